"""The weights of one block's linear layers as one contiguous, immutable run of bytes: a blob, copied as a whole or not at all.

    [qkv: q packed | q scales | k packed | ... ][o: ...][gate_up: ...][down: ...]        every piece begins at a multiple of 64

A matrix in 4 bits has two pieces (codes, float32 scales), or four with double quantisation (codes, 8-bit scales, nested scales,
their code table). A matrix in the model's dtype has one; matrices that make a fused layer between them lie end to end, so that the
layer is one view. `blob_layout` says where in which file each piece comes from; norms and biases are small and not in here.

`enginepost.model.layout.block_bytes` gives the size of a blob from the config alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from enginepost.checkpoint import Checkpoint, is_quantized, read_quantized
from enginepost.checkpoint.reader import Source
from enginepost.kernels.lora import Matrix, Weight
from enginepost.kernels.nf4 import NF4Weight
from enginepost.model.layout import ALIGNMENT, Entry, layout
from enginepost.model.spec import ModelSpec


@dataclasses.dataclass(frozen=True)
class Piece:
    """`count` elements, in `file` at byte `offset` as dtype `stored`; in the blob at byte `start` as `dtype`."""

    file: Path
    offset: int
    stored: torch.dtype
    start: int
    dtype: torch.dtype
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def view(self, blob: Tensor) -> Tensor:
        return blob[self.start : self.start + self.nbytes].view(self.dtype)


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix in 4 bits: pieces codes, scales and with double quantisation the nested scales and their code; see NF4Weight."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, int]
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    offset: float

    @property
    def kind(self) -> str:
        """ "nf4", "nf4-double", "fp4" or "fp4-double"."""
        return self.quant_type + ("-double" if len(self.pieces) > 2 else "")

    def view(self, blob: Tensor) -> NF4Weight:
        packed, absmax, *nested = (piece.view(blob) for piece in self.pieces)
        return NF4Weight(
            packed, absmax, self.shape, self.blocksize, self.quant_type, self.dtype,
            nested_absmax=nested[0] if nested else None, nested_code=nested[1] if nested else None, offset=self.offset,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PlainMatrix:
    """A matrix, or several one below the other, in the model's dtype."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, int]

    def view(self, blob: Tensor) -> Tensor:
        first = self.pieces[0]
        return blob[first.start : first.start + math.prod(self.shape) * first.dtype.itemsize].view(first.dtype).view(
            self.shape
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BlobLayout:
    """Where the weights of a block's linear layers ("qkv", "o", "gate_up", "down") are in its blob."""

    linears: Mapping[str, tuple[PackedMatrix | PlainMatrix, ...]]
    nbytes: int

    @property
    def matrices(self) -> list[PackedMatrix | PlainMatrix]:
        return [part for parts in self.linears.values() for part in parts]

    @property
    def pieces(self) -> list[Piece]:
        return [piece for part in self.matrices for piece in part.pieces]

    def views(self, blob: Tensor) -> dict[str, Weight]:
        """The weights, as views of a blob (uint8 `[nbytes]`, on any device)."""
        found: dict[str, Weight] = {}
        for name, parts in self.linears.items():
            weights: tuple[Matrix, ...] = tuple(part.view(blob) for part in parts)
            found[name] = weights[0] if len(weights) == 1 else weights
        return found

    def read(self, sources: Mapping[Path, Source], blob: Tensor) -> None:
        """Fill a blob (on the CPU) from the files. Raises CheckpointError for a file that cannot be read or has changed."""
        for piece in self.pieces:
            sources[piece.file].read_into(piece.offset, piece.stored, piece.view(blob))


def blob_layout(checkpoint: Checkpoint, spec: ModelSpec, index: int, dtype: torch.dtype) -> BlobLayout:
    """The blob of block `index`: matrices in 4 bits as they are, others in `dtype`.

    Raises: CheckpointError for a damaged description of a matrix in 4 bits.
    """
    prefix = f"blocks.{index}."
    entries: dict[str, list[Entry]] = {}
    for entry in layout(spec):
        if entry.linear and entry.parameter.startswith(prefix):
            entries.setdefault(entry.parameter.removeprefix(prefix).removesuffix(".weight"), []).append(entry)
    linears: dict[str, tuple[PackedMatrix | PlainMatrix, ...]] = {}
    at = 0
    for name, parts in entries.items():
        found: list[PackedMatrix | PlainMatrix] = []
        for entry in parts:
            part: PackedMatrix | PlainMatrix
            if is_quantized(checkpoint, entry.name):
                part = _packed(checkpoint, entry, _aligned(at))
            else:
                last = found[-1] if found else None
                begin = at if isinstance(last, PlainMatrix) else _aligned(at)
                part = _plain(checkpoint, entry, begin, dtype, last if isinstance(last, PlainMatrix) else None)
                if isinstance(last, PlainMatrix):
                    found.pop()
            found.append(part)
            at = part.pieces[-1].start + part.pieces[-1].nbytes
        linears[name] = tuple(found)
    return BlobLayout(linears, _aligned(at))


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _plain(
    checkpoint: Checkpoint, entry: Entry, start: int, dtype: torch.dtype, above: PlainMatrix | None
) -> PlainMatrix:
    """The matrix, below `above` where there is one."""
    name, (rows, columns) = entry.name, entry.shape
    piece = Piece(checkpoint.file(name), checkpoint.offset(name), checkpoint.dtype(name), start, dtype, rows * columns)
    if above is None:
        return PlainMatrix((piece,), (rows, columns))
    return PlainMatrix((*above.pieces, piece), (above.shape[0] + rows, columns))


def _packed(checkpoint: Checkpoint, entry: Entry, start: int) -> PackedMatrix:
    weight = read_quantized(checkpoint, entry.name)
    pieces = []
    tensors = {"": weight.packed, ".absmax": weight.absmax}
    if weight.nested_absmax is not None and weight.nested_code is not None:
        tensors |= {".nested_absmax": weight.nested_absmax, ".nested_quant_map": weight.nested_code}
    for end, tensor in tensors.items():
        name = entry.name + end
        piece = Piece(checkpoint.file(name), checkpoint.offset(name), tensor.dtype, start, tensor.dtype, tensor.numel())
        pieces.append(piece)
        start = _aligned(start + piece.nbytes)
    rows, columns = weight.shape
    return PackedMatrix(
        tuple(pieces), (rows, columns), weight.blocksize, weight.quant_type, weight.dtype, weight.offset
    )
