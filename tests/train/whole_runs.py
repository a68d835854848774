"""What tests read of a run directory, and how they stop a run: two runs are the same when every bit of the result is and all that
was measured is, but for time and memory."""

import json
import os
import pathlib
import signal
from typing import Any

import pytest
import torch

import enginepost.train.loop as loop
from enginepost.checkpoint import Checkpoint

TIMELESS = ("tokens_per_second", "memory_gb", "elapsed_seconds")  # what differs from run to run


def metrics(run: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]


def timeless(run: str | pathlib.Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMELESS} for line in metrics(run)]


def weights_of(run: str | pathlib.Path) -> dict[str, torch.Tensor]:
    """Every tensor of the result, adapter or model and what lies beside it."""
    found: dict[str, torch.Tensor] = {}
    for result in ("adapter", "model"):
        for file in sorted(pathlib.Path(run, result).glob("*.safetensors")):
            checkpoint = Checkpoint(file)
            assert not found.keys() & set(checkpoint.names)
            found |= {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    return found


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def assert_same_run(a: str | pathlib.Path, b: str | pathlib.Path) -> None:
    assert_same_bits(weights_of(a), weights_of(b))
    assert timeless(a) == timeless(b)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of the given step (counted in this process)."""
    done = 0
    original = loop.optimizer_step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        done += 1
        if done == steps:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "optimizer_step", step)
