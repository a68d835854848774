"""The inputs of one merged tensor, seen chunk by chunk: what the reductions and combinations of merge methods are given.

Methods that look at the tensor as a flat vector get chunks of a multiple of BLOCK elements; methods that work row by row (`rows`)
get whole rows. Nothing that a method computes may depend on where chunks end: sum in blocks, or row by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from enginepost.kernels.merge import BLOCK

CPU = torch.device("cpu")
CHUNK = 1 << 20  # elements, at most: what stays in the caches of a core or two


@dataclass
class Chunk:
    """A piece of every input.

    Attributes:
        start: element offset of the piece in the tensor.
        models: 1-D pieces as stored (do not write to them); base: likewise, or None.
        columns: length of a row.
        x, b, d: the same in float32 (float64 where an input is), shaped `[n]`, or `[rows, columns]` for methods that work on rows;
            d = x - b, or x itself without a base.
    """

    start: int
    models: list[Tensor]
    base: Tensor | None
    columns: int
    rows: bool = False

    @property
    def numel(self) -> int:
        return self.models[0].numel() if self.models else self._base.numel()

    @property
    def _base(self) -> Tensor:
        assert self.base is not None
        return self.base

    @cached_property
    def _wide(self) -> torch.dtype:
        doubles = any(t.dtype == torch.float64 for t in (*self.models, *([] if self.base is None else [self.base])))
        return torch.float64 if doubles else torch.float32

    def _shaped(self, t: Tensor) -> Tensor:
        t = t.to(self._wide)
        return t.view(-1, self.columns) if self.rows else t

    @cached_property
    def x(self) -> list[Tensor]:
        return [self._shaped(t) for t in self.models]

    @cached_property
    def b(self) -> Tensor:
        return self._shaped(self._base)

    @cached_property
    def d(self) -> list[Tensor]:
        return self.x if self.base is None else [x - self.b for x in self.x]


@dataclass
class Inputs:
    """All inputs of one output tensor.

    Attributes:
        name: of the output tensor; with `seed` it keys the random masks.
        models: tensors of one shape, without the base; base: the base's, or None.
        keys: what names each model in the random masks (its place in the recipe).
        chunk: most elements of a chunk.
        spare: bytes that a method may keep between its passes, besides chunks.
        rows: whether chunks hold whole rows; columns: length of a row.
        device: where chunks go (`apply.place` says which it may be).
        shared: facts about the whole model that a method asked for (see `Method.survey`).
    finite: whether a reduction has found out that all inputs are finite, which then need not be looked at again.
    """

    name: str
    models: list[Tensor]
    base: Tensor | None = None
    seed: int = 0
    keys: Sequence[str] = ()
    chunk: int = CHUNK
    spare: float = 0.0
    rows: bool = False
    shared: dict = field(default_factory=dict)
    columns: int = 0
    device: torch.device = CPU
    finite: bool = False

    def __post_init__(self) -> None:
        first = self.models[0] if self.models else self.base
        assert first is not None
        self.shape = tuple(first.shape)
        self.numel = first.numel()
        if not self.columns:
            self.columns = self.shape[-1] if len(self.shape) > 0 else 1
        self.models = [t.reshape(-1) for t in self.models]
        self.base = None if self.base is None else self.base.reshape(-1)

    def chunks(self) -> Iterator[Chunk]:
        if self.rows:
            step = max(1, self.chunk // max(1, self.columns)) * self.columns
        else:
            step = max(1, self.chunk // BLOCK) * BLOCK
        for start in range(0, self.numel, max(1, step)):
            piece = slice(start, min(start + step, self.numel))
            base = None if self.base is None else self.base[piece].to(self.device)
            yield Chunk(start, [t[piece].to(self.device) for t in self.models], base, self.columns, self.rows)

    def random_key(self, model: int) -> int:
        """64 bits from (seed, tensor name, model)."""
        label = self.keys[model] if self.keys else str(model)
        digest = hashlib.blake2b(f"{self.seed}\0{self.name}\0{label}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")
