"""Policy gradients: what is lost at each token when a policy that has moved is judged by what an older one drew.

With r = pi(x_t) / pi_old(x_t) and the advantage A, per token (or per completion, see `log_ratio`):

    clipped   -min(r A, clip(r, 1 - e_low, 1 + e_high) A)       PPO, GRPO, Dr. GRPO, RLOO; DAPO with e_high > e_low; GSPO
              with `delta`, r in the first term is at most delta (two-sided clipping)
    cispo     -stop(min(r, e_high)) A log pi(x_t)                no token loses its gradient

The loss of an optimizer step is sum_t w_t loss_t, with weights from the whole step, so that how it is cut into micro-batches
changes nothing:

    grpo      w = 1 / (S |o|)         mean over completions of the mean over tokens
    dr_grpo   w = 1 / (S L)           L the completion length at most: no bias by length
    dapo      w = 1 / N               mean over all tokens

Layout: the tokens of S completions one after another, `[N]`, with `lengths` int64 `[S]`. Sources: Schulman et al. 2017 (PPO, arXiv
1707.06347); Shao et al. 2024 (GRPO, 2402.03300); Liu et al. 2025 (Dr. GRPO, 2503.20783); Yu et al. 2025 (DAPO, 2503.14476); Zheng et
al. 2025 (GSPO, 2507.18071); MiniMax 2025 (CISPO, 2506.13585); Ahmadian et al. 2024 (RLOO, 2402.14740).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from enginepost.errors import EnginepostError

Level = Literal["token", "sequence", "product"]
Aggregate = Literal["grpo", "dr_grpo", "dapo"]


def log_ratio(logprob: Tensor, old_logprob: Tensor, lengths: Tensor, level: Level = "token") -> Tensor:
    """log r at every token `[N]`, gradients through `logprob`.

    level: "token"; "sequence": the mean over the completion (GSPO's geometric mean, eq. 7); "product": the sum over it (RLOO).
    """
    each = logprob - old_logprob
    if level == "token":
        return each
    if level not in ("sequence", "product"):
        raise EnginepostError(f"ratio level {level!r} is not known; use token, sequence or product")
    total = torch.segment_reduce(each, "sum", lengths=lengths, initial=0.0)
    if level == "sequence":
        total = total / lengths.clamp(min=1)
    spread: Tensor = _Spread.apply(total, lengths, len(each))
    return spread


class _Spread(torch.autograd.Function):
    """x `[S]` at every token of its completion, `[N]`. (The gradient of repeat_interleave would be added up in any order on a
    GPU.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(lengths)
        return x.repeat_interleave(lengths, output_size=tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (lengths,) = ctx.saved_tensors
        return torch.segment_reduce(gradients[0], "sum", lengths=lengths, initial=0.0), None, None


def clipped_loss(
    logratio: Tensor, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None,
    delta: float | None = None,
) -> Tensor:  # fmt: skip
    """The clipped surrogate at every token: logratio, advantages `[N]` -> `[N]`."""
    ratio = logratio.exp()
    held = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, held * advantages)


def cispo_loss(logprob: Tensor, logratio: Tensor, advantages: Tensor, *, epsilon_high: float = 5.0) -> Tensor:
    """CISPO at every token `[N]`: the weight is clipped (at epsilon_high, as in TRL), not the gradient."""
    return -logratio.exp().clamp(max=epsilon_high).detach() * advantages * logprob


def clipped_tokens(
    logratio: Tensor, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """bool `[N]` twice: tokens without a gradient because their ratio fell below, or rose above, the trust region."""
    ratio = logratio.detach().exp()
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    return (ratio < 1 - epsilon) & (advantages < 0), (ratio > high) & (advantages > 0)


def token_weights(
    lengths: Tensor, aggregate: Aggregate, *, completions: int, tokens: int, max_length: int
) -> Tensor:  # fmt: skip
    """w above at every token `[N]`, float64.

    Args: lengths `[S]` of the completions at hand; completions, tokens: of the whole optimizer step; max_length: L.
    """
    if aggregate == "grpo":
        weight = 1.0 / (completions * lengths.clamp(min=1).double())
    elif aggregate == "dr_grpo":
        weight = torch.full(lengths.shape, 1.0 / (completions * max_length), dtype=torch.float64, device=lengths.device)
    elif aggregate == "dapo":
        weight = torch.full(lengths.shape, 1.0 / max(tokens, 1), dtype=torch.float64, device=lengths.device)
    else:
        raise EnginepostError(f"aggregation {aggregate!r} is not known; use grpo, dr_grpo or dapo")
    return weight.repeat_interleave(lengths)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """PPO's loss of the value head at every token `[N]`: half the squared error, or that of the value held within `clip` of what it
    was at the roll-out, whichever is worse."""
    worst = (values - returns).square()
    if clip is not None:
        held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
        worst = torch.maximum(worst, (held - returns).square())
    return worst / 2
