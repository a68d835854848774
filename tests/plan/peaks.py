"""Whole runs in processes of their own, and the highest of their anonymous resident memory beside what the planner says."""

import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from enginepost.model.architectures import architecture, init_model
from enginepost.plan.memory import PROCESS, step_peak
from enginepost.plan.setup import config_of, setup_of
from enginepost.recipe import load_recipe

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8, "head_dim": 64,
         "num_key_value_heads": 4, "vocab_size": 32_000, "sliding_window": None}  # fmt: skip
TRAIN = "import json, sys, enginepost; enginepost.train(json.loads(sys.argv[1]))"


def peak_of_run(models: pathlib.Path, tokenizer: pathlib.Path, name: str, keys: dict[str, Any]) -> tuple[float, float]:
    """(peak of the anonymous resident memory of a run of two steps, the planner's), in bytes."""
    if not (models / name).exists():
        init_model(models / name, {**architecture(name), **SHAPE}, tokenizer=tokenizer)
    recipe = {
        "model": str(models / name), "data": str(models / "rows.txt"), "method": "pretrain", "max_steps": 2,
        "gradient_accumulation": 1, "max_length": 1024, "output": str(models / f"run{time.monotonic_ns()}"), **keys,
    }  # fmt: skip
    recipe = {k: v for k, v in recipe.items() if v is not None or k == "lora"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ENGINEPOST_CACHE": str(models / "cache")}
    run = subprocess.Popen([sys.executable, "-c", TRAIN, json.dumps(recipe)], env=environment, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)  # fmt: skip
    measured = 0.0
    while run.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{run.pid}/status").read_text()
        except OSError:
            break
        measured = max(
            measured, *(1024.0 * int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")), 0
        )
        time.sleep(0.003)
    said = run.communicate()[0]
    assert run.returncode == 0, said
    checked = load_recipe(recipe)
    return measured, step_peak(setup_of(checked, config_of(checked.model))).total


def close(measured: float, planned: float) -> None:
    print(f"{measured / 1e6:.0f} MB measured, {planned / 1e6:.0f} planned, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.10)
    base = PROCESS["cpu"]
    assert planned - base == pytest.approx(measured - base, rel=0.15, abs=25e6)
