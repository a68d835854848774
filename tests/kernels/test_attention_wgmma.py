"""Attention for sm_90a (TMA, wgmma), in the emulator: what test_attention.py asks of the other kernels, and what is new here."""

import pytest
import torch
from test_attention import CASES, compare_all, inputs, plain_and_exact, with_gradients

from enginepost.kernels.attention import attention, attention_qkv, reference

SEVERAL_TILES = {
    "tiles, dim 64": ([300, 5, 129], None, 2, 1, 64, {}),
    "tiles, dim 128": ([390, 1, 7], None, 3, 1, 128, {}),
    "tiles, groups of 7": ([120, 31], None, 14, 2, 64, dict(window=90)),
    "tiles, window": ([1, 400, 33], None, 2, 1, 128, dict(window=150)),
    "tiles, both ways": ([257, 300], None, 2, 2, 64, dict(causal=False, softcap=4.0)),
    "tiles, cache": ([130, 2], [384, 300], 4, 1, 128, dict(used=[370, 299])),
    "dim 120": ([140, 3], None, 2, 1, 120, {}),
}  # fmt: skip
TAKEN = [name for name, case in CASES.items() if case[4] % 8 == 0 and (case[4] <= 64 or 96 < case[4] <= 128)]
NOT_CALLED = {"nothing", "no keys"}  # no queries, or no keys, at all


MULTIPROCESSORS = 8


@pytest.mark.parametrize("case", [*TAKEN, *SEVERAL_TILES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_against_float64(case, dtype, hopper, no_worse, monkeypatch):
    monkeypatch.setitem(CASES, case, {**CASES, **SEVERAL_TILES}[case])
    hopper.set_schedule(["forward", "reverse", "shuffled"][len(case) % 3], len(case))
    qkv, where, options, dout = inputs(case, dtype)
    ours = with_gradients(attention, qkv, where, options, dout)
    assert (hopper.statistics()["wgmma"] > 0) == (case not in NOT_CALLED)
    compare_all(no_worse, ours, *plain_and_exact(qkv, where, options, dout, monkeypatch))


@pytest.mark.parametrize("case", ["tiles, dim 64", "tiles, groups of 7", "tiles, window"])
def test_same_bits_in_every_order_of_warps(case, hopper, each_schedule, monkeypatch):
    monkeypatch.setitem(CASES, case, SEVERAL_TILES[case])
    qkv, where, options, dout = inputs(case, torch.bfloat16)
    each_schedule(lambda: with_gradients(attention, qkv, where, options, dout))
    counts = hopper.statistics()
    assert counts["wgmma"] > 0 and counts["mma"] == 0 and counts["ldmatrix"] == 0


def test_unordered_additions(hopper, no_worse, monkeypatch):
    case = "tiles, dim 64"
    monkeypatch.setitem(CASES, case, SEVERAL_TILES[case])
    qkv, where, options, dout = inputs(case, torch.bfloat16)
    ours = with_gradients(attention, qkv, where, {**options, "deterministic": False}, dout)
    compare_all(no_worse, ours, *plain_and_exact(qkv, where, options, dout, monkeypatch))


def test_what_lies_beyond_the_keys_counts_for_nothing(hopper):
    """The rows after a sequence's last key, in the same tile, hold NaN: a cache that is not full."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 1, 64).bfloat16() for n in (40, 300, 300))
    starts, slots = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([0, 300], dtype=torch.int32)
    used = torch.tensor([201], dtype=torch.int32)
    out, lse = attention(q, k, v, starts, slots, used)
    k[201:], v[201:] = float("nan"), float("nan")
    again = attention(q, k, v, starts, slots, used)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse) and out.isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_do_not_see_the_neighbours(dim, hopper):
    """The sequences before and after hold NaN: the same gradients, bit for bit."""
    torch.manual_seed(3)
    inside, total = slice(50, 203), 260
    starts = torch.tensor([0, 50, 203, 260], dtype=torch.int32)
    clean = [torch.randn(total, n, dim).bfloat16() for n in (3, 1, 1, 3)]
    results = []
    for fill in (0.0, float("nan")):
        tensors = []
        for x in clean:
            y = torch.full_like(x, fill)
            y[inside] = x[inside]
            tensors.append(y)
        out, _, *gradients = with_gradients(attention, tensors[:3], (starts,), {}, tensors[3])
        results.append([t[inside] for t in (out, *gradients)])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


def test_a_packed_sequence_equals_itself_alone(hopper):
    torch.manual_seed(1)
    q, k, v = torch.randn(340, 2, 64).bfloat16(), torch.randn(340, 1, 64).bfloat16(), torch.randn(340, 1, 64).bfloat16()
    packed = attention(q, k, v, torch.tensor([0, 77, 340], dtype=torch.int32))[0]
    alone = attention(q[77:], k[77:], v[77:], torch.tensor([0, 263], dtype=torch.int32))[0]
    assert torch.equal(packed[77:], alone)


def test_fused_projection(hopper):
    """q, k and v as views of one tensor: their rows lie at the strides of all heads together."""
    torch.manual_seed(2)
    qkv = torch.randn(150, 4 + 2 + 2, 64).bfloat16()
    starts = torch.tensor([0, 100, 150], dtype=torch.int32)
    out = attention_qkv(qkv, 4, 2, starts)
    assert hopper.statistics()["wgmma"] > 0
    exact = reference(*(x.double() for x in qkv.split([4, 2, 2], 1)), starts)[0]
    assert (out.double() - exact).abs().max() < 0.02


@pytest.mark.parametrize("case", ["dim 96", "dim 59", "dim 192"])
def test_others_go_to_the_other_kernels(case, hopper):
    qkv, where, options, _ = inputs(case, torch.bfloat16)
    attention(*qkv, *where, **options)
    counts = hopper.statistics()
    assert counts["wgmma"] == 0 and counts["mma"] > 0


def test_only_where_it_is_asked_for(hopper, monkeypatch):
    qkv, where, options, _ = inputs("ragged", torch.bfloat16)
    for architecture, value in ((90, "0"), (100, "1"), (80, "1")):
        hopper.set_card(architecture, 8)
        monkeypatch.setenv("ENGINEPOST_WGMMA", value)
        attention(*qkv, *where, **options)
        counts = hopper.statistics()
        assert counts["wgmma"] == 0 and counts["mma"] > 0
