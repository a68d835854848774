"""Preference losses: pure functions of the log-probabilities of whole completions.

For pair i: pi_w, pi_l = log-probability of the chosen and the rejected completion under the policy (summed over their tokens),
ref_w, ref_l the same under the reference, n_w, n_l their tokens, and

    D_w = pi_w - ref_w      D_l = pi_l - ref_l      S = f(D)  (f_divergence, below)      d = S_w - S_l      s = logsigmoid

    sigmoid       -s(b d)                                                     DPO, arXiv 2305.18290
    conservative  -(1-e) s(b d) - e s(-b d)                                   cDPO
    robust        [-(1-e) s(b d) + e s(-b d)] / (1 - 2e)                      arXiv 2403.00409
    hinge         max(0, 1 - b d)                                             SLiC, arXiv 2305.10425
    ipo           (S_w / n_w - S_l / n_l - 1/(2b))^2                          arXiv 2310.12036, averaged over tokens (as TRL has it)
    ipo_sum       (d - 1/(2b))^2                                              ... as the paper's equation 17 reads: sums
    exo_pair      q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = sigmoid(b d)       arXiv 2402.00856, equation 16
    nca_pair      -s(b D_w) - s(-b D_w)/2 - s(-b D_l)/2                       arXiv 2402.05369
    bco_pair      -s(b D_w) - s(-b D_l)                                       arXiv 2404.04656
    sppo_hard     (D_w - 1/(2b))^2 + (D_l + 1/(2b))^2                         arXiv 2405.00675
    aot           -(1-e) s(b u) - e s(-b u), u = sort(pi_w - pi_l) - sort(ref_w - ref_l)   arXiv 2406.05882
    aot_unpaired  ... u = sort(D_w) - sort(D_l)
    apo_zero      1 - sigmoid(b D_w) + sigmoid(b D_l)                         arXiv 2408.06266, equation 7
    apo_down      sigmoid(b D_w) + 1 - sigmoid(b (D_w - D_l))                 ... equation 8
    discopop      (1-m) (-s(b d)) + m exp(-b d), m = sigmoid(b d / tau)       arXiv 2406.08414, equation 5
    sigmoid_norm  -s(b (S_w / n_w - S_l / n_l))                               length-normalised DPO (arXiv 2411.15124)
    sft           -pi_w / mean(n_w)                                           cross entropy per chosen token

    f_divergence  reverse_kl D    forward_kl 1 - exp(-D)    js_divergence log 2 + s(D)    alpha_divergence (exp((a-1) D) - 1) / (a-1)
                  (f' at exp(D), arXiv 2309.16240, equation 6; zero at D = 0)

A sort is over the pairs given at once (the pairs of a micro-batch). Results are float64 where the inputs are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # of alpha_divergence, so that exp stays finite in float32
EXO_SMOOTHING = 1e-3  # exo_pair has no value at e = 0; the paper's


class _Pairs(NamedTuple):
    """What the losses see; `[P]` each."""

    beta: float
    smoothing: float
    tau: float
    policy: tuple[Tensor, Tensor]
    reference: tuple[Tensor, Tensor]
    ratios: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor]
    sft: tuple[Tensor, Tensor | float]  # log-probability of the chosen completion, and what it is divided by

    @property
    def logits(self) -> Tensor:
        return self.beta * (self.scores[0] - self.scores[1])

    @property
    def averaged(self) -> Tensor:
        return self.scores[0] / self.tokens[0] - self.scores[1] / self.tokens[1]


def _smoothed(logits: Tensor, e: float) -> Tensor:
    return -(1 - e) * logsigmoid(logits) - e * logsigmoid(-logits)


def _exo_pair(p: _Pairs) -> Tensor:
    e = p.smoothing or EXO_SMOOTHING
    win, lose = logsigmoid(p.logits), logsigmoid(-p.logits)
    return win.exp() * (win - math.log1p(-e)) + lose.exp() * (lose - math.log(e))


def _discopop(p: _Pairs) -> Tensor:
    m = torch.sigmoid(p.logits / p.tau)
    return (1 - m) * -logsigmoid(p.logits) + m * torch.exp(-p.logits)


def _aot(p: _Pairs) -> Tensor:
    policy, reference = p.policy[0] - p.policy[1], p.reference[0] - p.reference[1]
    return _smoothed(p.beta * (policy.sort().values - reference.sort().values), p.smoothing)


def _aot_unpaired(p: _Pairs) -> Tensor:
    return _smoothed(p.beta * (p.ratios[0].sort().values - p.ratios[1].sort().values), p.smoothing)


_LOSSES: dict[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": lambda p: -logsigmoid(p.logits),
    "conservative": lambda p: _smoothed(p.logits, p.smoothing),
    "robust": lambda p: (
        (p.smoothing * logsigmoid(-p.logits) - (1 - p.smoothing) * logsigmoid(p.logits)) / (1 - 2 * p.smoothing)
    ),
    "hinge": lambda p: torch.relu(1 - p.logits),
    "ipo": lambda p: (p.averaged - 1 / (2 * p.beta)).square(),
    "ipo_sum": lambda p: (p.scores[0] - p.scores[1] - 1 / (2 * p.beta)).square(),
    "exo_pair": _exo_pair,
    "nca_pair": lambda p: (
        -logsigmoid(p.beta * p.ratios[0])
        - 0.5 * logsigmoid(-p.beta * p.ratios[0])
        - 0.5 * logsigmoid(-p.beta * p.ratios[1])
    ),
    "bco_pair": lambda p: -logsigmoid(p.beta * p.ratios[0]) - logsigmoid(-p.beta * p.ratios[1]),
    "sppo_hard": lambda p: (p.ratios[0] - 0.5 / p.beta).square() + (p.ratios[1] + 0.5 / p.beta).square(),
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": lambda p: 1 - torch.sigmoid(p.beta * p.ratios[0]) + torch.sigmoid(p.beta * p.ratios[1]),
    "apo_down": lambda p: torch.sigmoid(p.beta * p.ratios[0]) + 1 - torch.sigmoid(p.beta * (p.ratios[0] - p.ratios[1])),
    "discopop": _discopop,
    "sigmoid_norm": lambda p: -logsigmoid(p.beta * p.averaged),
    "sft": lambda p: -p.sft[0] / p.sft[1],
}
DPO_LOSSES = tuple(_LOSSES)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    loss: str | Sequence[str] | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    weights: Tensor | None = None,
    sft_logprob: Tensor | None = None,
    mean_chosen_tokens: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of pairs and their implicit rewards.

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: `[P]`, log-probabilities of whole completions.
        loss: a name of the table above, a list of names (added up), or {name: weight}.
        chosen_tokens, rejected_tokens: `[P]`, tokens of the completions; ipo, sigmoid_norm and sft want them.
        weights: `[P]`, multiplies the losses (WPO, `wpo_weights`).
        sft_logprob: what loss sft takes for pi_w; default policy_chosen. mean_chosen_tokens: what it divides by, when the mean is to
            be over more pairs than these (a whole optimizer step); default the mean of chosen_tokens.

    Returns: (losses `[P]`, chosen rewards b D_w `[P]`, rejected rewards b D_l `[P]`); the rewards carry no gradient.
    Raises: ValueError for an unknown name, or token counts missing where a loss divides by them.

    >>> zero = torch.zeros(2, dtype=torch.float64)
    >>> losses, *_ = dpo_loss(zero, zero, zero, zero)
    >>> [round(x, 6) for x in losses.tolist()]
    [0.693147, 0.693147]
    """
    named = loss_weights(loss)
    needing = [n for n in named if n in ("ipo", "sigmoid_norm", "sft")]
    if needing and (chosen_tokens is None or rejected_tokens is None):
        raise ValueError(
            f"dpo_loss: {needing[0]} divides by the number of tokens: give chosen_tokens and rejected_tokens"
        )
    ratios = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    ones = torch.ones_like(policy_chosen)
    tokens = tuple(
        ones if n is None else n.to(policy_chosen.dtype).clamp_min(1) for n in (chosen_tokens, rejected_tokens)
    )
    pairs = _Pairs(
        beta,
        label_smoothing,
        discopop_tau,
        (policy_chosen, policy_rejected),
        (reference_chosen, reference_rejected),
        ratios,
        (_score(ratios[0], f_divergence, f_alpha), _score(ratios[1], f_divergence, f_alpha)),
        (tokens[0], tokens[1]),
        (
            policy_chosen if sft_logprob is None else sft_logprob,
            tokens[0].mean() if mean_chosen_tokens is None else mean_chosen_tokens,
        ),
    )
    losses = torch.zeros_like(policy_chosen)
    for name, weight in named.items():
        losses = losses + weight * _LOSSES[name](pairs)
    if weights is not None:
        losses = losses * weights
    return losses, beta * ratios[0].detach(), beta * ratios[1].detach()


def loss_weights(loss: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """`loss` as {name: weight}. Raises ValueError for a name that is not in the table."""
    named = (
        {loss: 1.0} if isinstance(loss, str) else dict(loss) if isinstance(loss, Mapping) else dict.fromkeys(loss, 1.0)
    )
    unknown = [n for n in named if n not in _LOSSES]
    if unknown or not named:
        raise ValueError(f"dpo_loss: loss {unknown[0] if unknown else loss!r} is none of {', '.join(DPO_LOSSES)}")
    return named


def _score(ratio: Tensor, f_divergence: str, alpha: float) -> Tensor:
    if f_divergence == "reverse_kl" or (f_divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return ratio
    if f_divergence == "forward_kl":
        return -torch.expm1(-ratio)
    if f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    if f_divergence == "alpha_divergence":
        return torch.expm1(((alpha - 1) * ratio).clamp_max(LARGEST_EXPONENT)) / (alpha - 1)
    raise ValueError(f"dpo_loss: f_divergence {f_divergence!r} is none of {', '.join(F_DIVERGENCES)}")


def length_desensitised(chosen: Tensor, rejected: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """LD-DPO: log-probabilities of a pair whose tokens beyond the shorter completion's length count alpha (arXiv 2409.06411).

    Args: chosen `[n_w]`, rejected `[n_l]`, per token. Returns two scalars of the inputs' dtype.
    """
    shared = min(len(chosen), len(rejected))
    return tuple(x[:shared].sum() + alpha * x[shared:].sum() for x in (chosen, rejected))  # type: ignore[return-value]


def wpo_weights(logprob: Tensor, log_sum_squares: Tensor) -> Tensor:
    """Weight of one completion in WPO: exp(mean_t(log p_t - log sum_v p_tv^2)), how like the policy's own it is; no gradient.

    Args: logprob `[n]`; log_sum_squares `[n]`, log of the sum of squared probabilities at each place. A pair's weight is the product
    of its two completions'. Source: arXiv 2406.11827, equation 2 with the alignment of section 3.2.
    """
    return (logprob.detach() - log_sum_squares.detach()).mean().exp()


def orpo_loss(chosen: Tensor, rejected: Tensor, nll: Tensor, *, beta: float = 0.1) -> tuple[Tensor, Tensor]:
    """Odds-ratio preference optimization: nll - beta logsigmoid(log odds(chosen) - log odds(rejected)) (arXiv 2403.07691).

    Args: chosen, rejected `[P]`, mean log-probability of a completion's tokens; nll `[P]`, cross entropy of the chosen rows.
    Returns: (losses, log odds ratios `[P]`, which carry no gradient).
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return nll - beta * logsigmoid(odds), odds.detach()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact at both ends (Maechler 2012)."""
    x = x.clamp_max(-1e-12)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(x)))


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO: -logsigmoid(beta (chosen - rejected) - gamma), without a reference (arXiv 2405.14734, equation 6).

    Args: chosen, rejected `[P]`, mean log-probability of a completion's tokens. Returns losses `[P]`.
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo_loss(
    chosen: Tensor, rejected: Tensor, nll: Tensor, *, beta: float = 0.1, alpha: float = 1.0, loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Contrastive preference optimization: a DPO loss with a uniform reference, plus alpha times cross entropy (arXiv 2401.08417).

    Args: chosen, rejected `[P]`, summed log-probability; nll `[P]`, cross entropy of the chosen rows; loss: sigmoid, hinge or ipo
    (the caller then gives mean log-probabilities). Returns losses `[P]`. Raises ValueError for another loss.
    """
    difference = chosen - rejected
    if loss == "sigmoid":
        preference = _smoothed(beta * difference, label_smoothing)
    elif loss == "hinge":
        preference = torch.relu(1 - beta * difference)
    elif loss == "ipo":
        preference = (difference - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"cpo_loss: loss {loss!r} is none of sigmoid, hinge, ipo")
    return preference + alpha * nll


def kto_loss(
    ratio: Tensor, desirable: Tensor, kl: Tensor | float, *, beta: float = 0.1, desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0, loss: str = "kto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Kahneman-Tversky optimization of unpaired completions (arXiv 2402.01306, equations 7 and 8).

        desirable    w_d (1 - sigmoid(beta (ratio - kl)))         undesirable  w_u (1 - sigmoid(beta (kl - ratio)))
        apo_zero_unpaired: 1 - sigmoid(beta ratio) and sigmoid(beta ratio), without kl (arXiv 2408.06266)

    Args: ratio `[B]`, log pi - log ref of whole completions; desirable bool `[B]`; kl the estimate of KL(pi || ref), at least 0 and
    without gradient. Returns: (losses `[B]`, rewards beta ratio `[B]`, which carry no gradient).
    """
    if loss not in ("kto", "apo_zero_unpaired"):
        raise ValueError(f"kto_loss: loss {loss!r} is none of kto, apo_zero_unpaired")
    shift = kl if loss == "kto" else 0.0
    sign = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    good = desirable.to(ratio.dtype)
    weight = desirable_weight * good + undesirable_weight * (1 - good)
    return weight * (1 - torch.sigmoid(sign * beta * (ratio - shift))), beta * ratio.detach()
