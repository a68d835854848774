"""Best-fit packing against brute force, and the flat batch against a sequence-by-sequence reading."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enginepost.data import DataError, Sequence, collate, plan_batches
from enginepost.data.packing import best_fit


def slow_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Fill of each bin, by trying every bin for every sequence."""
    fills: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [k for k, fill in enumerate(fills) if fill + size <= capacity]
        if fitting:
            fills[max(fitting, key=lambda k: fills[k])] += size
        else:
            fills.append(size)
    return fills


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 5))
def test_best_fit_equals_brute_force(sizes: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(sizes))
    bins = best_fit(order, np.array(sizes, dtype=np.int64), 20)
    assert sorted(i for one in bins for i in one) == list(range(len(sizes)))
    assert sorted(sum(sizes[i] for i in one) for one in bins) == sorted(slow_best_fit(sizes, 20))


@pytest.mark.parametrize("packing", [True, False])
def test_plan_holds_every_sequence_once(packing: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 101, 997)
    plan = plan_batches(lengths, batch_size=3, max_length=100, packing=packing, seed=5)
    assert sorted(i for batch in plan for i in batch) == list(range(997))
    assert plan == plan_batches(lengths, batch_size=3, max_length=100, packing=packing, seed=5)
    assert plan != plan_batches(lengths, batch_size=3, max_length=100, packing=packing, seed=6)
    assert all(sum(lengths[i] for i in batch) <= 300 for batch in plan)
    if not packing:
        assert {len(batch) for batch in plan[:-1]} == {3} and len(plan) == 333


def test_packing_is_tight_and_quick() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.7, 100_000).clip(1, 2048).astype(int)
    start = time.perf_counter()
    plan = plan_batches(lengths, batch_size=1, max_length=2048)
    assert time.perf_counter() - start < 10  # 0.2 s on a quiet core
    assert lengths.sum() / (len(plan) * 2048) > 0.99


def test_order_of_bins_does_not_follow_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 2000)
    plan = plan_batches(lengths, batch_size=1, max_length=512)
    longest = [max(int(lengths[i]) for i in batch) for batch in plan]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.15


def test_plan_of_nothing() -> None:
    assert plan_batches([], batch_size=2, max_length=8) == []


@pytest.mark.parametrize(("lengths", "size", "message"), [
    ([3, 9], 1, "sequence 1 has 9 tokens; packing wants 1 to max_length = 8"),
    ([0], 1, "sequence 0 has 0 tokens"),
    ([3], 0, "batch_size must be at least 1"),
])  # fmt: skip
def test_plan_errors(lengths: list[int], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plan_batches(lengths, batch_size=size, max_length=8)


def sequence(ids: list[int], labels: list[int], row: int) -> Sequence:
    return Sequence(np.array(ids, np.int32), np.array(labels, bool), row, "f")


def test_collate() -> None:
    batch = collate([sequence([5, 6, 7], [0, 0, 1], 1), sequence([8], [0], 2), sequence([9, 4], [1, 1], 4)])
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.targets.tolist() == [-100, 7, -100, -100, 4, -100]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.rows == ["f:1", "f:2", "f:4"]
    kinds = [str(t.dtype) for t in (batch.ids, batch.targets, batch.cu_seqlens, batch.positions)]
    assert kinds == ["torch.int64", "torch.int64", "torch.int32", "torch.int64"]


def test_collate_nothing() -> None:
    with pytest.raises(DataError, match="at least one sequence"):
        collate([])
