"""How far the policy is from its reference, by the tokens it drew; and how strongly that is held against it.

With d_t = log pi(x_t) - log ref(x_t), x_t drawn from pi, the estimators of KL(pi || ref) at a token (Schulman 2020,
http://joschu.net/blog/kl-approx.html):

    k1 = d                unbiased; a token's may be negative
    k2 = d^2 / 2          biased, low variance; its gradient is that of the true KL
    k3 = e^-d - 1 + d     unbiased, never negative

The adaptive controller (Ziegler et al. 2019, arXiv 1909.08593, section 2.2) moves the coefficient so that the KL of a completion,
summed over its tokens, stays near a target:

    e = clip(KL / target - 1, -0.2, 0.2)        beta <- beta (1 + e n / horizon)        n completions since the last time
"""

from typing import Literal

import torch
from torch import Tensor

from enginepost.errors import EnginepostError

Estimator = Literal["k1", "k2", "k3"]
CLIP = 0.2  # of the controller's error


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, kind: Estimator = "k3") -> Tensor:
    """Log-probabilities `[N]` of drawn tokens under policy and reference -> the estimate at each token `[N]`."""
    d = logprob - ref_logprob
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise EnginepostError(f"KL estimator {kind!r} is not known; use k1, k2 or k3")


def next_coefficient(beta: float, kl: float, *, target: float, horizon: float, completions: int) -> float:
    """The controller's coefficient after a roll-out of `completions` whose mean KL (nats per completion) was `kl`."""
    error = min(max(kl / target - 1.0, -CLIP), CLIP)
    return beta * (1.0 + error * completions / horizon)
