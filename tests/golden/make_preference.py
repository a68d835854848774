"""Golden values of preference losses: TRL's own loss functions on random log-probabilities.

    .venv-peers/bin/python tests/golden/make_preference.py

Writes preference.json. The trainers are made without their constructors and given a model that returns prepared numbers, so what
runs is `_compute_loss` of TRL as it is; everything is float64, but for the alpha divergence, which TRL knows in float32 only.
"""

import collections
import json
import pathlib
import types

import torch
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

PAIRS, LENGTH = 4, 12
LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
    "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def accelerator() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, unwrap_model=lambda m: m
    )


def numbers(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Per-token log-probabilities of policy and reference, completions of 3 to 9 tokens after a prompt of 2."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.long)
    for row, length in enumerate([3, 9, 5, 7, 8, 4, 5, 6]):  # chosen, then rejected
        mask[row, 2 : 2 + length] = 1
    shifted = mask[:, 1:]

    def logps() -> torch.Tensor:
        drawn = -torch.rand(2 * PAIRS, LENGTH - 1, generator=generator, dtype=torch.float64) * 3 - 0.05
        return (drawn * shifted).to(dtype)

    squares = -torch.rand(2 * PAIRS, LENGTH - 1, generator=generator, dtype=torch.float64)
    return {"policy": logps(), "reference": logps(), "squares": squares.to(dtype), "mask": mask}


class Stub(torch.nn.Module):
    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor, squares: torch.Tensor) -> None:
        super().__init__()
        zero = torch.zeros_like(log_probs)
        self.outputs = types.SimpleNamespace(
            log_probs=log_probs, log_sum_sq_probs=squares, entropy=zero, mean_logits=zero, is_top1=zero.bool()
        )

    def forward(self, **_: object) -> types.SimpleNamespace:
        return self.outputs


def dpo(n: dict[str, torch.Tensor], **settings: object) -> dict[str, object]:
    t = object.__new__(DPOTrainer)
    s = {
        "loss_types": ["sigmoid"], "loss_weights": None, "beta": 0.3, "label_smoothing": 0.1, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False, "discopop_tau": 0.05,
        **settings,
    }  # fmt: skip
    s["loss_weights"] = s["loss_weights"] or [1.0] * len(s["loss_types"])
    t.__dict__.update(
        s, accelerator=accelerator(), aux_loss_enabled=False, precompute_ref_logps=False, _total_train_tokens=0, _tp_size=1,
        ref_model=Stub(n["reference"], n["squares"]), _metrics={"train": collections.defaultdict(list)},
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=s["discopop_tau"]),
    )  # fmt: skip
    policy = n["policy"].clone().requires_grad_()
    t.model = Stub(policy, n["squares"])
    inputs = {
        "input_ids": torch.ones_like(n["mask"]), "completion_mask": n["mask"], "attention_mask": torch.ones_like(n["mask"]),
    }  # fmt: skip
    loss = t._compute_loss(t.model, inputs, False)
    loss.backward()
    metrics = {k: v[-1] for k, v in t._metrics["train"].items() if k.startswith(("rewards/", "logps/"))}
    return {
        "settings": settings,
        "loss": loss.item(),
        "metrics": metrics,
        "grad": (policy.grad * n["mask"][:, 1:]).sum(1).tolist(),
    }


def kto(n: dict[str, torch.Tensor], loss_type: str) -> dict[str, object]:
    t = object.__new__(KTOTrainer)
    kl_policy, kl_reference = torch.tensor([-3.0, -2.0, -4.0]).double(), torch.tensor([-3.4, -2.5, -4.1]).double()
    answers = iter([kl_policy, kl_reference])
    t.__dict__.update(
        accelerator=accelerator(), aux_loss_enabled=False, precompute_ref_logps=False, calculate_KL=loss_type == "kto",
        loss_type=loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7, _total_train_tokens=0, _tp_size=1,
        ref_model=Stub(n["reference"], n["squares"]), _metrics={"train": collections.defaultdict(list)},
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        _compute_kl_logps=lambda *_: next(answers),
    )  # fmt: skip
    policy = n["policy"].clone().requires_grad_()
    t.model = Stub(policy, n["squares"])
    label = torch.tensor([True, False, True, True, False, False, True, False])
    inputs = {
        "input_ids": torch.ones_like(n["mask"]), "completion_mask": n["mask"], "attention_mask": torch.ones_like(n["mask"]),
        "label": label,
    }  # fmt: skip
    loss = t._compute_loss(t.model, inputs, False)
    loss.backward()
    metrics = {k: v[-1] for k, v in t._metrics["train"].items() if k.startswith(("rewards/", "logps/", "kl"))}
    return {
        "label": label.tolist(), "kl_policy": kl_policy.tolist(), "kl_reference": kl_reference.tolist(),
        "loss": loss.item(), "metrics": metrics, "grad": (policy.grad * n["mask"][:, 1:]).sum(1).tolist(),
    }  # fmt: skip


def contrastive(n: dict[str, torch.Tensor]) -> dict[str, object]:
    """ORPO and CPO (SimPO is one of its losses) from log-probabilities of completions; averages where TRL averages."""
    tokens = n["mask"][:, 1:].sum(1)
    summed = n["policy"].sum(1)
    mean = summed / tokens
    found: dict[str, object] = {}
    t = object.__new__(ORPOTrainer)
    t.__dict__.update(beta=0.3, accelerator=accelerator())
    losses, *_, log_odds = t.odds_ratio_loss(mean[:PAIRS], mean[PAIRS:])
    found["orpo"] = {"losses": losses.tolist(), "log_odds_chosen": log_odds.item()}
    for loss_type in ("sigmoid", "hinge", "ipo", "simpo"):
        t = object.__new__(CPOTrainer)
        t.__dict__.update(
            beta=0.3, accelerator=accelerator(), alpha=0.0, simpo_gamma=0.5, loss_type=loss_type, label_smoothing=0.1
        )
        given = mean if loss_type in ("simpo", "ipo") else summed
        found[loss_type] = t.cpo_loss(given[:PAIRS], given[PAIRS:])[0].tolist()
    return found


def reward() -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(2 * PAIRS, 1, generator=generator, dtype=torch.float64).requires_grad_()
    margin = torch.rand(PAIRS, generator=generator, dtype=torch.float64)
    t = object.__new__(RewardTrainer)
    t.__dict__.update(
        accelerator=accelerator(), _total_train_tokens=0, _tp_size=1, _metrics={"train": collections.defaultdict(list)},
        args=types.SimpleNamespace(center_rewards_coefficient=0.01),
    )  # fmt: skip

    def model(**_: object) -> types.SimpleNamespace:
        return types.SimpleNamespace(logits=rewards)

    model.training = True
    t.model = model
    loss = t.compute_loss(model, {"margin": margin, "attention_mask": torch.ones(1)})
    loss.backward()
    return {
        "rewards": rewards.flatten().tolist(), "margin": margin.tolist(), "loss": loss.item(),
        "grad": rewards.grad.flatten().tolist(),
        "metrics": {k: v[-1] for k, v in t._metrics["train"].items() if k != "num_tokens"},
    }  # fmt: skip


def main() -> None:
    n = numbers(torch.float64)
    cases = [dpo(n, loss_types=[loss]) for loss in LOSSES]
    cases += [
        dpo(n, loss_types=["sigmoid"], f_divergence_type=f) for f in ("forward_kl", "js_divergence")
    ]  # fmt: skip
    cases += [dpo(n, loss_types=["ipo"], f_divergence_type="js_divergence")]
    cases += [dpo(n, loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])]
    cases += [dpo(n, loss_types=["sigmoid"], ld_alpha=0.4), dpo(n, loss_types=["sigmoid"], use_weighting=True)]
    single = numbers(torch.float32)
    cases += [
        {
            **dpo(single, loss_types=["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=a),
            "float32": True,
        }
        for a in (0.5, 1.0, 1.5)
    ]
    golden = {
        "trl": trl.__version__,
        "inputs": {k: v.tolist() for k, v in n.items()},
        "dpo": cases,
        "kto": {name: kto(n, name) for name in ("kto", "apo_zero_unpaired")},
        "contrastive": contrastive(n),
        "reward": reward(),
    }
    path = pathlib.Path(__file__).with_name("preference.json")
    path.write_text(json.dumps(golden) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
