"""Methods pretrain and sft: cross entropy of the trained tokens, over packs of bins.

A step is `gradient_accumulation` micro-batches of `batch_size` bins; its count is the number of trained tokens in all of them.
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.data import plan_batches
from enginepost.device import fetch, placed, sent
from enginepost.errors import EnginepostError
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.recipe import Recipe
from enginepost.train.methods.method import Method, Metrics, Work
from enginepost.train.objectives.sft import sft_loss
from enginepost.train.rows import Rows, fingerprint, load_rows
from enginepost.train.schedule import Plan


class Sft(Method):
    """Rows, plan and loss of supervised fine-tuning and continued pre-training."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.rows, self.validation = load_rows(recipe)
        self.data = fingerprint(self.rows)
        self.plan = Plan(self.rows.lengths, recipe)
        self.total = self.plan.total
        held = 0 if self.validation is None else len(self.validation)
        self.size = f"{len(self.rows)} sequences, {held} for validation"

    def step(self, model: Any, number: int) -> Work:
        todo = self.plan.step(number)
        return self.work(todo.micro_batches, todo.epoch, todo.ends_epoch)

    def work(
        self, micro_batches: list[list[int]], epoch: float = 0.0, ends_epoch: bool = False, rows: Rows | None = None
    ) -> Work:
        """The step that looks at these rows, by default of the training side. Raises EnginepostError when none of their tokens is
        trained on."""
        batches = [(rows or self.rows).batch(members) for members in micro_batches]
        trained = [(b.targets != -100).nonzero().squeeze(1) for b in batches]
        count = sum(map(len, trained))
        if count == 0:
            places = ", ".join(row for b in batches for row in b.rows)
            raise EnginepostError(f"no token of these rows is trained on: {places}")
        extra = {"trained": [sent(t, self.device) for t in trained]}  # rows of each stream that predict a trained token
        return Work([placed(b, self.device) for b in batches], count, epoch, ends_epoch, extra=extra)

    def planned(self, rows: Rows) -> list[list[int]]:
        """Micro-batches that see each row once."""
        r = self.recipe
        return plan_batches(rows.lengths, batch_size=r.batch_size, max_length=r.max_length, packing=r.packing)

    def loss(self, model: Any, work: Work, index: int) -> tuple[Tensor, Metrics]:
        batch = work.micro_batches[index]
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob, _, entropy = linear_logprob(
            hidden, model.head_table, batch.targets, softcap=model.spec.final_softcap, entropy=True
        )
        trained = len(work.extra["trained"][index])
        return sft_loss(logprob, work.count), {"entropy": (entropy.detach().sum(), trained)}

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float] | None:
        if self.validation is None:
            return None
        model.eval()
        losses, count = [], 0
        for micro in self.planned(self.validation):
            host = self.validation.batch(micro)
            batch = placed(host, self.device)
            hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)
            logprob, _, _ = linear_logprob(hidden, model.head_table, batch.targets, softcap=model.spec.final_softcap)
            losses.append(sft_loss(logprob, 1))
            count += int((host.targets != -100).sum())
        model.train()
        return {"eval_loss": sum(fetch(losses)) / max(count, 1)}
