"""How good a candidate of `enginepost merge evolve` is: higher is better.

    loss           minus the mean loss in nats per trained token of data rows
    exact_match    share of rows whose answer the model gives, greedily, to the letter (white space at the ends aside)
    python         what a function of one's own says: function(language_model) -> number

Rows are split once, by the seed, into those of the fitness and those held out. A row that is in both (files may share some) is taken
out of the held-out ones, and the count is reported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enginepost.data import Tokenizer, collate, plan_batches, prepare
from enginepost.data.prompts import load_prompts
from enginepost.device import placed
from enginepost.generate.language_model import LanguageModel
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.merge.registry import MergeError
from enginepost.merge.search_space import Fitness, Space

Score = Callable[[LanguageModel], float]


def scores(space: Space, directory: Path) -> tuple[Score, Score | None, str]:
    """(fitness, held-out score or None, one line that says which data they use); `directory` has the tokenizer."""
    fitness = space.fitness
    if fitness.python is not None:
        home = Path(space.file).parent
        held = python_score(space.held_out, home) if isinstance(space.held_out, str) else None
        told = f"fitness: {fitness.python}; held out: {space.held_out or 'nothing, so the score found is optimistic'}"
        return python_score(fitness.python, home), held, told
    tokenizer = Tokenizer.load(directory)
    rows = _rows(fitness, fitness.data, tokenizer)
    files = f"{', '.join(fitness.data)} ({_digest(fitness.data)})"
    if isinstance(space.held_out, list):
        kept, other = rows, _rows(fitness, space.held_out, tokenizer)
        seen = {_key(row) for row in kept}
        clean = [row for row in other if _key(row) not in seen]
        told = f"{fitness.metric} on {len(kept)} rows of {files}; held out: {len(clean)} rows of {', '.join(space.held_out)}"
        if len(clean) < len(other):
            told += f", {len(other) - len(clean)} more were left out as the fitness has them"
    elif space.held_out is not None:
        order = np.random.default_rng(space.seed).permutation(len(rows))
        count = round(len(rows) * float(space.held_out))
        seen = {_key(rows[i]) for i in order[count:]}
        clean = [rows[i] for i in order[:count] if _key(rows[i]) not in seen]
        kept = [rows[i] for i in order[count:]]
        told = f"{fitness.metric} on {len(kept)} rows of {files}; held out: {len(clean)} other rows"
    else:
        kept, clean = rows, []
        told = f"{fitness.metric} on {len(kept)} rows of {files}; held out: nothing, so the score found is optimistic"
    if not kept or (space.held_out is not None and not clean):
        raise MergeError(
            f"{space.file}: no rows are left for the {'fitness' if not kept else 'held-out score'}; {told}."
        )
    measure = _loss if fitness.metric == "loss" else _exact
    return (
        lambda model: measure(model, kept, fitness),
        (lambda model: measure(model, clean, fitness)) if clean else None,
        told,
    )


def _rows(fitness: Fitness, paths: list[str], tokenizer: Tokenizer) -> list[Any]:
    if fitness.metric == "loss":
        dataset = prepare(paths, tokenizer, template=fitness.template, max_length=fitness.max_length)
        return [dataset[i] for i in range(len(dataset))]
    prompts = load_prompts(paths, tokenizer, template=fitness.template, max_tokens=fitness.max_length, answers=True)
    return list(prompts)


def _key(row: Any) -> bytes:
    return np.asarray(row.ids, dtype=np.int32).tobytes()


@torch.no_grad()
def _loss(model: LanguageModel, rows: list[Any], fitness: Fitness) -> float:
    total, count = 0.0, 0
    net = model.model
    for members in plan_batches(np.array([len(r.ids) for r in rows]), batch_size=4, max_length=fitness.max_length):
        batch = placed(collate([rows[i] for i in members]), net.device)
        hidden = net.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob = linear_logprob(hidden, net.head_table, batch.targets, softcap=net.spec.final_softcap)[0]
        total -= logprob.double().sum().item()
        count += int((batch.targets != -100).sum())
    return -total / count


def _exact(model: LanguageModel, rows: list[Any], fitness: Fitness) -> float:
    said = model.generate([row.ids for row in rows], max_new_tokens=fitness.max_new_tokens)
    wanted = [model.tokenizer.decode(row.answer, skip_special=True) for row in rows]
    return sum(a.strip() == b.strip() for a, b in zip(said, wanted, strict=True)) / len(rows)


def python_score(place: str, home: Path) -> Score:
    """The function at `file.py:function`."""
    file, _, name = place.partition(":")
    path = Path(file) if Path(file).exists() else home / file
    if not path.exists():
        raise MergeError(f"{path}: no such file; the fitness is file.py:function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise MergeError(f"{path}: has no function {name!r}.")

    def score(model: LanguageModel) -> float:
        value = float(function(model))
        if not math.isfinite(value):
            raise MergeError(f"{place}: gave {value}; a fitness is a finite number, higher is better.")
        return value

    return score


def _digest(paths: list[str]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        if os.path.isfile(path):
            whole.update(Path(path).read_bytes())
    return f"sha256 {whole.hexdigest()[:12]}"
