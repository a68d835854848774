"""`enginepost kernels`: what it lists, tests and times, and that a wrong result fails it."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from enginepost import cli, kernels
from enginepost.kernels import backend, selftest


def test_every_family_is_tested_on_every_instruction_set():
    verdicts = list(selftest.run())
    assert all(v.passed for v in verdicts), [v for v in verdicts if not v.passed]
    done = {(v.family, v.isa, v.dtype) for v in verdicts}
    isas = backend.info()["isas"]
    assert done == {(f, i, d) for f in kernels.FAMILIES for i in isas for d in ("float32", "bfloat16")}
    assert set(selftest.DOES) == set(kernels.FAMILIES) and "portable" in isas


def test_the_instruction_set_is_switched_and_put_back():
    before = backend.info()["isa"]
    for isa in backend.info()["isas"]:
        with backend.use_isa(isa):
            assert backend.info()["isa"] == isa
    assert backend.info()["isa"] == before
    with pytest.raises(ValueError, match=r"set_cpu_isa: sse9 is not one of .*portable"), backend.use_isa("sse9"):
        pass


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_a_wrong_result_fails(family, monkeypatch):
    make = selftest.CASES[family]

    def wrong(dtype, large):
        case = make(dtype, large)

        def ours(*inputs):
            first, *rest = case.ours(*inputs)
            first = first.clone()
            first.view(-1)[3] += 0.05 * first.abs().max()
            return [first, *rest]

        return dataclasses.replace(case, ours=ours)

    monkeypatch.setitem(selftest.CASES, family, wrong)
    assert not any(selftest.check(family, dtype, "").passed for dtype in selftest.DTYPES)


def test_a_failure_is_an_error_with_the_family_and_the_instruction_set(monkeypatch):
    bad = selftest.Verdict("glu", backend.info()["isa"], "bfloat16", 0.25, False)
    monkeypatch.setattr(selftest, "run", lambda: iter([bad]))
    result = CliRunner().invoke(cli.app, ["kernels"])
    assert "FAILED bfloat16" in result.stdout
    assert str(result.exception) == (
        f"results differ from the reference: glu on {bad.isa}, bfloat16, by 0.25 of the largest"
    )


def test_the_command_takes_seconds_and_exits_with_0():
    command = [sys.executable, "-m", "enginepost.cli", "kernels"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"}, timeout=120)
    assert run.returncode == 0, run.stderr
    for word in (*kernels.FAMILIES, *backend.info()["isas"]):
        assert word in run.stdout
    assert "FAILED" not in run.stdout


def test_the_table_of_speeds(monkeypatch):
    monkeypatch.setattr(selftest, "CASES", {f: lambda d, _, m=m: m(d, False) for f, m in selftest.CASES.items()})
    rows = list(selftest.speeds(rounds=1))
    assert [r.family for r in rows[::2]] == list(kernels.FAMILIES)
    assert all(r.milliseconds > 0 and r.rate > 0 and r.peer_milliseconds > 0 for r in rows)
    result = CliRunner().invoke(cli.app, ["kernels", "--bench"])
    assert result.exit_code == 0 and "torch SDPA" in result.stdout and "GFLOP/s" in result.stdout


def test_large_cases_agree_too():
    """What the speed table times is the same maths as what the test compares."""
    for family in ("norm", "rope", "glu"):
        case = selftest.CASES[family](torch.float32, True)
        for ours, reference in zip(case.ours(*case.inputs), case.reference(*case.inputs), strict=True):
            assert torch.allclose(ours, reference, atol=1e-3), family
