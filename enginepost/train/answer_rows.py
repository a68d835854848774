"""Rows of the methods that compare or grade answers: read, parted into training and validation, planned and made into batches.

What is planned as one is a record: a pair is its prompt and both answers (the prompt twice where it is not shared), a graded answer
or a solution with its steps is one sequence.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enginepost.data import Tokenizer
from enginepost.data.pairs import AnswerBatch, collate_answers
from enginepost.data.preferences import Kind, Preferences, prepare_preferences
from enginepost.model import ModelSpec
from enginepost.model.layout import read_config
from enginepost.recipe import Recipe
from enginepost.train.rows import split_places


@dataclass(frozen=True)
class AnswerRows:
    """Records of a data set by index: the training or the validation side. shared `[n of all]`: tokens of a pair's shared prompt."""

    preferences: Preferences
    index: NDArray[np.int64]
    shared: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def each(self) -> int:
        """Sequences of a record."""
        return 2 if self.preferences.kind == "paired" else 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of the stream that each record takes."""
        lengths = self.preferences.dataset.lengths.reshape(-1, self.each).sum(1)
        return (lengths if self.shared is None else lengths - self.shared)[self.index]

    def batch(self, members: list[int]) -> AnswerBatch:
        """The stream of these records; its `members` are indices into all records of the data set."""
        records = [int(self.index[i]) for i in members]
        dataset = self.preferences.dataset
        sequences = [dataset[self.each * record + side] for record in records for side in range(self.each)]
        return collate_answers(sequences, records, None if self.shared is None else self.shared[records])

    def fingerprint(self) -> str:
        """Hash of tokens, labels, what the records say of them, and their order."""
        p, digest = self.preferences, hashlib.blake2b(digest_size=16)
        said = [x for x in (p.margins, p.desirable, p.classes) if x is not None]
        for array in (p.dataset.ids, p.dataset.labels, p.dataset.offsets, self.index, *said):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_answers(
    recipe: Recipe, kind: Kind, *, share: bool = False, separator: str = "\n"
) -> tuple[AnswerRows, AnswerRows | None]:
    """(training, validation or None) of a recipe. share: compute the prompts of pairs once."""
    tokenizer = Tokenizer.load(recipe.model)
    spec = ModelSpec.from_config(read_config(recipe.model))
    # Frequencies that depend on a sequence's length would be those of half a sequence.
    share = share and not any(r.kind in ("dynamic", "longrope") for r in spec.ropes)

    def read(paths: list[str]) -> Preferences:
        found = prepare_preferences(
            paths, tokenizer, kind=kind, template=recipe.template, max_length=recipe.max_length,
            overlong=recipe.overlong, vocab_size=spec.vocab_size, separator=separator,
        )  # fmt: skip
        print(f"{', '.join(paths)}: {found.dataset.report}", flush=True)
        return found

    def side(found: Preferences, index: NDArray[np.int64]) -> AnswerRows:
        return AnswerRows(found, index, found.shared() if share and kind == "paired" else None)

    found = read(recipe.data)
    if isinstance(recipe.validation, float):
        each = 2 if kind == "paired" else 1
        places = [found.dataset[each * i].place for i in range(len(found))]
        kept, held = split_places(places, recipe.validation, recipe.seed)
        return side(found, kept), side(found, held)
    rows = side(found, np.arange(len(found)))
    if recipe.validation is None:
        return rows, None
    other = read(recipe.validation)
    return rows, side(other, np.arange(len(other)))
