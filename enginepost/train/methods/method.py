"""What a training method is to the loop.

The loop owns the optimizer, the learning rate, clipping, checkpoints, metrics on disk and signals. A method owns its rows, what a
step looks at, the loss and what is measured. In the order in which the loop calls them:

    method = create(recipe)                     rows read, `data` and `total` set; no model yet, so mistakes in data come first
    method.attach(model)                        reference policies, heads; `modules` are trained beside the model
    method.restore(state, tensors)              only when a run resumes: what `state()` and `tensors()` gave
    method.begin(model)                         only when a run does not resume: checks before the first step
    for step = 1, 2, ..., total:
        work = method.step(model, step)         micro-batches of one optimizer step (roll-outs are made here)
        for i: method.loss(model, work, i)      backward, then the update
        method.updated(model, work)             after the update (controllers)
        method.evaluate(model)                  when due
    method.save_result(model, directory)        the run's result

Everything must follow from the recipe, the data, the weights and the step's number, or be part of `state()` and `tensors()`: a
resumed run has the same bits as one that was never stopped.
"""

import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from enginepost.device import fetch
from enginepost.recipe import Recipe
from enginepost.train import weights

Number = float | Tensor
Metrics = dict[str, tuple[Number, Number]]
"""Name -> (sum, count): the mean over a whole step is the sum of sums over the sum of counts, however it was cut. Scalars on the
device stay there until the end of the step: to look at one would wait for the device."""


class MicroBatch(Protocol):
    """What goes through the model at once; an `enginepost.data.Batch` is one."""

    ids: Tensor  # int64 [T], the tokens of the stream
    rows: list[str]  # "file:row" of each sequence, for errors


@dataclass
class Work:
    """One optimizer step.

    count: what the sum of losses is divided by (trained tokens, pairs), over all micro-batches. epoch: passed at its end.
    metrics: of the step as a whole, where a mean over micro-batches would be wrong; they go to metrics.jsonl as they are.
    The tensors of micro-batches are on the model's device, but for those that their class keeps on the host.
    """

    micro_batches: list[Any]  # of MicroBatch
    count: int
    epoch: float
    ends_epoch: bool
    metrics: dict[str, Number] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # what the micro-batches of the step share

    @property
    def tokens(self) -> int:
        return sum(len(b.ids) for b in self.micro_batches)


class Method:
    """Defaults of a method that keeps no state, trains no module of its own and gives the model or adapter as its result."""

    data: str  # hash of the rows: a resumed run must see what the run began with
    total: int  # optimizer steps
    size: str  # what is trained on, for the first line of a run: "18 sequences, 6 for validation"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.device = weights.device_of(recipe)
        self.modules: dict[str, nn.Module] = {}  # trained beside the model; their tensors are kept in checkpoints

    def attach(self, model: Any) -> None:
        """Called once, before the optimizer is made. `model` is in training mode, at the checkpoint's weights if there is one."""

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over `state()` and `tensors()` of a checkpoint, after `attach`; the tensors of `modules` are restored already."""

    def begin(self, model: Any) -> None:
        """Called before the first step of a run that does not resume. Leaves the model in training mode."""

    def step(self, model: Any, number: int) -> Work:
        """What optimizer step `number`, counted from 1, does."""
        raise NotImplementedError

    def loss(self, model: Any, work: Work, index: int) -> tuple[Tensor, Metrics]:
        """(a float64 scalar, this micro-batch's share of the loss of the step; metrics). Backward is the loop's."""
        raise NotImplementedError

    def updated(self, model: Any, work: Work) -> None:
        """Called after the update of a step."""

    def evaluate(self, model: Any) -> dict[str, float] | None:
        """{"eval_loss": ..., "eval_...": ...} on the validation rows, None without any. Leaves the model in training mode."""
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and tensors, as JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """... and as tensors (roll-outs that later updates still use), `modules` excepted."""
        return {}

    def result_name(self) -> str:
        """Name of the result in the run directory."""
        return "model" if self.recipe.lora is None else "adapter"

    def save_result(self, model: Any, directory: pathlib.Path) -> None:
        """Write the result into an existing directory."""
        weights.save_result(self.recipe, model, directory)

    def module_tensors(self) -> dict[str, nn.Parameter]:
        """Parameters of `modules` by name, as the optimizer and checkpoints know them."""
        return {f"{name}.{key}": p for name, m in self.modules.items() for key, p in m.named_parameters()}


def add_metrics(total: Metrics, share: Metrics) -> None:
    """Add the sums and counts of `share` to `total`."""
    for name, pair in share.items():
        before = total.get(name, (0.0, 0.0))
        value, count = (x.detach().double() if isinstance(x, Tensor) else x for x in pair)
        total[name] = (before[0] + value, before[1] + count)


def mean_metrics(total: Metrics, prefix: str = "") -> dict[str, float]:
    """The means. A metric that nothing was counted for is left out (accuracy of a step without a pair)."""
    numbers = iter(fetch([x for pair in total.values() for x in pair]))
    found = {name: (next(numbers), next(numbers)) for name in total}
    return {f"{prefix}{n}": value / count for n, (value, count) in found.items() if count and not math.isnan(value)}
