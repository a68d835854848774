"""AdamW with decoupled weight decay over many tensors at once, and the global gradient norm.

    g' = grad_scale * g                       (grad_scale carries the clip: min(1, max_norm / norm))
    m = b1 m + (1 - b1) g'      v = b2 v + (1 - b2) g'^2
    p = p - lr * wd * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2. States are float32. A bfloat16 parameter is updated in float32
and rounded once, from its float32 master copy where one is given.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays, takes_arrays_in_place
from enginepost.kernels.backend import core, native, to_dlpack


def reference_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], *,
    lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, step: int,
    grad_scale: float = 1.0, masters: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One AdamW step in plain PyTorch, in place, at float32 or better."""
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
        g = g.to(m.dtype) * grad_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w = (p if masters is None else masters[i]).to(m.dtype)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        w = w - lr * weight_decay * w - lr / (1 - beta1**step) * m / denominator
        p.copy_(w)
        if masters is not None:
            masters[i].copy_(w)


@takes_arrays_in_place
@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avg: Sequence[Tensor], exp_avg_sq: Sequence[Tensor], *,
    lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0, step: int,
    grad_scale: float = 1.0, masters: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One AdamW step over all tensors, in place.

    Args: params, grads float32 or bfloat16, contiguous, equal shapes; exp_avg, exp_avg_sq float32; masters: float32 copies that hold
    the exact parameters when params are bfloat16; step counts from 1; grad_scale multiplies every gradient.
    Raises: ValueError that names the argument at fault. No gradient flows through it.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.

    >>> p, g, m, v = torch.ones(3), torch.tensor([1.0, -1.0, 0.0]), torch.zeros(3), torch.zeros(3)
    >>> adamw_step([p], [g], [m], [v], lr=0.1, step=1)
    >>> [round(x, 4) for x in p.tolist()]
    [0.9, 1.1, 1.0]
    """
    if native(*params, *grads, *exp_avg, *exp_avg_sq, *(masters or ())):
        c = core()
        for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avg, exp_avg_sq, strict=True)):
            c.adamw_step(
                to_dlpack(p.detach().view(-1)), to_dlpack(g.detach().contiguous().view(-1)), to_dlpack(m.view(-1)),
                to_dlpack(v.view(-1)), None if masters is None else to_dlpack(masters[i].view(-1)),
                lr, beta1, beta2, eps, weight_decay, step, grad_scale,
            )  # fmt: skip
        return
    reference_step(
        params, grads, exp_avg, exp_avg_sq, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
        step=step, grad_scale=grad_scale, masters=masters,
    )  # fmt: skip


@takes_arrays
@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> float:
    """sqrt of the sum of squares over all tensors (any shape and dtype), accumulated in float64; the same bits at any thread count.

    >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    5.0
    """
    total = 0.0
    for t in tensors:
        t = t.detach().contiguous()
        total += core().sum_squares(to_dlpack(t.view(-1))) if native(t) else float(t.double().pow(2).sum())
    return math.sqrt(total)


make_callable(__name__, adamw_step)
