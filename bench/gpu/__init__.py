"""Benchmarks on a GPU: `python -m bench.gpu [NAME ...] [--json FILE]`, sections of `make gpu-check` (check.py).

A benchmark of kernels is one module, `bench/gpu/NAME.py`, that has

    def cases(device: torch.device, small: bool) -> Iterator[Case]

and, where its kernels have a second path for sm_90a, `WGMMA = True`: each case is then timed with and without it, in turn. Whole
steps and whole runs (trainer, plan, memory) are modules with

    def run(device: torch.device, small: bool, seconds: float) -> Iterator[Row]

which raise where the engine is wrong; `seconds` is about what they may take.

`small`: tiny shapes, called once each and not timed: for compute-sanitizer, and (on the CPU, with the emulated kernels) for the dry
run on a machine without a GPU. A peer that is not importable is left out of `calls`.

How it measures: CUDA events around one call; before each, a buffer larger than the L2 cache is overwritten, which also gives the
host time to queue the call; ours and the peers take turns, in reversed order every second round; the figure is the median of at
least 20.
"""

import os
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from bench import Row


@dataclass(frozen=True)
class Case:
    """One row per peer. calls: ours first; work: bytes or FLOP of one call by `unit` ("GB/s" or "TFLOP/s"), which also names the
    roof: a memory copy, or torch's bfloat16 product."""

    case: str
    calls: dict[str, Callable[[], object]]
    work: float
    unit: str


def milliseconds(calls: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, list[float]]:
    """Times of every call, `rounds` each, sorted."""
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    for call in calls.values():
        for _ in range(3):
            call()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else list(reversed(calls)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            calls[name]()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize()
    return {name: sorted(b.elapsed_time(e) for b, e in pairs) for name, pairs in events.items()}


def through_wgmma(call: Callable[[], object]) -> Callable[[], object]:
    """The call with the kernels for sm_90a, which look at the environment each time."""

    def run() -> object:
        before = os.environ.get("ENGINEPOST_WGMMA")
        os.environ["ENGINEPOST_WGMMA"] = "1"
        try:
            return call()
        finally:
            if before is None:
                del os.environ["ENGINEPOST_WGMMA"]
            else:
                os.environ["ENGINEPOST_WGMMA"] = before

    return run


def rows(case: Case, roofs: dict[str, float], wgmma: bool = False) -> Iterator[Row]:
    """Ours beside each peer (alone where there is none). `roofs`: bytes/s by "GB/s", FLOP/s by "TFLOP/s"; wgmma: ours once more with
    the kernels for sm_90a, beside the peers and beside ours without."""
    ours, *peers = case.calls
    hopper = {f"{ours}, wgmma": through_wgmma(case.calls[ours])} if wgmma else {}
    times = milliseconds({**case.calls, **hopper})
    yield from _rows(case, case.case, times, ours, peers, roofs)
    for name in hopper:
        yield from _rows(case, f"{case.case}, wgmma", times, name, [ours, *peers], roofs)


def _rows(
    case: Case, title: str, times: dict[str, list[float]], ours: str, peers: list[str], roofs: dict[str, float]
) -> Iterator[Row]:
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[case.unit]
    median = statistics.median(times[ours])
    low, high = (times[ours][len(times[ours]) * k // 5] for k in (1, 4))
    rate = case.work / median * 1e3
    for peer in peers or [None]:
        theirs = None if peer is None else case.work / statistics.median(times[peer]) * 1e3 / scale
        yield Row(
            title, "speed", case.unit, rate / scale, peer, theirs, better="higher", roof_percent=100 * rate / roofs[case.unit],
            milliseconds=median, spread_percent=100 * (high - low) / median,
        )  # fmt: skip


def all_of(parts: Iterable[tuple[str, Iterator[Row]]]) -> Iterator[Row]:
    """The rows of every part, by name. One that raises loses its own alone; RuntimeError names such parts in the end."""
    failed = []
    for name, found in parts:
        try:
            yield from found
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        raise RuntimeError("failed: " + "; ".join(failed))


def measure_roofs() -> dict[str, float]:
    """What this card does at best, measured: bytes/s (read and written) of a copy of 1 GB, FLOP/s of torch's bfloat16 8192^3."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    x, w = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    y = torch.empty_like(x)
    times = milliseconds({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(x, w.T, out=y)})
    return {
        "GB/s": 2 * source.nbytes / statistics.median(times["copy"]) * 1e3,
        "TFLOP/s": 2 * 8192**3 / statistics.median(times["product"]) * 1e3,
    }
