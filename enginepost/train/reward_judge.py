"""A reward model as a judge of completions that a run has just sampled."""

import torch

from enginepost.data import Tokenizer
from enginepost.errors import EnginepostError
from enginepost.model.scorer import load_scorer
from enginepost.train.rewards import Prompt, Scorer


def model_scorer(directory: str, tokenizer: Tokenizer, vocab_size: int, dtype: torch.dtype) -> Scorer:
    """Scores prompt and completion together, at the last token. Raises EnginepostError for another vocabulary."""
    judge = load_scorer(directory, dtype)
    theirs = judge.model.spec.vocab_size
    if judge.kind != "sequence" or judge.head.out_features != 1:
        raise EnginepostError(
            f"rewards: {directory}: {judge.kind} classification with {judge.head.out_features} labels; "
            "expected a reward model, which has one"
        )
    if theirs != vocab_size:
        raise EnginepostError(
            f"rewards: {directory}: the reward model has a vocabulary of {theirs}, the policy one of {vocab_size}; they must "
            "read the same tokens"
        )
    other = Tokenizer.load(judge.tokenizer)
    sample = "The quick brown fox: 42 + 7 = 49?\n"
    if other.encode(sample) != tokenizer.encode(sample):
        raise EnginepostError(
            f"rewards: {directory}: its tokenizer gives other ids than the policy's; they must be the same"
        )

    def score(prompts: list[Prompt], ids: list[list[int]]) -> list[float | None]:
        return list(judge.score([[*p.ids, *c] for p, c in zip(prompts, ids, strict=True)]))

    return score
