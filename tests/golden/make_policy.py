"""Makes policy.safetensors: losses, gradients, clip fractions and advantages by TRL's own code (GRPOTrainer, RLOOTrainer), float64.

    .venv-peers/bin/python tests/golden/make_policy.py

The loss is TRL's method `_compute_loss` on a trainer whose model is a table of log-probabilities; the advantages are the lines of
`_generate_and_score_completions` that make them, taken out by their text and run on rewards of ours.
"""

import inspect
import json
import pathlib
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from trl.experimental.gkd import GKDTrainer
from trl.trainer import grpo_trainer, rloo_trainer

LENGTHS = [4, 1, 6, 3, 5, 2]
MAX_LENGTH = 8
LOSSES = {
    "grpo": {},
    "grpo, kl": {"beta": 0.3},
    "grpo, two-sided": {"delta": 1.1},
    "dr_grpo": {"loss_type": "dr_grpo", "beta": 0.1},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.15},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
}


class Accelerator:
    num_processes = 1
    sync_gradients = True

    def reduce(self, x: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


def padded(values: torch.Tensor) -> torch.Tensor:
    """The tokens of the completions, one after another, as TRL's rectangle."""
    rows = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=values.dtype)
    return torch.stack([torch.cat([v, r[len(v) :]]) for v, r in zip(values.split(LENGTHS), rows, strict=True)])


def trainer(table: torch.Tensor, **keys: object) -> SimpleNamespace:
    """What `_compute_loss` looks at."""
    settings = {
        "loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
        "delta": None, **keys,
    }  # fmt: skip
    return SimpleNamespace(
        **settings, args=SimpleNamespace(delta=settings["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *a, **k: (table, table.detach().abs(), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH, _entropy_bonus_enabled=False, accelerator=Accelerator(),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
    )  # fmt: skip


def inputs(old: torch.Tensor, ref: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = padded(torch.ones(sum(LENGTHS), dtype=torch.float64))
    empty = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    return {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask.long(), "completion_mask": mask,
        "advantages": advantages, "old_per_token_logps": padded(old), "ref_per_token_logps": padded(ref),
        "old_logps": padded(old).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def lines_of(function: object, first: str, last: str) -> str:
    """The source lines of a function from the one that holds `first` to the one that holds `last`."""
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line)
    return textwrap.dedent("\n".join(lines[start : stop + 1]))


def advantages(
    module: object, function: object, rewards: torch.Tensor, weights: torch.Tensor, **keys: object
) -> torch.Tensor:
    code = lines_of(function, "unscorable_mask = torch.isnan", "advantages = torch.nan_to_num(advantages")
    space = {
        **vars(module), "rewards_per_func": rewards.clone(), "device": "cpu", "num_generations": 4, "gather": lambda x: x,
        "self": SimpleNamespace(
            reward_weights=weights, reward_funcs=[None] * rewards.shape[1], beta=0.0, reward_clip_range=None, **keys
        ),
    }  # fmt: skip
    exec(code, space)
    return space["advantages"]


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    count = sum(LENGTHS)
    logprob = -normal(count).abs()
    old, ref = logprob + 0.2 * normal(count), logprob + 0.5 * normal(count)
    scores = normal(len(LENGTHS))
    tensors = {"logprob": logprob, "old": old, "ref": ref, "advantages": scores, "lengths": torch.tensor(LENGTHS)}
    cases = [(name, grpo_trainer.GRPOTrainer, keys) for name, keys in LOSSES.items()]
    for name, owner, keys in [*cases, ("rloo", rloo_trainer.RLOOTrainer, {})]:
        table = padded(logprob).requires_grad_()
        fake = trainer(table, **keys)
        if name == "rloo":
            fake._get_per_token_logps_and_entropies = lambda *a, t=table, **k: (t, t.detach().abs(), None)
        loss = owner._compute_loss(fake, None, inputs(old, ref, scores))
        loss.backward()
        tensors[f"{name}.loss"] = loss.detach()
        tensors[f"{name}.gradient"] = torch.cat([g[:n] for g, n in zip(table.grad, LENGTHS, strict=True)])
        for metric in ("clip_ratio/low_mean", "clip_ratio/high_mean", "kl"):
            if metric in fake._metrics["train"]:
                tensors[f"{name}.{metric}"] = torch.tensor(fake._metrics["train"][metric], dtype=torch.float64)

    rewards = normal(20, 2)
    rewards[4:8, 0], rewards[4:8, 1] = 1.0, 2.0  # a group that teaches nothing
    rewards[9] = torch.nan  # nobody could score it
    rewards[13, 0] = torch.nan  # one could
    rewards[16:19] = torch.nan  # one of the group is left
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    tensors |= {"rewards": rewards, "weights": weights}
    grpo = grpo_trainer.GRPOTrainer._generate_and_score_completions
    for scale in ("group", "batch", "none"):
        keys = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": scale}
        tensors[f"advantages.{scale}"] = advantages(grpo_trainer, grpo, rewards, weights, **keys)
    keys = {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}
    # TRL's lines work on the rewards of all groups at once, unscorable ones included.
    tensors["advantages.gdpo"] = advantages(grpo_trainer, grpo, rewards, weights, **keys)
    rloo = rloo_trainer.RLOOTrainer._generate_and_score_completions
    for normalize in (False, True):
        tensors[f"advantages.rloo.{normalize}"] = advantages(
            rloo_trainer, rloo, rewards, weights, normalize_advantages=normalize
        )

    hidden, head, teacher_hidden, teacher_head = normal(6, 5), normal(9, 5), normal(6, 4), normal(9, 4)
    tensors |= {
        "gkd.hidden": hidden,
        "gkd.head": head,
        "gkd.teacher_hidden": teacher_hidden,
        "gkd.teacher_head": teacher_head,
    }
    for beta in (0.0, 0.3, 1.0):
        student = hidden.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(
            student @ head.T, teacher_hidden @ teacher_head.T, beta=beta, temperature=0.9, reduction="sum"
        )
        loss.backward()
        tensors[f"gkd.{beta}.loss"], tensors[f"gkd.{beta}.gradient"] = loss.detach(), student.grad
    path = pathlib.Path(__file__).parent / "policy.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"losses": json.dumps(LOSSES)})


if __name__ == "__main__":
    main()
