"""Matrix product: every layout, dtype mix and edge of the tiles against float64, on the instruction set of the process."""

import itertools

import pytest
import torch

from enginepost.kernels import matmul
from enginepost.kernels.backend import _core, core, to_dlpack
from enginepost.kernels.matmul import mm, reference

pytestmark = pytest.mark.skipif(_core is None, reason="the native extension is not built")
SHAPES = [(1, 1, 1, 0), (14, 32, 16, 0), (15, 33, 17, 3), (16, 130, 600, 20),
          (7, 65, 40, 24), (56, 64, 300, 16), (3, 500, 700, 0), (257, 129, 1030, 48),
          (200, 16, 70, 0), (131, 37, 1100, 0),
          (5, 7, 0, 3), (64, 64, 0, 0), (0, 5, 4, 0), (5, 0, 4, 0)]  # fmt: skip


def native_mm(a, b, out, a2=None, b2=None, accumulate=False):
    capsule = [None if t is None else to_dlpack(t) for t in (a, b, a2, b2, out)]
    core().matmul(*capsule, accumulate)
    return out


def laid_out(rows, cols, dtype, turned):
    return torch.randn(cols, rows).to(dtype).t() if turned else torch.randn(rows, cols).to(dtype)


def worst(y, exact):
    return (y.double() - exact).abs().max().item()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    torch.manual_seed(4)
    a, b = torch.randn(16, 300).bfloat16(), torch.randn(70, 300).bfloat16().t()
    whole = native_mm(a, b, torch.empty(16, 70))
    for rows in (slice(0, 1), slice(3, 5), slice(2, 9)):
        assert torch.equal(native_mm(a[rows], b, torch.empty(rows.stop - rows.start, 70)), whole[rows])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_against_float64(shape, dtype):
    rows, cols, depth, depth2 = shape
    torch.manual_seed(0)
    for turn_a, turn_b, accumulate in itertools.product([False, True], repeat=3):
        a, b = laid_out(rows, depth, dtype, turn_a), laid_out(depth, cols, dtype, turn_b)
        a2 = laid_out(rows, depth2, dtype, turn_b) if depth2 else None
        b2 = laid_out(depth2, cols, dtype, turn_a) if depth2 else None
        start = torch.randn(rows, cols).to(dtype)
        exact = a.double() @ b.double() + (start.double() if accumulate else 0)
        if a2 is not None and b2 is not None:
            exact = exact + a2.double() @ b2.double()
        ours = native_mm(a, b, start.clone(), a2, b2, accumulate)
        plain = reference(a, b, a2, b2)
        plain = (plain.float() + start.float()).to(dtype) if accumulate else plain
        if ours.numel():
            assert worst(ours, exact) <= 2 * worst(plain, exact) + 1e-6 * (depth + depth2 + 1) ** 0.5


def test_mixed_dtypes_and_strided_output():
    torch.manual_seed(1)
    a, b = torch.randn(40, 24), torch.randn(50, 24).bfloat16().t()
    wide = torch.full((40, 80), 7.0)
    native_mm(a, b, wide[:, 10:60])
    torch.testing.assert_close(wide[:, 10:60].double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert (wide[:, :10] == 7).all() and (wide[:, 60:] == 7).all()
    tall, few = torch.randn(24, 90).bfloat16().t(), torch.randn(24, 16)  # turned on the way: dy^T s of a backward pass
    wide = torch.full((90, 40), 7.0)
    native_mm(tall, few, wide[:, 3:19])
    torch.testing.assert_close(wide[:, 3:19].double(), tall.double() @ few.double(), rtol=1e-5, atol=1e-4)
    assert (wide[:, :3] == 7).all() and (wide[:, 19:] == 7).all()


@pytest.mark.parametrize("cols, turned", [(333, False), (48, True)])
def test_same_bits_at_any_thread_count(cols, turned):
    torch.manual_seed(2)
    a, b = laid_out(301, 200, torch.bfloat16, turned), torch.randn(cols, 200).bfloat16().t()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(native_mm(a, b, torch.empty(301, cols)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mm_takes_every_path(rows, dtype):
    torch.manual_seed(3)
    a, b, a2, b2 = (torch.randn(s).to(dtype) for s in [(rows, 20), (20, 30), (rows, 4), (4, 30)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    exact = a.double() @ b.double() + a2.double() @ b2.double()
    torch.testing.assert_close(mm(a, b, a2=a2, b2=b2).double(), exact, rtol=tolerance, atol=5 * tolerance)
    out = torch.ones(rows, 30)
    mm(a, b, out=out, a2=a2, b2=b2, accumulate=True)
    torch.testing.assert_close(out.double(), exact + 1, rtol=max(tolerance, 1e-5), atol=5 * max(tolerance, 1e-5))


def test_parameters_may_require_gradients():
    weight = torch.nn.Parameter(torch.randn(32, 20).bfloat16())
    with torch.no_grad():
        assert mm(torch.randn(40, 20).bfloat16(), weight.t()).shape == (40, 32)


def test_widening_choice_is_a_bool_and_cached():
    assert matmul.widening_wins() in (True, False)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(b=torch.zeros(5, 6)), "does not make c"),
        (dict(a=torch.zeros(8, 8)[:, ::2]), "stride"),
        (dict(a2=torch.zeros(3, 2)), "come together"),
        (dict(out=torch.zeros(3, 6, dtype=torch.float64)), "float32 or bfloat16"),
        (dict(a=torch.zeros(3)), "2 dimensions"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(a=torch.zeros(3, 4), b=torch.zeros(4, 6), out=torch.zeros(3, 6)) | change
    with pytest.raises(ValueError, match=message):
        native_mm(**arguments)
