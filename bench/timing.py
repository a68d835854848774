"""Time and memory of a call."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """Seconds per call. `spread`: distance of the quartiles over the median."""

    median: float
    spread: float


def interleave(calls: dict[str, Callable[[], object]], rounds: int = 7, budget: float = 30.0) -> dict[str, Sample]:
    """Time every call once per round, in turn, so that a slow moment of the machine hits all of them alike.

    The order is reversed in every second round. Calls far below a millisecond are repeated within a round. `budget` in seconds
    bounds extra rounds: at least `rounds`, more while the whole stays under a tenth of it.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, min(1000, int(2e-3 / once)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    while len(next(iter(seconds.values()))) < rounds or (
        time.perf_counter() - began < budget / 10 and len(next(iter(seconds.values()))) < 5 * rounds
    ):
        order = list(calls) if len(next(iter(seconds.values()))) % 2 == 0 else list(reversed(calls))
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                calls[name]()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _sample(values) for name, values in seconds.items()}


def _sample(values: list[float]) -> Sample:
    low, median, high = statistics.quantiles(values, n=4)
    return Sample(median, (high - low) / median)


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes that `call` adds to the resident memory of this process at its peak (Linux).

    Freed heap is handed back first, so that memory left over from earlier work does not hide what the call takes.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
