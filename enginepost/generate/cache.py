"""Keys and values of running sequences, in pages: per layer `[pages, PAGE, Hk, D]`.

Row s of `table` names the pages that hold sequence s: its token t is in page table[s, t // PAGE], at t % PAGE. Sequences may share
pages: a fork takes the same ones and copies a page only when it is about to write into it (the last, half-filled one), so G
completions of a prompt cost its keys and values once. Pages that no token reached are never touched, hence never resident.
"""

import numpy as np
import torch
from torch import Tensor

from enginepost.device import sent
from enginepost.kernels.attention import paged_attention
from enginepost.model.transformer import Transformer

PAGE = 32  # tokens


class KVCache:
    """A cache for `slots` sequences of at most `capacity` tokens each. `used[s]` tokens of slot s are stored."""

    keeps = True

    def __init__(self, model: Transformer, slots: int, capacity: int) -> None:
        spec = model.spec
        blocks = -(-capacity // PAGE)
        pages = slots * blocks
        shape = (pages, PAGE, spec.kv_heads, spec.head_dim)

        def store() -> list[Tensor]:
            return [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in spec.layers]

        self.keys, self.values = store(), store()
        self.slots, self.capacity, self.device = slots, capacity, model.device
        self.used = np.zeros(slots, dtype=np.int64)
        self.table = np.zeros((slots, blocks), dtype=np.int32)
        self.holders = np.zeros(pages, dtype=np.int32)  # sequences that have the page
        self._free = list(range(pages - 1, -1, -1))
        self._rows = torch.empty(0, dtype=torch.int64, device=self.device)
        self._seqused = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self._table = self._tensor(self.table)

    def extend(self, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Make room for counts[s] new tokens in every slot (0 where a slot rests).

        Returns: (cu_seqlens int32 `[slots+1]`, positions int64 `[T]`) of a stream that holds them slot by slot.
        """
        ends = np.concatenate([[0], np.cumsum(counts)])
        slot = np.repeat(np.arange(self.slots), counts)
        positions = np.arange(ends[-1]) - ends[slot] + self.used[slot]
        if (self.used + counts > self.capacity).any():
            raise ValueError(f"KVCache: a slot of {self.capacity} tokens would hold {(self.used + counts).max()}")
        before = self.table.copy()
        for s in np.flatnonzero(counts):
            self._own_last_page(int(s))
            for block in range(-(-int(self.used[s]) // PAGE), -(-int(self.used[s] + counts[s]) // PAGE)):
                self.table[s, block] = self._new_page()
        self.used += counts
        self._seqused = self._tensor(self.used.astype(np.int32))
        if not np.array_equal(before, self.table):
            self._table = self._tensor(self.table)
        self._rows = self._tensor(self.table[slot, positions // PAGE].astype(np.int64) * PAGE + positions % PAGE)
        return self._tensor(ends.astype(np.int32)), self._tensor(positions)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, window: int, softcap: float, scale: float
    ) -> Tensor:  # fmt: skip
        """Store the new tokens' k, v `[T, Hk, D]`; let q `[T, H, D]` attend to all stored ones of its sequence -> `[T, H, D]`."""
        keys, values = self.keys[layer], self.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._rows, k)
        values.flatten(0, 1).index_copy_(0, self._rows, v)
        return paged_attention(
            q, keys, values, self._table, self._seqused, cu_seqlens, window=window, softcap=softcap, scale=scale
        )[0]

    def fork(self, source: int, target: int) -> None:
        """Slot `target` goes on from what slot `source` holds."""
        self.clear(target)
        self.table[target], self.used[target] = self.table[source], self.used[source]
        np.add.at(self.holders, self._pages(target), 1)
        self._table = self._tensor(self.table)

    def clear(self, slot: int) -> None:
        """Slot `slot` is empty, and the pages that only it had are free."""
        for page in self._pages(slot):
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self._free.append(int(page))
        self.used[slot] = 0

    def _pages(self, slot: int) -> np.ndarray:
        return self.table[slot, : -(-int(self.used[slot]) // PAGE)].copy()

    def _new_page(self) -> int:
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def _own_last_page(self, slot: int) -> None:
        """A half-filled last page that others have too is copied, as the next token goes there."""
        block, filled = divmod(int(self.used[slot]), PAGE)
        if not filled or self.holders[self.table[slot, block]] == 1:
            return
        shared = int(self.table[slot, block])
        self.holders[shared] -= 1
        self.table[slot, block] = own = self._new_page()
        for store in (self.keys, self.values):
            for layer in store:
                layer[own, :filled] = layer[shared, :filled]

    def _tensor(self, x: np.ndarray) -> Tensor:
        return sent(torch.from_numpy(x.copy()), self.device)


def token_bytes(model: Transformer) -> int:
    """Bytes that one token of one sequence takes in a cache."""
    spec = model.spec
    return 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * model.dtype.itemsize
