"""Merging on a GPU: bytes per second of the passes over the inputs, beside plain PyTorch."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from bench.gpu import Case
from enginepost.kernels import merge
from enginepost.kernels.merge import Select


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    size = 70000 if small else 1 << 27
    base = torch.randn(size, device=device).bfloat16()
    models = [(base.float() + 0.01 * torch.randn(size, device=device)).bfloat16() for _ in range(3)]
    out = torch.empty_like(base)
    low = int(merge.magnitude_bits(models[0], base)[: 1 << 20].median())
    weights = [0.5, 0.3, 0.2]
    byte_count = base.nbytes

    def plain_sum() -> torch.Tensor:
        return sum(w * m.float() for m, w in zip(models, weights, strict=True)).bfloat16()  # type: ignore[union-attr]

    yield Case(
        f"merge: weighted sum of 3, {size} bf16",
        {"enginepost": lambda: merge.weighted_sum(models, weights, out), "plain PyTorch": plain_sum},
        4 * byte_count, "GB/s",
    )  # fmt: skip

    def gram(inputs: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: merge.gram(inputs, None, np.zeros((len(inputs), len(inputs))))

    yield Case(
        f"merge: inner products of 2 in float64, {size} bf16",
        {"enginepost": gram(models[:2]), "torch, one product in float32": lambda: models[0].float() @ models[1].float()},
        2 * byte_count, "GB/s",
    )  # fmt: skip

    def task_sum(selects: Callable[[], list[Select]], elect: bool) -> Callable[[], object]:
        return lambda: merge.task_sum(base, models, selects(), weights, out, elect=elect, normalize=True)

    kinds: dict[str, tuple[Callable[[], list[Select]], bool]] = {
        "DARE": (lambda: [Select("random", density=0.5, key=i, scale=2.0) for i in range(3)], False),
        "TIES, the thresholds known": (lambda: [Select("magnitude", low=low) for _ in range(3)], True),
    }
    for name, (selects, elect) in kinds.items():
        calls = {"enginepost": task_sum(selects, elect)}
        yield Case(f"merge: {name}, base and 3 models, {size} bf16", calls, 5 * byte_count, "GB/s")
    window = [(low - 256, 512)]
    counts = np.zeros(513, dtype=np.int64)
    calls = {"enginepost": lambda: merge.window_counts(models[0], base, window, counts)}
    yield Case(f"merge: counts of magnitudes in a window, {size} bf16", calls, 2 * byte_count, "GB/s")
