"""Write safetensors as a stream: names and shapes first, then the tensors in any order, whole or in parts, then `close`.

Memory does not grow with the model: a tensor's bytes go to their place in the file as they come. Files are written under temporary
names and renamed at `close`, so a reader sees the old checkpoint or the new one. Shards are named as Hugging Face names them
(`model-00001-of-00003.safetensors`, `model.safetensors.index.json`); one that fits is `model.safetensors` alone.

Replacing a sharded checkpoint takes several renames. The old index goes first and the new one comes last, so that a process killed
in between leaves a directory that readers refuse, never one that mixes two models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from enginepost.checkpoint.atomic import (
    AtomicFile,
    atomic_file,
    check_space,
    make_directory,
    sync_directory,
    write_json,
)
from enginepost.checkpoint.format import NAME_OF_DTYPE, CheckpointError, TensorInfo, make_header, tensor_bytes
from enginepost.checkpoint.reader import INDEX, SINGLE, is_plain_name, nearest

Declared = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def plan_shards(tensors: Declared, shard_bytes: float) -> dict[str, list[str]]:
    """File name -> tensor names, filled in the given order; a tensor larger than a shard has one to itself."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


class Writer:
    """A checkpoint being written.

    Args:
        directory: where; it is created if need be. Weights that it holds (`model*.safetensors`) are replaced at `close`.
        tensors: {name: (dtype, shape)} of everything that will be written.
        shard_bytes: the most bytes of tensors in a file.
        metadata: strings for each file's header; `{"format": "pt"}` is what transformers asks for.
        layout: {file name: tensor names} instead of `shard_bytes`, to keep the sharding of another checkpoint.
    Raises:
        CheckpointError: at once if the disk has no room; later, naming the tensor, for a wrong name, dtype, shape, part, or one that
            was never written.

    Use it as a context manager: leaving it by an exception aborts, and nothing is left behind; leaving it otherwise closes it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        tensors: Declared,
        *,
        shard_bytes: float = 5e9,
        metadata: Mapping[str, str] | None = {"format": "pt"},
        layout: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        make_directory(self.directory)
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
        _check_declared(tensors, self.directory)
        self._layout = dict(layout) if layout is not None else plan_shards(tensors, shard_bytes)
        _check_layout(self._layout, tensors, self.directory)
        self._place: dict[str, tuple[AtomicFile, TensorInfo]] = {}
        self._missing: dict[str, list[tuple[int, int]]] = {}  # element ranges not yet written
        self._files: list[AtomicFile] = []
        headers = {
            file: make_header({name: tensors[name] for name in names}, metadata) for file, names in self._layout.items()
        }
        self.total_size = sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())
        check_space(
            self.directory, self.total_size + sum(len(header) for header, _ in headers.values()), self.directory
        )
        try:
            for file, (header, infos) in headers.items():
                size = max((info.end for info in infos.values()), default=len(header))
                target = AtomicFile(self.directory / file, size)
                self._files.append(target)
                target.write_at(header, 0)
                for name, info in infos.items():
                    self._place[name] = (target, info)
                    count = (info.end - info.begin) // info.dtype.itemsize
                    self._missing[name] = [(0, count)] if count else []
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, tensor: torch.Tensor, start: int | None = None) -> None:
        """Write a tensor, or with `start` the part of it that begins at that element of the flattened tensor.

        Args:
            name: declared name.
            tensor: of the declared dtype, on any device; the whole shape, or any shape when it is a part.
            start: element offset of the part.
        """
        if name not in self._place:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} was not declared; {nearest(name, list(self._place))}."
            )
        file, info = self._place[name]
        where = f"{file.path}: tensor {name!r}"
        if tensor.dtype != info.dtype:
            raise CheckpointError(f"{where}: declared as {info.dtype}, and {tensor.dtype} came.")
        if start is None and tuple(tensor.shape) != info.shape:
            raise CheckpointError(f"{where}: declared with shape {list(info.shape)}, and {list(tensor.shape)} came.")
        begin = start or 0
        if not self._take(name, begin, begin + tensor.numel()):
            raise CheckpointError(
                f"{where}: elements {begin} to {begin + tensor.numel()} are outside the shape {list(info.shape)} or already written."
            )
        if tensor.numel():
            file.write_at(_bytes(tensor), info.begin + begin * info.dtype.itemsize)

    def _take(self, name: str, begin: int, end: int) -> bool:
        """Mark elements [begin, end) as written; False if they were not all waiting."""
        ranges = self._missing[name]
        if begin == end:
            return True
        for i, (low, high) in enumerate(ranges):
            if low <= begin and end <= high:
                ranges[i : i + 1] = [(a, b) for a, b in ((low, begin), (end, high)) if a < b]
                return True
        return False

    def close(self) -> None:
        """Check that all was written, bring it to the disk and put it in place."""
        unwritten = [name for name, ranges in self._missing.items() if ranges]
        if unwritten:
            self.abort()
            raise CheckpointError(
                f"{self.directory}: {len(unwritten)} of {len(self._missing)} declared tensors were not written in full, "
                f"the first is {unwritten[0]!r}; nothing was changed."
            )
        try:
            for file in self._files:
                file.sync()
            if not self._sharded and not (self.directory / INDEX).exists():
                self._files[0].commit()  # one rename: the old file or the new one
            else:
                (self.directory / INDEX).unlink(missing_ok=True)
                sync_directory(self.directory)
                for file in self._files:
                    file.commit()
                if self._sharded:
                    weight_map = {name: file for file, names in self._layout.items() for name in names}
                    write_json(
                        self.directory / INDEX, {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
                    )
        finally:
            self.abort()
        for path in self.directory.iterdir():  # shards of what was replaced
            if _WEIGHTS.fullmatch(path.name) and path.name not in self._layout:
                path.unlink()
        sync_directory(self.directory)

    @property
    def _sharded(self) -> bool:
        return list(self._layout) != [SINGLE]

    def abort(self) -> None:
        """Remove what was written; files already in place stay."""
        for file in self._files:
            file.abort()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file atomically. The directory must exist; metadata defaults to `{"format": "pt"}`."""
    path = Path(path)
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _check_declared(declared, path)
    header, infos = make_header(declared, {"format": "pt"} if metadata is None else metadata)
    with atomic_file(path, len(header) + sum(info.end - info.begin for info in infos.values())) as file:
        file.write_at(header, 0)
        for name, info in infos.items():
            if info.end > info.begin:
                file.write_at(_bytes(tensors[name]), info.begin)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _check_declared(tensors: Declared, where: Path) -> None:
    for name, (dtype, shape) in tensors.items():
        if dtype not in NAME_OF_DTYPE:
            raise CheckpointError(
                f"{where}: tensor {name!r}: safetensors has no dtype for {dtype}; known: {list(NAME_OF_DTYPE)}."
            )
        if name == "__metadata__" or any(n < 0 for n in shape):
            raise CheckpointError(f"{where}: tensor {name!r} of shape {list(shape)} cannot be stored.")


def _check_layout(layout: Mapping[str, list[str]], tensors: Declared, where: Path) -> None:
    placed = [name for names in layout.values() for name in names]
    if len(placed) != len(tensors) or set(placed) != set(tensors):
        raise CheckpointError(f"{where}: the layout places {len(placed)} tensors and {len(tensors)} were declared.")
    for file in layout:
        if not is_plain_name(file):
            raise CheckpointError(f"{where}: {file!r} is not a plain .safetensors file name.")
