"""Keys and values of running sequences, in slots of one capacity: per layer `[slots * capacity, Hk, D]`.

Slot s holds rows s * capacity .. s * capacity + used[s]. Attention takes the whole store as its keys and `seqused_k` as their
lengths, so a sequence that joins or leaves moves nothing. Pages that no token reached are never touched, hence never resident.
"""

import numpy as np
import torch
from torch import Tensor

from enginepost.model.transformer import Transformer


class KVCache:
    """A cache for `slots` sequences of at most `capacity` tokens each. `used[s]` tokens of slot s are stored."""

    def __init__(self, model: Transformer, slots: int, capacity: int) -> None:
        spec = model.spec
        shape = (slots * capacity, spec.kv_heads, spec.head_dim)

        def store() -> list[Tensor]:
            return [torch.empty(shape, dtype=model.dtype, device=model.embedding.device) for _ in spec.layers]

        self.keys, self.values = store(), store()
        self.slots, self.capacity, self.device = slots, capacity, model.embedding.device
        self.used = np.zeros(slots, dtype=np.int64)
        self.cu_seqlens_k = torch.arange(slots + 1, dtype=torch.int32, device=self.device) * capacity
        self.seqused_k = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self._rows = torch.empty(0, dtype=torch.int64, device=self.device)

    def extend(self, counts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Make room for counts[s] new tokens in every slot (0 where a slot rests).

        Returns: (cu_seqlens int32 `[slots+1]`, positions int64 `[T]`) of a stream that holds them slot by slot.
        """
        ends = np.concatenate([[0], np.cumsum(counts)])
        slot = np.repeat(np.arange(self.slots), counts)
        positions = np.arange(ends[-1]) - ends[slot] + self.used[slot]
        self.used += counts
        if (self.used > self.capacity).any():
            raise ValueError(f"KVCache: a slot of {self.capacity} tokens would hold {self.used.max()}")
        self.seqused_k = self._tensor(self.used.astype(np.int32))
        self._rows = self._tensor(slot * self.capacity + positions)
        return self._tensor(ends.astype(np.int32)), self._tensor(positions)

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' k, v `[T, Hk, D]`; return all keys and values of the layer."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, self._rows, k)
        values.index_copy_(0, self._rows, v)
        return keys, values

    def _tensor(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)


def token_bytes(model: Transformer) -> int:
    """Bytes that one token of one sequence takes in a cache."""
    spec = model.spec
    return 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * model.embedding.element_size()
