"""Roll-outs: completions that the policy has just drawn, and what is known of each of their tokens.

S completions; the stream holds prompt and completion of each, T tokens in all, N of them completions'. Whatever is known of a
completion's tokens (log-probabilities, advantages, values) is one vector `[N]`, completion after completion. Nothing is padded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.data import Sequence, collate, plan_batches
from enginepost.data.prompts import Prompts
from enginepost.device import placed, sent
from enginepost.generate import Completion
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.recipe import Recipe

_FIELDS = ("prompts", "ids", "lengths", "completions", "stopped", "keep")


@dataclass
class Rollout:
    """number: which roll-out of the run. prompts int64 `[S]`: the prompt of each completion; ids int64 `[T]`; lengths, completions
    int64 `[S]`: tokens of prompt and completion, and of the completion; stopped bool `[S]`: did it end by itself; keep bool `[S]`:
    is it learned from; tokens: vectors `[N]` by name; metrics: of the roll-out as a whole."""

    number: int
    prompts: Tensor
    ids: Tensor
    lengths: Tensor
    completions: Tensor
    stopped: Tensor
    keep: Tensor
    tokens: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def first_token(self) -> Tensor:
        """int64 `[S]`: where each completion's tokens begin in the vectors `[N]`."""
        return self.completions.cumsum(0) - self.completions

    def of(self, name: str, batch: "Pack") -> Tensor:
        """`[n]`: the vector `name` at the completions' tokens of a micro-batch, where that is."""
        return sent(self.tokens[name][batch.where], batch.ids.device)

    def completion_ids(self) -> list[list[int]]:
        ends = self.lengths.cumsum(0)
        return [self.ids[e - n : e].tolist() for e, n in zip(ends.tolist(), self.completions.tolist(), strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """All of it but number and metrics, for a checkpoint."""
        own = {f"rollout.{name}": getattr(self, name) for name in _FIELDS}
        return own | {f"rollout.tokens.{name}": t for name, t in self.tokens.items()}

    @staticmethod
    def restore(number: int, metrics: Mapping[str, float], tensors: Mapping[str, Tensor]) -> "Rollout":
        own = {name: tensors[f"rollout.{name}"].clone() for name in _FIELDS}
        prefix = "rollout.tokens."
        tokens = {n.removeprefix(prefix): t.clone() for n, t in tensors.items() if n.startswith(prefix)}
        return Rollout(number, **own, tokens=tokens, metrics=dict(metrics))


@dataclass
class Pack:
    """Some completions as one stream; a micro-batch. members int64 `[s]`: which; completions int64 `[s]`: their lengths; where int64
    `[n]`: their tokens in the vectors of the roll-out; predict int64 `[n]`: the position in the stream that predicts each. The
    roll-out is in host memory, and so are its indices members and where."""

    HOST = ("members", "where")

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    rows: list[str]
    members: Tensor
    completions: Tensor
    where: Tensor
    predict: Tensor


def gather(number: int, prompts: Prompts, index: list[int], groups: list[list[Completion]]) -> Rollout:
    """The roll-out of these groups; index: the prompt of each."""
    each = [(i, c) for i, group in zip(index, groups, strict=True) for c in group]
    ids = [[*prompts[i].ids, *c.ids] for i, c in each]
    return Rollout(
        number,
        prompts=torch.tensor([i for i, _ in each]),
        ids=torch.tensor([x for sequence in ids for x in sequence]),
        lengths=torch.tensor([len(sequence) for sequence in ids]),
        completions=torch.tensor([len(c.ids) for _, c in each]),
        stopped=torch.tensor([c.stopped for _, c in each]),
        keep=torch.ones(len(each), dtype=torch.bool),
        tokens={"sampled": torch.tensor([p for _, c in each for p in c.logprobs], dtype=torch.float32)},
    )


def packs(rollout: Rollout, prompts: Prompts, members: np.ndarray, recipe: Recipe, device: torch.device) -> list[Pack]:
    """The completions `members` in micro-batches of `batch_size` bins of `max_length` tokens, on the device."""
    lengths = rollout.lengths[torch.from_numpy(members)].numpy()
    plan = plan_batches(
        lengths, batch_size=recipe.batch_size, max_length=recipe.max_length, packing=recipe.packing, seed=recipe.seed
    )
    return [placed(pack(rollout, prompts, members[micro]), device) for micro in plan]


def pack(rollout: Rollout, prompts: Prompts, members: np.ndarray) -> Pack:
    """These completions as one stream, in this order."""
    ends, first = rollout.lengths.cumsum(0), rollout.first_token
    sequences, where = [], []
    for i in members.tolist():
        length, own = int(rollout.lengths[i]), int(rollout.completions[i])
        ids = rollout.ids[int(ends[i]) - length : int(ends[i])].numpy().astype(np.int32)
        source, _, row = prompts[int(rollout.prompts[i])].place.rpartition(":")
        sequences.append(Sequence(ids, np.arange(length) >= length - own, int(row), source))
        where.append(torch.arange(int(first[i]), int(first[i]) + own))
    batch = collate(sequences)
    chosen = torch.from_numpy(members)
    return Pack(
        batch.ids, batch.targets, batch.cu_seqlens, batch.positions, batch.rows, chosen, rollout.completions[chosen],
        torch.cat(where), (batch.targets != -100).nonzero().squeeze(1),
    )  # fmt: skip


def token_logprobs(
    model: Any, batch: Pack, temperature: float, *, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability `[n]`, entropy `[n]`, hidden state `[n, H]`) of each completion token at the temperature it was drawn
    with; the hidden state is that of the position that predicts it."""
    hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions).index_select(0, batch.predict)
    scaled = hidden if temperature == 1.0 else hidden / temperature
    logprob, _, spread = linear_logprob(
        scaled, model.head_table, batch.targets[batch.predict], softcap=model.spec.final_softcap, entropy=entropy
    )
    return logprob, spread, hidden


@torch.no_grad()
def add_logprobs(rollout: Rollout, model: Any, prompts: Prompts, recipe: Recipe, name: str, temperature: float) -> None:
    """Set the vector `name` to the log-probabilities under `model`, without dropout."""
    found = torch.zeros(int(rollout.completions.sum()))
    training = model.training
    model.eval()
    for batch in packs(rollout, prompts, np.arange(len(rollout)), recipe, model.device):
        found[batch.where] = token_logprobs(model, batch, temperature)[0].cpu()
    model.train(training)
    rollout.tokens[name] = found


def describe(rollout: Rollout) -> dict[str, float]:
    """TRL's metrics of completions."""
    lengths, ended = rollout.completions.double(), rollout.completions[rollout.stopped].double()
    found = {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1.0 - rollout.stopped.double().mean().item(),
    }
    if len(ended):
        found |= {
            "completions/mean_terminated_length": ended.mean().item(),
            "completions/min_terminated_length": ended.min().item(),
            "completions/max_terminated_length": ended.max().item(),
        }
    return found
