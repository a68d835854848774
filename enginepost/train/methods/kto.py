"""Method kto: answers that were found good or bad, each on its own.

The loss needs KL(policy || reference), which is estimated as TRL does: by the log-ratio of answers that do not belong to their
prompt, here of each record's prompt with the answer of the record after it. The estimate is the mean over the whole optimizer step,
clamped at zero, taken before its first backward pass and without dropout, so that it does not depend on how a step is cut.
Metrics: rewards/chosen, logps/chosen (good answers), rewards/rejected, logps/rejected (bad ones), rewards/margins, kl, entropy.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.data import Sequence
from enginepost.data.pairs import AnswerBatch, collate_answers
from enginepost.data.preferences import Kind
from enginepost.device import fetch, placed, sent
from enginepost.errors import EnginepostError
from enginepost.recipe import Recipe
from enginepost.recipe_offline import KtoRecipe
from enginepost.train.answer_rows import AnswerRows
from enginepost.train.answers import answer_sums, predicting, token_logprobs
from enginepost.train.methods.answers import AnswerMethod, check_start
from enginepost.train.methods.method import Metrics, Work
from enginepost.train.methods.preference import precomputed
from enginepost.train.objectives.preference import kto_loss
from enginepost.train.reference import Reference


class Kto(AnswerMethod):
    """Kahneman-Tversky optimization."""

    recipe: KtoRecipe
    kind: Kind = "unpaired"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        for rows in (self.rows, self.validation):
            if rows is not None and len(rows.preferences) < 2:
                raise EnginepostError(
                    "method kto estimates KL from the answers of other records, so it needs at least 2 of them"
                )
        self.caches: dict[int, Tensor] = {}  # id of a data set -> log-probabilities [n]

    def attach(self, model: Any) -> None:
        self.reference = Reference(self.recipe, model, self.recipe.reference)
        if self.recipe.precompute:
            for rows in (self.rows, self.validation):
                if rows is not None and id(rows.preferences) not in self.caches:
                    self.caches[id(rows.preferences)] = precomputed(self, model, rows)

    def begin(self, model: Any) -> None:
        """Policy and reference are one, so the rewards are zero and the loss is half the mean weight."""
        if self.recipe.reference is not None:
            return
        batch = self.step(model, 1).micro_batches[0]
        model.eval()
        with torch.no_grad():
            ratio = answer_sums(token_logprobs(model, batch)[0], batch) - self.reference_logps(model, self.rows, batch)
        model.train()
        found, expected = (self._losses(self.rows, batch, r, 0.0)[0].mean().item() for r in (ratio, 0 * ratio))
        what = f"{self.recipe.loss} on {', '.join(batch.rows[:4])}"
        check_start(found, expected, what, model.dtype, exact=not self.recipe.precompute)

    def reference_logps(self, model: Any, rows: AnswerRows, batch: AnswerBatch) -> Tensor:
        kept = self.caches.get(id(rows.preferences))
        if kept is not None:
            return sent(kept[batch.members], self.device)
        with self.reference.policy(model) as reference:
            return answer_sums(token_logprobs(reference, batch)[0], batch)

    def mismatched(self, rows: AnswerRows, members: list[int]) -> AnswerBatch:
        """Prompts of these records, each with the answer of the next record, cut at max_length."""
        dataset, sequences = rows.preferences.dataset, []
        for record in members:
            own, other = dataset[record], dataset[(record + 1) % len(dataset)]
            start, answer = int(own.labels.argmax()), other.ids[int(other.labels.argmax()) :]
            ids = np.concatenate([own.ids[:start], answer])[: self.recipe.max_length]
            sequences.append(Sequence(ids, np.arange(len(ids)) >= max(start, 1), own.row, own.source))
        return collate_answers(sequences, members)

    @torch.no_grad()
    def kl(self, model: Any, rows: AnswerRows, work: Work) -> float:
        """The estimate for a step."""
        if self.recipe.loss != "kto":
            return 0.0
        was_training, totals = model.training, []
        model.eval()
        for batch in work.micro_batches:
            other = placed(self.mismatched(rows, batch.members), self.device)
            policy = answer_sums(token_logprobs(model, other)[0], other)
            with self.reference.policy(model) as reference:
                totals.append((policy - answer_sums(token_logprobs(reference, other)[0], other)).sum())
        model.train(was_training)
        return max(0.0, sum(fetch(totals)) / work.count)

    def _losses(self, rows: AnswerRows, batch: AnswerBatch, ratio: Tensor, kl: float) -> tuple[Tensor, Tensor, Tensor]:
        r, all_of_them = self.recipe, rows.preferences.desirable
        assert all_of_them is not None
        desirable = sent(torch.from_numpy(all_of_them[batch.members]), self.device)
        losses, rewards = kto_loss(
            ratio, desirable, kl, beta=r.beta, desirable_weight=r.desirable_weight,
            undesirable_weight=r.undesirable_weight, loss=r.loss,
        )  # fmt: skip
        return losses, rewards, desirable

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        if index == 0:
            work.extra["kl"] = self.kl(model, rows, work)
            work.extra["sums"] = [0.0, 0.0]  # of the rewards of good and bad answers
            work.extra["counts"] = [0, 0]
        batch, kl = work.micro_batches[index], work.extra["kl"]
        reference = self.reference_logps(model, rows, batch)
        hidden = predicting(model, batch)
        logprob, entropy, _ = token_logprobs(model, batch, entropy=True, rows=hidden)
        logits, lengths = self.mean_logits(model, hidden), np.array(batch.lengths)
        policy = answer_sums(logprob, batch)
        losses, rewards, desirable = self._losses(rows, batch, policy - reference, kl)
        metrics: Metrics = {"kl": (kl, 1), "entropy": (entropy.detach().sum(), len(entropy))}
        sums, counts = work.extra["sums"], work.extra["counts"]
        assert rows.preferences.desirable is not None
        right = rows.preferences.desirable[batch.members]
        for side, (name, mask, of) in enumerate((("chosen", desirable, right), ("rejected", ~desirable, ~right))):
            count = int(of.sum())
            metrics[f"rewards/{name}"] = (masked_sum(rewards, mask), count)
            metrics[f"logps/{name}"] = (masked_sum(policy.detach(), mask), count)
            if logits is not None:
                metrics[f"logits/{name}"] = (masked_sum(answer_sums(logits, batch), mask), int(lengths[of].sum()))
            sums[side], counts[side] = sums[side] + masked_sum(rewards, mask), counts[side] + count
        if index + 1 == len(work.micro_batches) and all(counts):
            work.metrics["rewards/margins"] = sums[0] / counts[0] - sums[1] / counts[1]
        return losses.sum() / work.count, metrics


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """x summed where mask is True. (To select first would ask the device how many there are.)"""
    return torch.where(mask, x, 0.0).sum()
