"""The instruction sets that this machine has but does not choose: the tests against float64 once more, with each of them."""

import os
import pathlib
import subprocess
import sys

import pytest

from enginepost.kernels.backend import info

HERE = pathlib.Path(__file__).parent
CHOICES = [isa for isa in ("avx2", "portable") if isa in info()["isas"] and isa != info()["isa"]]


@pytest.mark.skipif("ENGINEPOST_CPU" in os.environ, reason="the instruction set is chosen from outside")
@pytest.mark.parametrize("isa", CHOICES)
def test_against_float64(isa):
    arguments = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "float64 and not logprob",
        str(HERE),
    ]
    run = subprocess.run(
        arguments, env={**os.environ, "ENGINEPOST_CPU": isa}, capture_output=True, text=True, cwd=HERE.parents[1]
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    check = "from enginepost.kernels.backend import info; print(info()['isa'])"
    chosen = subprocess.run(
        [sys.executable, "-c", check], env={**os.environ, "ENGINEPOST_CPU": isa}, capture_output=True, text=True
    )
    assert chosen.stdout.strip() == isa
