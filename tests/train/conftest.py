"""Rows and recipes for the trainer's tests: a tiny model, ragged rows, a few steps."""

import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

WORDS = "the quick brown fox jumps over a lazy dog what is six times seven forty two one token at time".split()


def write_rows(path: pathlib.Path, count: int = 24, seed: int = 0) -> pathlib.Path:
    """Question and answer rows of ragged lengths."""
    rng = random.Random(seed)
    with open(path, "w") as f:
        for _ in range(count):
            prompt, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised copies are kept with the test's other files."""
    monkeypatch.setenv("ENGINEPOST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def recipe(tmp_path: pathlib.Path, tiny_model_dir: pathlib.Path, rows: pathlib.Path) -> Callable[..., dict[str, Any]]:
    """A recipe as a mapping; keyword arguments set keys."""

    def make(**keys: Any) -> dict[str, Any]:
        return {
            "model": str(tiny_model_dir),
            "data": str(rows),
            "output": str(tmp_path / "run"),
            "max_length": 128,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "max_steps": 6,
            "learning_rate": 1e-3,
            "dtype": "fp32",
            "lora": {"r": 4, "alpha": 8},
            "save_every": 100,
            **keys,
        }

    return make
