"""Learning rates by hand, and the plan of steps."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from enginepost.recipe import Recipe, load_recipe
from enginepost.train.schedule import Plan, learning_rate

LENGTHS = np.array([30, 20, 64, 5, 40, 12, 33, 8, 50, 27, 64, 10, 3])


def recipe(**keys: Any) -> Recipe:
    return load_recipe({"model": "m", "data": "d", "max_length": 64, "learning_rate": 1.0, **keys})


def rates(total: int, **keys: Any) -> list[float]:
    return [learning_rate(step, total, recipe(**keys)) for step in range(1, total + 1)]


def test_warmup_then_cosine_to_the_floor() -> None:
    lr = rates(100, warmup_ratio=0.03)
    assert lr[:4] == [0.25, 0.5, 0.75, 1.0]
    t = (50 - 3) / 97
    assert lr[50] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2)
    assert all(a > b for a, b in itertools.pairwise(lr[3:])) and 0.1 < lr[-1] < 0.101


def test_linear_and_constant() -> None:
    assert rates(4, schedule="linear", warmup_ratio=0, min_lr_ratio=0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, schedule="constant", warmup_ratio=0.25) == [0.5, 1.0, 1.0, 1.0]


def test_one_step_run_learns() -> None:
    assert rates(1) == [0.5] and rates(1, warmup_ratio=0) == [1.0]


@pytest.mark.parametrize("packing", [True, False])
def test_plan_sees_every_row_once_an_epoch(packing: bool) -> None:
    r = recipe(packing=packing, batch_size=2, gradient_accumulation=2, epochs=2)
    plan = Plan(LENGTHS, r)
    steps = [plan.step(n) for n in range(1, plan.total + 1)]
    assert [s.epoch for s in steps if s.ends_epoch] == [1, 2]
    first = [s for s in steps if s.epoch <= 1]
    seen = [i for s in first for micro in s.micro_batches for i in micro]
    assert sorted(seen) == list(range(len(LENGTHS)))
    assert all(len(s.micro_batches) <= 2 for s in steps) and all(len(s.micro_batches) == 2 for s in first[:-1])
    second = [i for s in steps[len(first) :] for micro in s.micro_batches for i in micro]
    assert sorted(second) == sorted(seen) and second != seen
    if not packing:
        assert len(first) == 4  # 13 rows, 4 to a step


def test_total_follows_epochs_or_max_steps() -> None:
    def total(**keys: Any) -> int:
        return Plan(LENGTHS, recipe(packing=False, gradient_accumulation=2, **keys)).total

    assert total(epochs=1) == 7 and total(epochs=3) == 21
    assert total(epochs=0.5) == 4 and total(epochs=1.1) == 8 and total(epochs=0.01) == 1
    assert total(epochs=3, max_steps=5) == 5


def test_max_steps_may_pass_the_epochs_and_any_step_can_be_asked_first() -> None:
    r = recipe(packing=False, gradient_accumulation=2, max_steps=30)
    later = Plan(LENGTHS, r).step(30)
    plan = Plan(LENGTHS, r)
    assert [plan.step(n) for n in range(1, 31)][-1] == later and later.epoch == pytest.approx(4 + 2 / 7)
