"""What this machine can do at best, measured, not looked up: the roofs that other benchmarks are percentages of."""

import functools
from collections.abc import Iterator

import torch

from bench import Options, Row, timing


@functools.cache
def copy() -> float:
    """Bytes per second (read + written) of a memory copy much larger than the caches, with all threads."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = timing.interleave({"copy": lambda: target.copy_(source)}, 9)["copy"].median
    return 2 * source.nbytes / best


@functools.cache
def gemm(dtype: torch.dtype) -> float:
    """FLOP per second of torch's matrix product in a layer's layout (x @ W^T): 2048 x 2048 x 2048, or 512 x 512 x 512 where that
    would take seconds (bfloat16 on a CPU without an instruction for it)."""
    rate = _gemm(dtype, 512, rounds=3)
    return rate if rate < 10e9 else _gemm(dtype, 2048, rounds=9)


def _gemm(dtype: torch.dtype, n: int, rounds: int) -> float:
    x, w, y = (torch.randn(n, n).to(dtype) for _ in range(3))
    return 2 * n**3 / timing.interleave({"gemm": lambda: torch.mm(x, w.T, out=y)}, rounds)["gemm"].median


@functools.cache
def widening_wins() -> bool:
    """True where torch's bfloat16 product is slower than half its float32 one: there a peer is given float32 to multiply with."""
    return _gemm(torch.float32, 512, rounds=3) > 2 * _gemm(torch.bfloat16, 512, rounds=3)


def run(options: Options) -> Iterator[Row]:
    yield Row("copy 256 MB float32", "bandwidth", "GB/s", copy() / 1e9, better="higher", roof_percent=100.0)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        yield Row(f"GEMM 2048^3 {name}", "speed", "GFLOP/s", gemm(dtype) / 1e9, better="higher", roof_percent=100.0)
