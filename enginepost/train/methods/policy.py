"""Methods grpo and rloo: completions are compared with the others of their prompt.

    grpo   A = group advantage; clipped ratio per token; beta times the KL is part of the loss. `loss` names its kin.
    rloo   A = reward less the mean of the others; one ratio for the whole completion; beta times the KL is part of the reward.

When a roll-out is learned from once, in one step, the old policy is the present one and no pass is spent on it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.errors import EnginepostError
from enginepost.generate import Completion
from enginepost.recipe_online import GrpoRecipe, RlooRecipe
from enginepost.train.methods.method import Metrics
from enginepost.train.methods.online import FLAT, Online
from enginepost.train.objectives import advantages as adv
from enginepost.train.objectives.kl import kl_estimate
from enginepost.train.objectives.policy import (
    Aggregate,
    Level,
    cispo_loss,
    clipped_loss,
    clipped_tokens,
    log_ratio,
    token_weights,
)
from enginepost.train.rollout import Pack, Rollout, describe, gather, token_logprobs

AGGREGATES: dict[str, Aggregate] = {
    "grpo": "grpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "gspo": "grpo",
    "cispo": "dapo",
}


class Grouped(Online):
    """Both: one advantage for a completion, and a clipped ratio."""

    recipe: Any
    level: Level = "token"
    aggregate: Aggregate = "grpo"

    def __init__(self, recipe: Any) -> None:
        if not recipe.rewards:
            raise EnginepostError(
                f"rewards: method {recipe.method} needs at least one, such as `rewards: rewards.py:correct` or `rewards: [{{model: "
                "models/reward}}]`"
            )
        super().__init__(recipe)

    def learn(self, model: Any, rollout: Rollout, scores: Tensor | None) -> None:
        assert scores is not None
        if self.per_rollout > 1 or self.kl_in_reward():
            self.add_old(model, rollout)
        if self.needs_reference():
            self.add_reference(model, rollout)
        rollout.tokens["advantages"] = self.advantages(rollout, scores).float().repeat_interleave(rollout.completions)

    def kl_in_reward(self) -> bool:
        return False

    def advantages(self, rollout: Rollout, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def each(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The loss of each token `[n]`."""
        recipe = self.recipe
        return clipped_loss(ratio, advantages, epsilon=recipe.epsilon)

    def epsilon_high(self) -> float | None:
        return None

    def loss(self, model: Any, work: Any, index: int) -> tuple[Tensor, Metrics]:
        recipe, batch, rollout = self.recipe, work.micro_batches[index], work.rollout
        logprob, entropy, _ = token_logprobs(model, batch, recipe.temperature, entropy=True)
        advantages = rollout.of("advantages", batch)
        old = rollout.of("old", batch) if self.per_rollout > 1 else logprob.detach()
        ratio = log_ratio(logprob, old, batch.completions, self.level)
        each = self.each(logprob, ratio, advantages)
        metrics = policy_metrics(rollout, batch, logprob, entropy)
        if "ref" in rollout.tokens and not self.kl_in_reward():
            kl = kl_estimate(logprob, rollout.of("ref", batch), recipe.kl_estimator)
            each = each + recipe.beta * kl
            metrics["kl"] = (kl.detach().double().sum(), len(kl))
        weights = token_weights(
            batch.completions, self.aggregate, completions=work.completions, tokens=work.count,
            max_length=recipe.max_completion_length,
        )  # fmt: skip
        loss = (each * weights).sum()
        if recipe.entropy_coef:
            loss = loss - recipe.entropy_coef * entropy.double().sum() / work.count
        low, high = clipped_tokens(ratio, advantages, epsilon=recipe.epsilon, epsilon_high=self.epsilon_high())
        return loss, metrics | clip_metrics(low, high)


class Grpo(Grouped):
    """Group relative policy optimization and its kin."""

    recipe: GrpoRecipe

    def __init__(self, recipe: GrpoRecipe) -> None:
        super().__init__(recipe)
        self.level = "sequence" if recipe.loss == "gspo" else "token"
        self.aggregate = AGGREGATES[recipe.loss]

    def make(self, model: Any, r: int) -> Rollout:
        """With dynamic sampling (DAPO), a roll-out of groups whose rewards differ: flat ones are replaced from at most
        `max_resamples` further draws of prompts, keyed by (seed, r, attempt). Where none differs the first draw is kept."""
        recipe, wanted = self.recipe, self.recipe.rollout_prompts
        if not recipe.dynamic_sampling:
            return super().make(model, r)
        index: list[int] = []
        groups: list[list[Completion]] = []
        scores: list[Tensor] = []
        flat_groups = drawn = 0
        for attempt in range(recipe.max_resamples + 1):
            order = np.random.default_rng([recipe.seed, r, attempt]).permutation(len(self.prompts))
            asked = self.chosen(r) if attempt == 0 else order[:wanted].tolist()
            answers = self.draw(model, r, attempt, asked)
            rollout = gather(r, self.prompts, asked, answers)
            found = self.score(rollout)
            flat = adv.flat_groups(self.shaped(rollout, found), recipe.num_generations).tolist()
            flat_groups, drawn = flat_groups + sum(flat), drawn + len(flat)
            if attempt == 0:
                first = rollout, found
            for g in [g for g, same in enumerate(flat) if not same]:
                index.append(asked[g])
                groups.append(answers[g])
                scores.append(found[g * recipe.num_generations : (g + 1) * recipe.num_generations])
            if len(index) >= wanted:
                break
        rollout, found = first
        if index:
            rollout = gather(r, self.prompts, index[:wanted], groups[:wanted])
            found = torch.cat(scores[:wanted])
            rollout.metrics = {n: v for n, v in first[0].metrics.items() if n.startswith("rewards/")}
        rollout.metrics |= {**describe(rollout), "resamples": float(attempt)}
        self.learn(model, rollout, found)
        # What the policy does on all prompts, and not on those that were chosen for their spread.
        rollout.metrics |= {n: first[0].metrics[n] for n in ("reward", "reward_std")}
        rollout.metrics[FLAT] = flat_groups / drawn
        return rollout

    def advantages(self, rollout: Rollout, scores: Tensor) -> Tensor:
        recipe, total = self.recipe, self.shaped(rollout, scores)
        if recipe.multi_objective_aggregation == "normalize_then_sum":
            return adv.normalized_then_summed(scores, self.weights(), recipe.num_generations)
        assert recipe.scale_rewards is not None
        return adv.group_advantages(total, recipe.num_generations, recipe.scale_rewards)

    def epsilon_high(self) -> float | None:
        assert self.recipe.epsilon_high is not None
        return self.recipe.epsilon_high - 1 if self.recipe.loss == "cispo" else self.recipe.epsilon_high

    def each(self, logprob: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
        recipe = self.recipe
        assert recipe.epsilon_high is not None and recipe.epsilon is not None
        if recipe.loss == "cispo":
            return cispo_loss(logprob, ratio, advantages, epsilon_high=recipe.epsilon_high)
        return clipped_loss(
            ratio, advantages, epsilon=recipe.epsilon, epsilon_high=recipe.epsilon_high, delta=recipe.delta
        )


class Rloo(Grouped):
    """REINFORCE with a leave-one-out baseline."""

    recipe: RlooRecipe
    level: Level = "product"

    def kl_in_reward(self) -> bool:
        return self.recipe.beta > 0

    def advantages(self, rollout: Rollout, scores: Tensor) -> Tensor:
        recipe, total = self.recipe, self.shaped(rollout, scores)
        if self.kl_in_reward():
            kl = kl_estimate(rollout.tokens["old"].double(), rollout.tokens["ref"].double(), recipe.kl_estimator)
            rollout.metrics["kl"] = kl.mean().item()
            total = total - recipe.beta * torch.segment_reduce(kl, "sum", lengths=rollout.completions, initial=0.0)
        return adv.leave_one_out(total, recipe.num_generations, normalize=recipe.normalize_advantages)


def policy_metrics(rollout: Rollout, batch: Pack, logprob: Tensor, entropy: Tensor) -> Metrics:
    """Entropy, and how far sampling and training are from the same log-probabilities (rounding, at the first step of a roll-out)."""
    count = len(logprob)
    apart = (logprob.detach() - rollout.of("sampled", batch)).abs()
    return {
        "entropy": (entropy.detach().double().sum(), count),
        "sampling/sampling_logp_difference/mean": (apart.double().sum(), count),
    }


def clip_metrics(low: Tensor, high: Tensor) -> Metrics:
    """Share of tokens whose ratio left the trust region."""
    count = len(low)
    return {
        "clip_ratio/low_mean": (low.sum(), count),
        "clip_ratio/high_mean": (high.sum(), count),
        "clip_ratio/region_mean": ((low | high).sum(), count),
    }
