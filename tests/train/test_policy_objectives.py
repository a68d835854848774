"""Policy objectives against TRL's own code (golden files), hand-worked tables, finite differences and brute-force enumeration."""

import itertools
import json
import pathlib

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from enginepost.errors import EnginepostError
from enginepost.kernels.linear_kl import linear_kl
from enginepost.train.objectives import advantages as adv
from enginepost.train.objectives import kl, policy

FILE = pathlib.Path(__file__).parent.parent / "golden" / "policy.safetensors"
with safe_open(str(FILE), "pt") as f:
    GOLDEN = {name: f.get_tensor(name) for name in f.keys()}
    LOSSES = json.loads(f.metadata()["losses"])
AGGREGATE = {"dr_grpo": "dr_grpo", "dapo": "dapo", "cispo": "dapo"}


def loss_of(name: str, logprob: Tensor, old: Tensor, ref: Tensor, scores: Tensor, lengths: Tensor) -> Tensor:
    """The case `name` in our terms."""
    keys = LOSSES.get(name, {})
    kind = keys.get("loss_type", "grpo")
    level = {"rloo": "product", "gspo": "sequence"}.get(name, "token")
    ratio = policy.log_ratio(logprob, old, lengths, level)
    advantages = scores.repeat_interleave(lengths)
    if kind == "cispo":
        each = policy.cispo_loss(logprob, ratio, advantages, epsilon_high=keys["epsilon_high"])
    else:
        each = policy.clipped_loss(
            ratio, advantages, epsilon=keys.get("epsilon_low", 0.2), epsilon_high=keys.get("epsilon_high"),
            delta=keys.get("delta"),
        )  # fmt: skip
    if "beta" in keys:
        each = each + keys["beta"] * kl.kl_estimate(logprob, ref, "k3")
    weights = policy.token_weights(
        lengths, AGGREGATE.get(kind, "grpo"), completions=len(lengths), tokens=int(lengths.sum()), max_length=8
    )
    return (each * weights).sum()


@pytest.mark.parametrize("name", [*LOSSES, "rloo"])
def test_losses_and_gradients_are_trls(name: str) -> None:
    logprob = GOLDEN["logprob"].clone().requires_grad_()
    loss = loss_of(name, logprob, GOLDEN["old"], GOLDEN["ref"], GOLDEN["advantages"], GOLDEN["lengths"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), GOLDEN[f"{name}.loss"], rtol=0, atol=1e-9)
    torch.testing.assert_close(logprob.grad, GOLDEN[f"{name}.gradient"], rtol=0, atol=1e-9)
    if name != "cispo":  # whose weight is a constant to the gradient and not to a finite difference
        assert torch.autograd.gradcheck(
            lambda x: loss_of(name, x, GOLDEN["old"], GOLDEN["ref"], GOLDEN["advantages"], GOLDEN["lengths"]),
            GOLDEN["logprob"].clone().requires_grad_(),
        )


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("cispo", "grpo, two-sided")])
def test_clip_fractions_are_trls(name: str) -> None:
    keys, lengths = LOSSES[name], GOLDEN["lengths"]
    level = "sequence" if name == "gspo" else "token"
    ratio = policy.log_ratio(GOLDEN["logprob"], GOLDEN["old"], lengths, level)
    low, high = policy.clipped_tokens(
        ratio, GOLDEN["advantages"].repeat_interleave(lengths), epsilon=keys.get("epsilon_low", 0.2),
        epsilon_high=keys.get("epsilon_high"),
    )  # fmt: skip
    for found, side in ((low, "low"), (high, "high")):
        values = found.double()
        if level == "sequence":  # one value a completion there
            values = values[lengths.cumsum(0) - 1]
        torch.testing.assert_close(values.mean(), GOLDEN[f"{name}.clip_ratio/{side}_mean"].squeeze(), rtol=0, atol=1e-7)


def test_micro_batches_change_nothing() -> None:
    """The shares of two micro-batches add up to the loss of one, for every aggregation."""
    lengths, logprob, old = GOLDEN["lengths"], GOLDEN["logprob"], GOLDEN["old"]
    scores = GOLDEN["advantages"]
    for aggregate in ("grpo", "dr_grpo", "dapo"):

        def share(rows: slice, tokens: slice, kind: str = aggregate) -> Tensor:
            part = lengths[rows]
            ratio = policy.log_ratio(logprob[tokens], old[tokens], part)
            weights = policy.token_weights(
                part, kind, completions=len(lengths), tokens=int(lengths.sum()), max_length=8
            )  # type: ignore[arg-type]
            return (policy.clipped_loss(ratio, scores[rows].repeat_interleave(part)) * weights).sum()

        cut = int(lengths[:2].sum())
        whole = share(slice(None), slice(None))
        parts = share(slice(0, 2), slice(0, cut)) + share(slice(2, None), slice(cut, None))
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)


# TRL counts in float32 where it corrects a variance: hence 1e-7.
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_trls(scale: str) -> None:
    total = adv.combine(GOLDEN["rewards"], GOLDEN["weights"])
    found = adv.group_advantages(total, 4, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(found, GOLDEN[f"advantages.{scale}"], rtol=0, atol=1e-7)
    assert (found[4:8] == 0).all() and adv.flat_groups(total, 4).tolist() == [False, True, False, False, True]


def test_other_advantages_are_trls() -> None:
    rewards, weights = GOLDEN["rewards"], GOLDEN["weights"]
    torch.testing.assert_close(
        adv.normalized_then_summed(rewards, weights, 4), GOLDEN["advantages.gdpo"], rtol=0, atol=1e-7
    )
    for normalize in (False, True):
        found = adv.leave_one_out(adv.combine(rewards, weights), 4, normalize=normalize)
        torch.testing.assert_close(found, GOLDEN[f"advantages.rloo.{normalize}"], rtol=0, atol=1e-7)
    assert (adv.leave_one_out(torch.tensor([3.0, 4.0]), 1) == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_is_trls(beta: float) -> None:
    """TRL's beta 0 is forward KL, 1 reverse; between, its beta weighs the teacher in the mixture, as ours does."""
    hidden = GOLDEN["gkd.hidden"].clone().requires_grad_()
    kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "js")
    loss = linear_kl(
        hidden, GOLDEN["gkd.head"], teacher_hidden=GOLDEN["gkd.teacher_hidden"], teacher_head=GOLDEN["gkd.teacher_head"],
        kind=kind, beta=beta if kind == "js" else 0.5, temperature=0.9,
    ).sum()  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss.detach().double(), GOLDEN[f"gkd.{beta}.loss"], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.grad, GOLDEN[f"gkd.{beta}.gradient"], rtol=0, atol=1e-5)


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5. First completion, from the end: delta = 4 - 2 = 2; 0 + 0.5 * 2 - 1 = 0, A = 0 + 0.25 * 2 = 0.5;
    1 + 0.5 * 1 - 3 = -1.5, A = -1.5 + 0.25 * 0.5 = -1.375. The second: delta = 7 - 5 = 2; -1 + 0.5 * 5 - 0 = 1.5, A = 2."""
    lengths = torch.tensor([3, 0, 2])
    rewards = torch.tensor([1.0, 0.0, 4.0, -1.0, 7.0], dtype=torch.float64)
    values = torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0], dtype=torch.float64)
    advantages, returns = adv.gae(rewards, values, lengths, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [-1.375, 0.5, 2.0, 2.0, 2.0]
    assert returns.tolist() == [1.625, 1.5, 4.0, 2.0, 7.0]


def test_gae_of_lambda_one_is_the_return_less_the_value() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 1, 7])
    rewards, values = torch.randn(2, 13, generator=generator, dtype=torch.float64)
    advantages, returns = adv.gae(rewards, values, lengths, gamma=1.0, lam=1.0)
    ahead = torch.cat([r.flip(0).cumsum(0).flip(0) for r in rewards.split(lengths.tolist())])
    torch.testing.assert_close(returns, ahead)
    torch.testing.assert_close(advantages, ahead - values)
    one_step, _ = adv.gae(rewards, values, lengths, gamma=0.9, lam=0.0)
    after = torch.cat([torch.cat([v[1:], v.new_zeros(1)]) for v in values.split(lengths.tolist())])
    torch.testing.assert_close(one_step, rewards + 0.9 * after - values)


def test_rewards_of_tokens() -> None:
    found = adv.token_rewards(
        torch.tensor([5.0, 9.0, 7.0]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 1]), 0.1
    )
    torch.testing.assert_close(found, torch.tensor([-0.1, 4.8, 6.7]))


def test_overlong_penalty_by_hand() -> None:
    found = adv.overlong_penalty(torch.tensor([10, 16, 18, 20, 30]), limit=20, buffer=4)
    assert found.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_whiten() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    white = adv.whiten(x)
    assert abs(white.mean()) < 1e-12 and abs(white.var(unbiased=False) - 1) < 1e-6
    torch.testing.assert_close(adv.whiten(x, shift_mean=False), white + 3)
    assert torch.isfinite(adv.whiten(torch.ones(3))).all()


def test_kl_estimators_are_unbiased() -> None:
    """k1 and k3, averaged over the policy's own distribution, are KL(pi || ref); k2 is near it, and its gradient is KL's."""
    generator = torch.Generator().manual_seed(2)
    z, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    z = (reference + 0.1 * z).requires_grad_()
    log_p, log_q = z.log_softmax(0), reference.log_softmax(0)
    true = (log_p.exp() * (log_p - log_q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((log_p.exp() * kl.kl_estimate(log_p, log_q, kind)).sum(), true)  # type: ignore[arg-type]
    p = log_p.exp().detach()
    (gradient,) = torch.autograd.grad(true, z, retain_graph=True)
    (estimate,) = torch.autograd.grad((p * kl.kl_estimate(log_p, log_q, "k2")).sum(), z)
    torch.testing.assert_close(estimate, gradient)
    with pytest.raises(EnginepostError, match="k1, k2 or k3"):
        kl.kl_estimate(log_p, log_q, "k4")  # type: ignore[arg-type]


def test_the_controller_steers_towards_its_target() -> None:
    assert kl.next_coefficient(0.1, 12.0, target=6.0, horizon=100, completions=10) == pytest.approx(0.1 * 1.02)
    assert kl.next_coefficient(0.1, 0.0, target=6.0, horizon=100, completions=10) == pytest.approx(0.1 * 0.98)
    assert kl.next_coefficient(0.1, 6.3, target=6.0, horizon=100, completions=10) == pytest.approx(0.1 * 1.005)


def test_value_loss() -> None:
    values = torch.tensor([1.0, 1.5, 0.0], dtype=torch.float64, requires_grad=True)
    old, returns = (
        torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([2.0, 3.0, 3.0], dtype=torch.float64),
    )
    # (1 - 2)^2; held at 1.2, (1.2 - 3)^2 beats (1.5 - 3)^2; held at 0.8, (0 - 3)^2 beats (0.8 - 3)^2
    each = policy.value_loss(values, old, returns, clip=0.2)
    torch.testing.assert_close(each, torch.tensor([0.5, 1.62, 4.5], dtype=torch.float64))
    each.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-1.0, 0.0, -3.0]  # the held one has no gradient


class Toy:
    """A policy over two tokens and three steps: a logit for every prefix."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.prefixes = [p for n in range(3) for p in itertools.product((0, 1), repeat=n)]
        self.z = torch.randn(len(self.prefixes), generator=generator, dtype=torch.float64, requires_grad=True)
        self.reward = {s: float(i * i % 7) for i, s in enumerate(itertools.product((0, 1), repeat=3))}

    def logprob(self, sequence: tuple[int, ...]) -> Tensor:
        """`[3]`"""
        z = torch.stack([self.z[self.prefixes.index(sequence[:t])] for t in range(3)])
        return torch.nn.functional.logsigmoid(torch.where(torch.tensor(sequence) == 1, z, -z))

    def value(self, prefix: tuple[int, ...]) -> float:
        """The true value: expected reward from here."""
        with torch.no_grad():
            ends = [s for s in self.reward if s[: len(prefix)] == prefix]
            weights = [float(self.logprob(s)[len(prefix) :].sum().exp()) for s in ends]
        return sum(w * self.reward[s] for w, s in zip(weights, ends, strict=True))


@pytest.mark.parametrize("estimator", ["gae 0", "gae 0.95", "gae 1", "reward", "product"])
def test_policy_gradient_is_that_of_the_expected_reward(estimator: str) -> None:
    """Summed over all eight completions with their probabilities, the estimate is the gradient of the expected reward, to rounding:
    with GAE on the true values for any lambda, with the reward itself, and with RLOO's ratio of whole completions."""
    toy = Toy()
    (wanted,) = torch.autograd.grad(sum(toy.logprob(s).sum().exp() * r for s, r in toy.reward.items()), toy.z)
    found = torch.zeros_like(toy.z)
    lengths = torch.tensor([3])
    for sequence, score in toy.reward.items():
        logprob = toy.logprob(sequence)
        chance = logprob.detach().sum().exp()
        if estimator.startswith("gae"):
            rewards = torch.tensor([0.0, 0.0, score], dtype=torch.float64)
            values = torch.tensor([toy.value(sequence[:t]) for t in range(3)], dtype=torch.float64)
            advantages, _ = adv.gae(rewards, values, lengths, gamma=1.0, lam=float(estimator.split()[1]))
        else:
            advantages = torch.full((3,), score, dtype=torch.float64)
        level = "product" if estimator == "product" else "token"
        ratio = policy.log_ratio(logprob, logprob.detach(), lengths, level)
        loss = policy.clipped_loss(ratio, advantages)
        loss = loss.mean() if level == "product" else loss.sum()
        (gradient,) = torch.autograd.grad(loss, toy.z)
        found -= chance * gradient
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_leave_one_out_estimate_over_all_pairs() -> None:
    """RLOO with two samples, enumerated over all 64 pairs: its baseline leaves the gradient of the expected reward unbiased."""
    toy = Toy()
    (wanted,) = torch.autograd.grad(sum(toy.logprob(s).sum().exp() * r for s, r in toy.reward.items()), toy.z)
    found = torch.zeros_like(toy.z)
    for pair in itertools.product(toy.reward, repeat=2):
        both = [toy.logprob(s) for s in pair]
        chance = torch.stack([b.detach().sum() for b in both]).sum().exp()
        scores = adv.leave_one_out(torch.tensor([toy.reward[s] for s in pair], dtype=torch.float64), 2)
        logprob, lengths = torch.cat(both), torch.tensor([3, 3])
        ratio = policy.log_ratio(logprob, logprob.detach(), lengths, "product")
        loss = policy.clipped_loss(ratio, scores.repeat_interleave(lengths))
        (gradient,) = torch.autograd.grad(loss.sum() / 3 / 2, toy.z)
        found -= chance * gradient
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_wrong_names_are_errors() -> None:
    lengths, x = torch.tensor([2]), torch.zeros(2)
    with pytest.raises(EnginepostError, match="token, sequence or product"):
        policy.log_ratio(x, x, lengths, "word")  # type: ignore[arg-type]
    with pytest.raises(EnginepostError, match="grpo, dr_grpo or dapo"):
        policy.token_weights(lengths, "mean", completions=1, tokens=2, max_length=2)  # type: ignore[arg-type]
