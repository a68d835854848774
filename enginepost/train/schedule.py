"""When what happens: the learning rate of a step, and which rows a step sees.

With t = step - 1 and W warm-up steps of `total`:
    t < W:   lr = peak (t + 1) / (W + 1)                             the first step already learns
    else:    x = (t - W) / (total - W), from 0 towards 1
             cosine    lr = peak (f + (1 - f) (1 + cos(pi x)) / 2)   f = min_lr_ratio, 0.1 by default
             linear    lr = peak (1 - (1 - f) x)
             constant  lr = peak
The order of rows depends only on the seed and the epoch, so a run that resumes at a step needs no more than the step's number.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enginepost.data import plan_batches
from enginepost.recipe import Recipe


def learning_rate(step: int, total: int, recipe: Recipe) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `total`."""
    peak, floor = recipe.peak_learning_rate, recipe.min_lr_ratio
    warmup = math.ceil(recipe.warmup_ratio * total)
    t = step - 1
    if t < warmup:
        return peak * (t + 1) / (warmup + 1)
    x = (t - warmup) / (total - warmup)
    if recipe.schedule == "cosine":
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2)
    if recipe.schedule == "linear":
        return peak * (1 - (1 - floor) * x)
    return peak


@dataclass(frozen=True)
class Step:
    """One optimizer step: micro-batches of sequence indices; `epoch` passed at its end, and whether it ends one."""

    micro_batches: list[list[int]]
    epoch: float
    ends_epoch: bool


class Plan:
    """All optimizer steps of a run, in order. The last step of an epoch may have fewer micro-batches than the others."""

    def __init__(self, lengths: NDArray[np.int64], recipe: Recipe, *, bin_length: int | None = None) -> None:
        """lengths `[n]`: tokens of what is planned as one (a row, a pair); bin_length: tokens of a bin, default max_length."""
        self._lengths, self._recipe = lengths, recipe
        self._bin = bin_length or recipe.max_length
        self._epochs: list[list[Step]] = []
        self._starts = [0]  # first step of every epoch, counted from 0
        self.total = self._count()

    def _count(self) -> int:
        if self._recipe.max_steps is not None:
            return self._recipe.max_steps
        whole = int(self._recipe.epochs)
        while len(self._epochs) < whole:
            self._extend()
        total = self._starts[whole]
        part = self._recipe.epochs - whole
        if part > 0:
            total += max(1, math.ceil(part * len(self._extend())))
        return total

    def _extend(self) -> list[Step]:
        r, epoch = self._recipe, len(self._epochs)
        batches = plan_batches(
            self._lengths, batch_size=r.batch_size, max_length=self._bin, packing=r.packing, seed=r.seed + epoch
        )
        groups = [batches[i : i + r.gradient_accumulation] for i in range(0, len(batches), r.gradient_accumulation)]
        n = len(groups)
        steps = [Step(group, epoch + (i + 1) / n, i + 1 == n) for i, group in enumerate(groups)]
        self._epochs.append(steps)
        self._starts.append(self._starts[-1] + n)
        return steps

    def step(self, number: int) -> Step:
        """Step `number`, counted from 1."""
        while self._starts[-1] < number:
            self._extend()
        epoch = next(e for e in range(len(self._epochs)) if self._starts[e + 1] >= number)
        return self._epochs[epoch][number - 1 - self._starts[epoch]]
