"""Methods of pairs: dpo (with a reference policy), orpo, simpo and cpo (without).

Metrics have TRL's names: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected (sums
over the tokens of an answer; means for orpo and simpo), logits/chosen, logits/rejected (means over vocabulary and trained tokens, of
models without a final softcap), entropy (per trained token), nll_loss.
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.data.pairs import AnswerBatch
from enginepost.device import placed, sent, tensor
from enginepost.recipe import Recipe
from enginepost.recipe_offline import CpoRecipe, DpoRecipe, OrpoRecipe, SimpoRecipe
from enginepost.train.answer_rows import AnswerRows
from enginepost.train.answers import answer_sums, by_answer, predicting, token_logprobs
from enginepost.train.methods.answers import AnswerMethod, check_start
from enginepost.train.methods.method import Metrics, Work
from enginepost.train.objectives.preference import (
    cpo_loss,
    dpo_loss,
    length_desensitised,
    orpo_loss,
    simpo_loss,
    wpo_weights,
)
from enginepost.train.reference import Reference, cache_path, read_cache, write_cache


def pair_metrics(
    chosen: Tensor, rejected: Tensor, policy: Tensor, entropy: Tensor, logits: Tensor | None, batch: AnswerBatch
) -> Metrics:
    """Of rewards `[P]`, log-probabilities of answers `[2P]` (chosen, rejected, chosen, ...), entropies and mean logits `[N]`."""
    pairs = len(chosen)
    ends = policy.detach()
    metrics: Metrics = {
        "rewards/chosen": (chosen.sum(), pairs),
        "rewards/rejected": (rejected.sum(), pairs),
        "rewards/margins": ((chosen - rejected).sum(), pairs),
        "rewards/accuracies": ((chosen > rejected).sum(), pairs),
        "logps/chosen": (ends[0::2].sum(), pairs),
        "logps/rejected": (ends[1::2].sum(), pairs),
        "entropy": (entropy.detach().sum(), len(entropy)),
    }
    if logits is not None:
        sums = answer_sums(logits, batch)
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"logits/{name}"] = (sums[side::2].sum(), sum(batch.lengths[side::2]))
    return metrics


def chosen_tokens(work: Work) -> int:
    """Trained tokens of all chosen answers of a step: what a mean over them divides by."""
    return sum(sum(b.lengths[0::2]) for b in work.micro_batches)


class Dpo(AnswerMethod):
    """Direct preference optimization."""

    recipe: DpoRecipe

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe, DpoRecipe)
        super().__init__(recipe)
        self.caches: dict[int, Tensor] = {}  # id of a data set -> log-probabilities [2n]

    def attach(self, model: Any) -> None:
        self.reference: Reference | None = Reference(self.recipe, model, self.recipe.reference)
        if self.recipe.precompute:
            sides = [self.rows] if self.validation is None else [self.rows, self.validation]
            for rows in sides:
                if id(rows.preferences) not in self.caches:
                    self.caches[id(rows.preferences)] = precomputed(self, model, rows)
            self.reference = None  # its memory is free from here on

    def begin(self, model: Any) -> None:
        """The loss of the first micro-batch has its known value, or the run is refused."""
        if self.recipe.reference is not None:
            return  # another policy: nothing is known of the first loss
        work = self.step(model, 1)
        batch = work.micro_batches[0]
        model.eval()
        with torch.no_grad():
            policy = self.logps(batch, token_logprobs(model, batch)[0])
        model.train()
        reference = self.reference_logps(model, self.rows, batch)
        for name in self.recipe.loss:
            if name != "sft":
                found, expected = (self.pairs_loss(batch, x, reference, {name: 1.0})[0] for x in (policy, reference))
                what = f"{name} on {', '.join(batch.rows[:4])}"
                exact = not self.recipe.precompute
                check_start(found.mean().item(), expected.mean().item(), what, model.dtype, exact)

    def logps(self, batch: AnswerBatch, logprob: Tensor) -> Tensor:
        """Log-probabilities of answers `[2P]`, tokens of the longer one's end weighed by ld_alpha."""
        if self.recipe.ld_alpha is None:
            return answer_sums(logprob, batch)
        each = by_answer(logprob, batch)
        pairs = [length_desensitised(a, b, self.recipe.ld_alpha) for a, b in zip(each[0::2], each[1::2], strict=True)]
        return torch.stack([x for pair in pairs for x in pair])

    def reference_logps(self, model: Any, rows: AnswerRows, batch: AnswerBatch) -> Tensor:
        kept = self.caches.get(id(rows.preferences))
        if kept is not None:
            return sent(kept.view(-1, 2)[batch.members].flatten(), self.device)
        assert self.reference is not None
        with self.reference.policy(model) as reference:
            return self.logps(batch, token_logprobs(reference, batch)[0])

    def pairs_loss(
        self, batch: AnswerBatch, policy: Tensor, reference: Tensor, loss: dict[str, float], **more: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        r, tokens = self.recipe, tensor(batch.lengths, self.device)
        return dpo_loss(
            policy[0::2], policy[1::2], reference[0::2], reference[1::2], beta=r.beta, loss=loss,
            label_smoothing=r.label_smoothing, f_divergence=r.f_divergence, f_alpha=r.f_alpha, discopop_tau=r.discopop_tau,
            chosen_tokens=tokens[0::2], rejected_tokens=tokens[1::2], **more,
        )  # fmt: skip

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        batch = work.micro_batches[index]
        reference = self.reference_logps(model, rows, batch)
        hidden = predicting(model, batch)
        logprob, entropy, squares = token_logprobs(model, batch, entropy=True, squares=self.recipe.wpo, rows=hidden)
        policy = self.logps(batch, logprob)
        weights = None
        if squares is not None:
            pairs = zip(by_answer(logprob, batch), by_answer(squares, batch), strict=True)
            weights = torch.stack([wpo_weights(p, s) for p, s in pairs]).view(-1, 2).prod(1)
        losses, chosen, rejected = self.pairs_loss(
            batch, policy, reference, self.recipe.loss, weights=weights, sft_logprob=answer_sums(logprob, batch)[0::2],
            mean_chosen_tokens=chosen_tokens(work) / work.count,
        )  # fmt: skip
        return losses.sum() / work.count, pair_metrics(
            chosen, rejected, policy, entropy, self.mean_logits(model, hidden), batch
        )


def precomputed(method: Any, model: Any, rows: AnswerRows) -> Tensor:
    """Reference log-probabilities of every record of the data set of `rows`, from the cache on disk or made now."""
    dataset = AnswerRows(rows.preferences, torch.arange(len(rows.preferences)).numpy(), rows.shared)
    key = f"{dataset.fingerprint()}:{getattr(method.recipe, 'ld_alpha', None)}:{rows.shared is not None}"
    path = cache_path(method.reference.files, key, model.dtype)
    shape = (rows.each * len(rows.preferences),)
    found = read_cache(path, shape)
    if found is not None:
        print(f"reference log-probabilities: {path}", flush=True)
        return found
    logps = torch.zeros(shape, dtype=torch.float64)
    places = logps.view(-1, rows.each)
    for members in method.planned(dataset):
        batch = placed(dataset.batch(members), model.device)
        places[batch.members] = method.reference_logps(model, dataset, batch).view(-1, rows.each).cpu()
    write_cache(path, logps)
    print(f"reference log-probabilities of {len(rows.preferences)} records written to {path}", flush=True)
    return logps


class Orpo(AnswerMethod):
    """Odds-ratio preference optimization: cross entropy of the chosen answers and the odds of chosen against rejected."""

    recipe: OrpoRecipe

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        batch = work.micro_batches[index]
        hidden = predicting(model, batch)
        logprob, entropy, _ = token_logprobs(model, batch, entropy=True, rows=hidden)
        sums = answer_sums(logprob, batch)
        mean = sums / tensor(batch.lengths, self.device)
        nll = -sums[0::2] * (work.count / chosen_tokens(work))
        losses, odds = orpo_loss(mean[0::2], mean[1::2], nll, beta=self.recipe.beta)
        rewards = self.recipe.beta * mean.detach()
        metrics = pair_metrics(rewards[0::2], rewards[1::2], mean, entropy, self.mean_logits(model, hidden), batch)
        metrics["nll_loss"] = (-sums.detach()[0::2].sum(), sum(batch.lengths[0::2]))
        metrics["log_odds_chosen"] = (odds.sum(), len(odds))
        return losses.sum() / work.count, metrics


class Contrastive(AnswerMethod):
    """SimPO and CPO: a preference loss without a reference, and the cross entropy of the chosen answers."""

    recipe: CpoRecipe | SimpoRecipe

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        r, batch = self.recipe, work.micro_batches[index]
        hidden = predicting(model, batch)
        logprob, entropy, _ = token_logprobs(model, batch, entropy=True, rows=hidden)
        sums = answer_sums(logprob, batch)
        mean = sums / tensor(batch.lengths, self.device)
        nll = -sums[0::2] * (work.count / chosen_tokens(work))
        if isinstance(r, SimpoRecipe):
            policy = mean
            losses = simpo_loss(mean[0::2], mean[1::2], beta=r.beta, gamma=r.gamma, label_smoothing=r.label_smoothing)
            losses = losses + r.sft_weight * nll
        else:
            policy = mean if r.loss == "ipo" else sums
            losses = cpo_loss(
                policy[0::2], policy[1::2], nll, beta=r.beta, alpha=r.alpha, loss=r.loss, label_smoothing=r.label_smoothing
            )  # fmt: skip
        rewards = r.beta * policy.detach()
        metrics = pair_metrics(rewards[0::2], rewards[1::2], policy, entropy, self.mean_logits(model, hidden), batch)
        metrics["nll_loss"] = (-sums.detach()[0::2].sum(), sum(batch.lengths[0::2]))
        return losses.sum() / work.count, metrics
