"""The driver of `make gpu-check`: sections that fail, run long or are not asked for; what they measure, on the pretended device."""

import json
import pathlib
import sys
import time
from typing import Any

import pretend_gpu
import pytest

from bench.gpu import check, memory, plan
from bench.gpu.training import held_to, setup_of, trainee
from enginepost.model.architectures import architecture
from enginepost.plan.memory import PROCESS


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> check.Machine:
    monkeypatch.setattr(check, "OUT", tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "log").mkdir()
    return check.Machine([sys.executable], tmp_path, {}, True, False)


def test_outcomes_of_commands(machine: check.Machine, tmp_path: pathlib.Path) -> None:
    assert check.run(["-c", "print('hello')"], machine, 20, "a") == "passed"
    assert check.run(["-c", "raise SystemExit(3)"], machine, 20, "a") == "failed (3)"
    assert (tmp_path / "log" / "a.txt").read_text() == "hello\n"


def test_a_command_that_runs_long_is_ended_with_all_that_it_started(
    machine: check.Machine, tmp_path: pathlib.Path
) -> None:
    child = f"import time; time.sleep(4); open({str(tmp_path / 'late')!r}, 'w')"
    begin = time.monotonic()
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert check.run(["-c", code], machine, 1, "a") == "out of time"
    assert time.monotonic() - begin < 3.5
    time.sleep(max(0.0, begin + 5 - time.monotonic()))
    assert not (tmp_path / "late").exists()


def test_a_section_that_dies_keeps_its_rows_and_those_of_others(
    machine: check.Machine, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows"
    check.write(rows / "kernels.json", [{"case": "earlier"}])
    check.write(rows / "plan.json", [{"case": "of another day"}])
    code = f"open({str(rows / 'plan.json')!r}, 'w').write('[{{\"case\": \"first\"}}]'); raise SystemExit(1)"
    lost = check.Command(("-c", "pass"), needs="no-such-program")
    monkeypatch.setattr(check, "commands", lambda section, machine: [check.Command(("-c", code)), lost])
    outcome = check.run_section("plan", machine, 20)
    check.note("plan", outcome, 1.5, machine)
    check.collect()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in found] == ["earlier", "first", "plan, emulated: failed (1)"]


def test_what_each_section_runs(machine: check.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "emulated_module", lambda: pathlib.Path("module.so"))
    for emulated in (True, False):
        card = check.Machine(["python"], pathlib.Path(), {}, emulated, hopper=not emulated)
        found = {s: check.commands(s, card) for s in check.SHARES if s != "build"}
        text = str(found)
        assert ("--pretended" in text) == emulated and ("ENGINEPOST_WGMMA" in text) == (not emulated)
        files = [a for c in found["kernels"] for a in c.arguments if a.endswith(".py")]
        assert files and all(pathlib.Path(f).exists() for f in files)
    assert [len(check.commands(s, card)) for s in ("kernels", "sanitizer")] == [2, 2]


@pytest.mark.parametrize("number", [1, 4, 7, 10], ids=lambda n: str(plan.RECIPES[n][1:]))
def test_a_step_on_a_device_takes_what_was_planned(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pretended device's own count: weights that stream, inputs on the host, everything that torch allocates there."""
    monkeypatch.setattr(plan, "RECIPES", plan.RECIPES[number : number + 1])
    with pretend_gpu.present() as device:
        peak, reserved = plan.run(device, True, 60)
    assert peak.peer_value == pytest.approx(peak.ours, rel=plan.TOLERANCE) and reserved.ours > 0


def test_a_context_that_does_not_fit_is_told_and_a_shorter_one_runs() -> None:
    config = {**architecture("llama-3.1-8b"), **memory.SMALL}
    s = setup_of(config, 128, 8, quantize="nf4")
    with pretend_gpu.present() as device:
        before = pretend_gpu.memory.now
        with trainee(s, config, device) as t:
            used = t.step(128)
            with held_to(PROCESS["cuda"] + before + 1.1 * used.allocated, device):
                assert memory.step_or_none(t, 512) is None
                assert memory.step_or_none(t, 128) is not None
        assert pretend_gpu.memory.now < before + 1000  # a table of frequencies is kept


def test_a_plan_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RECIPES", plan.RECIPES[:1])
    right: Any = plan.planned
    monkeypatch.setattr(plan, "planned", lambda s: 1.2 * right(s))
    with pretend_gpu.present() as device, pytest.raises(RuntimeError, match=r"failed: .*nf4-double"):
        list(plan.run(device, True, 60))
