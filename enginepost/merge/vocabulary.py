"""One vocabulary for models that have several: which tokens the merged model has, and whose row each of them gets in each input.

The merged tokenizer is the base's, a named model's, or the union: the base's with the tokens of the others added behind. For every
input the rows of embedding and head are then put into the merged order. A token that a model lacks gets, in this order: what
`tokens:` says; the row of the only model that has it; the base's; the average of those that have it; zeros. Rows that only pad are
the average of all rows.

Rearranged tensors go to files of their own, in blocks of tokens, so that memory does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enginepost.checkpoint import Checkpoint, Writer
from enginepost.merge.models import Model
from enginepost.merge.plan import is_vocabulary
from enginepost.merge.recipe import ModelRef, Recipe, TokenizerSetting, TokenSource
from enginepost.merge.registry import MergeError
from enginepost.merge.tokens import extended, read_tokens

_BLOCK_BYTES = 16 << 20


@dataclass
class Vocabulary:
    """The merged vocabulary.

    donor: the model whose tokenizer files are copied. tokens: {token: id}. size: rows, padding included.
    rows: {model: int64 [size]}, the row of each token in that model, -1 where it has none.
    tokenizer: the changed tokenizer.json, or None when the donor's is right as it is. notes: what the user should know.
    """

    donor: ModelRef
    tokens: dict[str, int]
    size: int
    rows: dict[ModelRef, np.ndarray]
    tokenizer: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)


def build(recipe: Recipe, setting: TokenizerSetting, models: Mapping[ModelRef, Model]) -> Vocabulary:
    """The merged vocabulary as the recipe's `tokenizer` says."""
    refs = list(models)
    base = recipe.base_model or refs[0]
    vocabularies = {ref: read_tokens(models[ref]) for ref in refs}
    donor = setting.source if isinstance(setting.source, ModelRef) else base
    if donor not in models:
        raise MergeError(
            f"{recipe.file}: the tokenizer's source {donor} is not one of the merged models ({', '.join(map(str, refs))})."
        )
    tokens = dict(vocabularies[donor].ids)
    added: list[dict[str, Any]] = []

    def add(token: str, entry: Mapping[str, Any] | None) -> None:
        if token in tokens:
            return
        number = max(tokens.values(), default=-1) + 1
        tokens[token] = number
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        added.append(
            {
                "id": number,
                "content": token,
                **plain,
                **{k: v for k, v in (entry or {}).items() if k not in ("id", "content")},
            }
        )

    if setting.source == "union":
        others = [ref for ref in [base, *refs]]
        for only_added in (False, True):  # plain tokens first, then the special ones, as mergekit has them
            for ref in dict.fromkeys(others):
                own, limit = vocabularies[ref].added, models[ref].vocabulary
                for token, number in vocabularies[ref].ids.items():
                    if (token in own) == only_added and (limit is None or number < limit):
                        add(token, own.get(token))
    for token in setting.tokens:
        add(token, None)
    size = max(tokens.values()) + 1
    if setting.pad_to_multiple_of:
        size = -(-size // setting.pad_to_multiple_of) * setting.pad_to_multiple_of
    rows: dict[ModelRef, np.ndarray] = {}
    for ref in refs:
        ids, limit = vocabularies[ref].ids, models[ref].vocabulary
        place = np.full(size, -1, dtype=np.int64)
        for token, number in tokens.items():
            found = ids.get(token, -1)
            place[number] = found if limit is None or found < limit else -1
        rows[ref] = place
    tokenizer = extended(vocabularies[donor], added, models[donor]) if added else None
    vocabulary = Vocabulary(donor, tokens, size, rows, tokenizer)
    nobody = [t for t, i in tokens.items() if all(r[i] < 0 for r in rows.values()) and t not in setting.tokens]
    if nobody:
        vocabulary.notes.append(f"{len(nobody)} tokens are in no model and get zeros, the first is {nobody[0]!r}.")
    return vocabulary


def rearrange(
    recipe: Recipe, setting: TokenizerSetting, vocabulary: Vocabulary, models: Mapping[ModelRef, Model], directory: Path
) -> dict[ModelRef, Checkpoint]:
    """Write every model's embedding and head in the order of the merged vocabulary; {} when all are in that order already."""
    refs = list(models)
    names = {ref: [n for n in models[ref].checkpoint.names if is_vocabulary(n)] for ref in refs}
    counts = {models[ref].checkpoint.shape(n)[0] for ref in refs for n in names[ref]}
    order = np.arange(vocabulary.size)
    if counts == {vocabulary.size} and all(np.array_equal(vocabulary.rows[ref], order) for ref in refs):
        if not any(token.force for token in setting.tokens.values()):
            return {}
    sources = _sources(recipe, setting, vocabulary, models)
    every = list(dict.fromkeys(name for ref in refs for name in names[ref]))
    writers = []
    for i, ref in enumerate(refs):
        declared = {}
        for name in names[ref]:
            dtype = _widest([models[r].checkpoint.dtype(name) for r in refs if name in names[r]])
            declared[name] = (dtype, (vocabulary.size, *models[ref].checkpoint.shape(name)[1:]))
        writers.append(Writer(directory / str(i), declared, shard_bytes=float("inf")))
    try:
        for name in every:
            holders = [(ref, w) for ref, w in zip(refs, writers, strict=True) if name in names[ref]]
            _rearrange_tensor(name, holders, vocabulary, setting, sources, models)
        for writer in writers:
            writer.close()
    finally:
        for writer in writers:
            writer.abort()
    return {ref: Checkpoint(directory / str(i)) for i, ref in enumerate(refs) if names[ref]}


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


_AVERAGE, _ZERO = -1, -2  # instead of a model's number


def _sources(
    recipe: Recipe, setting: TokenizerSetting, vocabulary: Vocabulary, models: Mapping[ModelRef, Model]
) -> np.ndarray:
    """int64 `[size, 2]`: the model (its number, or average, or zero) and row that a model without the token gets."""
    refs = list(models)
    table = np.stack([vocabulary.rows[ref] for ref in refs])  # [models, size]
    present = table >= 0
    count = present.sum(0)
    result = np.full((vocabulary.size, 2), -1, dtype=np.int64)
    result[:, 0] = np.where(count == 0, _ZERO, _AVERAGE)
    base = refs.index(recipe.base_model) if recipe.base_model in refs else None
    donor = np.argmax(present, axis=0)
    if base is not None:
        donor = np.where(present[base], base, donor)
    fixed = (count == 1) | (present[base] if base is not None else False)
    chosen = np.flatnonzero(fixed & (count > 0))
    result[chosen, 0] = donor[chosen]
    result[chosen, 1] = table[donor[chosen], chosen]
    for token, source in setting.tokens.items():
        if source.kind:
            result[vocabulary.tokens[token]] = _named(token, source, vocabulary, models, refs, recipe)
    return result


def _named(
    token: str,
    source: TokenSource,
    vocabulary: Vocabulary,
    models: Mapping[ModelRef, Model],
    refs: list[ModelRef],
    recipe: Recipe,
) -> tuple[int, int]:
    if source.kind == "zero":
        return _ZERO, -1
    assert source.model is not None
    if source.model not in models:
        raise MergeError(
            f"{recipe.file}: token {token!r} takes its row from {source.model}, which is not one of the merged models."
        )
    wanted = token if source.token is None else source.token
    row = source.token_id if source.token_id is not None else read_tokens(models[source.model]).ids.get(wanted, -1)
    limit = models[source.model].vocabulary
    if row < 0 or (limit is not None and row >= limit):
        raise MergeError(
            f"{recipe.file}: token {token!r} takes the row of {wanted!r} (id {row}) of {source.model}, which has no such token."
        )
    return refs.index(source.model), row


def _rearrange_tensor(
    name: str,
    holders: list[tuple[ModelRef, Writer]],
    vocabulary: Vocabulary,
    setting: TokenizerSetting,
    sources: np.ndarray,
    models: Mapping[ModelRef, Model],
) -> None:
    refs = list(models)
    tensors = {ref: models[ref].checkpoint.tensor(name) for ref, _ in holders}
    shape = next(iter(tensors.values())).shape[1:]
    for ref, tensor in tensors.items():
        if tensor.shape[1:] != shape:
            raise MergeError(
                f"{ref}: {name} has rows of {list(tensor.shape[1:])}, and {holders[0][0]} of {list(shape)}; they must be equal."
            )
    width = int(np.prod(shape, dtype=np.int64))
    dtype = _widest([t.dtype for t in tensors.values()])
    forced = np.zeros(vocabulary.size, dtype=bool)
    forced[[vocabulary.tokens[t] for t, s in setting.tokens.items() if s.force]] = True
    last = max(vocabulary.tokens.values()) + 1
    step = max(1, _BLOCK_BYTES // (4 * max(1, width) * (len(holders) + 1)))
    totals = {ref: torch.zeros(shape, dtype=torch.float64) for ref, _ in holders}
    for begin in range(0, last, step):
        block = np.arange(begin, min(begin + step, last))
        default = torch.zeros((len(block), *shape), dtype=torch.float32)
        for ref in tensors:
            mine = np.flatnonzero(sources[block, 0] == refs.index(ref))
            default[mine] = tensors[ref][_rows(sources[block[mine], 1], tensors[ref], ref, name)].float()
        averaged = np.flatnonzero(sources[block, 0] == _AVERAGE)
        if averaged.size:
            number = torch.zeros(len(averaged))
            for ref in tensors:
                has = np.flatnonzero(vocabulary.rows[ref][block[averaged]] >= 0)
                default[averaged[has]] += tensors[ref][
                    _rows(vocabulary.rows[ref][block[averaged[has]]], tensors[ref], ref, name)
                ].float()
                number[has] += 1
            default[averaged] /= number.clamp(min=1).view(-1, *[1] * len(shape))
        for ref, writer in holders:
            rows = default.to(dtype, copy=True)
            own = np.flatnonzero((vocabulary.rows[ref][block] >= 0) & ~forced[block])
            rows[own] = tensors[ref][_rows(vocabulary.rows[ref][block[own]], tensors[ref], ref, name)].to(dtype)
            totals[ref] += rows.double().sum(0)
            writer.write(name, rows, begin * width)
    for ref, writer in holders:
        models[ref].checkpoint.drop(name)
        if vocabulary.size > last:
            mean = (totals[ref] / last).to(dtype)
            writer.write(name, mean.expand(vocabulary.size - last, *shape).contiguous(), last * width)


def _rows(rows: np.ndarray, tensor: torch.Tensor, ref: ModelRef, name: str) -> torch.Tensor:
    if rows.size and int(rows.max()) >= tensor.shape[0]:
        raise MergeError(f"{ref}: its tokenizer has the id {int(rows.max())}, and {name} only {tensor.shape[0]} rows.")
    return torch.from_numpy(rows)
