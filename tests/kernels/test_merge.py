"""Merge kernels against the reference, on task vectors with ties, zeros, odd lengths and all dtypes; the GPU's against the CPU's,
bit by bit; and the random generator."""

from typing import Any

import numpy as np
import pytest
import torch

from enginepost.kernels import merge as kernel
from enginepost.kernels.backend import core, to_dlpack, use_backend
from enginepost.kernels.merge import BLOCK, Select

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(n: int, count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and models whose task vectors have many ties and exact zeros in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(n, generator=g).to(dtype)
    models = []
    for _ in range(count):
        step = torch.randn(n, generator=g) * 0.01 * (torch.rand(n, generator=g) < 0.7)
        models.append((base.float() + step).to(dtype))
    return base, models


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def call(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        with monkeypatch.context() as m:
            m.setenv("ENGINEPOST_BACKEND", "reference")
            return function(*args, **kwargs)

    return call


def both(backend, reference, function, selects):  # type: ignore[no-untyped-def]
    """(result of the backend, reference result), each with its own copies of the selects."""
    from dataclasses import replace

    ours = [replace(s) for s in selects]
    theirs = [replace(s) for s in selects]
    a = function(ours, backend.to)
    b = reference(function, theirs)
    for s, t in zip(ours, theirs, strict=True):  # counted only as long as it matters
        assert min(s.seen[0], s.low_skip) == min(t.seen[0], t.low_skip)
        if s.low != s.high:
            assert min(s.seen[1], s.high_keep) == min(t.seen[1], t.high_keep)
    return a, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 256, 1000, BLOCK + 17])
def test_weighted_sum(backend: Any, reference, dtype, n) -> None:  # type: ignore[no-untyped-def]
    _, models = tensors(n, 3, dtype)
    for out_dtype in DTYPES:
        ours, theirs = backend.to(torch.empty(n, dtype=out_dtype)), torch.empty(n, dtype=out_dtype)
        kernel.weighted_sum([backend.to(x) for x in models], [0.3, -0.5, 1.1], ours)
        reference(kernel.weighted_sum, models, [0.3, -0.5, 1.1], theirs)
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 1000, 2 * BLOCK + 300])
def test_gram_is_exact_to_float64(backend: Any, dtype: torch.dtype, n: int) -> None:
    base, models = tensors(n, 3, dtype)
    for origin in (None, base):
        total = np.zeros((3, 3))
        for start in range(0, n, BLOCK):
            piece = slice(start, start + BLOCK)
            kernel.gram(
                [backend.to(m[piece]) for m in models], None if origin is None else backend.to(base[piece]), total
            )
        d = torch.stack([m.float() - (0 if origin is None else base.float()) for m in models]).double()
        np.testing.assert_allclose(total, (d @ d.T).numpy(), rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 20001])
def test_magnitude_counts(backend: Any, reference, dtype, n) -> None:  # type: ignore[no-untyped-def]
    base, [model] = tensors(n, 1, dtype)
    for every in (1, 3):
        ours, theirs = np.zeros((2, 1 << 16), dtype=np.int64), np.zeros((2, 1 << 16), dtype=np.int64)
        kernel.magnitude_counts(*backend.to(model, base), ours, every)
        reference(kernel.magnitude_counts, model, base, theirs, every)
        assert (ours.sum(0) == theirs.sum(0)).all()
        assert ours.sum() == sum(min(256, n - at) for at in range(0, n, 256 * every))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 20001])
def test_window_counts(backend: Any, reference, dtype, n) -> None:  # type: ignore[no-untyped-def]
    base, [model] = tensors(n, 1, dtype)
    bits = kernel.magnitude_bits(model, base)
    for windows in ([(0, 1)], [(int(bits.median()), 70000), (int(bits.max()), 9)], [(0x7F000000, 1 << 20), (0, 5)]):
        ours, theirs = (np.zeros(sum(1 + width for _, width in windows), dtype=np.int64) for _ in range(2))
        kernel.window_counts(*backend.to(model, base), windows, ours)
        reference(kernel.window_counts, model, base, windows, theirs)
        assert (ours == theirs).all()
        if windows == [(0, 1)]:
            assert ours.tolist() == [0, int((bits == 0).sum())]


@pytest.mark.parametrize("places", [[0], [1 << 20], [3, (1 << 21) - 1], [12345, 2000000]])
@pytest.mark.parametrize("kind", ["smooth", "ties", "sorted"])
def test_elements_at_places(places: list[int], kind: str) -> None:
    """Thresholds of a large tensor, which come from a sample first, are exact: also where the sample misleads."""
    from enginepost.merge import task_vectors
    from enginepost.merge.tensors import Inputs

    n = (1 << 21) + 777
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        x = (x * 8).round() / 8
    if kind == "sorted":
        x = torch.where(torch.arange(n) // 256 % 17 == 0, 1e-9 * x, x)  # the runs of the sample are unlike the others
    bits = kernel.magnitude_bits(x, None).sort().values
    expected = [(int(bits[p]), int((bits < bits[p]).sum())) for p in places]
    assert task_vectors._at_places([Inputs("t", [x])], {0: places}) == {0: expected}


def selections(base: torch.Tensor, model: torch.Tensor) -> list[Select]:
    bits = kernel.magnitude_bits(model, base)
    values = torch.unique(bits).tolist()
    low, high = values[len(values) // 4], values[-2]
    ties = int((bits == low).sum())
    return [
        Select("all", scale=1.5),
        Select("none"),
        Select("magnitude", low=low, low_skip=ties // 2),
        Select("magnitude", low=0, low_skip=int((bits == 0).sum()) // 3),
        Select("magnitude", low=low, low_skip=1, high=high, high_keep=1),
        Select("magnitude", low=values[0], low_skip=2, high=values[0], high_keep=9),
        Select("random", density=0.37, key=1234567890123456789, scale=1 / 0.37),
        Select("random", density=1.0, key=7),
        Select("ranked", density=0.5, epsilon=0.2, key=99),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 13, 300, 1000])
def test_masks(backend: Any, reference, dtype, columns) -> None:  # type: ignore[no-untyped-def]
    n = 3 * columns if columns > 100 else 101 * columns
    base, [model] = tensors(n, 1, dtype)
    start = 5 * columns  # as if chunks had come before

    def kept(selects, place=lambda *t: t):  # type: ignore[no-untyped-def]
        b, m, out = place(base, model, torch.empty(n))
        kernel.task_sum(b, [m], selects, [1.0], out, elect=False, normalize=False, start=start, columns=columns)
        return out.cpu()

    def sums(selects, place=lambda *t: t):  # type: ignore[no-untyped-def]
        total = np.zeros(2)
        kernel.masked_sums(*place(model, base), selects[0], start, columns, total)
        return total

    for select in selections(base, model):
        ours, theirs = both(backend, reference, kept, [select])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        ours, theirs = both(backend, reference, sums, [select])
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("zero_sign", [1, 0, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_task_sum(backend: Any, reference, elect, normalize, zero_sign, dtype) -> None:  # type: ignore[no-untyped-def]
    base, models = tensors(1003, 3, dtype)
    selects = [selections(base, models[0])[2], selections(base, models[1])[6], Select(scale=0.5)]

    def run(selects, place=lambda *t: t):  # type: ignore[no-untyped-def]
        b, out, *m = place(base, torch.empty(1003, dtype=dtype), *models)
        options = {"elect": elect, "normalize": normalize, "scale": 0.8, "zero_sign": zero_sign}
        signs = kernel.task_sum(b, m, selects, [0.4, -0.3, 0.9], out, **options)
        return out.cpu(), signs

    (ours, signs), (theirs, signs_reference) = both(backend, reference, run, selects)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6, atol=1e-7)
    assert signs == signs_reference


def test_more_inputs_than_the_kernel_takes(reference) -> None:  # type: ignore[no-untyped-def]
    base, models = tensors(50, 70, torch.float32)
    out = torch.empty(50)
    kernel.task_sum(base, models, [Select() for _ in models], [0.1] * 70, out, elect=True, normalize=True)
    expected = torch.empty(50)
    reference(
        kernel.task_sum, base, models, [Select() for _ in models], [0.1] * 70, expected, elect=True, normalize=True
    )
    torch.testing.assert_close(out, expected)


def test_random_bits_native_like_reference(backend: Any) -> None:
    if backend.name == "reference":
        pytest.skip("the reference is what this compares with")
    for start, count in ((0, 1000), (65530, 20), (123456789012, 70000)):
        out = backend.to(torch.empty(count, dtype=torch.int32))
        core().merge_random(0xDEADBEEFCAFEBABE, start, to_dlpack(out))
        assert (out.cpu().numpy().view(np.uint32) == kernel.random_bits(0xDEADBEEFCAFEBABE, start, count)).all()


@pytest.mark.parametrize(
    "dtypes", [[torch.float32] * 5, [torch.bfloat16] * 5, [*DTYPES, torch.float32, torch.bfloat16]]
)
@pytest.mark.parametrize("offset", [0, 1])
def test_gpu_has_the_bits_of_the_cpu(backend: Any, dtypes: list[torch.dtype], offset: int) -> None:
    """Sums, masks, results: of pieces of mixed dtypes, aligned or not, cut at any block, with ties that change inside a piece."""
    if not backend.gpu:
        pytest.skip("the CPU is what this compares with")
    n, columns = BLOCK + 8192 + 40, 8
    base, models = tensors(n + offset, len(dtypes), torch.bfloat16)
    base, models = base[offset:], [m.to(dtype)[offset:] for m, dtype in zip(models, dtypes, strict=True)]
    low = selections(base, models[0])[2].low

    def everything(place: Any) -> list[Any]:
        b, *m = place(base, *models)
        results: list[Any] = []
        for origin in (None, b):
            for k in (1, 2, 3, 5):
                results.append(np.zeros((k, k)))
                kernel.gram(m[:k], origin, results[-1])
        cut = (slice(0, BLOCK), slice(BLOCK, n))  # in two pieces: selections count on from one to the next
        for out_dtype in DTYPES:
            for elect in (False, True):
                selects = [*selections(base, models[0])[2:7], Select("magnitude", low=low, low_skip=9000)]
                out = place(torch.empty(n + offset, dtype=out_dtype))[offset:]
                sources = [m[i % len(m)] for i in range(len(selects))]
                for piece in cut:
                    weights = [0.3, -0.2, 0.5, 1.1, -0.7, 0.4]
                    results.append(kernel.task_sum(
                        b[piece], [x[piece] for x in sources], selects, weights, out[piece], elect=elect, normalize=True,
                        scale=0.9, start=piece.start, columns=columns,
                    ))  # fmt: skip
                results.append(out.cpu())
        for select in selections(base, models[0]):
            total = np.zeros(2)
            for piece in cut:
                kernel.masked_sums(m[0][piece], b[piece], select, piece.start, columns, total)
            results.append(total)
        return results

    ours = everything(backend.to)
    with use_backend(""):
        theirs = everything(lambda *t: t if len(t) > 1 else t[0])
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert np.array_equal(one, other), (one, other)


METHODS_ON_A_GPU: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": [0.3, 0.6]}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {"weight": [0.3, 0.6], "nuslerp_flatten": True}),
    ("multislerp", {"weight": [0.3, 0.6]}),
    ("karcher", {}),
    ("model_stock", {}),
    ("task_arithmetic", {"weight": [0.3, 0.6]}),
    ("ties", {"weight": [0.3, 0.6], "density": 0.4, "zero_sign": "majority"}),
    ("ties", {"weight": [0.3, 0.6], "density": 0.4, "trim": "model"}),
    ("dare_ties", {"weight": [0.3, 0.6], "density": 0.4}),
    ("breadcrumbs", {"weight": [0.3, 0.6], "density": 0.4, "gamma": 0.1}),
    ("della", {"weight": [0.3, 0.6], "density": 0.4}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS_ON_A_GPU)
def test_methods_whose_kernels_are_on_a_gpu(emulated_module, method, parameters) -> None:  # type: ignore[no-untyped-def]
    """Reduction and combination, in two chunks: the emulated kernels take all of it, and give the bits of the CPU's."""
    from enginepost.merge import METHODS, merge_tensors
    from enginepost.merge.apply import complete

    count = METHODS[method].models[1] or 2
    assert METHODS[method].gpu(complete(METHODS[method], parameters, count, "test"))
    base, models = tensors(BLOCK + 5 * 16, count, torch.bfloat16)
    given = [m.view(-1, 16) for m in models], None if METHODS[method].base == "ignored" else base.view(-1, 16)
    emulated_module.statistics()
    with use_backend("emulated"):
        ours = merge_tensors(method, *given, chunk=BLOCK, **parameters)
    assert emulated_module.statistics()["launches"] >= 2
    assert torch.equal(ours, merge_tensors(method, *given, chunk=BLOCK, **parameters))


def test_any_order_of_warps_and_blocks_gives_the_same_bits(each_schedule) -> None:  # type: ignore[no-untyped-def]
    n, columns = 3 * 8192 + 5 * 16, 16
    base, models = tensors(n, 3, torch.bfloat16)

    def run() -> list[torch.Tensor]:
        out, sums = torch.empty(n, dtype=torch.bfloat16), np.zeros(2)
        selects = [selections(base, models[0])[i] for i in (2, 6, 8)]
        signs = kernel.task_sum(
            base, models, selects, [0.4, -0.3, 0.9], out, elect=True, normalize=True, columns=columns
        )
        gram, counts = np.zeros((3, 3)), np.zeros((2, 1 << 16), dtype=np.int64)
        kernel.gram(models, base, gram)
        kernel.magnitude_counts(models[0], base, counts)
        for select in selects:
            kernel.masked_sums(models[0], base, select, 0, columns, sums)
        return [out, torch.tensor(signs), *map(torch.from_numpy, (gram, counts, sums))]

    each_schedule(run)


def test_random_bits_are_random() -> None:
    """Uniform bytes, independent neighbours, independent keys and blocks (chi-square and correlation at 5 sigma)."""
    draws = kernel.random_bits(1, 0, 1 << 20)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((draws >> np.uint32(shift)) & np.uint32(255), minlength=256)
        chi = ((counts - (1 << 12)) ** 2 / (1 << 12)).sum()
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
    unit = draws / 2.0**32 - 0.5
    others = [unit[1:], kernel.random_bits(2, 0, (1 << 20) - 1) / 2.0**32 - 0.5, np.roll(unit, BLOCK)[:-1]]
    for other in others:
        assert abs(float(np.mean(unit[:-1] * other)) * 12) < 5 / np.sqrt(1 << 20)
    ones = np.unpackbits(draws.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(draws.size * 32)


def test_nonfinite_counts(backend: Any) -> None:
    for dtype in DTYPES:
        x = torch.zeros(10001, dtype=dtype)
        x[[0, 17, 10000]] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
        assert kernel.nonfinite(backend.to(x)) == 3
        assert kernel.nonfinite(backend.to(torch.ones(5, dtype=dtype))) == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda c, d: c.merge_nonfinite(d(torch.zeros(2, 2))), "merge_nonfinite: x"),
        (
            lambda c, d: c.merge_weighted_sum([d(torch.zeros(3)), d(torch.zeros(4))], [1.0, 1.0], d(torch.zeros(3))),
            "has 4",
        ),
        (lambda c, d: c.merge_weighted_sum([], [], d(torch.zeros(3))), "0 inputs"),
        (lambda c, d: c.merge_weighted_sum([d(torch.zeros(3))], [1.0, 2.0], d(torch.zeros(3))), "one weight a tensor"),
        (lambda c, d: c.merge_gram([d(torch.zeros(3).int())], None, d(torch.zeros(1, 1).double())), "merge_gram: x"),
        (lambda c, d: c.merge_magnitude_counts(d(torch.zeros(3)), None, 1, d(torch.zeros(2, 9))), "counts must be"),
        (lambda c, d: c.merge_window_counts(d(torch.zeros(3)), None, [0, 8], d(torch.zeros(9))), "pairs"),
        (
            lambda c, d: c.merge_window_counts(d(torch.zeros(3)), None, [-1, 8], d(torch.zeros(9, dtype=torch.int64))),
            "begins at -1",
        ),
        (
            lambda c, d: c.merge_rank_mask(
                d(torch.zeros(6)), d(torch.zeros(6)), 4, 0.5, 0.1, 1, 0, d(torch.zeros(1).int()), None
            ),
            "no rows of 4",
        ),
        (
            lambda c, d: c.merge_rank_mask(
                d(torch.zeros(6)), d(torch.zeros(6)), 3, 0.5, 0.6, 1, 0, d(torch.zeros(1).int()), None
            ),
            "epsilon 0.6",
        ),
    ],
)
def test_bad_arguments(call, says) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=says):
        call(core(), to_dlpack)
