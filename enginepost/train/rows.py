"""The rows of a run: read, tokenized, and parted into a training and a validation side.

Sequences stay where `prepare` put them, in flat arrays; a side is an array of indices.
"""

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enginepost.data import Batch, Dataset, Tokenizer, collate, prepare
from enginepost.errors import EnginepostError
from enginepost.model import ModelSpec
from enginepost.model.layout import read_config
from enginepost.recipe import Recipe


@dataclass(frozen=True)
class Rows:
    """Some sequences of a data set, by index: the training or the validation side."""

    dataset: Dataset
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, members: list[int]) -> Batch:
        return collate([self.dataset[int(self.index[i])] for i in members])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.dataset.lengths[self.index]


def load_rows(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Read, render and tokenize the data of a recipe: (training rows, validation rows or None)."""
    tokenizer = Tokenizer.load(recipe.model)
    vocab_size = ModelSpec.from_config(read_config(recipe.model)).vocab_size

    def read(paths: list[str]) -> Dataset:
        dataset = prepare(
            paths,
            tokenizer,
            method="pretrain" if recipe.method == "pretrain" else "sft",
            format=recipe.format,
            template=recipe.template,
            train_on=recipe.train_on,
            max_length=recipe.max_length,
            overlong=recipe.overlong,
            vocab_size=vocab_size,
        )
        print(f"{', '.join(paths)}: {dataset.report}", flush=True)
        return dataset

    dataset = read(recipe.data)
    if isinstance(recipe.validation, float):
        return split_rows(dataset, recipe.validation, recipe.seed)
    held = None if recipe.validation is None else read(recipe.validation)
    return Rows(dataset, np.arange(len(dataset))), None if held is None else Rows(held, np.arange(len(held)))


def split_rows(dataset: Dataset, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training, validation) by whole rows: pieces of one long document never land on both sides. At least one row on each."""
    kept, held = split_places([s.place for s in dataset], fraction, seed)
    return Rows(dataset, kept), Rows(dataset, held)


def split_places(places: list[str], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of (training, validation); equal places stay together."""
    rows = list(dict.fromkeys(places))
    if len(rows) < 2:
        raise EnginepostError(f"validation: {fraction}: the data has {len(rows)} row; a split needs at least 2")
    count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = set(random.Random(seed).sample(rows, count))
    chosen = np.array([place in held for place in places])
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def fingerprint(rows: Rows) -> str:
    """Hash of tokens, labels and their order: a resumed run must see what the run began with."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (rows.dataset.ids, rows.dataset.labels, rows.dataset.offsets, rows.index):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
