"""RMSNorm, alone and fused with the residual addition before it.

    y = x * rsqrt(mean(x^2) + eps) * (offset + weight)

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4; `offset` is 1 for Gemma and 0 elsewhere.
All arithmetic is float32, rounded once on store. Backward, with g = dy * (offset + weight), r = rsqrt(...), n = width:

    dx = r * g - x * r^3 * sum(g * x) / n           dweight = sum over rows of dy * x * r
"""

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_FLOATS, core, native, plain, to_dlpack


def reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """RMSNorm in plain PyTorch, at float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xw = x.to(wide)
    y = xw * torch.rsqrt(xw.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.to(wide))
    return y.to(x.dtype)


@takes_arrays
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """RMSNorm over the last dimension.

    Args: x `[..., H]` float32 or bfloat16 (on a GPU also float16); weight `[H]`, float32 or x's dtype; eps added to the mean
        square; offset added to weight.
    Returns: `[..., H]` in x's dtype. Gradients flow to x and weight. Raises ValueError that names the argument at fault.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0).mul(12.5**0.5).tolist()
    [[3.0, 4.0]]
    """
    if not native(x, weight, gpu=GPU_FLOATS):
        return reference(x, weight, eps, offset=offset)
    if plain(x, weight):
        return _forward(x, weight, eps, offset)[0]
    return torch.ops.enginepost.rms_norm(x, weight, eps, offset)[0]


@takes_arrays
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`h = residual + x; y = rms_norm(h)` in one pass.

    Args: x, residual `[..., H]` of one dtype; the rest as in `rms_norm`. The norm reads the rounded h, as two separate ops would.
    Returns: (y, h), both `[..., H]` in x's dtype. Raises ValueError that names the argument at fault.

    >>> x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    >>> y, h = add_rms_norm(x, residual, torch.ones(16), eps=1e-6)
    >>> torch.equal(h, residual + x), torch.allclose(y, rms_norm(h, torch.ones(16), eps=1e-6))
    (True, True)
    """
    if not native(x, residual, weight, gpu=GPU_FLOATS):
        h = residual + x
        return reference(h, weight, eps, offset=offset), h
    if plain(x, residual, weight):
        return _add_forward(x, residual, weight, eps, offset)[:2]
    y, h, _ = torch.ops.enginepost.add_rms_norm(x, residual, weight, eps, offset)
    return y, h


def _rstd_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _forward(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    y, rstd = torch.empty_like(x), _rstd_like(x)
    core().rms_norm_forward(
        to_dlpack(x.view(-1, x.shape[-1])), to_dlpack(weight.detach()), to_dlpack(y.view(-1, x.shape[-1])),
        to_dlpack(rstd.view(-1)), eps, offset,
    )  # fmt: skip
    return y, rstd


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    y, h, rstd = torch.empty_like(x), torch.empty_like(x), _rstd_like(x)
    width = x.shape[-1]
    core().add_rms_norm_forward(
        to_dlpack(x.view(-1, width)), to_dlpack(residual.view(-1, width)), to_dlpack(weight.detach()),
        to_dlpack(y.view(-1, width)), to_dlpack(h.view(-1, width)), to_dlpack(rstd.view(-1)), eps, offset,
    )  # fmt: skip
    return y, h, rstd


@torch.library.custom_op("enginepost::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return _forward(x, weight, eps, offset)


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _rstd_like(x)


@torch.library.custom_op("enginepost::add_rms_norm", mutates_args=())
def _add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _add_forward(x, residual, weight, eps, offset)


@_add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), _rstd_like(x)


@torch.library.custom_op("enginepost::rms_norm_backward", mutates_args=())
def _backward_op(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """dx = dh + the norm's own gradient; dweight `[H]` in weight's dtype, or `[0]` when it is not asked."""
    dy, x = dy.contiguous(), x.contiguous()
    width = x.shape[-1]
    dx = torch.empty_like(x)
    dweight = torch.empty(width if weight_grad else 0, dtype=weight.dtype, device=weight.device)
    core().rms_norm_backward(
        to_dlpack(dy.view(-1, width)), None if dh is None else to_dlpack(dh.contiguous().view(-1, width)),
        to_dlpack(x.view(-1, width)), to_dlpack(weight.detach()), to_dlpack(rstd.view(-1)), to_dlpack(dx.view(-1, width)),
        to_dlpack(dweight) if weight_grad else None, offset,
    )  # fmt: skip
    return dx, dweight


@_backward_op.register_fake
def _(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[0] if weight_grad else 0),
    )


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx, dy: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.enginepost.rms_norm_backward(dy, None, x, weight, rstd, ctx.offset, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None, None


def _add_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, _, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _add_grad(ctx, dy: Tensor, dh: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.enginepost.rms_norm_backward(dy, dh, h, weight, rstd, ctx.offset, ctx.needs_input_grad[2])
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None, None


_rms_norm_op.register_autograd(_grad, setup_context=_setup)
_add_rms_norm_op.register_autograd(_add_grad, setup_context=_add_setup)

make_callable(__name__, rms_norm)
