"""Preference and reward losses against TRL's own functions (golden/preference.json), finite differences and closed forms."""

import json
import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from enginepost.train.objectives.preference import (
    DPO_LOSSES,
    F_DIVERGENCES,
    cpo_loss,
    dpo_loss,
    kto_loss,
    length_desensitised,
    loss_weights,
    orpo_loss,
    simpo_loss,
    wpo_weights,
)
from enginepost.train.objectives.reward import process_loss, reward_loss

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "preference.json").read_text())
PAIRS = 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Per-token values of policy, reference and log sum of squares, one tensor a completion; tokens `[2P]`."""
    n = {k: torch.tensor(v, dtype=torch.float64 if k != "mask" else torch.int64) for k, v in GOLDEN["inputs"].items()}
    keep = n["mask"][:, 1:].bool()
    policy, reference, squares = (
        [n[k][i][keep[i]].to(dtype) for i in range(2 * PAIRS)] for k in ("policy", "reference", "squares")
    )
    return policy, reference, squares, keep.sum(1)


def desensitised(values: list[Tensor], alpha: float) -> list[tuple[Tensor, Tensor]]:
    return [length_desensitised(a, b, alpha) for a, b in zip(values[:PAIRS], values[PAIRS:], strict=True)]


def label(case: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in case["settings"].items())


@pytest.mark.parametrize("case", GOLDEN["dpo"], ids=label)
def test_dpo_losses_are_those_of_trl(case: dict[str, Any]) -> None:
    single = case.get("float32", False)
    policy, reference, squares, tokens = inputs(torch.float32 if single else torch.float64)
    s = case["settings"]
    for x in policy:
        x.requires_grad_()
    weights = None
    if s.get("use_weighting"):
        each = torch.stack([wpo_weights(p, q) for p, q in zip(policy, squares, strict=True)])
        weights = each[:PAIRS] * each[PAIRS:]
    sums = torch.stack([x.sum() for x in policy])
    given, ref = sums, torch.stack([x.sum() for x in reference])
    if s.get("ld_alpha"):
        given, ref = (
            torch.stack([pair[side] for side in (0, 1) for pair in desensitised(v, s["ld_alpha"])])
            for v in (policy, reference)
        )
    smoothed = {"exo_pair", "robust", "aot", "aot_unpaired"} & set(s["loss_types"])
    losses, chosen, rejected = dpo_loss(
        given[:PAIRS], given[PAIRS:], ref[:PAIRS], ref[PAIRS:], beta=0.3,
        loss=dict(zip(s["loss_types"], s.get("loss_weights") or [1.0] * 3, strict=False)),
        label_smoothing=0.1 if smoothed else 0.0, f_divergence=s.get("f_divergence_type", "reverse_kl"),
        f_alpha=s.get("f_alpha_divergence_coef", 0.5), chosen_tokens=tokens[:PAIRS], rejected_tokens=tokens[PAIRS:],
        weights=weights, sft_logprob=sums[:PAIRS],
    )  # fmt: skip
    loss = losses.mean()
    if s["loss_types"] == ["sft"]:  # TRL's mean is over all chosen tokens
        assert loss.item() == pytest.approx((-sums[:PAIRS].sum() / tokens[:PAIRS].sum()).item())
    exact = {"rel": 1e-7} if "exo_pair" in s["loss_types"] else {"rel": 1e-12, "abs": 1e-12}  # TRL rounds its epsilon
    near = {"rel": 1e-5} if single else exact
    assert loss.item() == pytest.approx(case["loss"], **near)
    loss.backward()
    grads = [x.grad.sum().item() if x.grad is not None else 0.0 for x in policy]
    assert grads == pytest.approx(case["grad"], rel=1e-4 if single else 1e-6, abs=1e-9)
    m = case["metrics"]
    assert chosen.mean().item() == pytest.approx(m["rewards/chosen"], **near)
    assert rejected.mean().item() == pytest.approx(m["rewards/rejected"], **near)
    assert (chosen > rejected).double().mean().item() == m["rewards/accuracies"]
    assert (chosen - rejected).mean().item() == pytest.approx(m["rewards/margins"], **near)
    assert given[:PAIRS].mean().item() == pytest.approx(m["logps/chosen"], **near)


def test_conservative_and_sums_that_trl_no_longer_has() -> None:
    """cDPO as its authors have it, and IPO of sums, in numbers worked out apart from the code."""
    zero = torch.zeros(1, dtype=torch.float64)
    d = torch.tensor([2.0], dtype=torch.float64)
    sigmoid = 1 / (1 + math.exp(-0.2))
    assert dpo_loss(d, zero, zero, zero, loss="conservative", label_smoothing=0.25)[0].item() == pytest.approx(
        -0.75 * math.log(sigmoid) - 0.25 * math.log(1 - sigmoid), rel=1e-12
    )
    assert dpo_loss(d, zero, zero, zero, loss="ipo_sum")[0].item() == pytest.approx((2 - 5) ** 2)
    counts = torch.tensor([4]), torch.tensor([1])
    mean = dpo_loss(d, zero, zero, zero, loss="ipo", chosen_tokens=counts[0], rejected_tokens=counts[1])
    assert mean[0].item() == pytest.approx((0.5 - 5) ** 2)


START = {
    "sigmoid": math.log(2), "conservative": math.log(2), "robust": math.log(2), "hinge": 1.0, "ipo": 25.0, "ipo_sum": 25.0,
    "exo_pair": 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2), "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0, "aot": math.log(2), "aot_unpaired": math.log(2), "apo_zero": 1.0, "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5, "sigmoid_norm": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("f_divergence", F_DIVERGENCES)
@pytest.mark.parametrize("loss", START)
def test_value_where_policy_is_reference(loss: str, f_divergence: str) -> None:
    x = [torch.tensor([-3.0, -9.0], dtype=torch.float64), torch.tensor([-5.0, -2.0], dtype=torch.float64)]
    n = torch.tensor([2, 3])
    found = dpo_loss(
        *x, *x, loss=loss, label_smoothing=0.2, f_divergence=f_divergence, chosen_tokens=n, rejected_tokens=n.flip(0)
    )[0]  # fmt: skip
    assert found.tolist() == pytest.approx([START[loss]] * 2, rel=1e-12)


@pytest.mark.parametrize("loss", DPO_LOSSES)
def test_gradients_by_differences(loss: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = [(-torch.rand(3, generator=generator, dtype=torch.float64) * 4).requires_grad_() for _ in range(4)]
    n = torch.tensor([3, 5, 2])
    for f in F_DIVERGENCES:
        assert torch.autograd.gradcheck(
            lambda *x, f=f: dpo_loss(
                *x, beta=0.4, loss=loss, label_smoothing=0.1, f_divergence=f, chosen_tokens=n, rejected_tokens=n
            )[0],
            x,
        )  # fmt: skip


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_is_that_of_trl(loss: str) -> None:
    g = GOLDEN["kto"][loss]
    policy, reference, _, _ = inputs()
    for x in policy:
        x.requires_grad_()
    ratio = torch.stack([a.sum() - b.sum() for a, b in zip(policy, reference, strict=True)])
    desirable = torch.tensor(g["label"])
    kl = max(0.0, sum(g["kl_policy"]) / 3 - sum(g["kl_reference"]) / 3)
    losses, rewards = kto_loss(ratio, desirable, kl, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7, loss=loss)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(g["loss"], rel=1e-12)
    assert [x.grad.sum().item() for x in policy if x.grad is not None] == pytest.approx(g["grad"], rel=1e-9)
    assert rewards[desirable].mean().item() == pytest.approx(g["metrics"]["rewards/chosen"], rel=1e-12)
    if loss == "kto":
        assert kl == pytest.approx(g["metrics"]["kl"])


def test_orpo_cpo_and_simpo_are_those_of_trl() -> None:
    policy, _, _, tokens = inputs()
    summed = torch.stack([x.sum() for x in policy])
    mean, g = summed / tokens, GOLDEN["contrastive"]
    zero = torch.zeros(PAIRS, dtype=torch.float64)
    losses, odds = orpo_loss(mean[:PAIRS], mean[PAIRS:], zero, beta=0.3)
    # TRL rounds to float32 first
    assert (-losses).tolist() == pytest.approx(g["orpo"]["losses"], rel=1e-5)
    assert odds.mean().item() == pytest.approx(g["orpo"]["log_odds_chosen"], rel=1e-5)
    for loss in ("sigmoid", "hinge", "ipo"):
        x = mean if loss == "ipo" else summed
        found = cpo_loss(x[:PAIRS], x[PAIRS:], zero, beta=0.3, loss=loss, label_smoothing=0.1)
        assert found.tolist() == pytest.approx(g[loss], rel=1e-12)
    found = simpo_loss(mean[:PAIRS], mean[PAIRS:], beta=0.3, gamma=0.5, label_smoothing=0.1)
    assert found.tolist() == pytest.approx(g["simpo"], rel=1e-12)


def test_gradients_of_the_others_by_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b, c = ((-torch.rand(3, generator=generator, dtype=torch.float64) - 0.1).requires_grad_() for _ in range(3))
    desirable = torch.tensor([True, False, True])
    check = torch.autograd.gradcheck
    assert check(lambda a, b, c: orpo_loss(a, b, c)[0], (a, b, c))
    assert check(simpo_loss, (a, b))
    for loss in ("sigmoid", "hinge", "ipo"):
        assert check(lambda a, b, c, loss=loss: cpo_loss(a, b, c, loss=loss), (a, b, c))
    for loss in ("kto", "apo_zero_unpaired"):
        assert check(lambda a, loss=loss: kto_loss(a, desirable, 0.3, loss=loss)[0], (a,))
    assert check(lambda a, b: reward_loss(a, b, c.detach(), centring=0.1), (a, b))
    logits = torch.randn(3, 2, generator=generator, dtype=torch.float64).requires_grad_()
    assert check(lambda x: process_loss(x, desirable), (logits,))


def test_odds_stay_finite_at_both_ends() -> None:
    """A completion that is all but certain, and one that is all but impossible."""
    x = torch.tensor([-1e-9, -800.0], dtype=torch.float64, requires_grad=True)
    losses, odds = orpo_loss(x, x.flip(0).detach(), torch.zeros(2, dtype=torch.float64))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(odds).all() and torch.isfinite(x.grad).all()
    assert odds[0].item() == pytest.approx(800 - math.log(1e-9), rel=1e-6)


def test_reward_loss_is_that_of_trl() -> None:
    g = GOLDEN["reward"]
    rewards = torch.tensor(g["rewards"], dtype=torch.float64, requires_grad=True)
    margin = torch.tensor(g["margin"], dtype=torch.float64)
    loss = reward_loss(rewards[:PAIRS], rewards[PAIRS:], margin, centring=0.01).mean()
    loss.backward()
    assert loss.item() == pytest.approx(g["loss"], rel=1e-12)
    assert rewards.grad.tolist() == pytest.approx(g["grad"], rel=1e-9)


def test_process_loss_in_numbers() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], dtype=torch.float64)
    found = process_loss(logits, torch.tensor([True, False]))
    assert found.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])


def test_refusals() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"loss 'sigmoyd' is none of sigmoid, conservative"):
        dpo_loss(x, x, x, x, loss="sigmoyd")
    with pytest.raises(ValueError, match="ipo divides by the number of tokens"):
        dpo_loss(x, x, x, x, loss="ipo")
    with pytest.raises(ValueError, match="f_divergence 'tv' is none of"):
        dpo_loss(x, x, x, x, f_divergence="tv")
    with pytest.raises(ValueError, match=r"loss \[\] is none of"):
        loss_weights([])
    with pytest.raises(ValueError, match="loss 'odd' is none of"):
        cpo_loss(x, x, x, loss="odd")
    with pytest.raises(ValueError, match="loss 'odd' is none of"):
        kto_loss(x, x > 0, 0.0, loss="odd")
