"""Losses of reward models: pure functions of scores.

outcome   -logsigmoid(r_w - r_l - margin) + c (r_w + r_l)^2           Bradley-Terry; margin of Llama 2 (arXiv 2307.09288, eq. 2);
                                                                     centring of arXiv 2312.09244, which keeps scores near 0
process   cross entropy of "this step is wrong" (0) and "right" (1) at the token that ends a step     (arXiv 2305.20050)
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, centring: float = 0.0) -> Tensor:
    """Losses `[P]` of pairs.

    Args: chosen, rejected `[P]` scores; margin `[P]`, by how much chosen should win, default 0; centring: c above.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    losses = -logsigmoid(difference)
    return losses + centring * (chosen + rejected).square() if centring else losses


def process_loss(logits: Tensor, correct: Tensor) -> Tensor:
    """Losses `[N]` of steps. Args: logits `[N, 2]` for wrong and right; correct bool `[N]`."""
    return cross_entropy(logits, correct.to(torch.int64), reduction="none")
