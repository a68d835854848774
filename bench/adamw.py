"""AdamW, a step over one tensor of 33.5M float32 parameters, in 32 and in 8 bits, beside torch's fused AdamW and bitsandbytes'.

Bandwidths count what a step has to read and write once: parameter, gradient and moments. Rows that compare the two widths of ours
count the same 28 bytes an element for both, so that the ratio is one of times.

A step in 8 bits is bound by arithmetic where the float32 one is bound by memory (docs/kernels/adamw.md).
"""

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import Options, Row, compare, roof
from enginepost.kernels.adamw import Moment, Moment8, adamw_step, zero_moments

SIZE = 32 << 20
RATES = dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
BYTES = {32: 28, 8: 16 + 4 * 4 / 256}  # an element


def run(options: Options) -> Iterator[Row]:
    torch.manual_seed(0)
    param, grad = torch.randn(SIZE), torch.randn(SIZE) * 0.01
    moments = {bits: zero_moments(param, bits) for bits in BYTES}
    steps = {bits: ours(param, grad, moments[bits]) for bits in BYTES}
    fused = torch_fused(param, grad)
    yield row("fp32", {"ours": steps[32], "torch fused": fused}, BYTES[32], options)
    yield row("8-bit, as 28 bytes", {"ours": steps[8], "torch fused fp32": fused}, BYTES[32], options)
    yield row("8-bit, as 28 bytes", {"ours": steps[8], "ours fp32": steps[32]}, BYTES[32], options)
    peer = bitsandbytes_step(param, grad)
    yield row("8-bit", {"ours": steps[8], **({"bitsandbytes": peer} if peer else {})}, BYTES[8], options)
    state = {bits: sum(map(nbytes, moments[bits])) for bits in BYTES}
    yield Row("8-bit", "state", "MB", state[8] / 1e6, "fp32 moments", state[32] / 1e6)


def row(case: str, calls: dict[str, Callable[[], object]], width: float, options: Options) -> Row:
    return compare(case, calls, work=width * SIZE, unit="GB/s", options=options, roof=roof.copy())


def nbytes(moment: Moment) -> int:
    return moment.codes.nbytes + moment.scale.nbytes if isinstance(moment, Moment8) else moment.nbytes


def ours(param: Tensor, grad: Tensor, moments: tuple[Moment, Moment]) -> Callable[[], object]:
    param = param.clone()
    return lambda: adamw_step([param], [grad], [moments[0]], [moments[1]], step=3, **RATES)


def torch_fused(param: Tensor, grad: Tensor) -> Callable[[], object]:
    leaf = torch.nn.Parameter(param.clone())
    leaf.grad = grad
    return torch.optim.AdamW([leaf], lr=1e-4, weight_decay=0.01, fused=True).step


def bitsandbytes_step(param: Tensor, grad: Tensor) -> Callable[[], object] | None:
    try:
        optim = importlib.import_module("bitsandbytes.optim")
    except ImportError:
        return None
    leaf = torch.nn.Parameter(param.clone())
    leaf.grad = grad
    return optim.AdamW8bit([leaf], lr=1e-4, weight_decay=0.01).step
