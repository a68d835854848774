"""What a teacher says of recorded rows, kept on disk: its k most likely next tokens at every trained token, and how likely they are.

    ids       int32   [N, k]    most likely first
    logprobs  float32 [N, k]    log softmax(softcap(logits) / temperature) over the whole vocabulary: the rest is 1 minus their sum

N counts the trained tokens of a data set, sequence after sequence. The directory is named by a hash of the teacher's files, the
tokens and labels of the rows (hence of the template), dtype, k and temperature, and read through a memory map: training holds
neither the teacher nor the cache. It appears whole or not at all; 8 k bytes for a trained token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from enginepost.checkpoint import Checkpoint, Writer
from enginepost.device import placed, sent
from enginepost.train.reference import cache_path
from enginepost.train.rows import Rows, fingerprint

LOGITS = 1 << 24  # of a block while the cache is made: 64 MB


@dataclass(frozen=True)
class Shown:
    """The cache of a data set. starts `[n + 1]`: where the tokens of each sequence begin among the N."""

    ids: Tensor
    logprobs: Tensor
    starts: NDArray[np.int64]

    def of(self, sequences: list[int]) -> tuple[Tensor, Tensor]:
        """(int64 ids, log-probabilities), both `[trained tokens, k]`, of these sequences of the data set one after another."""
        places = [slice(int(self.starts[i]), int(self.starts[i + 1])) for i in sequences]
        return torch.cat([self.ids[p] for p in places]).long(), torch.cat([self.logprobs[p] for p in places])


def whole(rows: Rows) -> Rows:
    """All sequences of the data set that `rows` are of: the sides of a split share one cache."""
    return Rows(rows.dataset, np.arange(len(rows.dataset)))


def shown_path(files: list[str], rows: Rows, dtype: torch.dtype, k: int, temperature: float) -> Path:
    """Where the cache of the data set of `rows` is kept. files: directories of the teacher and of its adapter."""
    return cache_path(files, f"{fingerprint(whole(rows))}:{k}:{temperature!r}", dtype, kind="teacher").with_suffix("")


def starts_of(rows: Rows) -> NDArray[np.int64]:
    dataset = rows.dataset
    return np.concatenate([[0], np.cumsum(dataset.labels, dtype=np.int64)])[dataset.offsets]


def read_shown(path: Path, rows: Rows) -> Shown:
    """The cache at `path`, mapped. Raises CheckpointError where it is damaged."""
    checkpoint = Checkpoint(path)
    return Shown(checkpoint.tensor("ids"), checkpoint.tensor("logprobs"), starts_of(rows))


@torch.no_grad()
def write_shown(
    path: Path, teacher: Any, rows: Rows, micro_batches: list[list[int]], k: int, temperature: float
) -> None:
    """Make the cache of the data set of `rows`. micro_batches: of `whole(rows)`, each sequence once.

    Raises CheckpointError where the disk has no room or cannot be written."""
    everything, starts = whole(rows), starts_of(rows)
    shape = (int(starts[-1]), k)
    with Writer(path, {"ids": (torch.int32, shape), "logprobs": (torch.float32, shape)}, shard_bytes=2.0**62) as writer:
        for members in micro_batches:
            host = everything.batch(members)
            kept = sent((host.targets != -100).nonzero().squeeze(1), teacher.device)
            batch = placed(host, teacher.device)
            hidden = teacher.hidden(batch.ids, batch.cu_seqlens, batch.positions)[kept]
            at = 0
            for i in members:
                count = int(starts[i + 1] - starts[i])
                ids, logprobs = most_likely(teacher, hidden[at : at + count], k, temperature)
                writer.write("ids", ids, start=int(starts[i]) * k)
                writer.write("logprobs", logprobs, start=int(starts[i]) * k)
                at += count


def most_likely(teacher: Any, hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """hidden `[N, H]` -> (int32 ids, float32 log-probabilities), both `[N, k]`, most likely first; logits in blocks of rows."""
    ids, logprobs = [], []
    for rows in hidden.split(max(1, LOGITS // teacher.spec.vocab_size)):
        z = teacher.logits(rows) / temperature
        largest, index = z.topk(k, dim=1)
        ids.append(index.int())
        logprobs.append((largest - z.logsumexp(1, keepdim=True)).clamp_max(0.0))
    return torch.cat(ids), torch.cat(logprobs)
