"""AdamW with decoupled weight decay over many tensors at once, and the global gradient norm.

    g' = grad_scale * g                       (grad_scale carries the clip: min(1, max_norm / norm))
    m = b1 m + (1 - b1) g'      v = b2 v + (1 - b2) g'^2
    p = p - lr * wd * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2. States are float32. A bfloat16 parameter is updated in float32
and rounded once, from its float32 master copy where one is given.

Moments can be held in 8 bits (`Moment8`), a quarter of the memory: blocks of 256, the dynamic code of kernels/nf4.py, signed for m
and unsigned for v. A step decodes them, updates as above in float32, moves the parameter, and then encodes them again; an m below
zero never becomes the code of zero. Where a gradient is not finite both moments become zero and the parameter stays. Source:
Dettmers et al. 2022 (arXiv 2110.02861); bitsandbytes' CUDA kernel (csrc/kernels.cu, kOptimizerStatic8bit2StateBlockwise), with two
differences. The weight decay comes before the step, as in the formula. And a v above zero never becomes the code of zero either: the
nearest code to anything below 1.6e-7 of its block's largest is zero, and the next step would divide an m that survived by almost
nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays, takes_arrays_in_place
from enginepost.kernels.backend import GPU_FLOATS, core, native, to_dlpack
from enginepost.kernels.nf4 import dequantize_blockwise, dynamic_code

BLOCK8 = 256  # elements that share a scale
SMALLEST8 = 4096  # tensors with fewer elements keep float32 moments


@dataclass
class Moment8:
    """A moment in 8 bits. codes uint8 of the parameter's shape, scale float32 `[ceil(N / 256)]`; signed: m, else v."""

    codes: Tensor
    scale: Tensor
    signed: bool

    def float(self) -> Tensor:
        code = dynamic_code(self.signed).to(self.codes.device)
        return dequantize_blockwise(self.codes, self.scale, code, blocksize=BLOCK8)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Moment = Tensor | Moment8


def zero_moments(param: Tensor, bits: int = 32, *, host: bool = False) -> tuple[Moment, Moment]:
    """(exp_avg, exp_avg_sq) for a parameter at its first step; with bits=8 those of 4096 elements and more are `Moment8`. host: in
    host memory, wherever the parameter is."""
    if bits not in (8, 32):
        raise ValueError(f"moments have 8 or 32 bits, got {bits}")

    def zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu" if host else param.device)

    if bits == 32 or param.numel() < SMALLEST8:
        return zeros(param.shape), zeros(param.shape)
    blocks = (-(-param.numel() // BLOCK8),)
    first, second = (Moment8(zeros(param.shape, torch.uint8), zeros(blocks), signed) for signed in (True, False))
    return first, second


def reference_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Moment], exp_avg_sq: Sequence[Moment], *,
    lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, step: int,
    grad_scale: float = 1.0, masters: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One AdamW step in plain PyTorch, in place, at float32 or better."""
    for i, (p, g, first, second) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        eight = _eight(first, second)
        m, v = (t.float() if isinstance(t, Moment8) else t for t in (first, second))
        g = g.to(m.dtype) * grad_scale
        finite = torch.isfinite(g)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = (p if masters is None else masters[i]).to(m.dtype)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        moved = w - lr * weight_decay * w - lr / (1 - beta1**step) * m / denominator
        if eight is not None:
            moved = torch.where(finite, moved, w)
            for moment, value in zip(eight, (m, v), strict=True):
                _encode(moment, torch.where(finite, value, 0.0))
        p.copy_(moved)
        if masters is not None:
            masters[i].copy_(moved)


def _eight(m: Moment, v: Moment) -> tuple[Moment8, Moment8] | None:
    """Both moments when they are in 8 bits, None when they are float32."""
    if isinstance(m, Moment8) and isinstance(v, Moment8):
        if not m.signed or v.signed:
            raise ValueError("adamw: exp_avg must be a signed Moment8 and exp_avg_sq an unsigned one")
        return m, v
    if isinstance(m, Moment8) or isinstance(v, Moment8):
        raise ValueError("adamw: exp_avg and exp_avg_sq of a parameter must both be Moment8 or both float32")
    return None


def _encode(moment: Moment8, value: Tensor) -> None:
    """The nearest codes to a moment, in place; every block by the reciprocal of its scale, a short one too."""
    flat = value.float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK8)).view(-1, BLOCK8)
    moment.scale.copy_(blocks.abs().amax(dim=1) if len(blocks) else moment.scale)
    scaled = blocks * (1.0 / moment.scale.clamp(min=1e-38)).unsqueeze(1)
    code = dynamic_code(moment.signed).to(value.device)
    if moment.signed:
        scaled = torch.where(torch.signbit(scaled), scaled.clamp(max=code[126].item()), scaled)
    else:
        scaled = torch.maximum(scaled, (scaled * 1e30).clamp(max=code[1].item()))
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).view(-1)[: len(flat)]
    moment.codes.copy_(codes.to(torch.uint8).view(moment.codes.shape))


@takes_arrays_in_place
@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Moment], exp_avg_sq: Sequence[Moment], *,
    lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, step: int,
    grad_scale: float = 1.0, masters: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One AdamW step over all tensors, in place.

    Args: params, grads float32 or bfloat16 (on a GPU also float16), contiguous, equal shapes; exp_avg, exp_avg_sq float32 or
        `Moment8` (see `zero_moments`); masters: float32 copies that hold
    the exact parameters when params are bfloat16; step counts from 1; grad_scale multiplies every gradient.
    Raises: ValueError that names the argument at fault. No gradient flows through it.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.

    >>> p, g, m, v = torch.ones(3), torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3), torch.zeros(3)
    >>> adamw_step([p], [g], [m], [v], lr=0.1, step=1)
    >>> [round(x, 4) for x in p.tolist()]
    [0.9, 1.1, 1.0]
    """
    plain_moments = [t for t in (*exp_avg, *exp_avg_sq) if isinstance(t, Tensor)]
    if native(*params, *grads, *plain_moments, *(masters or ()), gpu=GPU_FLOATS):
        c = core()
        for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
            tensors = [to_dlpack(p.detach().view(-1)), to_dlpack(g.detach().contiguous().view(-1))]
            master = None if masters is None else to_dlpack(masters[i].view(-1))
            rates = (lr, beta1, beta2, eps, weight_decay, step, grad_scale)
            eight = _eight(m, v)
            if eight is not None:
                states = [to_dlpack(t.view(-1)) for t in (*(e.codes for e in eight), *(e.scale for e in eight))]
                c.adamw8_step(*tensors, *states, master, *rates)
            elif isinstance(m, Tensor) and isinstance(v, Tensor):
                c.adamw_step(*tensors, to_dlpack(m.view(-1)), to_dlpack(v.view(-1)), master, *rates)
        return
    reference_step(
        params, grads, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        step=step, grad_scale=grad_scale, masters=masters,
    )  # fmt: skip


@takes_arrays
@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> float:
    """sqrt of the sum of squares over all tensors (any shape and dtype), accumulated in float64; the same bits at any thread count,
    and on a GPU those of a CPU with AVX2.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    total = 0.0
    elsewhere = []  # [1] each, on a GPU: looked at once, at the end
    for t in tensors:
        t = t.detach().contiguous()
        if native(t, gpu=GPU_FLOATS):
            if t.device.type == "cpu":
                total += core().sum_squares(to_dlpack(t.view(-1)))
                continue
            elsewhere.append(torch.empty(1, dtype=torch.float64, device=t.device))
            core().sum_squares(to_dlpack(t.view(-1)), to_dlpack(elsewhere[-1]))
        else:
            elsewhere.append(torch.linalg.vector_norm(t, dtype=torch.float64).square().view(1))
    for square in torch.cat([s.to(elsewhere[0].device) for s in elsewhere]).tolist() if elsewhere else []:
        total += square  # one after the other: sum() is compensated in some Pythons, and would give other bits
    return math.sqrt(total)


make_callable(__name__, adamw_step)
