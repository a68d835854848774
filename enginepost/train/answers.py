"""Log-probabilities of answers: from a stream of tokens to one number for each answer.

hidden [T, H]  ->  rows that predict trained tokens [N, H]  ->  log-probabilities [N]  ->  sums of each answer [A]
"""

from typing import Any

import torch
from torch import Tensor

from enginepost.data.pairs import AnswerBatch
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model.shared import Copies, SharedPrompts, take

HEAD_ROWS = 4096  # of the head that are widened at once


def hidden_states(model: Any, batch: AnswerBatch) -> Tensor:
    """`[T, H]`, prompts shared where the batch shares them."""
    shared = None
    if batch.keys is not None and batch.cu_seqlens_k is not None:
        shared = SharedPrompts(batch.keys, batch.cu_seqlens_k)
    return model.hidden(batch.ids, batch.cu_seqlens, batch.positions, shared)


def predicting(model: Any, batch: AnswerBatch) -> Tensor:
    """Hidden states `[N, H]` that predict the trained tokens."""
    return take(hidden_states(model, batch), Copies(batch.predict, model.device))


def token_logprobs(
    model: Any, batch: AnswerBatch, *, entropy: bool = False, squares: bool = False, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log-probabilities `[N]`, entropies `[N]`, log of the sum of squared probabilities `[N]` where `squares`).

    rows: what `predicting` gave, where it is there already. log sum_v p_v^2 = lse(2 z) - 2 lse(z); doubled hidden states under a
    doubled softcap give 2 z.
    """
    rows = predicting(model, batch) if rows is None else rows
    cap = model.spec.final_softcap
    logprob, lse, spread = linear_logprob(rows, model.head_table, batch.targets, softcap=cap, entropy=entropy)
    doubled = None
    if squares:
        with torch.no_grad():
            twice = linear_logprob(rows.detach() * 2, model.head_table, batch.targets, softcap=2 * cap)[1]
            doubled = twice - 2 * lse
    return logprob, spread, doubled


def by_answer(values: Tensor, batch: AnswerBatch) -> list[Tensor]:
    """`[N]` cut into answers, float64."""
    return list(values.double().split(batch.lengths))


def answer_sums(values: Tensor, batch: AnswerBatch) -> Tensor:
    """Sums over each answer, float64 `[A]`."""
    return torch.stack([x.sum() for x in by_answer(values, batch)])


@torch.no_grad()
def mean_row(model: Any) -> Tensor | None:
    """The mean of the head's rows, float32 `[H]`: its product with a hidden state is the mean of that token's logits over the
    vocabulary. None where a softcap bends the logits, so that their mean is not that of a linear map."""
    if model.spec.final_softcap:
        return None
    head = model.head_table
    # In blocks: a mean of bfloat16 would copy all of the head to float32, and one on disk need not be read whole.
    blocks = head.split(HEAD_ROWS) if isinstance(head, Tensor) else head.parts(HEAD_ROWS)
    total = sum(block.float().sum(0) for block in blocks)
    return total / head.shape[0]
