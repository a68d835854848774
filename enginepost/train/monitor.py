"""What a person sees of a run, and what is kept of it: progress, `metrics.jsonl`, TensorBoard, advice on spikes.

Each line of `metrics.jsonl` is one JSON object with names that TRL users know: step, epoch, loss, entropy, grad_norm, learning_rate,
num_tokens, tokens_per_second, eval_loss; and memory_gb (resident memory of the process; on a GPU the most that its tensors have
taken, and host_memory_gb beside it), elapsed_seconds (of this process, since its first step began). Tokens are real ones: there is
no padding to count.
"""

import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections import deque
from typing import Any

from enginepost.errors import EnginepostError


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory_used(device: Any) -> dict[str, float]:
    """What a line of metrics says of memory, in GB; device: the run's torch.device."""
    host = resident_bytes() / 1e9
    if device.type == "cpu":
        return {"memory_gb": host}
    import torch

    return {"memory_gb": torch.get_device_module(device).max_memory_allocated(device) / 1e9, "host_memory_gb": host}


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class SpikeWatch:
    """Gradient norms of the last steps; a norm far above them is worth a word.

    The z-score is taken of log(norm), whose spread over a run is near normal, against the last `window` steps.
    """

    def __init__(self, window: int = 50, threshold: float = 5.0) -> None:
        self.norms: deque[float] = deque(maxlen=window)
        self.threshold = threshold

    def check(self, norm: float) -> str | None:
        """Advice when `norm` is a spike, else None; then remember it."""
        advice = None
        value = math.log(max(norm, 1e-30))
        if len(self.norms) >= 20:
            mean = statistics.fmean(self.norms)
            spread = max(statistics.pstdev(self.norms), 0.1)
            z = (value - mean) / spread
            if z > self.threshold:
                advice = (
                    f"gradient norm {norm:.3g} is {z:.0f} standard deviations above that of the last {len(self.norms)} steps "
                    f"({math.exp(mean):.3g}). One spike is clipped and passes; if more follow or the loss climbs, look at these "
                    "rows, lower learning_rate, or lengthen warmup_ratio"
                )
        self.norms.append(value)
        return advice


class Monitor:
    """Progress on the terminal (a bar where there is one, plain lines elsewhere) and the metrics on disk."""

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        total: int,
        step: int,
        history: list[dict[str, Any]],
        tensorboard: bool = False,
    ) -> None:
        self.total, self.first = total, step
        self.history = list(history)
        self.start = time.perf_counter()
        self._file = open(directory / "metrics.jsonl", "a", encoding="utf-8")
        self._board_directory = directory / "tensorboard"
        self._board_class = _summary_writer() if tensorboard else None
        self._board: Any = None  # opened at the first metrics: a run that fails before leaves nothing
        self._bar: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            self._open_bar()

    def _open_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("[bold]{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}"),
            expand=True,
        )
        self._task = self._bar.add_task("", total=self.total, completed=self.first, line="")
        self._bar.start()

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Keep one line of metrics, which has at least `step`."""
        self.history.append(metrics)
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._board_class is not None:
            self._board = self._board or self._board_class(str(self._board_directory), purge_step=self.first + 1)
            for name, value in metrics.items():
                if name not in ("step", "epoch"):
                    group = "eval" if name.startswith("eval_") else "train"
                    self._board.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, metrics["step"])
        evaluated = next((name for name in ("eval_loss", "eval_reward") if name in metrics), None)
        if evaluated:
            self.say(f"step {metrics['step']}  {evaluated} {metrics[evaluated]:.4f}")
        else:
            self._show(metrics)

    def _show(self, m: dict[str, Any]) -> None:
        done = m["step"] - self.first
        left = (time.perf_counter() - self.start) / done * (self.total - m["step"])
        line = (
            f"loss {m['loss']:.4f}  grad_norm {m['grad_norm']:.3g}  lr {m['learning_rate']:.2e}  "
            f"{m['tokens_per_second']:.0f} tok/s  {m['memory_gb']:.1f} GB  {duration(left)} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=m["step"], line=line)
        else:
            print(f"step {m['step']}/{self.total}  {line}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EnginepostError(
            "tensorboard: true needs the package tensorboard: pip install 'enginepost[tensorboard]'"
        ) from None
    return SummaryWriter
