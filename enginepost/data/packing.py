"""Sequences into micro-batches: best-fit packing, and the flat token stream of a batch.

A micro-batch is `batch_size` bins of at most `max_length` tokens, concatenated: ids [T] with cu_seqlens [S+1] marking where
sequences begin, nothing padded. Packing is best-fit decreasing (Johnson 1974): the longest sequence first, each into the fullest
bin that still has room. Remaining rooms are a sorted list of distinct values, searched by bisection: O(n log n) in practice.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from enginepost.data.files import DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # a target that is not trained on


@dataclass
class Sequence:
    """One training sequence.

    ids: int32 [n]. labels: bool [n], is ids[t] trained on; labels[0] is False, as nothing precedes it, so the number of labels
    is the number of targets. row, source: the record it came from.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.bool_]
    row: int
    source: str

    @property
    def place(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass
class Batch:
    """A flat stream of T tokens in S sequences; torch tensors.

    ids int64 [T]; targets int64 [T], the next token where it is trained on, else -100; cu_seqlens int32 [S+1];
    positions int64 [T], counted from 0 in each sequence; rows: "file:row" of each sequence.
    """

    ids: "Tensor"
    targets: "Tensor"
    cu_seqlens: "Tensor"
    positions: "Tensor"
    rows: list[str]


def plan_batches(
    lengths: "Items[int] | NDArray[np.integer]",
    *,
    batch_size: int,
    max_length: int,
    packing: bool = True,
    seed: int = 0,
) -> list[list[int]]:
    """Micro-batches of sequence indices: each sequence exactly once, the order decided by `seed` alone.

    Args: lengths [n] tokens of each sequence; batch_size bins of a micro-batch (the last may have fewer); max_length tokens of a
    bin; packing False puts one sequence in each bin. Raises DataError when a length is 0 or above max_length.
    """
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, got {batch_size}")
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if wrong.size:
        raise DataError(
            f"sequence {wrong[0]} has {sizes[wrong[0]]} tokens; packing wants 1 to max_length = {max_length} of each"
            f" ({wrong.size} of {sizes.size} sequences are outside)"
        )
    random = np.random.default_rng(seed)
    order = random.permutation(sizes.size)
    bins = best_fit(order, sizes, max_length) if packing else [[int(i)] for i in order]
    bins = [bins[i] for i in random.permutation(len(bins))] if packing else bins
    return [
        [index for chosen in bins[start : start + batch_size] for index in chosen]
        for start in range(0, len(bins), batch_size)
    ]


def best_fit(order: NDArray[np.integer], sizes: NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Bins of indices by best-fit decreasing; sequences of equal length are taken in `order`, so ties follow the seed."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # distinct remaining rooms, ascending
    waiting: dict[int, list[int]] = {}  # room -> bins that have exactly it
    descending = order[np.argsort(-sizes[order], kind="stable")]
    for index, size in zip(descending.tolist(), sizes[descending].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[at]
            chosen = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
        bins[chosen].append(index)
        room -= size
        if room in waiting:
            waiting[room].append(chosen)
        elif room:
            waiting[room] = [chosen]
            insort(rooms, room)
    return bins


def collate(sequences: Iterable[Sequence]) -> Batch:
    """Sequences as one flat batch. The last token of each sequence predicts nothing: its target is -100."""
    import torch

    sequences = list(sequences)
    if not sequences:
        raise DataError("an empty batch: collate wants at least one sequence")
    ids = np.concatenate([s.ids for s in sequences]).astype(np.int64)
    labels = np.concatenate([s.labels for s in sequences])
    lengths = np.array([len(s.ids) for s in sequences], dtype=np.int64)
    ends = np.cumsum(lengths)
    targets = np.full(ids.size, IGNORE, dtype=np.int64)
    targets[:-1] = np.where(labels[1:], ids[1:], IGNORE)
    targets[ends[lengths > 0] - 1] = IGNORE
    positions = np.arange(ids.size, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        positions=torch.from_numpy(positions),
        rows=[s.place for s in sequences],
    )
