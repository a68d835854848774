"""What grpo, rloo, ppo and gkd have in common: prompts, roll-outs made inside the loop, and the steps that learn from them.

Roll-out r draws `num_generations` completions of the next `rollout_prompts` prompts, from generators keyed by (seed, r, attempt,
prompt, sample): it follows from the recipe, the prompts, the weights and r. It is then gone through `num_iterations` times in an
order keyed by (seed, r, iteration), each time in `num_mini_batches` optimizer steps. A checkpoint between two of them holds it.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.data import Tokenizer
from enginepost.data.prompts import Prompts, load_prompts
from enginepost.errors import EnginepostError
from enginepost.generate import Completion, sample
from enginepost.model import ModelSpec
from enginepost.model.weights import read_config
from enginepost.recipe_online import OnlineRecipe
from enginepost.train import rewards
from enginepost.train.methods.method import Method, Work
from enginepost.train.objectives import advantages as adv
from enginepost.train.reference import Reference
from enginepost.train.rollout import Rollout, add_logprobs, describe, gather, packs

FLAT = "frac_reward_zero_std"


@dataclass
class OnlineWork(Work):
    """A step on part of a roll-out. count: tokens learned from; completions: of the step, those left out included; last: of its
    roll-out."""

    rollout: Rollout | None = None
    completions: int = 0
    last: bool = False


class Online(Method):
    """Prompts, plan and roll-outs. A subclass says what a roll-out teaches (`learn`) and what is lost on a micro-batch."""

    recipe: OnlineRecipe
    needs_answers = False

    def __init__(self, recipe: OnlineRecipe) -> None:
        super().__init__(recipe)
        if recipe.lora is not None and recipe.lora.dropout > 0:
            raise EnginepostError(
                f"lora.dropout: {recipe.lora.dropout}: method {recipe.method} compares the policy with what it was a moment ago, "
                "which dropout would blur; set lora.dropout: 0"
            )
        self.tokenizer = Tokenizer.load(recipe.model)
        self.spec = ModelSpec.from_config(read_config(recipe.model))
        if recipe.temperature != 1.0 and self.spec.final_softcap:
            raise EnginepostError(
                f"temperature: {recipe.temperature}: the logits of this {self.spec.family} model are soft-capped, and "
                "log-probabilities at another temperature are not available for it; set temperature: 1.0"
            )
        self.prompts, self.held = self._read()
        self.data = self.prompts.fingerprint()
        self.per_rollout = recipe.num_iterations * recipe.num_mini_batches
        rollouts = math.ceil(recipe.epochs * len(self.prompts) / recipe.rollout_prompts)
        self.total = recipe.max_steps or rollouts * self.per_rollout
        held = 0 if self.held is None else len(self.held)
        self.size = f"{len(self.prompts)} prompts, {held} for validation, {recipe.num_generations} completions of each"
        self.rollout: Rollout | None = None
        self.judges = rewards.load(
            recipe.rewards, self.tokenizer, vocab_size=self.spec.vocab_size, template=recipe.template,
            dtype=torch.bfloat16 if recipe.dtype == "bf16" else torch.float32, device=self.device,
        )  # fmt: skip
        self.reference: Reference | None = None

    def _read(self) -> tuple[Prompts, Prompts | None]:
        recipe = self.recipe
        room = min(recipe.max_length, self.spec.max_position)
        if room <= recipe.max_completion_length:
            raise EnginepostError(
                f"max_completion_length: {recipe.max_completion_length}: a sequence holds at most {room} tokens (max_length, "
                "and the model's max_position_embeddings), which leaves none for the prompt"
            )

        def read(paths: list[str]) -> Prompts:
            prompts = load_prompts(
                paths, self.tokenizer, template=recipe.template, max_tokens=room - recipe.max_completion_length,
                overlong=recipe.overlong, vocab_size=self.spec.vocab_size, answers=self.needs_answers,
            )  # fmt: skip
            print(f"{', '.join(paths)}: {prompts.report}", flush=True)
            return prompts

        prompts = read(recipe.data)
        if isinstance(recipe.validation, float):
            if len(prompts) < 2:
                raise EnginepostError(
                    f"validation: {recipe.validation}: the data has 1 prompt; a split needs at least 2"
                )
            count = min(max(1, round(recipe.validation * len(prompts))), len(prompts) - 1)
            held = np.zeros(len(prompts), dtype=bool)
            held[random.Random(recipe.seed).sample(range(len(prompts)), count)] = True
            return prompts.subset(np.flatnonzero(~held)), prompts.subset(np.flatnonzero(held))
        return prompts, None if recipe.validation is None else read(recipe.validation)

    def attach(self, model: Any) -> None:
        if self.needs_reference():
            self.reference = Reference(self.recipe, model, None)

    def needs_reference(self) -> bool:
        return self.recipe.beta > 0

    # Roll-outs

    def step(self, model: Any, number: int) -> OnlineWork:
        recipe = self.recipe
        r, inner = divmod(number - 1, self.per_rollout)
        if self.rollout is None or self.rollout.number != r:
            self.rollout = self.make(model, r)
        iteration, part = divmod(inner, recipe.num_mini_batches)
        order = np.random.default_rng([recipe.seed, r, iteration]).permutation(len(self.rollout))
        members = np.array_split(order, recipe.num_mini_batches)[part]
        kept = members[self.rollout.keep.numpy()[members]]
        whole = len(self.prompts)
        before, after = ((r + x) * recipe.rollout_prompts / whole for x in (0, 1))
        last = inner == self.per_rollout - 1
        epoch = before + (after - before) * (inner + 1) / self.per_rollout
        return OnlineWork(
            packs(self.rollout, self.prompts, kept, recipe, self.device) if len(kept) else [],
            count=int(self.rollout.completions[torch.from_numpy(kept)].sum()),
            epoch=epoch,
            ends_epoch=last and math.floor(after) > math.floor(before),
            metrics=dict(self.rollout.metrics),
            rollout=self.rollout,
            completions=len(members),
            last=last,
        )

    def updated(self, model: Any, work: Work) -> None:
        assert isinstance(work, OnlineWork)
        if work.last:
            self.rollout = None

    def make(self, model: Any, r: int) -> Rollout:
        """Roll-out r: drawn, scored, and with everything that learning from it needs."""
        index = self.chosen(r)
        rollout = gather(r, self.prompts, index, self.draw(model, r, 0, index))
        rollout.metrics = describe(rollout)
        self.learn(model, rollout, self.score(rollout) if self.judges else None)
        return rollout

    def chosen(self, r: int) -> list[int]:
        """The prompts of roll-out r: the next ones of an endless list of permutations, each keyed by (seed, epoch)."""
        whole, count = len(self.prompts), self.recipe.rollout_prompts
        orders: dict[int, np.ndarray] = {}
        found = []
        for place in range(r * count, (r + 1) * count):
            epoch, at = divmod(place, whole)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([self.recipe.seed, epoch]).permutation(whole)
            found.append(int(orders[epoch][at]))
        return found

    def draw(self, model: Any, r: int, attempt: int, index: list[int]) -> list[list[Completion]]:
        """Completions of these prompts. A prompt that comes twice in a roll-out (a small data set) draws other ones each time."""
        recipe = self.recipe
        twice = [index[:i].count(p) for i, p in enumerate(index)]
        return sample(
            model, [self.prompts[i].ids for i in index], samples=recipe.num_generations,
            max_new_tokens=recipe.max_completion_length, temperature=recipe.temperature, top_p=recipe.top_p,
            top_k=recipe.top_k, stop_ids=self.tokenizer.stop_ids, seed=recipe.seed,
            keys=[(r, attempt, i, n) for i, n in zip(index, twice, strict=True)],
        )  # fmt: skip

    def score(self, rollout: Rollout) -> Tensor:
        """float64 `[S, K]`: reward k of completion s, NaN where it has no opinion."""
        prompts = [self.prompts[i] for i in rollout.prompts.tolist()]
        found = rewards.score_all(self.judges, prompts, rollout.completion_ids())
        if torch.isnan(found).all():
            raise rewards.RewardError(f"no reward has an opinion on any completion of {prompts[0].place} and on")
        for k, judge in enumerate(self.judges):
            rollout.metrics[f"rewards/{judge.name}/mean"] = torch.nanmean(found[:, k]).item()
            rollout.metrics[f"rewards/{judge.name}/std"] = adv.spread(found[:, k]).item()
        return found

    def weights(self) -> Tensor:
        return torch.tensor([judge.weight for judge in self.judges], dtype=torch.float64)

    def shaped(self, rollout: Rollout, scores: Tensor) -> Tensor:
        """The reward of each completion `[S]`: the weighted sum, less what being cut off or overlong costs; and its metrics."""
        recipe = self.recipe
        total = adv.combine(scores, self.weights())
        total = torch.where(rollout.stopped, total, total - recipe.missing_eos_penalty)
        if recipe.overlong_buffer is not None:
            total = total + adv.overlong_penalty(
                rollout.completions, recipe.max_completion_length, recipe.overlong_buffer
            )  # fmt: skip
        if recipe.mask_truncated_completions:
            rollout.keep &= rollout.stopped
        rollout.metrics["reward"] = torch.nanmean(total).item()
        rollout.metrics["reward_std"] = adv.spread(total).nan_to_num(0.0).item()
        rollout.metrics[FLAT] = adv.flat_groups(total, recipe.num_generations).double().mean().item()
        return total

    def learn(self, model: Any, rollout: Rollout, scores: Tensor | None) -> None:
        """Add to the roll-out what its steps need: old and reference log-probabilities, advantages."""
        raise NotImplementedError

    def add_old(self, model: Any, rollout: Rollout) -> None:
        add_logprobs(rollout, model, self.prompts, self.recipe, "old", self.recipe.temperature)

    def add_reference(self, model: Any, rollout: Rollout) -> None:
        assert self.reference is not None
        with self.reference.policy(model) as reference:
            add_logprobs(rollout, reference, self.prompts, self.recipe, "ref", self.recipe.temperature)

    # Evaluation and checkpoints

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float] | None:
        """Mean reward of greedy completions of the validation prompts."""
        if self.held is None or not self.judges:
            return None
        groups = sample(
            model, [p.ids for p in self.held], samples=1, max_new_tokens=self.recipe.max_completion_length,
            temperature=0.0, stop_ids=self.tokenizer.stop_ids,
        )  # fmt: skip
        rollout = gather(0, self.held, list(range(len(self.held))), groups)
        found = rewards.score_all(self.judges, list(self.held), rollout.completion_ids())
        each = {f"eval_rewards/{j.name}/mean": torch.nanmean(found[:, k]).item() for k, j in enumerate(self.judges)}
        total = torch.nanmean(adv.combine(found, self.weights())).item()
        return {"eval_reward": total, **each, **{f"eval_{name}": v for name, v in describe(rollout).items()}}

    def state(self) -> dict[str, Any]:
        if self.rollout is None:
            return {}
        return {"rollout": self.rollout.number, "metrics": self.rollout.metrics}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.rollout is None else self.rollout.tensors()

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if "rollout" in state:
            self.rollout = Rollout.restore(state["rollout"], state["metrics"], tensors)
