"""Files that appear whole or not at all: written under a temporary name beside the target, fsynced, renamed.

The temporary name is `.NAME.tmp`: an attempt that was killed leaves one behind, and the next attempt replaces it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from enginepost.checkpoint.format import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_space(directory: Path, size: int, target: Path) -> None:
    """Raise before a long write that cannot fit."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise CheckpointError(
            f"{target}: not enough disk space: {size} bytes are needed ({readable(size)}) and {free} are free "
            f"({readable(free)}). Free some, or write to another disk; nothing was changed."
        )


def readable(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def make_directory(path: Path) -> None:
    """Create a directory and its parents, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made a directory: {error.strerror}.") from None


class AtomicFile:
    """A file being written at any offsets; `commit` puts it in place, `abort` leaves no trace."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        self.path = Path(path)
        self.size = size
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        self._file = -1
        try:
            check_space(self.path.parent, size, self.path)
            self.temporary.unlink(missing_ok=True)
            self._file = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._explain(error) from None

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                done = os.pwrite(self._file, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise self._explain(error) from None

    def sync(self) -> None:
        """Bring the bytes to the disk; a full disk may show only here."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._explain(error) from None

    def commit(self) -> None:
        """Rename into place. The caller has called `sync`, and calls `sync_directory` after."""
        try:
            if not self._is_ours():
                raise CheckpointError(
                    f"{self.path}: another process writes the same file; give each run its own directory."
                )
            os.close(self._file)
            self._file = -1
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise self._explain(error) from None

    def abort(self) -> None:
        if self._file >= 0:
            ours = self._is_ours()
            os.close(self._file)
            self._file = -1
            if ours:
                self.temporary.unlink()

    def _is_ours(self) -> bool:
        """False if another process replaced the temporary file by its own."""
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.temporary))
        except FileNotFoundError:
            return False

    def _explain(self, error: OSError) -> CheckpointError:
        self.abort()
        if error.errno in _FULL:
            return CheckpointError(
                f"{self.path}: the disk is full: {self.size} bytes are needed for this file. "
                "Free some space or write to another disk; what was there before is untouched."
            )
        return CheckpointError(f"{self.path}: cannot be written: {error.strerror}.")


def sync_directory(directory: Path) -> None:
    """Make renames in a directory survive a power cut."""
    file = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def atomic_file(path: str | os.PathLike[str], size: int) -> Iterator[AtomicFile]:
    """An AtomicFile that is in place, durably, when the block ends well, and never was when it does not."""
    file = AtomicFile(path, size)
    try:
        yield file
        file.sync()
        file.commit()
    finally:
        file.abort()
    sync_directory(file.path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a small file atomically; the directory must exist."""
    with atomic_file(path, len(data)) as file:
        file.write_at(data, 0)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write JSON atomically, as Hugging Face formats it: two spaces, keys in order, a newline at the end."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8"))
