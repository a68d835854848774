"""Pairs as one flat stream, side by side, with the prompt once or twice.

    apart     [prompt chosen][prompt rejected] ...          every bracket a sequence
    shared    [prompt chosen][rejected] ...                 the prompt is computed once; rejected sees its keys and values too

With a shared prompt the queries of `rejected` are a sequence of their own whose keys are those of the prompt, copied beside its own:
`keys` lists, for every key of the longer stream that attention sees, the row of the stream that it comes from. Causal alignment to
the bottom right corner then is what it should be. The last token of the prompt predicts the first token of both answers, so its
hidden state is read twice: `predict` lists, for every trained token, the row of the stream that predicts it.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from enginepost.data.packing import Sequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class AnswerBatch:
    """A stream of T tokens that holds A answers, N trained tokens in all; of pairs, answers 2i and 2i + 1 are chosen and rejected.

    ids, positions int64 [T]; cu_seqlens int32 [S+1]; predict int64 [N], the rows of the stream that predict the trained tokens;
    targets int64 [N], those tokens; lengths: trained tokens of each answer; last int64 [A], the row of each answer's last token.
    keys int64 [Tk] and cu_seqlens_k int32 [S+1] where prompts are shared, else None. members: indices of the records.
    """

    HOST = ("predict", "keys", "last")  # indices that are looked at before they go to a device

    ids: "Tensor"
    positions: "Tensor"
    cu_seqlens: "Tensor"
    predict: "Tensor"
    targets: "Tensor"
    lengths: list[int]
    last: "Tensor"
    keys: "Tensor | None"
    cu_seqlens_k: "Tensor | None"
    rows: list[str]
    members: list[int]


def collate_answers(
    sequences: Items[Sequence], members: list[int], shared: Items[int] | NDArray[np.int64] | None = None
) -> AnswerBatch:
    """Sequences as one stream. Args: shared: for each two sequences that follow one another, how many first tokens the second takes
    from the first; None or 0 for none."""
    import torch

    ids, positions, predict, targets, keys, last = ([] for _ in range(6))
    ends, key_ends, lengths = [0], [0], []
    at = before = 0  # where this sequence begins in the stream; where the one before it does
    for number, s in enumerate(sequences):
        cut = int(shared[number // 2]) if shared is not None and number % 2 else 0
        rest = np.arange(cut, len(s.ids), dtype=np.int64)
        trained = np.flatnonzero(s.labels)
        # Token t of this sequence is row at + t - cut of the stream, or, within the shared prompt, row before + t.
        place = np.concatenate([before + np.arange(cut, dtype=np.int64), at + rest - cut])
        ids.append(s.ids[cut:].astype(np.int64))
        positions.append(rest)
        predict.append(place[trained - 1])
        targets.append(s.ids[trained].astype(np.int64))
        keys.append(place)
        last.append(place[-1])
        lengths.append(len(trained))
        before, at = at, at + len(rest)
        ends.append(at)
        key_ends.append(key_ends[-1] + len(s.ids))
    whole = key_ends[-1] == ends[-1]

    def stream(parts: list[NDArray[np.int64]]) -> "Tensor":
        return torch.from_numpy(np.concatenate(parts))

    return AnswerBatch(
        ids=stream(ids),
        positions=stream(positions),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        predict=stream(predict),
        targets=stream(targets),
        lengths=lengths,
        last=torch.tensor(last, dtype=torch.int64),
        keys=None if whole else stream(keys),
        cu_seqlens_k=None if whole else torch.tensor(key_ends, dtype=torch.int32),
        rows=[s.place for s in sequences],
        members=members,
    )
