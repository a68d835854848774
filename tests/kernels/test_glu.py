"""Gated linear unit: every activation and its backward against float64, the far ends, odd widths."""

import pytest
import torch

from enginepost.kernels.backend import _core
from enginepost.kernels.glu import ACTIVATIONS, glu, reference

needs_core = pytest.mark.skipif(_core is None, reason="the native extension is not built")
SHAPES = [(3, 32), (1, 1), (5, 59), (40, 1000), (0, 8), (2, 3, 17)]


def with_gradient(function, x, activation, dy):
    x = x.clone().requires_grad_()
    y = function(x, activation)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(activation, shape, dtype, backend, no_worse):
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    torch.manual_seed(0)
    *lead, width = shape
    x, dy = (3 * torch.randn(*lead, 2 * width)).to(dtype), torch.randn(*lead, width).to(dtype)
    exact = with_gradient(reference, x.double(), activation, dy.double())
    plain = with_gradient(reference, x, activation, dy)
    ours = with_gradient(glu, backend.to(x), activation, backend.to(dy))
    for name, mine, theirs, true in zip(("y", "dx"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference(x, activation), x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_ends(activation, backend):
    """Large gates pass or block; nothing overflows on the way (in plain PyTorch it does)."""
    if backend.name == "reference":
        pytest.skip("of the kernels alone")
    gate = torch.tensor([[-3e38, -1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4, 1e30]])
    x = backend.to(torch.cat([gate, torch.ones_like(gate)], dim=1)).requires_grad_()
    y = glu(x, activation)
    exact = reference(x.detach().double(), activation)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-7)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = torch.tensor([[0.0] * 5 + [0.5] + [1.0] * 5])
    torch.testing.assert_close(dx[:, :11].cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_passes_through(activation, backend):
    x = torch.zeros(1, 20)
    x[0, 3] = x[0, 14] = torch.nan
    x = backend.to(x).requires_grad_()
    y = glu(x, activation)
    assert y.isnan().nonzero()[:, 1].tolist() == [3, 4]
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, 3].isnan() and not dx[0, :3].isnan().any()


def test_same_bits_in_any_order_of_warps(each_schedule):
    x, dy = torch.randn(7, 88), torch.randn(7, 44)
    each_schedule(lambda: with_gradient(glu, x, "gelu_tanh", dy))


def test_strided_input_and_gradient():
    x, dy = torch.randn(6, 40)[:, ::2], torch.randn(10, 6).t()
    ours = with_gradient(glu, x, "silu", dy)
    tight = with_gradient(glu, x.contiguous(), "silu", dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours, tight, strict=True))


def test_same_bits_at_any_thread_count(each_thread_count):
    x, dy = torch.randn(301, 130).bfloat16(), torch.randn(301, 65).bfloat16()
    each_thread_count(lambda: with_gradient(glu, x, "gelu_tanh", dy))


def test_opcheck():
    x = torch.randn(5, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.enginepost.glu, (x, 0))
    torch.library.opcheck(torch.ops.enginepost.glu_backward, (torch.randn(5, 3), x.detach(), 1))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'relu' is not one of silu, gelu_tanh, gelu"):
        glu(torch.zeros(2, 4), "relu")
    with pytest.raises(ValueError, match="even; got 5"):
        glu(torch.zeros(2, 5))
