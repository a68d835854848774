"""lora_linear beside the operations that PEFT runs: a linear layer, two small ones on a float32 copy of x, a scaled sum.

Rows with "step" are a forward and a backward pass with W frozen: gradients of x, A and B. The roof is the better of torch's two
matrix products; both multiply the same FLOP.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import Options, Row, compare, roof
from enginepost.kernels.lora import LoraPart, lora_linear

RANK, SCALING = 16, 2.0
STEPS = [(512, 576, 1536), (2048, 576, 1536), (512, 2048, 2048)]


def peft(x: Tensor, weight: Tensor, part: LoraPart) -> Tensor:
    base = F.linear(x, weight)
    update = F.linear(F.linear(x.to(part.A.dtype), part.A), part.B) * part.scaling
    if part.magnitude is None:
        return (base + update).to(x.dtype)
    norm = (weight + part.scaling * (part.B @ part.A)).norm(dim=1).detach()
    gain = part.magnitude / norm
    return (base + (gain - 1) * base + gain * update).to(x.dtype)


def ours(x: Tensor, weight: Tensor, part: LoraPart) -> Tensor:
    return lora_linear(x, weight, None, [part])


def step(function: Callable[..., Tensor], x: Tensor, weight: Tensor, part: LoraPart, dy: Tensor) -> object:
    leaves = [t for t in (x, part.A, part.B, part.magnitude) if t is not None]
    return torch.autograd.grad(function(x, weight, part), leaves, dy)


def run(options: Options) -> Iterator[Row]:
    best = max(roof.gemm(torch.float32), roof.gemm(torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for tokens, width, out in STEPS:
            yield measured(f"step, {name}", dtype, tokens, width, out, False, best, options)
        yield measured(f"DoRA step, {name}", dtype, 512, 576, 1536, True, best, options)
    for tokens in (1, 8):
        yield decode(tokens, options)


def decode(tokens: int, options: Options) -> Row:
    x, weight, part, _ = tensors(torch.bfloat16, tokens, 576, 1536, False)
    with torch.no_grad():
        return compare(
            f"decode, bfloat16 T={tokens} 576 -> 1536 r={RANK}",
            {"ours": lambda: ours(x, weight, part), "PEFT's ops": lambda: peft(x, weight, part)},
            work=2 * weight.numel(),
            unit="GB/s",
            options=options,
            roof=roof.copy(),
            metric="weights read",
        )


def tensors(
    dtype: torch.dtype, tokens: int, width: int, out: int, dora: bool
) -> tuple[Tensor, Tensor, LoraPart, Tensor]:
    x, dy = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, out).to(dtype)
    weight = torch.randn(out, width).to(dtype)
    a, b = torch.randn(RANK, width).requires_grad_(), torch.randn(out, RANK).requires_grad_()
    magnitude = weight.float().norm(dim=1).requires_grad_() if dora else None
    return x, weight, LoraPart(a, b, SCALING, 0, magnitude), dy


def measured(
    case: str, dtype: torch.dtype, tokens: int, width: int, out: int, dora: bool, best: float, options: Options
) -> Row:
    x, weight, part, dy = tensors(dtype, tokens, width, out, dora)
    flop = 4 * tokens * width * out + 6 * tokens * RANK * (width + out)
    calls = {"ours": lambda: step(ours, x, weight, part, dy), "PEFT's ops": lambda: step(peft, x, weight, part, dy)}
    case = f"{case} T={tokens} {width} -> {out} r={RANK}"
    return compare(case, calls, work=flop, unit="GFLOP/s", options=options, roof=best)
