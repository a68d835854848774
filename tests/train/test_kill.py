"""SIGKILL at random moments: the run directory is whole after each, and the resumed run ends with the bits of an unbroken one."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

MakeRecipe = Callable[..., dict[str, Any]]
DRIVER = pathlib.Path(__file__).with_name("kill_driver.py")


def kill_often(recipe: dict[str, Any], directory: pathlib.Path, kills: int, seed: int) -> dict[str, int]:
    file = directory / "recipe.json"
    file.write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(file), str(kills), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


@pytest.mark.parametrize("flavour", ["lora", "full"])
def test_killed_at_random_moments(recipe: MakeRecipe, tmp_path: pathlib.Path, flavour: str) -> None:
    """A checkpoint at every step, so that many of the kills land in a save."""
    keys: dict[str, Any] = (
        {"lora": {"r": 4, "alpha": 8, "dropout": 0.2}} if flavour == "lora" else {"lora": None, "dtype": "bf16"}
    )
    report = kill_often(recipe(**keys, max_steps=14, save_every=1, gradient_accumulation=1), tmp_path, 10, seed=1)
    assert report["kills"] >= 10 and report["saves_hit"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("flavour", ["lora", "full"])
def test_killed_a_hundred_times(recipe: MakeRecipe, tmp_path: pathlib.Path, flavour: str, seed: int) -> None:
    keys: dict[str, Any] = {} if flavour == "lora" else {"lora": None, "dtype": "bf16"}
    report = kill_often(recipe(**keys, max_steps=40, save_every=2), tmp_path, 100, seed)
    assert report["kills"] == 100 and report["saves_hit"] > 3
