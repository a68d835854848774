"""Gated linear unit: `act(gate) * up`, gate and up side by side in one tensor.

Activations: `silu` (SwiGLU), `gelu_tanh` and `gelu` (GeGLU, tanh-approximated and exact). Source: Shazeer 2020, "GLU Variants
Improve Transformer". Arithmetic is float32, rounded once. The backward recomputes the activation from the input, so nothing
but the input is kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_FLOATS, core, native, plain, to_dlpack

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def reference(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) * up` in plain PyTorch, at float32 or better."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    if activation == "silu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    return (F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up).to(gate_up.dtype)


@takes_arrays
def glu(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) * up`.

    Args: gate_up `[..., 2I]` = [gate | up], float32 or bfloat16 (on a GPU also float16); activation one of
        "silu", "gelu_tanh", "gelu".
    Returns: `[..., I]` in gate_up's dtype. Raises ValueError for another activation or an odd width.

    Source: Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202), eq. 6.

    >>> gate, up = torch.randn(5, 8), torch.randn(5, 8)
    >>> torch.allclose(glu(torch.cat([gate, up], dim=-1)), F.silu(gate) * up, atol=1e-6)
    True
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"glu: the last dimension must hold [gate | up], so be even; got {gate_up.shape[-1]}")
    if not native(gate_up, gpu=GPU_FLOATS):
        return reference(gate_up, activation)
    if plain(gate_up):
        return _forward(gate_up, ACTIVATIONS[activation])
    return torch.ops.enginepost.glu(gate_up, ACTIVATIONS[activation])


def _forward(gate_up: Tensor, activation: int) -> Tensor:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1]
    out = gate_up.new_empty(*gate_up.shape[:-1], width // 2)
    core().glu_forward(to_dlpack(gate_up.view(-1, width)), to_dlpack(out.view(-1, width // 2)), activation)
    return out


@torch.library.custom_op("enginepost::glu", mutates_args=())
def _glu_op(gate_up: Tensor, activation: int) -> Tensor:
    return _forward(gate_up, activation)


@_glu_op.register_fake
def _(gate_up: Tensor, activation: int) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("enginepost::glu_backward", mutates_args=())
def _backward_op(dy: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    width = gate_up.shape[-1]
    dx = torch.empty_like(gate_up)
    core().glu_backward(
        to_dlpack(dy.view(-1, width // 2)),
        to_dlpack(gate_up.view(-1, width)),
        to_dlpack(dx.view(-1, width)),
        activation,
    )
    return dx


@_backward_op.register_fake
def _(dy: Tensor, gate_up: Tensor, activation: int) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0])
    ctx.activation = inputs[1]


def _grad(ctx, dy: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    return torch.ops.enginepost.glu_backward(dy, ctx.saved_tensors[0], ctx.activation), None


_glu_op.register_autograd(_grad, setup_context=_setup)

make_callable(__name__, glu)
