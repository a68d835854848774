"""Attention: against float64 over every kind of visibility, gradients, bits, packing, bad input."""

import math

import pytest
import torch

from enginepost.kernels.attention import attention, attention_qkv, reference
from enginepost.kernels.backend import _core

needs_core = pytest.mark.skipif(_core is None, reason="the native extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# name: query lengths, key lengths (None: the same), heads, key heads, head dim, options
CASES = {
    "ragged": ([5, 0, 1, 130, 17], None, 4, 2, 64, {}),
    "one row": ([1], None, 2, 2, 64, {}),
    "nothing": ([0, 0], None, 2, 1, 16, {}),
    "dim 59": ([33, 1, 70], None, 3, 1, 59, {}),
    "dim 1": ([9, 2], None, 2, 2, 1, {}),
    "dim 128": ([140, 3], None, 4, 1, 128, {}),
    "dim 96": ([70, 3, 33], None, 4, 2, 96, {}),
    "dim 160": ([65, 20], None, 2, 2, 160, {}),
    "dim 192": ([70, 3, 33], None, 2, 1, 192, dict(window=30)),
    "dim 256": ([65, 20], None, 2, 1, 256, {}),
    "nine heads on three": ([97, 31], None, 9, 3, 64, {}),
    "several key blocks": ([600, 2], None, 2, 1, 32, {}),
    "window": ([90, 7, 1, 0], None, 2, 2, 24, dict(window=7)),
    "window 1": ([40], None, 2, 1, 16, dict(window=1)),
    "window over key blocks": ([700], None, 1, 1, 16, dict(window=300)),
    "softcap": ([80, 4], None, 4, 2, 40, dict(softcap=3.0)),
    "softcap and window": ([300], None, 2, 1, 32, dict(softcap=5.0, window=20, scale=0.3)),
    "both ways": ([50, 300, 1], None, 2, 1, 48, dict(causal=False)),
    "both ways in a window": ([60, 9], None, 2, 1, 48, dict(causal=False, window=11)),
    "scale": ([31], None, 1, 1, 64, dict(scale=1.0)),
    "negative scale": ([50], None, 2, 1, 64, dict(scale=-0.3)),
    "no scale": ([50], None, 2, 1, 64, dict(scale=0.0)),
    "more keys": ([3, 20, 1], [9, 300, 40], 4, 2, 32, {}),
    "fewer keys": ([10, 5, 3], [4, 5, 0], 2, 1, 32, {}),
    "no keys": ([6, 2], [0, 0], 2, 1, 32, dict(causal=False)),
    "no queries": ([0, 2], [7, 3], 2, 1, 32, {}),
    "cache": ([1, 1, 2, 1], [64, 300, 64, 64], 6, 2, 64, dict(used=[5, 290, 33, 0])),
    "cache, window": ([1, 3, 1], [64, 300, 64], 4, 1, 64, dict(used=[60, 290, 1], window=16, softcap=2.0)),
    "cache, long prompt": ([70, 1], [128, 300], 2, 1, 64, dict(used=[100, 270])),
}  # fmt: skip


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(case, dtype, seed=0):
    lengths, keys, heads, kv_heads, dim, options = CASES[case]
    options = dict(options)
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, count):
        return torch.randn(rows, count, dim, generator=generator).to(dtype)

    rows_k = sum(lengths if keys is None else keys)
    q, k, v = draw(sum(lengths), heads), draw(rows_k, kv_heads), draw(rows_k, kv_heads)
    used = options.pop("used", None)
    more = (None if keys is None else starts(keys), None if used is None else torch.tensor(used, dtype=torch.int32))
    return (q, k, v), (starts(lengths), *more), options, draw(sum(lengths), heads)


def with_gradients(function, qkv, where, options, dout):
    qkv = [x.clone().requires_grad_() for x in qkv]
    out, lse = function(*qkv, *where, **options)
    grads = torch.autograd.grad(out, qkv, dout)
    return [out.detach(), lse.detach(), *grads]


def takes(backend, dtype):
    """Skips what a backend does not take by itself."""
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    if dtype == torch.float32 and backend.gpu:
        pytest.skip("the CUDA kernels take 16 bits; float32 goes to the reference")


def plain_and_exact(qkv, where, options, dout, monkeypatch):
    """What plain PyTorch gives at the tensors' dtype, and at float64."""
    exact = with_gradients(reference, [x.double() for x in qkv], where, options, dout.double())
    plain = with_gradients(reference, qkv, where, options, dout)
    if qkv[0].dtype != torch.float32:
        # The reference computes in float32. A backward that is given the rounded out cannot equal it: dout . out is off by that
        # rounding. So gradients are held to the maths in 16 bits throughout, out and lse to the reference.
        with monkeypatch.context() as patch:
            patch.setattr(torch, "promote_types", lambda a, _: a)
            plain[2:] = with_gradients(reference, qkv, where, options, dout)[2:]
    return plain, exact


def compare_all(no_worse, ours, plain, exact):
    for name, mine, theirs, true in zip(("out", "lse", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        # dq and dk hold dP - delta, two numbers of size 10 whose difference is 0 where a row sees one key.
        no_worse(name, mine, theirs, true, floor=2e-6 if name in ("dq", "dk") else 2e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case, dtype, backend, no_worse, monkeypatch):
    takes(backend, dtype)
    qkv, where, options, dout = inputs(case, dtype)
    ours = with_gradients(attention, backend.to(*qkv), backend.to(*where), options, backend.to(dout))
    compare_all(no_worse, ours, *plain_and_exact(qkv, where, options, dout, monkeypatch))


@pytest.fixture
def card(emulated_module):
    """set(architecture): the emulator becomes that card; the one it was afterwards."""
    yield lambda architecture: emulated_module.set_card(architecture, 8)
    emulated_module.set_card(80, 108)


@pytest.mark.parametrize("architecture", [80, 120])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_tiles_of_every_card(dim, architecture, card, emulated_module, each_schedule, no_worse, monkeypatch):
    """Several tiles of rows and keys: right, the same bits in every order of warps and blocks, no two rows on the same banks."""
    card(architecture)
    monkeypatch.setitem(CASES, "tiles", ([150, 9], None, 2, 1, dim, dict(window=100)))
    qkv, where, options, dout = inputs("tiles", torch.bfloat16)
    results = []
    emulated_module.statistics()
    each_schedule(lambda: results.append(with_gradients(attention, qkv, where, options, dout)) or results[-1])
    counts = emulated_module.statistics()
    assert counts["mma"] > 0 and counts["ldmatrix"] > 0 and counts["ldmatrix_conflicts"] == 0
    compare_all(no_worse, results[0], *plain_and_exact(qkv, where, options, dout, monkeypatch))


def test_unordered_additions(backend, no_worse, monkeypatch):
    if not backend.gpu:
        pytest.skip("a CPU always adds in one order")
    qkv, where, options, dout = inputs("several key blocks", torch.bfloat16)
    options = {**options, "deterministic": False}
    ours = with_gradients(attention, backend.to(*qkv), backend.to(*where), options, backend.to(dout))
    compare_all(no_worse, ours, *plain_and_exact(qkv, where, {}, dout, monkeypatch))


def test_float32_goes_to_the_reference_on_a_gpu(backend):
    if not backend.gpu:
        pytest.skip("a CPU kernel takes it")
    qkv, where, options, _ = inputs("ragged", torch.float32)
    qkv, where = backend.to(*qkv), backend.to(*where)
    assert torch.equal(attention(*qkv, *where, **options)[0], reference(*qkv, *where, **options)[0])


def half_of(backend):
    return torch.bfloat16 if backend.gpu else torch.float32


def test_rows_that_see_nothing_are_zero(backend):
    qkv, where, options, dout = inputs("fewer keys", half_of(backend))
    out, lse, dq, _, _ = with_gradients(attention, backend.to(*qkv), backend.to(*where), options, backend.to(dout))
    blind = [*range(6), 15, 16, 17]
    assert (out[blind] == 0).all() and (dq[blind] == 0).all() and (lse[:, blind] == -math.inf).all()
    seeing = [t for t in range(18) if t not in blind]
    assert (out[seeing] != 0).any() and torch.isfinite(lse[:, seeing]).all()


@pytest.mark.parametrize("case", ["cache", "cache, long prompt"])
def test_keys_beyond_the_used_ones_do_not_matter(case, backend):
    qkv, where, options, _ = inputs(case, half_of(backend))
    (q, k, v), (cu, cu_k, used) = backend.to(*qkv), backend.to(*where)
    expected = attention(q, k, v, cu, cu_k, used, **options)[0]
    for b in range(len(used)):
        k[cu_k[b] + used[b] : cu_k[b + 1]] = math.nan
        v[cu_k[b] + used[b] : cu_k[b + 1]] = math.nan
    assert torch.equal(attention(q, k, v, cu, cu_k, used, **options)[0], expected)


def test_unused_keys_get_no_gradient(backend):
    qkv, where, options, dout = inputs("cache, long prompt", half_of(backend))
    _, _, _, dk, dv = with_gradients(attention, backend.to(*qkv), backend.to(*where), options, backend.to(dout))
    assert (dk[100:128] == 0).all() and (dv[128 + 270 :] == 0).all() and (dk[:100] != 0).any()


@pytest.mark.parametrize("case", ["ragged", "window", "softcap and window", "more keys", "both ways"])
def test_gradcheck_of_the_reference(case):
    lengths, keys, heads, kv_heads, _, options = CASES[case]
    short = [min(n, 6) for n in lengths]
    short_k = None if keys is None else [min(n, 9) for n in keys]
    q = torch.randn(sum(short), heads, 3, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(short_k or short), kv_heads, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {**options, **({"window": 3} if "window" in options else {})}
    where = (starts(short), None if short_k is None else starts(short_k))
    assert torch.autograd.gradcheck(lambda q, k, v: reference(q, k, v, *where, **options)[0], (q, k, v))


@needs_core
@pytest.mark.parametrize("case", ["ragged", "several key blocks", "window over key blocks", "cache"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_any_thread_count(case, dtype, each_thread_count):
    qkv, where, options, dout = inputs(case, dtype)
    each_thread_count(lambda: with_gradients(attention, qkv, where, options, dout))


@pytest.mark.parametrize("options", [{}, dict(window=50), dict(softcap=4.0)], ids=str)
def test_packed_is_unpacked_to_the_bit(options, backend):
    if backend.name == "reference":
        pytest.skip("torch's products depend on their shapes")
    lengths = [3, 180, 1, 0, 150 if backend.emulated else 400, 64]
    cu = starts(lengths)
    torch.manual_seed(4)
    q, k, v, dout = (backend.to(torch.randn(sum(lengths), h, 32).bfloat16()) for h in (4, 2, 2, 4))
    packed = with_gradients(attention, (q, k, v), (backend.to(cu),), options, dout)
    for b, n in enumerate(lengths):
        here = slice(int(cu[b]), int(cu[b + 1]))
        alone = with_gradients(attention, (q[here], k[here], v[here]), (backend.to(starts([n])),), options, dout[here])
        for i, (one, many) in enumerate(zip(alone, packed, strict=True)):
            assert torch.equal(one, many[:, here] if i == 1 else many[here]), (n, i)


@needs_core
def test_a_prefix_with_a_cache_continues_the_sequence():
    """Token by token with a cache is the whole sequence at once, to rounding."""
    torch.manual_seed(5)
    q, k, v = (torch.randn(40, h, 64) for h in (4, 2, 2))
    whole = attention(q, k, v, starts([40]), window=16)[0]
    for t in (0, 1, 17, 39):
        used = torch.tensor([t + 1], dtype=torch.int32)
        step = attention(q[t : t + 1], k, v, starts([1]), starts([40]), used, window=16)[0]
        torch.testing.assert_close(step, whole[t : t + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_projection_is_read_and_written_where_it_lies(dtype, backend):
    takes(backend, dtype)
    if backend.name == "reference":
        pytest.skip("no kernel of ours")
    heads, kv_heads, cu = 6, 2, backend.to(starts([70, 1, 33]))
    torch.manual_seed(6)
    wide = backend.to(torch.randn(104, heads + 2 * kv_heads + 3, 64).to(dtype))
    for qkv in (wide[:, :10].contiguous(), wide[:, :10], wide[:, 3:13]):
        options = dict(window=20, softcap=6.0)
        q, k, v = (x.contiguous() for x in qkv.split([heads, kv_heads, kv_heads], dim=1))
        dout = backend.to(torch.randn(104, heads, 64).to(dtype))
        expected = with_gradients(attention, (q, k, v), (cu,), options, dout)
        fused = qkv.clone(memory_format=torch.preserve_format).requires_grad_()
        out = attention_qkv(fused, heads, kv_heads, cu, **options)
        (grad,) = torch.autograd.grad(out, fused, dout)
        assert torch.equal(out, expected[0]) and torch.equal(grad, torch.cat(expected[2:], dim=1))
        with torch.no_grad():
            assert torch.equal(attention_qkv(qkv, heads, kv_heads, cu, **options), expected[0])


def test_any_strides(backend):
    torch.manual_seed(7)
    q, k, v, dout = (
        backend.to(x.to(half_of(backend)))
        for x in (torch.randn(4, 30, 16), torch.randn(2, 16, 30), torch.randn(30, 4, 16), torch.randn(16, 4, 30))
    )
    q, k, v, dout = q.transpose(0, 1), k.permute(2, 0, 1), v[:, ::2], dout.permute(2, 1, 0)
    cu = backend.to(starts([30]))
    loose = with_gradients(attention, (q, k, v), (cu,), {}, dout)
    tight = with_gradients(attention, [x.contiguous() for x in (q, k, v)], (cu,), {}, dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(loose, tight, strict=True))


@needs_core
def test_large_scores_do_not_overflow():
    q = torch.full((5, 1, 8), 100.0, requires_grad=True)
    k = torch.full((5, 1, 8), 100.0)
    k[2] = -100
    v = torch.randn(5, 1, 8)
    out, lse = attention(q, k, v, starts([5]))
    exact = reference(q.double(), k.double(), v.double(), starts([5]))
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-6, atol=1e-3)
    assert torch.isfinite(torch.autograd.grad(out.sum(), q)[0]).all()


@pytest.mark.parametrize("dim", [16, 15])
def test_rows_at_odd_places(dim, backend):
    """A GPU reads and writes 16 bytes at a time where all rows allow it, and single elements where one does not."""
    torch.manual_seed(11)
    wide = backend.to(torch.randn(40, 9, dim + 1).to(half_of(backend)))
    qkv, cu = wide[..., 1:].split([4, 2, 2, 1], dim=1)[:3], backend.to(starts([33, 7]))
    dout = backend.to(torch.randn(40, 4, dim).to(half_of(backend)))
    odd = with_gradients(attention, qkv, (cu,), {}, dout)
    even = with_gradients(attention, [x.contiguous() for x in qkv], (cu,), {}, dout)
    for one, other in zip(odd, even, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_nan_stays_in_its_sequence(backend):
    torch.manual_seed(8)
    q, k, v = (backend.to(torch.randn(20, 2, 16).to(half_of(backend))) for _ in range(3))
    cu = backend.to(starts([8, 12]))
    clean = attention(q, k, v, cu)[0]
    q[3] = math.nan
    out = attention(q, k, v, cu)[0]
    assert out[3].isnan().all() and torch.equal(out[8:], clean[8:])


@needs_core
@pytest.mark.parametrize("case", ["ragged", "more keys", "cache, window"])
def test_opcheck(case):
    qkv, where, options, dout = inputs(case, torch.float32)
    o = {"causal": True, "window": 0, "softcap": 0.0, "scale": 0.25, **options}
    arguments = (*where, *o.values())
    torch.library.opcheck(torch.ops.enginepost.attention, (*(x.requires_grad_() for x in qkv), *arguments))
    qkv = [x.detach() for x in qkv]
    out, lse = torch.ops.enginepost.attention(*qkv, *arguments)
    torch.library.opcheck(torch.ops.enginepost.attention_backward, (dout, *qkv, out, lse, *arguments))


@needs_core
def test_opcheck_fused():
    qkv, cu = torch.randn(12, 8, 16, requires_grad=True), starts([5, 7])
    options = (True, 4, 0.0, 0.25)
    torch.library.opcheck(torch.ops.enginepost.attention_qkv, (qkv, 4, 2, cu, *options))
    qkv = qkv.detach()
    out, lse = torch.ops.enginepost.attention_qkv(qkv, 4, 2, cu, *options)
    torch.library.opcheck(
        torch.ops.enginepost.attention_qkv_backward, (torch.randn_like(out), qkv, out, lse, 4, 2, cu, *options)
    )


@needs_core
def test_reference_backend(monkeypatch):
    qkv, where, options, _ = inputs("ragged", torch.float32)
    monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    out, lse = attention(*qkv, *where, **options)
    expected = reference(*qkv, *where, **options)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


Z = torch.zeros


@needs_core
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=Z(6, 16)), "q must have shape"),
        (dict(q=Z(6, 3, 16)), "3 heads of q must be a multiple of the 2"),
        (dict(k=Z(6, 2, 8)), "head dimension of q, 16, got 8"),
        (dict(v=Z(6, 1, 16)), "v must have the shape of k"),
        (dict(k=Z(6, 2, 16).bfloat16()), "k must have the dtype of q"),
        (dict(k=Z(5, 2, 16), v=Z(5, 2, 16)), "give cu_seqlens_k"),
        (dict(q=Z(6, 2, 300), k=Z(6, 2, 300), v=Z(6, 2, 300)), "1 to 256"),
        (dict(cu_seqlens=torch.tensor([0, 6])), "cu_seqlens must be int32"),
        (dict(cu_seqlens=torch.tensor([1, 6], dtype=torch.int32)), "begin with 0"),
        (dict(cu_seqlens=torch.tensor([0, 7, 6], dtype=torch.int32)), r"cu_seqlens\[2\] = 6 follows 7"),
        (dict(cu_seqlens=torch.tensor([0, 5], dtype=torch.int32)), "must end with the number of rows of q, 6, got 5"),
        (dict(cu_seqlens_k=torch.tensor([0, 3, 6], dtype=torch.int32)), "as many elements"),
        (dict(cu_seqlens_k=torch.tensor([0, 5], dtype=torch.int32)), "rows of k, 6, got 5"),
        (dict(seqused_k=torch.tensor([7], dtype=torch.int32)), r"seqused_k\[0\] = 7, but the sequence has 6"),
        (dict(seqused_k=torch.tensor([-1], dtype=torch.int32)), r"seqused_k\[0\] = -1"),
        (dict(seqused_k=torch.tensor([1, 2], dtype=torch.int32)), "with 1 elements, got 2"),
        (dict(window=-1), "window must be"),
        (dict(softcap=-2.0), "softcap must be"),
        (dict(scale=math.nan), "scale must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(q=Z(6, 4, 16), k=Z(6, 2, 16), v=Z(6, 2, 16), cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | change))


def test_bad_fused_width_is_named():
    with pytest.raises(ValueError, match="heads \\+ 2 kv_heads"):
        attention_qkv(Z(6, 7, 16), 4, 2, starts([6]))
