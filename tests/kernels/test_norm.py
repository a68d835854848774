"""RMSNorm, alone and with the residual addition: forward and every gradient against float64, mixed dtypes, odd widths."""

import pytest
import torch

from enginepost.kernels.backend import _core
from enginepost.kernels.norm import add_rms_norm, reference, rms_norm

needs_core = pytest.mark.skipif(_core is None, reason="the native extension is not built")
SHAPES = [(3, 64), (1, 1), (5, 59), (70, 1000), (0, 8), (2, 3, 17), (300, 16)]
DTYPES = [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2, ("float16", "float32")]
EPS = 1e-5


def inputs(shape, dtype, weight_dtype=None):
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(shape).to(dtype) for _ in range(4))
    return x, residual, torch.randn(shape[-1]).to(weight_dtype or dtype), dy, dh


def norm_grads(function, x, weight, dy, offset):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, EPS, offset=offset)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def add_reference(x, residual, weight, eps, *, offset):
    h = residual + x
    return reference(h, weight, eps, offset=offset), h


def add_grads(function, x, residual, weight, dy, dh, offset):
    x, residual, weight = (t.clone().requires_grad_() for t in (x, residual, weight))
    y, h = function(x, residual, weight, EPS, offset=offset)
    return [y.detach(), h.detach(), *torch.autograd.grad((y, h), (x, residual, weight), (dy, dh))]


def wide(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_norm_against_float64(shape, offset, dtypes, backend, no_worse):
    if dtypes[0] == "float16" and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    x, _, weight, dy, _ = inputs(shape, *(getattr(torch, d) for d in dtypes))
    exact = norm_grads(reference, *wide((x, weight, dy)), offset)
    plain = norm_grads(reference, x, weight, dy, offset)
    ours = norm_grads(rms_norm, *backend.to(x, weight, dy), offset)
    for name, mine, theirs, true in zip(("y", "dx", "dweight"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_add_norm_against_float64(shape, offset, dtypes, backend, no_worse):
    if dtypes[0] == "float16" and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    arguments = inputs(shape, *(getattr(torch, d) for d in dtypes))
    exact = add_grads(add_reference, *wide(arguments), offset)
    plain = add_grads(add_reference, *arguments, offset)
    ours = add_grads(add_rms_norm, *backend.to(*arguments), offset)
    for name, mine, theirs, true in zip(("y", "h", "dx", "dresidual", "dweight"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true)


def test_gradcheck_of_the_reference():
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 6), (6,)))
    assert torch.autograd.gradcheck(lambda x, w: reference(x, w, EPS, offset=1.0), (x, weight))


@pytest.mark.parametrize("size", [0.0, 1e-18, 1e-4, 1e15])
def test_sizes(size):
    """A zero row gives 0, not NaN; eps counts where x is small."""
    x = torch.randn(3, 40) * size
    exact = reference(x.double(), torch.ones(40).double(), EPS)
    torch.testing.assert_close(rms_norm(x, torch.ones(40), EPS).double(), exact, rtol=1e-6, atol=0)
    grads = norm_grads(rms_norm, x, torch.ones(40), torch.ones(3, 40), 0.0)
    assert all(torch.isfinite(g).all() for g in grads)


def test_frozen_weight_and_unused_results():
    x, residual, weight, dy, dh = inputs((9, 33), torch.float32)
    full = norm_grads(rms_norm, x, weight, dy, 0.0)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(leaf, weight, EPS), leaf, dy)
    assert torch.equal(dx, full[1])
    leaf = residual.clone().requires_grad_()
    y, h = add_rms_norm(x, leaf, weight, EPS)
    (from_h,) = torch.autograd.grad(h, leaf, dh, retain_graph=True)
    assert torch.equal(from_h, dh)
    (from_y,) = torch.autograd.grad(y, leaf, dy)
    expected = add_grads(add_rms_norm, x, residual, weight, dy, torch.zeros_like(dh), 0.0)
    assert torch.equal(from_y, expected[3])


def test_strided_input_and_gradient():
    x, dy, weight = torch.randn(20, 12).t(), torch.randn(12, 40)[:, ::2], torch.randn(20)
    ours = norm_grads(rms_norm, x, weight, dy, 0.0)
    tight = norm_grads(rms_norm, x.contiguous(), weight, dy.contiguous(), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, tight, strict=True))


@pytest.mark.parametrize(
    "width", [5, 40, 520, 4200], ids="width {}".format
)  # 4200: more than a block of float32 holds in registers
def test_same_bits_in_any_order_of_warps(width, each_schedule):
    arguments = inputs((19, width), torch.float32)
    each_schedule(lambda: add_grads(add_rms_norm, *arguments, 1.0))


@pytest.mark.parametrize("shape", [(2, 16400), (2, 40000), (40, 4104)], ids=str)
def test_wide_rows(shape, backend, no_worse):
    """Rows that a block of the GPU holds in registers, and rows that it does not."""
    arguments = inputs(shape, torch.bfloat16)
    exact, plain = add_grads(add_reference, *wide(arguments), 0.0), add_grads(add_reference, *arguments, 0.0)
    ours = add_grads(add_rms_norm, *backend.to(*arguments), 0.0)
    for name, mine, theirs, true in zip(("y", "h", "dx", "dresidual", "dweight"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true)


@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_thread_count(dtype, each_thread_count):
    arguments = inputs((701, 72), dtype)
    each_thread_count(lambda: add_grads(add_rms_norm, *arguments, 1.0))


def test_a_row_does_not_depend_on_its_neighbours(backend):
    x, _, weight, dy, _ = inputs((30, 59), torch.bfloat16)
    x, weight, dy = backend.to(x, weight, dy)
    many, alone = norm_grads(rms_norm, x, weight, dy, 0.0), norm_grads(rms_norm, x[7:8], weight, dy[7:8], 0.0)
    assert torch.equal(many[0][7:8], alone[0]) and torch.equal(many[1][7:8], alone[1])


@needs_core
def test_opcheck():
    x, residual, weight, dy, dh = inputs((5, 12), torch.float32)
    for t in (x, residual, weight):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.enginepost.rms_norm, (x, weight, EPS, 1.0))
    torch.library.opcheck(torch.ops.enginepost.add_rms_norm, (x, residual, weight, EPS, 0.0))
    x, weight = x.detach(), weight.detach()
    _, rstd = torch.ops.enginepost.rms_norm(x, weight, EPS, 0.0)
    for has_dh, weight_grad in ((False, True), (True, False)):
        arguments = (dy, dh if has_dh else None, x, weight, rstd, 0.0, weight_grad)
        torch.library.opcheck(torch.ops.enginepost.rms_norm_backward, arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rms_norm(torch.zeros(3, 8), torch.zeros(9), EPS), "weight"),
        (lambda: rms_norm(torch.zeros(3, 8), torch.zeros(8).bfloat16(), EPS), "weight"),
        (lambda: add_rms_norm(torch.zeros(3, 8), torch.zeros(4, 8), torch.zeros(8), EPS), "residual"),
        (lambda: add_rms_norm(torch.zeros(3, 8), torch.zeros(3, 8).bfloat16(), torch.zeros(8), EPS), "residual"),
    ],
)
@needs_core
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
