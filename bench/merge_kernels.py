"""The primitives of merging, on tensors far larger than the caches, as a share of what mere copying takes.

Every function runs on the calling thread alone and merging gives each thread a tensor of its own, so here each thread has its part
of the elements, a chunk at a time as the executor cuts them. A rate counts inputs and outputs once; the roof is a copy with the same
number of threads (`bench/roof.py`). Peers are the same sums in plain torch, chunk by chunk too.

Reductions read and write nothing, yet stand beside the same roof.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from bench import Options, Row, compare, roof
from enginepost.kernels import merge
from enginepost.merge.tensors import CHUNK

SIZE = 48 << 20  # elements of a tensor
DTYPES = (torch.bfloat16, torch.float32)
ROW = 4096  # columns of DELLA's rows
Work = Callable[[slice], object]  # does the elements of a slice


def in_threads(pool: ThreadPoolExecutor, threads: int, work: Work) -> Callable[[], object]:
    def part(i: int) -> None:
        for start in range(i * SIZE // threads, (i + 1) * SIZE // threads, CHUNK):
            work(slice(start, min(start + CHUNK, (i + 1) * SIZE // threads)))

    return lambda: list(pool.map(part, range(threads)))


def run(options: Options) -> Iterator[Row]:
    with ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for dtype in DTYPES:
            yield from rows(dtype, pool, options)


def rows(dtype: torch.dtype, pool: ThreadPoolExecutor, options: Options) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(SIZE, generator=draw).to(dtype)
    models = [(base.float() + 0.1 * torch.randn(SIZE, generator=draw)).to(dtype) for _ in range(2)]
    out = torch.empty_like(base)
    a, b = models
    width = base.element_size()
    bits = merge.magnitude_bits(a[: 1 << 20], base[: 1 << 20])
    median = int(bits.median())
    cases: dict[str, tuple[float, Work, Work | None]] = {}  # bytes an element, ours, the peer

    def add(name: str, tensors: float, ours: Work, peer: Work | None = None) -> None:
        cases[name] = (tensors * width, ours, peer)

    def magnitude() -> merge.Select:
        return merge.Select("magnitude", low=median, low_skip=0)

    def random() -> merge.Select:
        return merge.Select("random", density=0.5, key=7, scale=2.0)

    def two(at: slice) -> tuple[Tensor, list[Tensor]]:
        return base[at], [a[at], b[at]]

    add(
        "weighted_sum of 2",
        3,
        lambda at: merge.weighted_sum([a[at], b[at]], [0.5, 0.5], out[at]),
        lambda at: plain_sum(a[at], b[at], out[at]),
    )
    add("weighted_sum of 3", 4, lambda at: merge.weighted_sum([base[at], a[at], b[at]], [0.2, 0.4, 0.4], out[at]))
    add(
        "gram of 2 (norms, dot product)",
        2,
        lambda at: merge.gram([a[at], b[at]], None, np.zeros((2, 2))),
        lambda at: plain_gram(a[at], b[at]),
    )
    add("gram of 2 task vectors", 3, lambda at: merge.gram([a[at], b[at]], base[at], np.zeros((2, 2))))
    add("task_sum of 2", 4, lambda at: combine(*two(at), [merge.Select(), merge.Select()], out[at], at.start, False))
    add(
        "task_sum of 2, signs elected",
        4,
        lambda at: combine(*two(at), [merge.Select(), merge.Select()], out[at], at.start, True),
    )
    add(
        "task_sum of 2, by magnitude, signs elected",
        4,
        lambda at: combine(*two(at), [magnitude(), magnitude()], out[at], at.start, True),
    )
    add("task_sum of 2, at random", 4, lambda at: combine(*two(at), [random(), random()], out[at], at.start, False))
    add(
        "task_sum of 2, at random, signs elected",
        4,
        lambda at: combine(*two(at), [random(), random()], out[at], at.start, True),
    )
    add(
        "masked_sums, at random", 2, lambda at: merge.masked_sums(a[at], base[at], random(), at.start, ROW, np.zeros(2))
    )
    add("magnitude_counts", 2, lambda at: merge.magnitude_counts(a[at], base[at], np.zeros((2, 1 << 16), np.int64)))
    add(
        "window_counts",
        2,
        lambda at: merge.window_counts(a[at], base[at], [(median, 1 << 12)], np.zeros(1 + (1 << 12), np.int64)),
    )
    add("nonfinite", 1, lambda at: merge.nonfinite(a[at]))
    for name, (each, ours, peer) in cases.items():
        calls = {"ours": in_threads(pool, options.threads, ours)}
        if peer is not None:
            calls["torch"] = in_threads(pool, options.threads, peer)
        case = f"{name}, {str(dtype).removeprefix('torch.')}"
        yield compare(case, calls, work=each * SIZE, unit="GB/s", options=options, roof=roof.copy())


def combine(
    base: Tensor, models: list[Tensor], selects: list[merge.Select], out: Tensor, start: int, elect: bool
) -> None:
    merge.task_sum(base, models, selects, [0.5, 0.5], out, elect=elect, normalize=True, start=start, columns=ROW)


def plain_sum(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_((a.float() * 0.5).add_(b, alpha=0.5))


def plain_gram(a: Tensor, b: Tensor) -> None:
    x, y = a.double(), b.double()
    _ = x.dot(x), x.dot(y), y.dot(y)
