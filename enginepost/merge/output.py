"""The files of a merge being written: headers first, then tensors at their offsets in any order, several at once, resumable.

Everything is made in `.OUT.partial` beside OUT and renamed at the end. `journal.jsonl` there begins with a fingerprint of the merge
(recipe, options, inputs) and gets a line for every finished tensor with the XXH3-128 of its bytes. A merge that was killed and is
started again with the same fingerprint keeps the tensors whose bytes still have that checksum; with another one it starts anew.
The checksum (XXH3-128) is against torn writes, not against forgers: SHA-256 takes longer than the arithmetic of a linear merge.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from enginepost.checkpoint.atomic import check_space, make_directory, sync_directory, write_bytes, write_json
from enginepost.checkpoint.format import CheckpointError, TensorInfo, make_header
from enginepost.checkpoint.reader import INDEX, SINGLE
from enginepost.checkpoint.writer import plan_shards
from enginepost.merge.registry import MergeError

JOURNAL = "journal.jsonl"


class DiskError(MergeError, CheckpointError):
    """The output could not be written; what is finished stays, for the same merge to go on."""


class Output:
    """Weight files under construction.

    Args:
        directory: where the model will be; it must not exist, or be empty.
        tensors: {name: (dtype, shape)} of all, in the order of the files.
        shard_bytes: most bytes of tensors in a file.
        fingerprint: what makes this merge this merge.
    Attributes:
        partial: the directory worked in. done: {name: XXH3-128} of finished tensors.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        shard_bytes: float,
        fingerprint: str,
    ) -> None:
        self.directory = directory
        self.partial = partial_directory(directory)
        self.done: dict[str, str] = {}
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}
        self._journal = -1
        self._place: dict[str, tuple[int, TensorInfo]] = {}
        self.layout = plan_shards(tensors, shard_bytes)
        metadata = {"format": "pt"}
        headers = {
            file: make_header({name: tensors[name] for name in names}, metadata) for file, names in self.layout.items()
        }
        self._sizes = sizes = {
            file: max((i.end for i in infos.values()), default=len(head)) for file, (head, infos) in headers.items()
        }
        self.total_size = sum(i.end - i.begin for _, infos in headers.values() for i in infos.values())
        make_directory(self.partial)
        earlier = read_journal(self.partial, fingerprint)
        resumed = earlier is not None and all(_size(self.partial / file) == size for file, size in sizes.items())
        if not resumed:
            for path in self.partial.glob("*.safetensors"):
                path.unlink()
            check_space(self.partial, sum(sizes.values()), directory)
        try:
            for file, (header, infos) in headers.items():
                handle = os.open(self.partial / file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._files[file] = handle
                if not resumed:
                    _reserve(handle, sizes[file])
                    self._pwrite(handle, memoryview(header), 0)
                for name, info in infos.items():
                    self._place[name] = (handle, info)
            if resumed and earlier:
                self.done = {name: digest for name, digest in earlier.items() if self._digest(name) == digest}
            lines = [{"fingerprint": fingerprint}, *({"tensor": n, "xxh3_128": d} for n, d in self.done.items())]
            write_bytes(self.partial / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines).encode())
            self._journal = os.open(self.partial / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            self.release()
            raise self._explain(error) from None
        except BaseException:
            self.release()
            raise

    def write(self, name: str, start: int, piece: torch.Tensor) -> memoryview:
        """Write elements from `start` on; returns their bytes."""
        handle, info = self._place[name]
        data = piece.view(torch.uint8).numpy().data if piece.numel() else memoryview(b"")
        try:
            self._pwrite(handle, data, info.begin + start * info.dtype.itemsize)
        except OSError as error:
            raise self._explain(error) from None
        _start_writing(handle, info.begin + start * info.dtype.itemsize, len(data))
        return data

    def finish(self, name: str, digest: str) -> None:
        line = (json.dumps({"tensor": name, "xxh3_128": digest}) + "\n").encode()
        try:
            with self._lock:
                while line:
                    line = line[os.write(self._journal, line) :]
                self.done[name] = digest
        except OSError as error:
            raise self._explain(error) from None

    def close(self) -> None:
        """Bring the weights to the disk and write the index; the directory is not yet renamed."""
        try:
            for handle in self._files.values():
                os.fsync(handle)
        except OSError as error:
            raise self._explain(error) from None
        self.release()
        if list(self.layout) != [SINGLE]:
            weight_map = {name: file for file, names in self.layout.items() for name in names}
            write_json(self.partial / INDEX, {"metadata": {"total_size": self.total_size}, "weight_map": weight_map})

    def publish(self) -> None:
        """Rename the finished directory to its place."""
        try:
            sync_directory(self.partial)
            os.rename(self.partial, self.directory)  # onto nothing or an empty directory
            (self.directory / JOURNAL).unlink()
            sync_directory(self.directory.parent)
        except OSError as error:
            raise DiskError(
                f"{self.directory}: cannot be put in place: {error.strerror}. It is whole in {self.partial}."
            ) from None

    def release(self) -> None:
        """Close the files; what was written stays for a later resume."""
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _digest(self, name: str) -> str:
        handle, info = self._place[name]
        digest = xxhash.xxh3_128()
        for at in range(info.begin, info.end, 1 << 22):
            digest.update(os.pread(handle, min(1 << 22, info.end - at), at))
        return digest.hexdigest()

    @staticmethod
    def _pwrite(handle: int, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(handle, data, offset)
            data, offset = data[count:], offset + count

    def _explain(self, error: OSError) -> DiskError:
        kept = (
            f"{len(self.done)} of {len(self._place)} tensors are finished and kept" if self.done else "nothing was kept"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskError(
                f"{self.directory}: the disk is full ({self.total_size / 1e9:.2f} GB of weights are to be written; {kept}). "
                f"Free some space and run the same merge again, or delete {self.partial} and write to another disk."
            )
        if error.errno == errno.EFBIG:
            largest = max(self._sizes.values())
            return DiskError(
                f"{self.directory}: the file system, or a limit of this process (ulimit -f), takes no file of "
                f"{largest / 1e9:.2f} GB. Write smaller ones with --shard, in GB."
            )
        return DiskError(f"{self.partial}: cannot be written: {error.strerror}; {kept}.")


def partial_directory(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def read_journal(partial: Path, fingerprint: str) -> dict[str, str] | None:
    """{tensor: checksum} of an earlier attempt at the same merge; None if there was none. A line cut short by a kill is left out."""
    try:
        lines = (partial / JOURNAL).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    if not entries or entries[0].get("fingerprint") != fingerprint:
        return None
    return {entry["tensor"]: entry["xxh3_128"] for entry in entries[1:]}


def claim(directory: Path) -> int:
    """Make the directory in which the merge to `directory` is worked on, locked; the handle holds the lock until it is closed.

    Raises: MergeError where another process has it."""
    partial = partial_directory(directory)
    while True:
        make_directory(partial)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(partial)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise MergeError(
                f"{directory}: another process is merging into it. Wait until it is done, or name another directory."
            ) from None
        except FileNotFoundError:
            pass  # another process has just finished or given up
        except OSError:
            return handle  # a file system without locks
        os.close(handle)


def clear(partial: Path) -> None:
    """Remove what an attempt at another merge left there, but for the directory itself, which is locked."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def discard(directory: Path) -> None:
    """Remove what an attempt left."""
    shutil.rmtree(partial_directory(directory), ignore_errors=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


_sync_file_range: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it


def _start_writing(handle: int, offset: int, size: int) -> None:
    """Ask the system to begin with these pages, so that the disk works beside us and little is left for the end."""
    if _sync_file_range is not None and size:
        _sync_file_range(
            handle, ctypes.c_int64(offset), ctypes.c_int64(size), 2
        )  # SYNC_FILE_RANGE_WRITE: start, do not wait


def _reserve(handle: int, size: int) -> None:
    """Take the disk space now, so that a full disk shows before the work."""
    os.ftruncate(handle, size)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
