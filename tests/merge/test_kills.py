"""Killed before any of the calls that reach the disk, a merge resumes to the same bytes.

A process that has imported torch forks a child for every kill: the child counts what it asks of the system (open, write, fsync,
rename, ...) and kills itself before call number k. Then the same merge is run again, and every file is compared.
"""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from small_checkpoints import two

KILLS = """
    import json, os, pathlib, random, shutil, signal, sys
    from enginepost.merge import merge
    from enginepost.merge import run, evolution, apply, executor  # now, so that children need not
    recipe, home, kills = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
    NAMES = ("open", "pwrite", "write", "fsync", "rename", "replace", "unlink", "ftruncate", "posix_fallocate", "mkdir")

    def forked(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr)
                os._exit(1)
        return os.waitpid(pid, 0)[1]

    def counted(out, end):
        # Returns how many calls there were, unless killed before number `end`.
        calls = [0]
        def counting(before):
            def call(*args, **keys):
                calls[0] += 1
                if calls[0] == end:
                    os.kill(os.getpid(), signal.SIGKILL)
                return before(*args, **keys)
            return call
        for name in NAMES:
            setattr(os, name, counting(getattr(os, name)))
        merge(recipe, out, threads=1, memory=30e6, shard_bytes=300_000)
        (home / "count").write_text(str(calls[0]))

    def content(out):
        files = {p.name: p.read_bytes() for p in out.iterdir()}
        record = json.loads(files.pop("merge_run.json"))
        for changing in ("finished", "threads"):
            del record[changing]
        return files, record

    assert forked(lambda: counted(home / "out", -1)) == 0
    whole, total = content(home / "out"), int((home / "count").read_text())
    shutil.rmtree(home / "out")
    resumed = 0
    draw = random.Random(0)
    for end in sorted(draw.sample(range(1, total + 1), min(kills, total))):
        status = forked(lambda: counted(home / "out", end))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (end, status)
        def again():
            [report] = merge(recipe, home / "out", threads=2, shard_bytes=300_000)
            (home / "count").write_text(str(report.resumed))
        assert forked(again) == 0, end
        resumed += int((home / "count").read_text()) > 0
        assert content(home / "out") == whole, end
        left = sorted(p.name for p in home.iterdir())
        assert left == ["count", "out"], (end, left)
        shutil.rmtree(home / "out")
    print(total, resumed)
"""


@pytest.mark.parametrize("kills", [20, pytest.param(10_000, marks=pytest.mark.slow)])
def test_killed_before_a_call(kills, family, write, tmp_path: pathlib.Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "home").mkdir()
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLS),
        str(write(two(family, "dare_ties"))),
        str(tmp_path / "home"),
        str(kills),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    total, resumed = map(int, done.stdout.split())
    assert total > 60 and resumed > min(kills, total) / 4  # most of them in the middle of the work
