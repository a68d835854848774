"""From a recipe and its opened models to a list of output tensors, each with its sources and parameters; all checks before a byte.

Tensors of the layers are renumbered as the slices stack them; those before the layers (embeddings) come from the first slice's
sources, those after (norm, head) from the last slice's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from enginepost.checkpoint import Checkpoint
from enginepost.checkpoint.reader import nearest
from enginepost.merge.apply import FLOATS, check_count, prepare
from enginepost.merge.models import Model
from enginepost.merge.recipe import ModelRef, Module, Recipe, Slice, Source, parameters_of
from enginepost.merge.registry import MergeError
from enginepost.merge.tensors import Inputs

_BEFORE = ("embed", "wte", "wpe")
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", "masked_bias")


@dataclass
class Read:
    """A tensor of an input: the model it belongs to and where it lies."""

    model: ModelRef
    checkpoint: Checkpoint
    name: str


@dataclass
class Task:
    """One output tensor. base: the base's tensor, if the method has a base. keys: names of the models in the random masks.

    copied: a tensor of integers that all models share."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    models: list[Read]
    base: Read | None
    parameters: dict[str, Any]
    keys: list[str]
    copied: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def inputs(self, recipe: Recipe, seed: int, chunk: int) -> Inputs:
        models = [read.checkpoint.tensor(read.name) for read in self.models]
        base = None if self.base is None else self.base.checkpoint.tensor(self.base.name)
        given = Inputs(self.name, models, base, seed=seed, keys=self.keys, chunk=chunk)
        return prepare(recipe.method, given, self.parameters)

    @property
    def reads(self) -> list[Read]:
        return [*self.models, *([self.base] if self.base else [])]


def is_vocabulary(name: str) -> bool:
    """Tensors with a row for every token."""
    return name.endswith(
        (
            "embed_tokens.weight",
            "lm_head.weight",
            "wte.weight",
            "embed_in.weight",
            "embed_out.weight",
            "word_embeddings.weight",
            "lm_head.bias",
        )
    )


def make_tasks(
    recipe: Recipe, models: Mapping[ModelRef, Model], vocabulary: Mapping[ModelRef, Checkpoint]
) -> list[Task]:
    """Every output tensor. `vocabulary` holds, for models whose token rows were rearranged, those tensors by their names."""
    tasks: list[Task] = []
    for name, module in recipe.modules.items():
        tasks += _module_tasks(recipe, name, module, models, vocabulary)
    seen: dict[str, Task] = {}
    for task in tasks:
        if task.name in seen:
            raise MergeError(
                f"{recipe.file}: two modules write the tensor {task.name}; name the modules as the tensors' prefixes."
            )
        seen[task.name] = task
    return tasks


def _module_tasks(
    recipe: Recipe,
    name: str,
    module: Module,
    models: Mapping[ModelRef, Model],
    vocabulary: Mapping[ModelRef, Checkpoint],
) -> list[Task]:
    first = models[module.slices[0].sources[0].model]
    prefixes = (f"{name}.", f"model.{name}.")
    whole = len(recipe.modules) == 1
    if not whole and not any(n.startswith(prefixes) for n in first.checkpoint.names):
        raise MergeError(
            f"{recipe.file}: no tensor of {first.ref} begins with {prefixes[0]!r} or {prefixes[1]!r}: no module {name!r}."
        )
    for piece in module.slices:
        _check_slice(recipe, piece, models)
    tasks = []
    for tensor in _outside(module.slices[0].sources, models):
        if not whole and not tensor.startswith(prefixes):
            continue
        piece = module.slices[0 if any(word in tensor for word in _BEFORE) else -1]
        tasks.append(_task(recipe, module, piece, models, vocabulary, tensor, [tensor] * len(piece.sources), 0.0))
    number = 0
    for piece in module.slices:
        spans = [source.layers or (0, models[source.model].layers) for source in piece.sources]
        count = spans[0][1] - spans[0][0]
        for i in range(count):
            t = i / (count - 1) if count > 1 else 1.0
            for rest in _inside(piece.sources, spans, i, models):
                out = f"{first.prefix}{number}.{rest}"
                if whole or out.startswith(prefixes):
                    names = [
                        f"{models[s.model].prefix}{span[0] + i}.{rest}"
                        for s, span in zip(piece.sources, spans, strict=True)
                    ]
                    tasks.append(_task(recipe, module, piece, models, vocabulary, out, names, t))
            number += 1
    return tasks


def _check_slice(recipe: Recipe, piece: Slice, models: Mapping[ModelRef, Model]) -> None:
    base = piece.base_model or recipe.base_model
    listed = [source.model for source in piece.sources]
    if recipe.method.base != "ignored" and base is not None and base not in listed:
        raise MergeError(
            f"{piece.where}: the base model {base} is not among the sources of the slice; add it with its layer_range."
        )
    has_base = recipe.method.base != "ignored" and base is not None
    check_count(recipe.method, sum(1 for m in listed if not (has_base and m == base)), has_base, piece.where)
    for source in piece.sources:
        model = models[source.model]
        if source.layers and source.layers[1] > model.layers:
            raise MergeError(
                f"{source.where}: layer_range {list(source.layers)} reaches beyond the {model.layers} layers of {source.model}."
            )
    if any(source.layers is None for source in piece.sources):
        counts = {str(source.model): models[source.model].layers for source in piece.sources}
        if len(set(counts.values())) > 1:
            raise MergeError(
                f"{piece.where}: the models have different numbers of layers ({counts}); merge equal ones, or use slices."
            )


def _outside(sources: list[Source], models: Mapping[ModelRef, Model]) -> list[str]:
    names: dict[str, None] = {}
    for source in sources:
        model = models[source.model]
        for name in model.checkpoint.names:
            if not (model.prefix and name.startswith(model.prefix)) and not name.endswith(_BUFFERS):
                names[name] = None
    return list(names)


def _inside(sources: list[Source], spans: list[tuple[int, int]], i: int, models: Mapping[ModelRef, Model]) -> list[str]:
    names: dict[str, None] = {}
    for source, span in zip(sources, spans, strict=True):
        model = models[source.model]
        prefix = f"{model.prefix}{span[0] + i}."
        for name in model.checkpoint.names:
            if name.startswith(prefix) and not name.endswith(_BUFFERS):
                names[name[len(prefix) :]] = None
    return list(names)


def _task(
    recipe: Recipe, module: Module, piece: Slice, models: Mapping[ModelRef, Model], vocabulary: Mapping[ModelRef, Checkpoint],
    out: str, names: list[str], t: float,
) -> Task:  # fmt: skip
    base_ref = (piece.base_model or recipe.base_model) if recipe.method.base != "ignored" else None
    reads: list[tuple[Source, Read]] = []
    base: Read | None = None
    for source, name in zip(piece.sources, names, strict=True):
        read = _read(models[source.model], vocabulary.get(source.model), name, out, piece)
        if base_ref is not None and source.model == base_ref and base is None:
            base = read
        else:
            reads.append((source, read))
    everything = [read for _, read in reads] + ([base] if base else [])
    _check_shapes(out, everything, piece)
    dtypes = [read.checkpoint.dtype(read.name) for read in everything]
    sources = [source for source, _ in reads]
    copied = not all(dtype in FLOATS for dtype in dtypes)
    dtype = dtypes[0]
    if copied:
        first = everything[0].checkpoint.tensor(everything[0].name)
        for read in everything[1:]:
            if not torch.equal(first, read.checkpoint.tensor(read.name)):
                raise MergeError(
                    f"{piece.where}: {out} holds {dtype}, which cannot be merged, and differs between the models."
                )
    else:
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        chosen = recipe.out_dtype or recipe.dtype
        dtype = getattr(torch, chosen) if chosen else dtype
    p = {} if copied else parameters_of(recipe, module, piece, sources, out, [read.name for _, read in reads], t)
    keys = [str(i) for i in range(len(reads))]
    shape = everything[0].checkpoint.shape(everything[0].name)
    return Task(out, shape, dtype, [read for _, read in reads], base, p, keys, copied)


def _read(model: Model, rearranged: Checkpoint | None, name: str, out: str, piece: Slice) -> Read:
    for checkpoint in ([rearranged] if rearranged is not None else []) + [model.checkpoint]:
        if name in checkpoint:
            return Read(model.ref, checkpoint, name)
        if name.endswith("lm_head.weight"):  # a tied head is the embedding
            tied = [n for n in checkpoint.names if n.endswith("embed_tokens.weight")]
            if len(tied) == 1 and model.tied:
                return Read(model.ref, checkpoint, tied[0])
    raise MergeError(
        f"{piece.where}: {model.ref} has no tensor {name}, which the merge of {out} needs; {nearest(name, model.checkpoint.names)}. "
        "The models are not of one architecture, or one of them is incomplete."
    )


def _check_shapes(out: str, reads: list[Read], piece: Slice) -> None:
    shapes = [read.checkpoint.shape(read.name) for read in reads]
    for read, shape in zip(reads, shapes, strict=True):
        if shape == shapes[0]:
            continue
        if is_vocabulary(out) and shape[1:] == shapes[0][1:]:
            raise MergeError(
                f"{piece.where}: {out} has {shapes[0][0]} rows in {reads[0].model} and {shape[0]} in {read.model}: the vocabularies "
                "differ. Add `tokenizer: {source: base}` (or union) to the recipe, so that rows are matched by token."
            )
        turned = " It looks transposed." if tuple(reversed(shape)) == shapes[0] else ""
        raise MergeError(
            f"{piece.where}: {out} is {list(shapes[0])} in {reads[0].model} and {list(shape)} in {read.model}; the shapes "
            f"must be equal.{turned}"
        )
