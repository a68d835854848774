"""`score`: what a reward model says of the rows of a file, packed.

A reward model gives one number a row: `{"row", "score"}`, or of a pair `{"row", "chosen", "rejected"}`. A process reward model gives
the probability that each step is right: `{"row", "steps": [...]}`. Rows are read as method reward and method prm read them.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from enginepost.data import Sequence, Tokenizer, collate, plan_batches, prepare
from enginepost.data.files import DataError, Paths, find, read
from enginepost.data.preferences import prepare_preferences
from enginepost.device import placed, sent
from enginepost.errors import EnginepostError
from enginepost.model.scorer import load_scorer


@dataclass
class Scores:
    """One entry a row, in order, and of labelled rows how often the model agrees: pairs whose chosen answer scores higher, or steps
    that are on the right side of one half."""

    rows: list[dict[str, Any]]
    accuracy: float | None = None
    labelled: int = 0


def score(
    model: str | os.PathLike[str],
    paths: Paths,
    *,
    template: str | None = None,
    max_length: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    separator: str = "\n",
    device: torch.device | str = "cpu",
) -> Scores:
    """Score every row of `paths`.

    Args: model: a classification checkpoint or the adapter of one; template as in `prepare`; max_length tokens of a row; separator
    ends a step, for process reward models; device: a torch device.
    Raises: EnginepostError for another kind of model, rows that cannot be read or are longer than max_length.
    """
    scorer = load_scorer(os.fspath(model), dtype, device)
    tokenizer = Tokenizer.load(scorer.tokenizer)
    vocab_size = scorer.model.spec.vocab_size
    if scorer.kind == "token":
        if scorer.head.out_features != 2:
            raise EnginepostError(
                f"{model}: token classification with {scorer.head.out_features} labels; expected wrong and right"
            )
        found = prepare_preferences(
            paths, tokenizer, kind="stepwise", template=template, max_length=max_length, vocab_size=vocab_size, separator=separator
        )  # fmt: skip
        return _steps(scorer, list(found.dataset), found.classes)
    if scorer.head.out_features != 1:
        raise EnginepostError(
            f"{model}: sequence classification with {scorer.head.out_features} labels; a reward model has one"
        )
    if _paired(paths):
        pairs = prepare_preferences(
            paths, tokenizer, kind="paired", template=template, max_length=max_length, vocab_size=vocab_size
        )
        sequences = list(pairs.dataset)
        values = np.array(scorer.score([s.ids.tolist() for s in sequences])).reshape(-1, 2)
        rows = [
            {"row": s.place, "chosen": a, "rejected": b}
            for s, (a, b) in zip(sequences[0::2], values.tolist(), strict=True)
        ]
        return Scores(rows, float((values[:, 0] > values[:, 1]).mean()), len(rows))
    plain = prepare(paths, tokenizer, template=template, train_on="all", max_length=max_length, vocab_size=vocab_size)
    scores = scorer.score([s.ids.tolist() for s in plain])
    return Scores([{"row": s.place, "score": v} for s, v in zip(plain, scores, strict=True)])


def _paired(paths: Paths) -> bool:
    """Is the first record one of preferences?"""
    for file in find(paths):
        for _, record in read(file):
            keys = set(record) if isinstance(record, dict) else set()
            return bool(keys & {"chosen", "chosen_response"}) and bool(keys & {"rejected", "rejected_response"})
    raise DataError("the data set is empty")


@torch.no_grad()
def _steps(scorer: Any, sequences: list[Sequence], classes: Any) -> Scores:
    entries: list[dict[str, Any]] = [{} for _ in sequences]
    lengths = [len(s.ids) for s in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    right = total = 0
    for members in plan_batches(lengths, batch_size=1, max_length=max(8192, *lengths)):
        host = collate([sequences[i] for i in members])
        batch = placed(host, scorer.model.device)
        ends = [np.flatnonzero(sequences[i].labels) for i in members]
        at = np.concatenate([e + int(b) for e, b in zip(ends, host.cu_seqlens, strict=False)])
        rows = sent(torch.from_numpy(at), scorer.model.device)
        logits = scorer.token_scores(batch.ids, batch.cu_seqlens, batch.positions, rows)
        each = torch.softmax(logits.double(), dim=1)[:, 1].cpu().split([len(e) for e in ends])
        for i, end, p in zip(members, ends, each, strict=True):
            entries[i] = {"row": sequences[i].place, "steps": p.tolist()}
            right += int(((p.numpy() > 0.5) == (classes[starts[i] + end] == 1)).sum())
            total += len(end)
    return Scores(entries, right / total, total)
