"""Matrix products on a GPU: matmul, linear_logprob, lora and 4 bits, beside torch, PEFT's operations, Liger and bitsandbytes.

FLOP counted are those that the result needs, for all sides alike: linear_logprob 4 T K V with a frozen head and 6 with a trained one
(ours makes the logits of a trained head twice). Rows of generation and of formats count bytes: those of the weight as it is stored.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import Case
from bench.gpu.memory_bound import optional
from enginepost.kernels import nf4
from enginepost.kernels.backend import core, to_dlpack
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.kernels.lora import LoraPart, lora_linear

RANK = 16
WGMMA = True
Calls = dict[str, Callable[[], object]]


def product_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """The bare product, and with a rank-16 update in the same accumulators."""
    shapes = [(70, 96, 72)] if small else [(4096, 4096, 4096), (8192, 4096, 14336), (512, 4096, 4096), (16, 4096, 4096)]
    for tokens, out, width in shapes:
        x, w = (torch.randn(n, width, device=device).bfloat16() for n in (tokens, out))
        y = torch.empty(tokens, out, dtype=torch.bfloat16, device=device)
        calls: Calls = {
            "enginepost": lambda x=x, w=w, y=y: core().matmul(
                *map(to_dlpack, (x, w.t())), None, None, to_dlpack(y), False
            ),
            "torch mm": lambda x=x, w=w, y=y: torch.mm(x, w.t(), out=y),
        }
        if tokens > 16:
            yield Case(f"x W^T, T {tokens} {width} -> {out} bf16", calls, 2 * tokens * out * width, "TFLOP/s")
        else:
            yield Case(f"x W^T, T {tokens} {width} -> {out} bf16", calls, w.nbytes, "GB/s")


def logprob_step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], object]:
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    return lambda: torch.autograd.grad(loss(hidden, weight, targets), leaves)


def logprob_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Forward and backward of SFT's loss."""
    shapes = [(40, 64, 300)] if small else [(8192, 2304, 256000), (8192, 4096, 128256)]

    def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_logprob(hidden, weight, targets)[0].mean()

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), targets)

    for (tokens, width, vocab), trained in ((s, t) for s in shapes for t in (False, True)):
        hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        weight = (torch.randn(vocab, width, device=device) / width**0.5).bfloat16().requires_grad_(trained)
        targets = torch.randint(vocab, (tokens,), device=device)
        calls: Calls = {"enginepost": logprob_step(ours, hidden, weight, targets)}
        if device.type == "cuda" and not small:
            calls["torch.compile cross_entropy"] = logprob_step(torch.compile(plain), hidden, weight, targets)
            liger = optional("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
            if liger is not None:
                calls["Liger"] = logprob_step(
                    lambda h, w, t, liger=liger: _first(liger(h, w, t)), hidden, weight, targets
                )
        else:
            calls["torch cross_entropy"] = logprob_step(plain, hidden, weight, targets)
        head, work = ("trained", 6) if trained else ("frozen", 4)
        yield Case(
            f"linear_logprob step T {tokens} K {width} V {vocab} {head} head, bf16",
            calls,
            work * tokens * width * vocab,
            "TFLOP/s",
        )


def _first(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def lora_cases(device: torch.device, small: bool) -> Iterator[Case]:
    """A layer and its step: W in bf16 and in 4 bits beside the bare products and PEFT's operations."""
    tokens, width, out = (40, 64, 72) if small else (4096, 4096, 4096)
    x, dy = (torch.randn(tokens, n, device=device).bfloat16() for n in (width, out))
    weight = (torch.randn(out, width, device=device) / width**0.5).bfloat16()
    a = torch.randn(RANK, width, device=device).requires_grad_()
    b = torch.randn(out, RANK, device=device).requires_grad_()
    packed, part, shape = nf4.quantize(weight), LoraPart(a, b, 2.0), f"T {tokens} {width} -> {out} r {RANK}"

    def peft(x: Tensor) -> Tensor:
        return F.linear(x, weight) + (F.linear(F.linear(x.float(), a), b) * 2.0).to(x.dtype)

    def bare(x: Tensor) -> Tensor:
        return F.linear(x, weight)

    with torch.no_grad():
        for name, w in (("bf16", weight), ("NF4", packed)):
            calls: Calls = {
                "enginepost": lambda w=w: lora_linear(x, w, parts=[part]),
                "torch, W alone in bf16": lambda: bare(x),
                "PEFT's operations, W in bf16": lambda: peft(x),
            }
            yield Case(f"lora_linear over {name} {shape}", calls, 2 * tokens * out * width, "TFLOP/s")
    leaf = x.clone().requires_grad_()
    for name, w in (("bf16", weight), ("NF4", packed)):
        calls = {
            "enginepost": lambda w=w: torch.autograd.grad(lora_linear(leaf, w, parts=[part]), [leaf, a, b], dy),
            "PEFT's operations, W in bf16": lambda: torch.autograd.grad(peft(leaf), [leaf, a, b], dy),
        }
        yield Case(f"lora_linear step over {name} {shape}", calls, 4 * tokens * out * width, "TFLOP/s")


def nf4_cases(device: torch.device, small: bool) -> Iterator[Case]:
    out, width = (72, 128) if small else (4096, 4096)
    weight = (torch.randn(out, width, device=device) / width**0.5).bfloat16()
    packed = nf4.quantize(weight)
    peer = optional("bitsandbytes", "functional") if device.type == "cuda" and not small else None
    multiply = optional("bitsandbytes", "matmul_4bit") if peer is not None else None
    theirs = peer.quantize_4bit(weight, quant_type="nf4") if peer is not None else None
    stored = weight.numel() * 4.5 / 8
    calls: Calls = {"enginepost": lambda: nf4.dequantize(packed)}
    if peer is not None and theirs is not None:
        calls["bitsandbytes"] = lambda: peer.dequantize_4bit(*theirs)
    yield Case(f"NF4 dequantise {out} x {width} to bf16", calls, stored + weight.nbytes, "GB/s")
    calls = {"enginepost": lambda: nf4.quantize(weight)}
    if peer is not None:
        calls["bitsandbytes"] = lambda: peer.quantize_4bit(weight, quant_type="nf4")
    yield Case(f"NF4 quantise {out} x {width} bf16", calls, stored + weight.nbytes, "GB/s")
    for tokens in (1, 4, 16, 64):
        x = torch.randn(tokens, width, device=device).bfloat16()
        y = torch.empty(tokens, out, dtype=torch.bfloat16, device=device)
        calls = {
            "enginepost": lambda x=x, y=y: nf4.nf4_mm(x, packed, y),
            "dequantise, torch mm": lambda x=x, y=y: torch.mm(x, nf4.dequantize(packed).t(), out=y),
            "torch mm, W in bf16": lambda x=x, y=y: torch.mm(x, weight.t(), out=y),
        }
        if multiply is not None and theirs is not None:
            calls["bitsandbytes"] = lambda x=x: multiply(x, theirs[0].t(), theirs[1])
        yield Case(f"x W^T, W in NF4, T {tokens} {width} -> {out}", calls, stored, "GB/s")


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for of in (product_cases, logprob_cases, lora_cases, nf4_cases):
        yield from of(device, small)
