"""Method ppo: a value head beside the policy says what was to be expected of every token.

    roll-out   old log-probs, reference log-probs, values V_t;  r_t = -beta KL_t (kl_in: reward) + the score at the last token
               A, returns by GAE; A whitened over the roll-out
    step       clipped ratio * A  +  value_coef * (clipped) squared error of the value  [+ beta KL, kl_in: loss], means over tokens
    after      beta follows the adaptive controller, when there is a target_kl

The head is linear on the hidden state that predicts a token, in float32, and begins at zero; its gradient reaches the policy's
trunk.
Sources: Schulman et al. 2017 (arXiv 1707.06347); Ziegler et al. 2019 (1909.08593); Huang et al. 2024 (2403.17031, the details).
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from enginepost.checkpoint import save_tensors
from enginepost.errors import EnginepostError
from enginepost.recipe_online import PpoRecipe
from enginepost.train.methods.method import Metrics
from enginepost.train.methods.online import Online
from enginepost.train.methods.policy import clip_metrics, policy_metrics
from enginepost.train.objectives import advantages as adv
from enginepost.train.objectives.kl import kl_estimate, next_coefficient
from enginepost.train.objectives.policy import clipped_loss, clipped_tokens, value_loss
from enginepost.train.rollout import Rollout, packs, token_logprobs


class ValueHead(nn.Module):
    """hidden `[n, H]` -> value `[n]`, float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.weight.t() + self.bias).squeeze(1)


class Ppo(Online):
    """Proximal policy optimization."""

    recipe: PpoRecipe

    def __init__(self, recipe: PpoRecipe) -> None:
        if not recipe.rewards:
            raise EnginepostError(
                "rewards: method ppo needs at least one, such as `rewards: [{model: models/reward}]` or `rewards: "
                "rewards.py:correct`"
            )
        super().__init__(recipe)
        self.kl_coef = recipe.beta
        self.head = ValueHead(self.spec.hidden_size)

    def needs_reference(self) -> bool:
        return self.recipe.beta > 0 or self.recipe.target_kl is not None

    def attach(self, model: Any) -> None:
        super().attach(model)
        self.modules["value_head"] = self.head.to(model.device)

    def learn(self, model: Any, rollout: Rollout, scores: Tensor | None) -> None:
        assert scores is not None
        recipe, tokens, metrics = self.recipe, rollout.tokens, rollout.metrics
        self._add_old_and_values(model, rollout)
        kl = torch.zeros(len(tokens["old"]), dtype=torch.float64)
        if self.needs_reference():
            self.add_reference(model, rollout)
            kl = kl_estimate(tokens["old"].double(), tokens["ref"].double(), recipe.kl_estimator)
            # Of a completion, summed over its tokens: what the controller steers. k1 is exact in the mean and cannot be fooled.
            whole = (tokens["old"].double() - tokens["ref"].double()).sum().item() / len(rollout)
            metrics |= {"kl": kl.mean().item(), "objective/kl": whole, "kl_coef": self.kl_coef}
        score = self.shaped(rollout, scores).nan_to_num(0.0)
        penalty = self.kl_coef if recipe.kl_in == "reward" else 0.0
        reward = adv.token_rewards(score, kl, rollout.completions, penalty)
        if recipe.whiten_rewards:
            reward = adv.whiten(reward, shift_mean=False)
        values = tokens["values"].double()
        advantages, returns = adv.gae(reward, values, rollout.completions, gamma=recipe.gamma, lam=recipe.lam)
        spread = returns.var(unbiased=False).item()
        metrics["explained_variance"] = (1 - (returns - values).var(unbiased=False).item() / spread) if spread else 0.0
        if recipe.whiten_advantages:
            advantages = adv.whiten(advantages)
        tokens["advantages"], tokens["returns"] = advantages.float(), returns.float()

    @torch.no_grad()
    def _add_old_and_values(self, model: Any, rollout: Rollout) -> None:
        count = int(rollout.completions.sum())
        rollout.tokens |= {"old": torch.zeros(count), "values": torch.zeros(count)}
        training = model.training
        model.eval()
        for batch in packs(rollout, self.prompts, np.arange(len(rollout)), self.recipe, self.device):
            logprob, _, hidden = token_logprobs(model, batch, self.recipe.temperature)
            rollout.tokens["old"][batch.where] = logprob.cpu()
            rollout.tokens["values"][batch.where] = self.head(hidden).cpu()
        model.train(training)

    def loss(self, model: Any, work: Any, index: int) -> tuple[Tensor, Metrics]:
        recipe, batch, rollout = self.recipe, work.micro_batches[index], work.rollout
        logprob, entropy, hidden = token_logprobs(model, batch, recipe.temperature, entropy=True)
        names = ("old", "advantages", "returns", "values")
        old, advantages, returns, before = (rollout.of(name, batch) for name in names)
        ratio = logprob - old
        policy = clipped_loss(ratio, advantages, epsilon=recipe.epsilon)
        values = self.head(hidden)
        value = value_loss(values, before, returns, clip=recipe.value_clip)
        each = policy + recipe.value_coef * value
        if recipe.kl_in == "loss" and self.kl_coef:
            each = each + self.kl_coef * kl_estimate(logprob, rollout.of("ref", batch), recipe.kl_estimator)
        loss = each.sum(dtype=torch.float64) / work.count
        if recipe.entropy_coef:
            loss = loss - recipe.entropy_coef * entropy.double().sum() / work.count
        count = len(logprob)
        low, high = clipped_tokens(ratio, advantages, epsilon=recipe.epsilon)
        metrics = policy_metrics(rollout, batch, logprob, entropy) | clip_metrics(low, high)
        held = 0.0 if recipe.value_clip is None else ((values - before).abs() > recipe.value_clip).sum()
        return loss, metrics | {
            "policy_loss": (policy.detach().double().sum(), count),
            "value_loss": (value.detach().double().sum(), count),
            "value_clip_ratio": (held, count),
            "approx_kl": (ratio.detach().double().square().sum() / 2, count),
        }

    def updated(self, model: Any, work: Any) -> None:
        """After the last step of a roll-out, its KL moves the coefficient."""
        super().updated(model, work)
        if work.last and self.recipe.target_kl is not None:
            self.kl_coef = next_coefficient(
                self.kl_coef, work.rollout.metrics["objective/kl"], target=self.recipe.target_kl,
                horizon=self.recipe.kl_horizon, completions=len(work.rollout),
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {**super().state(), "kl_coef": self.kl_coef}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(state, tensors)
        self.kl_coef = state["kl_coef"]

    def save_result(self, model: Any, directory: pathlib.Path) -> None:
        """The policy; and the value head, under the names of TRL's models with one."""
        super().save_result(model, directory)
        tensors = {"v_head.summary.weight": self.head.weight.detach(), "v_head.summary.bias": self.head.bias.detach()}
        save_tensors(directory / "value_head.safetensors", tensors)
