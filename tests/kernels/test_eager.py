"""Ops of eager training, which run as bare autograd functions: the bits of the ops that torch.library knows, and an error where
those give one."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from enginepost.kernels.attention import attention, attention_qkv
from enginepost.kernels.glu import glu
from enginepost.kernels.norm import add_rms_norm, rms_norm
from enginepost.kernels.rope import rope

CU = torch.tensor([0, 3, 5], dtype=torch.int32)


def norms(x: Tensor, weight: Tensor) -> Tensor:
    y, h = add_rms_norm(x, x * 2, weight, 1e-6)
    return rms_norm(y, weight, 1e-6) + h


CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (norms, ((5, 8), (8,))),
    "glu": (glu, ((5, 8),)),
    "rope": (
        lambda x, table: rope(x, *(t.float() for t in (table.detach().cos(), table.detach().sin()))),
        ((5, 2, 8), (5, 4)),
    ),
    "attention": (lambda q, k, v: attention(q, k, v, CU)[0], ((5, 2, 8), (5, 1, 8), (5, 1, 8))),
    "attention_qkv": (lambda x: attention_qkv(x, 2, 1, CU), ((5, 4, 8),)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_as_the_op(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    f, shapes = CASES[name]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    dout = torch.randn_like(f(*inputs))

    def results() -> list[Tensor | None]:
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dout, allow_unused=True)]

    bare = results()
    for module in ("attention", "glu", "norm", "rope"):
        monkeypatch.setattr(sys.modules[f"enginepost.kernels.{module}"], "eager", lambda: False)
    ops = results()
    assert type(bare[0].grad_fn) is not type(ops[0].grad_fn) or name == "norm"  # there the sum is torch's
    for a, b in zip(bare, ops, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_of_a_gradient_is_an_error(name: str) -> None:
    f, shapes = CASES[name]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    (first, *_) = torch.autograd.grad(f(*inputs).square().sum(), inputs, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_mode_sees_the_op() -> None:
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        glu(torch.randn(5, 8, requires_grad=True))
    assert any("enginepost.glu" in name for name in seen)
