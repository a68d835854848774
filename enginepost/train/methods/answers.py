"""What methods that compare or grade answers have in common: rows, plan, evaluation, and the check before the first step.

A bin of pairs holds two answers of max_length tokens. The loss of a step is the mean over its records (pairs, graded answers),
whatever their lengths; `count` is their number.
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.data import plan_batches
from enginepost.data.preferences import Kind
from enginepost.device import fetch, placed
from enginepost.errors import EnginepostError
from enginepost.recipe import Recipe
from enginepost.train.answer_rows import AnswerRows, load_answers
from enginepost.train.answers import mean_row
from enginepost.train.methods.method import Method, Metrics, Work, add_metrics, mean_metrics
from enginepost.train.schedule import Plan


class AnswerMethod(Method):
    """Rows and plan. A method of this kind gives `share_of_loss`."""

    kind: Kind = "paired"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.mean_row: Tensor | None = None  # of a head that does not train
        self.rows, self.validation = self.load()
        self.data = self.rows.fingerprint()
        self.bin = recipe.max_length * self.rows.each
        self.plan = Plan(self.rows.lengths, recipe, bin_length=self.bin)
        self.total = self.plan.total
        noun = {"paired": "pairs", "unpaired": "graded answers", "stepwise": "solutions"}[self.kind]
        self.size = f"{len(self.rows)} {noun}, {0 if self.validation is None else len(self.validation)} for validation"

    def load(self) -> tuple[AnswerRows, AnswerRows | None]:
        return load_answers(self.recipe, self.kind, share=getattr(self.recipe, "share_prompts", False))

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        """As `loss`, of rows of the training or of the validation side."""
        raise NotImplementedError

    def mean_logits(self, model: Any, rows: Tensor) -> Tensor | None:
        """`[N, H]` -> the mean of each row's logits over the vocabulary, float32 `[N]`; None with a final softcap."""
        mean = self.mean_row if self.mean_row is not None else mean_row(model)
        if self.recipe.lora is not None:
            self.mean_row = mean
        return None if mean is None else rows.detach().float() @ mean

    def step(self, model: Any, number: int) -> Work:
        todo = self.plan.step(number)
        return self.work(self.rows, todo.micro_batches, todo.epoch, todo.ends_epoch)

    def work(
        self, rows: AnswerRows, micro_batches: list[list[int]], epoch: float = 0.0, ends_epoch: bool = False
    ) -> Work:
        """The step that looks at these records."""
        batches = [placed(rows.batch(m), self.device) for m in micro_batches]
        return Work(batches, sum(map(len, micro_batches)), epoch, ends_epoch)

    def planned(self, rows: AnswerRows) -> list[list[int]]:
        """Micro-batches that see each record once."""
        r = self.recipe
        return plan_batches(rows.lengths, batch_size=r.batch_size, max_length=self.bin, packing=r.packing)

    def loss(self, model: Any, work: Work, index: int) -> tuple[Tensor, Metrics]:
        return self.share_of_loss(model, self.rows, work, index)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float] | None:
        if self.validation is None:
            return None
        plan = self.planned(self.validation)
        work = self.work(self.validation, plan)
        model.eval()
        losses, metrics = [], Metrics()
        for index in range(len(plan)):
            loss, share = self.share_of_loss(model, self.validation, work, index)
            losses.append(loss)
            add_metrics(metrics, share)
        model.train()
        return {"eval_loss": sum(fetch(losses)), **mean_metrics(metrics, "eval_")}


def check_start(found: float, expected: float, what: str, dtype: torch.dtype, exact: bool = True) -> None:
    """Before the first update policy and reference are one, so the loss is known (ln 2 for sigmoid). Raises EnginepostError.

    exact: reference and policy go through the same products, so nothing but a mistake can set them apart; log-probabilities from a
    cache were made in other micro-batches, which bfloat16 notices."""
    bound = 1e-6 if exact or dtype == torch.float32 else 1e-2
    if not abs(found - expected) <= bound * max(1.0, abs(expected)):
        raise EnginepostError(
            f"before the first step the loss of {what} is {found:.7f}, and must be {expected:.7f}, as the policy still is its own "
            "reference: something computes the two differently, so training would optimise the wrong thing. If the cache of "
            "reference log-probabilities may be stale, delete it ($ENGINEPOST_CACHE, ~/.cache/enginepost/reference)"
        )
