"""Methods reward (a score of whole answers, from pairs) and prm (right or wrong for each step of a solution).

The head trains in float32 beside the adapter or the whole model, at the learning rate of the rest; the result is a checkpoint for
sequence or token classification. Metrics of reward are TRL's: accuracy, margin, mean_reward, min_reward, max_reward.
"""

import pathlib
from typing import Any

import torch
from torch import Tensor

from enginepost.data import Tokenizer
from enginepost.data.chat import resolve
from enginepost.data.pairs import AnswerBatch
from enginepost.data.preferences import Kind
from enginepost.device import sent
from enginepost.model.scorer import head_scores, new_head, save_scorer
from enginepost.model.shared import Copies, take
from enginepost.recipe_offline import PrmRecipe, RewardRecipe
from enginepost.train.answer_rows import AnswerRows, load_answers
from enginepost.train.answers import hidden_states
from enginepost.train.methods.answers import AnswerMethod
from enginepost.train.methods.method import Metrics, Work
from enginepost.train.objectives.reward import process_loss, reward_loss


class _Scoring(AnswerMethod):
    """A head on the hidden states. `labels` of it; `result`: how transformers calls the model."""

    labels: int
    result: str

    def attach(self, model: Any) -> None:
        self.head = new_head(model, self.labels, bias=self.result == "token", seed=self.recipe.seed)
        self.modules = {"score": self.head}

    def scores(self, model: Any, batch: AnswerBatch, rows: Tensor) -> Tensor:
        """float32 `[N, labels]` at rows of the stream."""
        return head_scores(model, self.head, take(hidden_states(model, batch), Copies(rows, model.device)))

    def save_result(self, model: Any, directory: pathlib.Path) -> None:
        tokenizer = Tokenizer.load(self.recipe.model)
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
        save_scorer(model, self.head, directory, kind=self.result, source=self.recipe.model, pad_id=pad)
        if self.recipe.template is not None:
            source = resolve(self.recipe.template, tokenizer)
            (directory / "chat_template.jinja").write_text(source, encoding="utf-8")


class Reward(_Scoring):
    """Bradley-Terry on the scores at the last tokens."""

    recipe: RewardRecipe
    labels, result = 1, "sequence"

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        batch = work.micro_batches[index]
        rewards = self.scores(model, batch, batch.last).squeeze(1).double()
        margins = rows.preferences.margins
        margin = None if margins is None else sent(torch.from_numpy(margins[batch.members]), self.device)
        losses = reward_loss(rewards[0::2], rewards[1::2], margin, centring=self.recipe.centring)
        seen = rewards.detach()
        difference = seen[0::2] - seen[1::2]
        worst, best = (work.extra.get(name, seen) for name in ("worst", "best"))
        work.extra |= {"worst": torch.minimum(worst.min(), seen.min()), "best": torch.maximum(best.max(), seen.max())}
        work.metrics |= {"min_reward": work.extra["worst"], "max_reward": work.extra["best"]}
        metrics: Metrics = {
            "accuracy": ((difference > 0).sum(), len(difference)),
            "margin": (difference.sum(), len(difference)),
            "mean_reward": (seen.sum(), len(seen)),
        }
        return losses.sum() / work.count, metrics


class Prm(_Scoring):
    """Cross entropy of wrong and right at the token that ends a step; the mean is over all steps of an optimizer step."""

    recipe: PrmRecipe
    kind: Kind = "stepwise"
    labels, result = 2, "token"

    def load(self) -> tuple[AnswerRows, AnswerRows | None]:
        return load_answers(self.recipe, "stepwise", separator=self.recipe.step_separator)

    def work(
        self, rows: AnswerRows, micro_batches: list[list[int]], epoch: float = 0.0, ends_epoch: bool = False
    ) -> Work:
        found = super().work(rows, micro_batches, epoch, ends_epoch)
        found.count = sum(sum(b.lengths) for b in found.micro_batches)
        return found

    def share_of_loss(self, model: Any, rows: AnswerRows, work: Work, index: int) -> tuple[Tensor, Metrics]:
        batch = work.micro_batches[index]
        logits = self.scores(model, batch, batch.predict + 1).double()  # at the step's end itself
        classes, offsets = rows.preferences.classes, rows.preferences.dataset.offsets
        assert classes is not None
        spans = [classes[offsets[m] : offsets[m + 1]] for m in batch.members]
        correct = sent(torch.cat([torch.from_numpy(s[s >= 0] == 1) for s in spans]), self.device)
        losses = process_loss(logits, correct)
        hits = (logits.detach().argmax(1) == correct.long()).sum()
        return losses.sum() / work.count, {"accuracy": (hits, len(correct))}
