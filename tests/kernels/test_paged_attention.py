"""Attention over pages: against float64, to the bit beside the packed stream, shared and foreign pages, bad input."""

import math

import pytest
import torch

from enginepost.kernels.attention import attention, paged_attention, paged_reference
from enginepost.kernels.backend import _core

needs_core = pytest.mark.skipif(_core is None, reason="the native extension is not built")

# name: queries and keys of each sequence, heads, key heads, head dim, page size, options
CASES = {
    "decode": ([1, 1, 1], [5, 300, 64], 4, 2, 64, 16, {}),
    "decode, long": ([1], [1030], 14, 2, 64, 16, {}),
    "decode, one key": ([1, 1], [1, 1], 2, 2, 32, 8, {}),
    "decode, nothing cached": ([1, 1, 1], [0, 7, 0], 2, 1, 32, 16, {}),
    "dim 59, page 24": ([1, 1], [50, 333], 3, 1, 59, 24, {}),
    "dim 96": ([1, 2], [600, 40], 8, 2, 96, 32, {}),
    "dim 128": ([1, 2], [259, 40], 8, 2, 128, 32, {}),
    "dim 192": ([1, 2], [300, 40], 8, 2, 192, 32, {}),
    "dim 256": ([2, 1], [300, 40], 2, 1, 256, 16, {}),
    "dim 256, page 1": ([1, 3], [9, 40], 2, 1, 256, 1, {}),
    "dim 1, page 8": ([2, 1], [9, 40], 2, 2, 1, 8, {}),
    "page over a key block": ([1, 5], [700, 90], 2, 1, 64, 640, {}),
    "continuations": ([3, 1, 0, 7, 40], [33, 257, 6, 7, 300], 6, 2, 64, 16, {}),
    "more queries than keys": ([5, 30], [3, 17], 2, 1, 32, 8, {}),
    "window": ([1, 4, 20], [300, 530, 60], 4, 2, 64, 16, dict(window=19)),
    "softcap": ([1, 9], [77, 300], 4, 1, 48, 16, dict(softcap=3.0, scale=0.4)),
    "both ways": ([2, 20], [70, 300], 2, 1, 32, 16, dict(causal=False)),
    "both ways in a window": ([2, 20], [70, 300], 2, 1, 32, 16, dict(causal=False, window=11)),
    "no sequences": ([], [], 2, 1, 32, 16, {}),
}  # fmt: skip


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(case, dtype):
    """q; caches full of NaN but for the keys in use, pages in any order; table with -1 beyond them; used; cu; the gathered k, v."""
    queries, keys, heads, kv_heads, dim, page, options = CASES[case]
    torch.manual_seed(0)
    q = torch.randn(sum(queries), heads, dim).to(dtype)
    counts = [-(-n // page) for n in keys]
    order = torch.randperm(sum(counts) + 3).int()
    caches = torch.full((2, sum(counts) + 3, page, kv_heads, dim), math.nan, dtype=dtype)
    table = torch.full((len(keys), max(counts, default=0) + 2), -1, dtype=torch.int32)
    streams = torch.randn(2, sum(keys), kv_heads, dim).to(dtype)
    for b, (n, count) in enumerate(zip(keys, counts, strict=True)):
        table[b, :count] = order[sum(counts[:b]) : sum(counts[: b + 1])]
        for j in range(n):
            caches[:, table[b, j // page], j % page] = streams[:, sum(keys[:b]) + j]
    used, cu = torch.tensor(keys, dtype=torch.int32), starts(queries)
    return q, *caches, table, used, cu, options, streams


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64_and_the_packed_stream(case, dtype, backend, no_worse):
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    if dtype == torch.float32 and backend.gpu:
        pytest.skip("the CUDA kernels take 16 bits; float32 goes to the reference")
    q, k, v, table, used, cu, options, (keys, values) = inputs(case, dtype)
    plain = paged_reference(q, k, v, table, used, cu, **options)
    exact = paged_reference(q.double(), k.double(), v.double(), table, used, cu, **options)
    cu_k = starts(used.tolist())
    q, k, v, table, used, cu, cu_k, keys, values = backend.to(q, k, v, table, used, cu, cu_k, keys, values)
    ours = paged_attention(q, k, v, table, used, cu, **options)
    packed = attention(q, keys, values, cu, cu_k, **options)
    for name, mine, theirs, true, same in zip(("out", "lse"), ours, plain, exact, packed, strict=True):
        no_worse(name, mine, theirs, true)
        assert torch.equal(mine, same), name
    if CASES[case][0] == [1] * len(used):
        alone = paged_attention(q, k, v, table, used, **options)
        assert all(torch.equal(a, b) for a, b in zip(alone, ours, strict=True))


@pytest.mark.parametrize("case", ["decode, long", "continuations", "dim 256"])
def test_same_bits_in_any_order_of_warps(case, each_schedule):
    q, k, v, table, used, cu, options, _ = inputs(case, torch.bfloat16)
    each_schedule(lambda: list(paged_attention(q, k, v, table, used, cu, **options)))


def test_a_sequence_has_the_same_bits_in_any_batch(backend):
    """Also where a GPU splits its keys among blocks: how it does depends on that sequence alone."""
    if backend.name == "reference":
        pytest.skip("torch's products depend on their shapes")
    torch.manual_seed(3)
    keys, page = [700, 5, 2100], 16
    dtype = torch.bfloat16 if backend.gpu else torch.float32
    counts = [-(-n // page) for n in keys]
    q, k, v = (
        torch.randn(n, *size, 2 * h, 64).to(dtype)
        for n, size, h in ((3, (), 2), (sum(counts), (page,), 1), (sum(counts), (page,), 1))
    )
    table = torch.zeros(3, max(counts), dtype=torch.int32)
    for b, count in enumerate(counts):
        table[b, :count] = torch.arange(sum(counts[:b]), sum(counts[: b + 1])).int()
    q, k, v, table, used = backend.to(q, k, v, table, ints(*keys))
    together = paged_attention(q, k, v, table, used)
    for b in range(3):
        alone = paged_attention(q[b : b + 1], k, v, table[b : b + 1], used[b : b + 1])
        assert torch.equal(alone[0], together[0][b : b + 1]) and torch.equal(alone[1], together[1][:, b : b + 1])


@needs_core
@pytest.mark.parametrize("case", ["decode", "continuations", "window"])
def test_same_bits_at_any_thread_count(case, each_thread_count):
    q, k, v, table, used, cu, options, _ = inputs(case, torch.bfloat16)
    each_thread_count(lambda: list(paged_attention(q, k, v, table, used, cu, **options)))


def test_no_keys_and_no_pages(backend):
    dtype = torch.bfloat16 if backend.gpu else torch.float32
    q, cache = torch.randn(2, 4, 16).to(dtype), torch.empty(0, 8, 2, 16, dtype=dtype)
    table, used = torch.empty(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    q, cache, table, used = backend.to(q, cache, table, used)
    out, lse = paged_attention(q, cache, cache, table, used)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_shared_pages_and_any_strides(backend):
    """Two sequences fork after a common page; the cache is one tensor [page, layer, 2, position, head, dim] read as views."""
    torch.manual_seed(1)
    dtype = torch.bfloat16 if backend.gpu else torch.float32
    store = backend.to(torch.randn(6, 3, 2, 16, 2, 40).to(dtype))
    k, v = store[:, 1, 0, ..., :32], store[:, 1, 1, ..., 4:36]
    table = torch.tensor([[4, 0, 9], [4, 2, 9]], dtype=torch.int32)[:, :2]
    used, q = torch.tensor([20, 27], dtype=torch.int32), torch.randn(6, 2, 32).to(dtype).transpose(0, 1)
    table, used, q = backend.to(table, used, q)
    out = paged_attention(q, k, v, table, used)[0]
    for b, other in enumerate((0, 2)):
        keys, values = (torch.cat([x[4], x[other]])[: used[b]] for x in (k, v))
        torch.testing.assert_close(
            out[b : b + 1],
            attention(q[b : b + 1], keys, values, backend.to(starts([1])), used[b : b + 1].new_tensor([0, used[b]]))[0],
        )


@needs_core
def test_a_gradient_is_refused():
    q, k, v, table, used, cu, _, _ = inputs("decode", torch.float32)
    with pytest.raises(ValueError, match="no gradient"):
        paged_attention(q.requires_grad_(), k, v, table, used, cu)
    with torch.no_grad():
        paged_attention(q, k, v, table, used, cu)


@needs_core
def test_opcheck():
    q, k, v, table, used, cu, _, _ = inputs("continuations", torch.float32)
    torch.library.opcheck(torch.ops.enginepost.paged_attention, (q, k, v, table, used, cu, True, 0, 0.0, 0.1))


@needs_core
def test_reference_backend(monkeypatch):
    q, k, v, table, used, cu, options, _ = inputs("softcap", torch.float32)
    monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    ours = paged_attention(q, k, v, table, used, cu, **options)
    assert all(
        torch.equal(a, b) for a, b in zip(ours, paged_reference(q, k, v, table, used, cu, **options), strict=True)
    )


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


Z = torch.zeros


@needs_core
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=Z(2, 16)), "q must have shape"),
        (dict(q=Z(2, 3, 16)), "3 heads of q must be a multiple of the 2 of k_cache"),
        (dict(q=Z(2, 4, 8)), "k_cache must have the head dimension of q, 8, got 16"),
        (dict(q=Z(2, 4, 16).bfloat16()), "k_cache must have the dtype of q"),
        (dict(v_cache=Z(3, 8, 2, 16).bfloat16()), "v_cache must have the dtype of k_cache"),
        (dict(v_cache=Z(3, 8, 1, 16)), "dimension 2 of v_cache must be that of k_cache, 2, got 1"),
        (dict(k_cache=Z(3, 2, 16)), "k_cache must have 4 dimensions"),
        (dict(k_cache=Z(3, 0, 2, 16), v_cache=Z(3, 0, 2, 16)), "at least one key"),
        (dict(k_cache=Z(3, 8, 16, 2).transpose(2, 3)), "last dimension of k_cache must be contiguous"),
        (dict(q=Z(3, 4, 16)), "q has 3 rows and seqused_k 2; give cu_seqlens"),
        (dict(cu_seqlens=ints(0, 2)), "cu_seqlens must have 3 elements, got 2"),
        (dict(cu_seqlens=ints(0, 1, 3)), "must end with the number of rows of q, 2, got 3"),
        (dict(block_table=ints(0, 1).view(1, 2)), "a row for each of the 2 sequences of seqused_k, got 1"),
        (dict(block_table=torch.zeros(2, 2, dtype=torch.int64)), "block_table must be int32"),
        (dict(block_table=ints(0, 1, 2, 3).view(2, 2)), r"block_table\[1\]\[1\] = 3 is not one of the 3 pages"),
        (dict(block_table=ints(-1, 1, 2, 0).view(2, 2)), r"block_table\[0\]\[0\] = -1"),
        (dict(seqused_k=ints(17, 1)), r"seqused_k\[0\] = 17, but a row of block_table holds 2 pages of 8 keys"),
        (dict(seqused_k=ints(1, -1)), r"seqused_k\[1\] = -1"),
        (dict(window=-1), "window must be"),
        (dict(softcap=-2.0), "softcap must be"),
        (dict(scale=math.nan), "scale must be finite"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(
        q=Z(2, 4, 16), k_cache=Z(3, 8, 2, 16), v_cache=Z(3, 8, 2, 16), block_table=ints(0, 1, 2, 0).view(2, 2),
        seqused_k=ints(9, 16),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        paged_attention(**(arguments | change))
