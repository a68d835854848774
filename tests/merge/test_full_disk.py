"""A disk that fills up, wherever it does: a clear error, what is finished is kept, and the same merge goes on to the same bytes."""

import errno
import hashlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
from small_checkpoints import two

from enginepost.errors import EnginepostError
from enginepost.merge import merge

Write = Callable[[str], pathlib.Path]


def digest(directory: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.glob("*.safetensors"))}


class Full:
    """An os function that fails as on a full disk, after `good` calls for which `counts` holds."""

    def __init__(self, name: str, good: int = 0, counts: Callable[..., bool] = lambda *args: True) -> None:
        self.before, self.good, self.counts = getattr(os, name), good, counts

    def __call__(self, *args):  # type: ignore[no-untyped-def]
        if self.counts(*args):
            self.good -= 1
            if self.good < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return self.before(*args)


def large(handle: int, data: memoryview, offset: int) -> bool:
    return len(data) > 1000  # tensors, no small files


def side_file(handle: int, data: memoryview, offset: int) -> bool:
    return "config" in os.readlink(f"/proc/self/fd/{handle}")


def unsupported(*args: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not supported")  # as NFS and some others say


@pytest.mark.parametrize(
    ("function", "good", "counts", "kept"),
    [
        ("pwrite", 9, large, True),  # while tensors are written
        ("fsync", 2, lambda handle: True, True),  # what the file system took on credit: header and journal were fine
        ("write", 3, lambda handle, data: b"xxh3" in bytes(data), True),  # a line of the journal
        ("pwrite", 0, side_file, True),  # config.json and its like, when the weights are finished
        ("posix_fallocate", 0, lambda *args: True, False),
    ],
)
def test_fills_up(function, good, counts, kept, family, write, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    recipe = write(two(family, "dare_ties"))
    merge(recipe, tmp_path / "whole", shard_bytes=200_000)
    if function != "posix_fallocate":
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, Full(function, good, counts))
        with pytest.raises(EnginepostError, match="the disk is full") as raised:
            merge(recipe, tmp_path / "out", threads=1, shard_bytes=200_000)
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    if not kept:
        assert not partial.exists() and "nothing was kept" in str(raised.value)
        return
    assert "run the same merge again" in str(raised.value).lower()
    finished = len((partial / "journal.jsonl").read_text().splitlines()) - 1
    assert finished >= 2
    [report] = merge(recipe, tmp_path / "out", shard_bytes=200_000)
    assert report.resumed == finished
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not partial.exists() and not (tmp_path / "out" / "journal.jsonl").exists()


def test_no_space_is_said_before_the_first_byte(family, write, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EnginepostError, match=r"not enough disk space: .* 1000 are free"):
        merge(write(two(family, "ties")), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


LIMITED = """
    import resource, sys
    from enginepost.errors import EnginepostError
    from enginepost.merge import merge
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # the system's own error, EFBIG
    try:
        merge(sys.argv[1], sys.argv[2])
    except EnginepostError as error:
        print(error)
    merge(sys.argv[1], sys.argv[2], shard_bytes=330_000)
"""


def test_a_file_too_large_for_the_file_system(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    out = tmp_path / "out"
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), str(write(two(family, "ties"))), str(out)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True,
    ).stdout  # fmt: skip
    assert "takes no file of" in said and "--shard" in said
    assert len(list(out.glob("*.safetensors"))) >= 3


# A file system of its own, too small, that reserves nothing beforehand; then it grows.
MOUNTED = """
    import errno, json, os, pathlib, shutil, subprocess, sys
    from enginepost.errors import EnginepostError
    from enginepost.merge import merge
    recipe, disk = sys.argv[1], pathlib.Path(sys.argv[2])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")
    os.posix_fallocate = unsupported
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 30)  # another process takes the space afterwards
    try:
        merge(recipe, disk / "out", threads=1)
    except EnginepostError as error:
        print(error)
    finished = len((disk / ".out.partial" / "journal.jsonl").read_text().splitlines()) - 1
    subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
    [report] = merge(recipe, disk / "out")
    assert report.resumed == finished >= 1, (report.resumed, finished)
    merge(recipe, disk / "whole")
    same = [(disk / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert same[0] == same[1]
"""


def test_a_small_file_system_that_grows(family, write, tmp_path) -> None:  # type: ignore[no-untyped-def]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here, to mount a file system in")
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(MOUNTED), str(write(two(family, "ties"))), str(tmp_path / "disk")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout and "tensors are finished and kept" in done.stdout
