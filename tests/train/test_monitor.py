"""Progress, metrics and the spike watch."""

import json
import pathlib
import random

import pytest

from enginepost.train.monitor import Monitor, SpikeWatch, duration, resident_bytes


def test_spike_watch_speaks_of_spikes_only() -> None:
    rng = random.Random(0)
    watch = SpikeWatch()
    assert [watch.check(rng.lognormvariate(0, 0.3)) for _ in range(300)] == [None] * 300
    advice = watch.check(40.0)
    assert advice is not None and "gradient norm 40" in advice and "learning_rate" in advice


def test_spike_watch_waits_for_a_history_and_bears_zero() -> None:
    watch = SpikeWatch()
    assert watch.check(0.0) is None and watch.check(1e9) is None


def test_duration() -> None:
    assert [duration(s) for s in (0, 42.4, 725, 11220)] == ["0:00", "0:42", "12:05", "3:07:00"]


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = bytearray(random.Random(0).randbytes(1 << 26))
    assert resident_bytes() - before > len(held) * 0.9


def test_plain_lines_and_metrics(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = {"step": 1, "loss": 3.0}
    monitor = Monitor(tmp_path, total=4, step=1, history=[old])
    line = {
        "step": 2, "epoch": 0.5, "loss": 2.5, "grad_norm": 1.25, "learning_rate": 1e-4, "num_tokens": 10,
        "tokens_per_second": 5.0, "memory_gb": 0.5, "elapsed_seconds": 1.0,
    }  # fmt: skip
    monitor.log(line)
    monitor.log({"step": 2, "epoch": 0.5, "eval_loss": 2.75})
    monitor.close()
    out = capsys.readouterr().out
    assert "step 2/4  loss 2.5000  grad_norm 1.25  lr 1.00e-04  5 tok/s  0.5 GB" in out and "left" in out
    assert "step 2  eval_loss 2.7500" in out
    assert [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == monitor.history[1:]
    assert monitor.history[0] == old
