"""`memory` in a recipe, and what a run says that goes out of memory."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import enginepost
from enginepost.errors import EnginepostError
from enginepost.plan.report import settled
from enginepost.recipe import RecipeError, load_recipe
from enginepost.train import budget, loop

Make = Callable[..., dict[str, Any]]
BIG = {"model": "llama-3.2-1b", "data": "rows.jsonl", "max_length": 4096}


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [
        ("40GB", {"checkpointing": False, "weights": "resident"}),
        ("6GB", {"checkpointing": True, "weights": "resident"}),
        ("2.3GB", {"checkpointing": True, "weights": "disk"}),
    ],
)
def test_the_fastest_that_fits_is_chosen(memory: str, wanted: dict[str, Any]) -> None:
    chosen, message = settled(load_recipe({**BIG, "memory": memory}))
    assert {"checkpointing": chosen.checkpointing, "weights": chosen.weights} == wanted
    assert f"weights={wanted['weights']}" in message and f"of {float(memory[:-2]):.2f} GB" in message


def test_what_the_recipe_says_itself_stays() -> None:
    chosen, _ = settled(load_recipe({**BIG, "memory": "40GB", "checkpointing": True, "weights": "disk"}))
    assert chosen.checkpointing and chosen.weights == "disk"


def test_a_budget_that_nothing_fits_is_refused_with_the_plan() -> None:
    with pytest.raises(EnginepostError, match=r"(?s)the run needs .* GB, in .*does not fit in 0\.50 GB"):
        settled(load_recipe({**BIG, "memory": "500MB"}))
    with pytest.raises(EnginepostError, match=r"no run fits: Python, torch and the driver alone take 0\.26 GB"):
        settled(load_recipe({**BIG, "memory": "200MB"}))


@pytest.mark.parametrize("wrong", ["plenty", True, -3, "12 parsecs", "0GB"])
def test_a_memory_that_is_no_amount_is_refused(wrong: Any) -> None:
    with pytest.raises(RecipeError, match="memory: expected auto, or an amount of memory such as 12GB"):
        load_recipe({**BIG, "memory": wrong})


def test_a_run_chooses_and_says_so_and_has_the_same_bits(recipe: Make, tmp_path: pathlib.Path, capsys: Any) -> None:
    enginepost.train(recipe(output=str(tmp_path / "plain")))
    capsys.readouterr()
    enginepost.train(recipe(output=str(tmp_path / "chosen"), memory="30GB"))
    assert "memory: checkpointing=false weights=resident: " in capsys.readouterr().out
    adapters = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("plain", "chosen")]
    assert adapters[0] == adapters[1]


def test_a_run_that_may_be_killed_is_warned_of(recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    big = load_recipe(BIG)
    assert budget.warning(big, 20e9) is None and budget.warning(big, None) is None
    said = budget.warning(big, 2.5e9)
    assert said is not None and "may be killed" in said and "cheapest change that fits" in said
    monkeypatch.setattr(budget, "available", lambda: 1000.0)
    enginepost.train(recipe())
    assert "warning: this run may be killed for want of memory: the run needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")],
)  # fmt: skip
def test_out_of_memory_is_the_plan(recipe: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(
        budget.OutOfMemory, match=r"(?s)^out of memory.* are free now\): the run needs .* GB, in the .*weights"
    ):
        enginepost.train(recipe())


LIMITED = """
import json, resource, sys
import enginepost
from enginepost.train import loop
original = loop.optimizer_step

def step(*args, **kwargs):
    held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + (4 << 20), resource.RLIM_INFINITY))
    return original(*args, **kwargs)

loop.optimizer_step = step
try:
    enginepost.train(json.loads(sys.argv[1]))
finally:
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on a process's memory is Linux's")
def test_a_process_out_of_memory_says_its_plan(recipe: Make, tmp_path: pathlib.Path) -> None:
    """The system itself says no, in the middle of a step."""
    (tmp_path / "long.txt").write_text("seven " * 20_000)
    keys = {"method": "pretrain", "data": str(tmp_path / "long.txt"), "max_length": 16_000, "checkpointing": False}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(recipe(**keys))], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode and "OutOfMemory: out of memory (" in run.stderr, run.stderr[-2000:]
    assert "the run needs" in run.stderr and "activations" in run.stderr


def test_other_errors_stay_what_they_are(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        enginepost.train(recipe())
