"""Where the frozen weights of the blocks live, and how they are there when a block runs.

    resident   in the memory of the device that computes
    host       in pinned host memory; a CPU computes from there, so on it this is `resident`
    disk       in the files of the checkpoint, read again every time; on a CPU embedding and head too, which a GPU keeps

Streamed weights pass through a few slots, each as large as the largest blob (`enginepost.model.blob`). While block i computes, a
thread fills the slot of the block that comes next in the direction of travel:

    forward     0 1 2 ... L-1            next after the last: L-2 when gradients are recorded, else 0 (another forward)
    backward    L-1 ... 1 0              recomputation and gradients of a block use the same visit; next after the first: 1

A slot may be filled again when another block has been entered, since a block's results, forward or backward, are complete before
another begins; with a GPU "complete" is an event on its stream. Blobs never change, so nothing is ever written back, and what a
block computes does not depend on where its weights came from: the losses are the same to the last bit.

Without activation checkpointing a block's operations keep their weights for the backward pass. `Stream.by_reference` makes them
keep (block, place) instead, and the backward pass enters the block once more.

No GPU has run the GPU half (pinned memory, a side stream, events); the tests run it on a device whose copies arrive as late as they
may.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from enginepost.checkpoint import Checkpoint, CheckpointError
from enginepost.checkpoint.reader import Source
from enginepost.model.blob import BlobLayout

Residency = Literal["resident", "host", "disk"]
SLOTS = 2  # one in use, one being filled


class WeightsError(CheckpointError):
    """Frozen weights could not be read in mid-run. What is being trained is untouched."""


def place(
    blocks: Sequence[nn.Module], layouts: Sequence[BlobLayout], device: torch.device, weights: Residency, slots: int
) -> "Stream | None":
    """Give the blocks the weights of their linear layers. Returns the stream that feeds them, None where all are resident."""
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    files = {piece.file for layout in layouts for piece in layout.pieces}
    sources = {file: Source(file) for file in sorted(files)}
    for block in blocks:
        forget(block)
    if weights == "disk":
        stream = Stream(blocks, layouts, lambda i, blob: layouts[i].read(sources, blob), device, slots)
        weakref.finalize(stream, _close, sources)
        return stream
    pinned = weights == "host" and device.type != "cpu"
    blobs = []
    for block, layout in zip(blocks, layouts, strict=True):
        blob = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
        layout.read(sources, blob)
        if not pinned:
            give(block, layout.views(blob.to(device)))
        blobs.append(blob)
    _close(sources)
    return Stream(blocks, layouts, lambda i, blob: blobs[i], device, slots, staged=False) if pinned else None


class StoredTable:
    """A `[rows, columns]` matrix that stays in its file, of a model on a CPU: the embedding, the head. It is read when it is asked
    for, and freed when it is used up, so the head is in memory only while the loss is made.

    Raises: WeightsError where it cannot be read any more.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
        self.name, self.shape, self.dtype = name, torch.Size(checkpoint.shape(name)), dtype
        self._stored, self._offset = checkpoint.dtype(name), checkpoint.offset(name)
        self._source = Source(checkpoint.file(name))
        weakref.finalize(self, self._source.close)

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 `[T]` -> `[T, columns]`."""
        wanted, place = ids.unique(return_inverse=True)
        found = torch.empty(len(wanted), self.shape[1], dtype=self.dtype)
        for i, row in enumerate(wanted.tolist()):
            self._read(row, found[i])
        return found[place]

    def parts(self, rows: int) -> Iterator[Tensor]:
        """`rows` rows after the other, fewer in the last part; a thread reads the next one meanwhile. A part is overwritten when the
        one after the next is asked for."""
        buffers = [torch.empty(min(rows, self.shape[0]), self.shape[1], dtype=self.dtype) for _ in range(2)]

        def read(first: int) -> Tensor:
            part = buffers[first // rows % 2][: self.shape[0] - first]
            self._read(first, part)
            return part

        with ThreadPoolExecutor(1, "enginepost-head") as reader:
            coming = reader.submit(read, 0)
            for first in range(rows, self.shape[0] + rows, rows):
                part = coming.result()
                if first < self.shape[0]:
                    coming = reader.submit(read, first)
                yield part

    def whole(self) -> Tensor:
        """All of it, new."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self._read(0, out)
        return out

    def _read(self, row: int, out: Tensor) -> None:
        try:
            self._source.read_into(self._offset + row * self.shape[1] * self._stored.itemsize, self._stored, out)
        except CheckpointError as error:
            raise _lost(self.name, error) from None


def _lost(what: str, error: CheckpointError) -> WeightsError:
    return WeightsError(
        f"the frozen weights of {what} cannot be read any more: {error} What is being trained is not affected; put the file back "
        "as it was and resume the run."
    )


def _close(sources: Mapping[Path, Source]) -> None:
    for source in sources.values():
        source.close()


def forget(block: nn.Module) -> None:
    """Linear layers without a weight: no parameter any more, but an attribute that is set when the weight is there."""
    for linear in block.children():
        if "weight" in linear._parameters:
            del linear._parameters["weight"]
            linear.weight = None  # type: ignore[assignment]


def give(block: nn.Module, weights: Mapping[str, Any]) -> None:
    """Set the weight of each linear layer of a block."""
    for name, weight in weights.items():
        getattr(block, name).weight = weight


@dataclasses.dataclass
class _Slot:
    """buffer: on the device; staging: pinned, where a file is read on its way to a GPU; free: recorded when the last block that used
    the slot had been given all its work."""

    buffer: Tensor
    staging: Tensor | None
    holds: int | None = None
    filled: "Future[Any] | None" = None
    free: Any = None


@dataclasses.dataclass(frozen=True)
class _Reference:
    """A tensor saved for the backward pass that is a view of a block's blob."""

    block: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class Stream:
    """Brings the weights of each block as it is entered.

    Args: fetch(i, blob) puts blob i (uint8, host memory) into `blob` and returns None, or returns the blob that it has already.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], layouts: Sequence[BlobLayout],
        fetch: Callable[[int, Tensor], Tensor | None], device: torch.device, slots: int = SLOTS, staged: bool = True,
    ) -> None:  # fmt: skip
        """staged: `fetch` fills what it is given, which for a GPU is pinned host memory beside each slot."""
        self._blocks, self._layouts, self._fetch, self._device = list(blocks), list(layouts), fetch, device
        nbytes = max(layout.nbytes for layout in layouts)
        gpu = device.type != "cpu"
        self._api: Any = None
        self._copies: Any = None
        if gpu:
            self._api = torch.get_device_module(device)
            self._copies = self._api.Stream(device)

        def slot() -> _Slot:
            staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if gpu and staged else None
            return _Slot(torch.empty(nbytes, dtype=torch.uint8, device=device), staging)

        self._slots = [slot() for _ in range(min(slots, len(self._blocks)))]
        self._here: int | None = None  # the block that was entered last
        self._step = 1
        # One thread: blobs are read in the order in which they are asked for. It ends with the executor.
        self._reader = ThreadPoolExecutor(1, "enginepost-weights")

    @property
    def nbytes(self) -> int:
        """Of the slots: device memory, and where files are read for a GPU as much pinned host memory."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def enter(self, index: int) -> None:
        """Block `index` is about to run: its weights are there when this returns, and those of the next are on their way.

        Raises: WeightsError when they cannot be read.
        """
        if index == self._here:
            # Forward came to the last block and backward begins there, or backward to the first and forward begins.
            return
        before, self._here = self._here, index
        last = len(self._blocks) - 1
        if before is not None:
            self._release(before)
            self._step = 1 if index > before else -1
        turn = {0: 1, last: -1 if torch.is_grad_enabled() else 1}
        step, route, at = self._step, [index], index
        while len(route) < len(self._slots):
            step = turn.get(at, step)
            at = (at + step) % len(self._blocks)
            if at in route:
                break
            route.append(at)
        for wanted in route:
            self._request(wanted, route)
        slot = self._slot_of(index)
        assert slot is not None and slot.filled is not None
        try:
            ready = slot.filled.result()
        except CheckpointError as error:
            slot.holds, self._here = None, None
            raise _lost(f"block {index}", error) from None
        if ready is not None:
            self._api.current_stream(self._device).wait_event(ready)
        give(self._blocks[index], self._layouts[index].views(slot.buffer))

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == index), None)

    def _release(self, index: int) -> None:
        """Block `index` has been given all its work: whoever fills its slot next waits for that."""
        slot = self._slot_of(index)
        if slot is not None and self._copies is not None:
            slot.free = self._api.Event()
            slot.free.record(self._api.current_stream(self._device))

    def _request(self, index: int, route: Sequence[int]) -> None:
        """See that `index` is in a slot or on its way to one that no block on the route needs."""
        slot = self._slot_of(index)
        if slot is not None and not (slot.filled is not None and slot.filled.done() and slot.filled.exception()):
            return
        slot = slot or next(slot for slot in self._slots if slot.holds not in route)
        if slot.holds is not None:
            give(self._blocks[slot.holds], dict.fromkeys(self._layouts[slot.holds].linears))
        slot.holds = index
        slot.filled = self._reader.submit(
            _fill, slot, index, self._layouts[index].nbytes, self._fetch, self._api, self._copies
        )

    @contextlib.contextmanager
    def by_reference(self, index: int) -> Iterator[None]:
        """Inside, operations that keep a weight of block `index` for the backward pass keep only where it is."""
        slot = self._slot_of(index)
        assert slot is not None
        ours = slot.buffer.untyped_storage().data_ptr()

        def pack(t: Tensor) -> Tensor | _Reference:
            if t.device != self._device or t.untyped_storage().data_ptr() != ours:
                return t.detach()  # an output of the node that keeps it would keep the node alive
            return _Reference(index, t.dtype, int(t.storage_offset()), t.shape, t.stride())

        def unpack(kept: Tensor | _Reference) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            self.enter(kept.block)
            there = self._slot_of(kept.block)
            assert there is not None
            return there.buffer.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _fill(
    slot: _Slot, index: int, nbytes: int, fetch: Callable[[int, Tensor], Tensor | None], api: Any, copies: Any
) -> Any:  # in the thread
    """Put blob `index` into the slot; returns the event after which it is on the device, None on a CPU."""
    target = slot.buffer if slot.staging is None else slot.staging
    if slot.staging is not None and slot.filled is not None:
        copies.synchronize()  # the copy out of this staging buffer, from its last use
    blob = fetch(index, target[:nbytes])
    if copies is None:
        assert blob is None
        return None
    with api.stream(copies):
        if slot.free is not None:
            copies.wait_event(slot.free)
        slot.buffer[:nbytes].copy_(target[:nbytes] if blob is None else blob, non_blocking=True)
        ready = api.Event()
        ready.record(copies)
    return ready
