"""Cross entropy of the trained tokens: continued pre-training and supervised fine-tuning.

    loss = - sum_t logprob_t / N        N = trained tokens of the whole optimizer step, over micro-batches and ranks

A mean per micro-batch would weigh a token of a short micro-batch more than one of a long micro-batch; with one global N, how rows
are split into micro-batches changes nothing but rounding.
"""

import torch
from torch import Tensor


def sft_loss(logprob: Tensor, tokens: int) -> Tensor:
    """Share of one micro-batch in the loss of an optimizer step.

    Args: logprob float32 `[T]`, zero where a token is not trained; tokens: N above, at least 1.
    Returns: a float64 scalar; the shares of all micro-batches add up to the mean loss in nats per token.
    """
    return -logprob.sum(dtype=torch.float64) / tokens
