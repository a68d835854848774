"""Read safetensors checkpoints without owning them: every tensor is a view of the memory-mapped file.

A checkpoint is a directory with `model.safetensors`, a directory with `model.safetensors.index.json` and its shards, or one
`.safetensors` file. The index is `{"metadata": {...}, "weight_map": {tensor name: file name}}`.

Pages come in as they are touched and are the kernel's to take back; `drop(name)` gives a tensor's pages back at once, which keeps a
stream over a large model small. The mapping is private: a write to a view by mistake stays in this process.
A file must not be truncated in place while it is mapped (the system answers with SIGBUS); our own writers rename instead.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from pathlib import Path
from typing import Any

import torch

from enginepost.checkpoint.format import CheckpointError, TensorInfo, parse_json, read_header, tensor_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

CHUNK = 1 << 22  # bytes converted at once
MOST = 1 << 30  # bytes of one read: the system's own limit is 2 GiB

# A private writable mapping of a file larger than memory is refused by default unless it reserves no swap. The constant is in
# `mmap` from Python 3.12 on; the number is Linux's on x86 and ARM.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class _Shard:
    """One mapped file. The map is never closed by hand: tensors that view it keep it alive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file.") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise CheckpointError(f"{path}: is not a regular file; a .safetensors file was expected.")
            self.tensors, self.metadata = read_header(file, path)
            flags = mmap.MAP_PRIVATE | _NORESERVE
            self.map = mmap.mmap(file, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from None
        finally:
            os.close(file)

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        count = tensor_bytes(info.dtype, info.shape) // info.dtype.itemsize
        if count == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        if info.begin % info.dtype.itemsize == 0:  # the map itself begins on a page
            flat = torch.frombuffer(self.map, dtype=info.dtype, count=count, offset=info.begin)
        else:  # the format does not promise alignment, torch needs it
            raw = torch.frombuffer(self.map, dtype=torch.uint8, count=info.end - info.begin, offset=info.begin)
            flat = torch.empty(count, dtype=info.dtype)
            flat.view(torch.uint8).copy_(raw)
        return flat.reshape(info.shape)

    def drop(self, info: TensorInfo) -> None:
        begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if info.end > begin:
            self.map.madvise(mmap.MADV_DONTNEED, begin, info.end - begin)


class Source:
    """A file whose bytes are read, not mapped: it may be truncated, overwritten or unplugged, and that is an error, not a signal.

    It stays open, so that deleting the file or renaming another over it changes nothing here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._seen = self._look()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}.") from None

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._file)

    def read_into(self, offset: int, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Elements of `dtype` from byte `offset` on -> all of `out` (contiguous, on the CPU), converted to its dtype.

        Raises: CheckpointError when the file cannot be read, has become too short, or is not the file that was opened any more.
        """
        flat = out.reshape(-1)
        assert flat.data_ptr() == out.data_ptr() and out.device.type == "cpu"
        if self._look() != self._seen:
            size, was = self._look()[0], self._seen[0]
            what = f"it has {size} bytes and had {was}" if size != was else "its content was written anew"
            raise CheckpointError(f"{self.path}: was changed while it was in use: {what}.")
        if dtype == out.dtype:
            self._fill(offset, flat.view(torch.uint8))
            return
        step = CHUNK // dtype.itemsize
        piece = torch.empty(min(step, flat.numel()), dtype=dtype)
        for start in range(0, flat.numel(), step):
            here = piece[: min(step, flat.numel() - start)]
            self._fill(offset + start * dtype.itemsize, here.view(torch.uint8))
            flat[start : start + step].copy_(here)

    def _fill(self, offset: int, out: torch.Tensor) -> None:
        left = memoryview(out.numpy().data)
        while left:
            try:
                done = os.preadv(self._file, [left[:MOST]], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read at byte {offset}: {error.strerror}.") from None
            if done == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {offset}, {len(left)} bytes too early: it was truncated."
                )
            left, offset = left[done:], offset + done


class Checkpoint:
    """A checkpoint opened for reading: headers checked, data untouched.

    Args:
        path: a directory (single file, or shards with an index), or one `.safetensors` file.
    Attributes:
        path: as given.
        names: tensor names, file by file, in the order of their bytes: the order to stream in.
        metadata: the `__metadata__` strings of all files together.
        files: the files read.
    Raises:
        CheckpointError: a missing, damaged or inconsistent file. The methods raise it too, for a name that is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self._shards: dict[str, _Shard] = {}
        self._where: dict[str, _Shard] = {}
        for shard in _open(self.path):
            self.metadata.update(shard.metadata)
            for name in shard.tensors:
                if name in self._where:
                    raise CheckpointError(f"tensor {name!r} is in both {self._where[name].path} and {shard.path}.")
                self._where[name] = shard
        self.names: list[str] = list(self._where)
        self.files: list[Path] = list(dict.fromkeys(shard.path for shard in self._where.values()))

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __len__(self) -> int:
        return len(self._where)

    def _find(self, name: str) -> tuple[_Shard, TensorInfo]:
        shard = self._where.get(name)
        if shard is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}; {nearest(name, self.names)}.")
        return shard, shard.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name)[1].dtype

    def nbytes(self, name: str) -> int:
        info = self._find(name)[1]
        return info.end - info.begin

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._find(name)[0].path

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file (a copy only if the file misaligns it); it stays valid after the Checkpoint is gone.

        Do not write to it: writes would stay in this process, and `drop` would undo them.
        """
        shard, info = self._find(name)
        return shard.tensor(info)

    def offset(self, name: str) -> int:
        """Where in `file(name)` the bytes of a tensor begin."""
        return self._find(name)[1].begin

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read a tensor into `out`, contiguous, of as many elements, converted to its dtype.

        The bytes are read, not mapped, so no page of the file counts as this process's memory.
        """
        with Source(self.file(name)) as source:
            source.read_into(self.offset(name), self.dtype(name), out)

    def drop(self, name: str) -> None:
        """Give a tensor's pages back to the system. Views stay valid: the next touch reads the file again."""
        shard, info = self._find(name)
        shard.drop(info)


def nearest(name: str, names: list[str]) -> str:
    """ "did you mean ..." for a message; the names closest to one that was not found."""
    import difflib

    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "the nearest are " + ", ".join(close)
    return f"it holds {len(names)} tensors" + (f", the first is {names[0]}" if names else "")


def _open(path: Path) -> list[_Shard]:
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or directory; expected a model directory or a .safetensors file.")
    if not path.is_dir():
        return [_Shard(path)]
    single, index = path / SINGLE, path / INDEX
    if index.exists():
        files = _read_index(index)
        if single.exists() and SINGLE not in files:
            raise CheckpointError(
                f"{path}: holds both {SINGLE} and {INDEX}, which lists other files: two models in one directory. "
                f"Remove one of them, or give the path of the one .safetensors file that you mean."
            )
        return _open_indexed(path, files)
    if single.exists():
        return [_Shard(single)]
    raise CheckpointError(_explain_missing(path))


def _read_index(index: Path) -> dict[str, list[str]]:
    """File name -> tensor names."""
    try:
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}.") from None
    content: Any = parse_json(text, index, "the index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: expected {{"metadata": ..., "weight_map": {{tensor name: file name}}}}.')
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise CheckpointError(
                f"{index}: tensor {name!a} is said to be in {file!a}; only the plain name of a .safetensors file in the "
                "same directory is allowed."
            )
        files.setdefault(file, []).append(name)
    return files


def is_plain_name(file: str) -> bool:
    """A .safetensors file name that cannot lead out of its directory. (A symbolic link behind it is the owner's own: Hugging Face's
    cache is made of them.)"""
    return file.endswith(".safetensors") and file.isprintable() and not any(c in file for c in "/\\:\0")


def _open_indexed(path: Path, files: dict[str, list[str]]) -> list[_Shard]:
    missing = sorted(file for file in files if not os.path.exists(path / file))
    if missing:
        raise CheckpointError(
            f"{path}: the index lists {len(files)} files and {len(missing)} of them are missing ({_some(missing)}); "
            "the download is incomplete."
        )
    shards = []
    for file in sorted(files):
        shard = _Shard(path / file)
        absent = [name for name in files[file] if name not in shard.tensors]
        if absent:
            raise CheckpointError(f"{shard.path}: the index puts {_some(absent)} here, but the file does not hold it.")
        extra = sorted(set(shard.tensors) - set(files[file]))
        if extra:
            raise CheckpointError(
                f"{shard.path}: holds {_some(extra)}, which the index ({INDEX}) does not list here; the two do not belong together."
            )
        shards.append(shard)
    return shards


def _some(names: list[str]) -> str:
    return ", ".join(ascii(name) for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _explain_missing(path: Path) -> str:
    """Why a directory has no weights that we read, and what to do."""
    try:
        files = sorted(os.listdir(path))
    except OSError as error:
        return f"{path}: cannot be listed: {error.strerror}."
    pickles = [
        f
        for f in files
        if f.endswith((".bin", ".pt", ".pth")) and f.startswith(("pytorch_model", "consolidated", "model"))
    ]
    tensors = [f for f in files if f.endswith(".safetensors")]
    if "adapter_config.json" in files or "adapter_model.safetensors" in files:
        return f"{path}: is an adapter, not a model (no {SINGLE}). Give its base model here and this directory as the adapter."
    if tensors:
        return (
            f"{path}: has neither {SINGLE} nor {INDEX}, though it holds {_some(tensors)}. "
            "If it is one of several shards the index is missing: download it; else give the path of the file itself."
        )
    if pickles:
        return (
            f"{path}: has only PyTorch pickles ({_some(pickles)}), which can run code when read. Convert them to safetensors once: "
            f"`from transformers import AutoModelForCausalLM as M; M.from_pretrained('{path}').save_pretrained('OUT')`."
        )
    if any(f.endswith(".gguf") for f in files):
        return f"{path}: has only GGUF files; use the safetensors checkpoint that they were made from."
    return f"{path}: has neither {SINGLE} nor {INDEX}, so there are no weights to read."
