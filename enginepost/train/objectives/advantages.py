"""From rewards to advantages: what a token, or a whole completion, was worth more than expected.

Layout: the tokens of S completions one after another, `[N]`, with `lengths` int64 `[S]`; a group is G completions of one prompt,
side by side, so the rewards of P prompts are `[P * G]`. A reward that nobody could give is NaN: it takes no part in means and
spreads, and its advantage is 0.

    GRPO     A_i = (r_i - mean(group)) / (std + 1e-4)      std of the group, of the batch, or none (Dr. GRPO)
    RLOO     A_i = r_i - mean(the others of the group)
    GAE      delta_t = r_t + gamma V_{t+1} - V_t           A_t = delta_t + gamma lambda A_{t+1}       return_t = A_t + V_t
    PPO's r  r_t = -beta KL_t, plus the score at the last token

Everything here is a constant to the optimizer: no gradients. Sources: Shao et al. 2024 (GRPO, arXiv 2402.03300); Liu et al. 2025
(Dr. GRPO, 2503.20783); Ahmadian et al. 2024 (RLOO, 2402.14740); Schulman et al. 2016 (GAE, 1506.02438); Yu et al. 2025 (DAPO,
2503.14476); GDPO 2026 (several rewards, each normalised first,
2601.05242).
"""

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation, as in TRL

Scale = Literal["group", "batch", "none"]


def spread(x: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation (n - 1 in the denominator) of the entries that are not NaN; NaN where fewer than two are left."""
    found = ~torch.isnan(x)
    count = found.sum() if dim is None else found.sum(dim, keepdim=True)
    mean = torch.nanmean(x) if dim is None else torch.nanmean(x, dim, keepdim=True)
    squares = torch.where(found, (x - mean).square(), 0.0)
    total = squares.sum() if dim is None else squares.sum(dim, keepdim=True)
    return torch.where(count > 1, total / (count - 1).clamp(min=1), torch.nan).sqrt()


def combine(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of K rewards: `[S, K]`, `[K]` -> `[S]`; NaN where no function gave one."""
    total = torch.nansum(rewards * weights, dim=1)
    return torch.where(torch.isnan(rewards).all(1), torch.nan, total)


def group_advantages(rewards: Tensor, group: int, scale: Scale = "group") -> Tensor:
    """GRPO's advantages `[P * G]` of the rewards `[P * G]`. A group whose rewards are all equal has advantages of zero."""
    grouped = rewards.view(-1, group)
    centred = grouped - torch.nanmean(grouped, 1, keepdim=True)
    if scale == "group":
        centred = centred / (spread(grouped, 1).nan_to_num(0.0) + EPSILON)
    elif scale == "batch":
        centred = centred / (spread(rewards).nan_to_num(0.0) + EPSILON)
    return centred.flatten().nan_to_num(0.0)


def normalized_then_summed(rewards: Tensor, weights: Tensor, group: int) -> Tensor:
    """GDPO: each of K rewards `[P * G, K]` is normalised in its group, they are weighed and summed, and the sums normalised over the
    batch -> advantages `[P * G]`. A reward with small numbers is then heard as well as one with large ones."""
    grouped = rewards.view(-1, group, rewards.shape[1])
    each = (grouped - torch.nanmean(grouped, 1, keepdim=True)) / (spread(grouped, 1).nan_to_num(0.0) + EPSILON)
    total = torch.where(torch.isnan(rewards).all(1), torch.nan, torch.nansum(each.flatten(0, 1) * weights, dim=1))
    return ((total - torch.nanmean(total)) / (spread(total).nan_to_num(0.0) + EPSILON)).nan_to_num(0.0)


def leave_one_out(rewards: Tensor, group: int, *, normalize: bool = False) -> Tensor:
    """RLOO: each reward `[P * G]` less the mean of the others of its group; a group of one has nothing to be compared with: 0."""
    grouped = rewards.view(-1, group)
    others = (~torch.isnan(grouped)).sum(1, keepdim=True) - 1
    baseline = (torch.nansum(grouped, 1, keepdim=True) - grouped) / others
    advantages = torch.where(others > 0, grouped - baseline, torch.nan).flatten()
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (spread(advantages).nan_to_num(0.0) + EPSILON)
    return advantages.nan_to_num(0.0)


def flat_groups(rewards: Tensor, group: int) -> Tensor:
    """bool `[P]`: groups whose rewards are all the same, which teach nothing (DAPO samples others in their place)."""
    grouped = rewards.view(-1, group)
    lowest = torch.where(torch.isnan(grouped), torch.inf, grouped).amin(1)
    highest = torch.where(torch.isnan(grouped), -torch.inf, grouped).amax(1)
    return highest - lowest <= 1e-8


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of length (eq. 13), added to the reward: 0 up to limit - buffer tokens, falling to -1 at `limit`."""
    return ((limit - buffer - lengths.double()) / buffer).clamp(-1.0, 0.0)


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """PPO's rewards `[N]`: -beta * kl at every token, and the completion's score `[S]` at its last one."""
    rewards = -beta * kl
    filled = lengths > 0
    rewards[lengths.cumsum(0)[filled] - 1] += scores[filled].to(rewards.dtype)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, each completion on its own; the value after its last token is 0.

    Args: rewards, values `[N]`: of each token, and of the state in which it was chosen. Returns: (advantages, returns) `[N]`.
    """
    advantages = torch.zeros_like(rewards)
    starts = lengths.cumsum(0) - lengths
    running = torch.zeros(len(lengths), dtype=rewards.dtype, device=rewards.device)
    after = running.clone()
    for t in range(int(lengths.max()) - 1 if len(lengths) else -1, -1, -1):
        live = lengths > t
        place = starts[live] + t
        delta = rewards[place] + gamma * after[live] - values[place]
        running[live] = delta + gamma * lam * running[live]
        after[live] = values[place]
        advantages[place] = running[live]
    return advantages, advantages + values


def whiten(x: Tensor, *, shift_mean: bool = True) -> Tensor:
    """x `[N]` to variance 1 (biased estimate plus 1e-8), and to mean 0 unless the mean is to stay."""
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var(unbiased=False) + 1e-8)
    return white if shift_mean else white + mean
