"""Benchmarks: `python -m bench [NAME ...|all] [--json FILE]`.

A benchmark is one module, `bench/NAME.py`, that has

    def run(options: Options) -> Iterator[Row]:
        yield compare("bf16 T=2048 ...", {"ours": f, "torch": g}, work=flop, unit="GFLOP/s",
                      options=options, roof=roof.gemm(torch.bfloat16))
        yield Row(case="...", metric="peak memory", unit="GB", ours=1.2, peer="trl", peer_value=4.0)

Rows are printed as they come, so a long benchmark shows its progress. The harness adds what is the same for every row of a run
(bench, device, threads, machine, commit, date). Modules of the peers are imported inside `run`; a peer that is not installed is a
row without a peer, never a failure.

How to measure: `compare` calls ours and the peer in turn, in one process, and takes medians; `timing.peak_memory` gives the bytes
that a call adds. A figure stands beside the roof of this very machine, measured in the same run (`bench/roof.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench import timing


@dataclass(frozen=True)
class Options:
    """What the command line says. `rounds`: timed calls of each candidate, at least 7. `threads`: torch is already set to it."""

    threads: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """One figure. `better`: "higher" (a rate) or "lower" (seconds, bytes); it only decides the direction of `ratio`."""

    case: str
    metric: str
    unit: str
    ours: float
    peer: str | None = None
    peer_value: float | None = None
    better: str = "lower"
    roof_percent: float | None = None
    milliseconds: float | None = None  # median time of ours, where the metric is a rate
    spread_percent: float | None = None  # (slowest - fastest of the middle half) / median, of ours

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer: 2.0 = twice as fast, or half the memory."""
        if self.peer_value is None or not self.ours or not self.peer_value:
            return None
        return self.ours / self.peer_value if self.better == "higher" else self.peer_value / self.ours


def compare(
    case: str,
    calls: dict[str, Callable[[], object]],
    *,
    work: float,
    unit: str,
    options: Options,
    roof: float | None = None,
    metric: str = "speed",
) -> Row:
    """Time `calls` (ours first, then at most one peer, by name) in turn and return the rate of each.

    Args: work in bytes or FLOP of one call; unit "GB/s" or "GFLOP/s"; roof in bytes/s or FLOP/s, see `bench.roof`.
    """
    samples = timing.interleave(calls, options.rounds)
    names = list(calls)
    rates = {name: work / samples[name].median for name in names}
    peer = names[1] if len(names) > 1 else None
    return Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=rates[names[0]] / 1e9,
        peer=peer,
        peer_value=rates[peer] / 1e9 if peer else None,
        better="higher",
        roof_percent=100 * rates[names[0]] / roof if roof else None,
        milliseconds=1e3 * samples[names[0]].median,
        spread_percent=100 * samples[names[0]].spread,
    )
