"""What `enginepost merge evolve` may vary, and how a vector of numbers in [0, 1] becomes a merge recipe.

    base_model: runs/base
    models: [runs/mathematics, runs/chat]
    methods: [task_arithmetic, ties]          # one is chosen; or a single name
    parameters:
      weight: [0.0, 1.2]                      # a range is searched, one value for each model (and layer point)
      density: [0.3, 1.0]
      lambda: 1.0                             # a number is fixed
    layers: 3                                 # points of a gradient over the layers; 1 = the same in all
    fitness: {metric: exact_match, data: rows.jsonl}     # or metric: loss; or {python: score.py:function}
    held_out: 0.3                             # share of the rows, or other files; never seen by the search
    budget: 60                                # candidates
    seed: 0

Genes: one per method where there are several (the largest wins), then for each searched parameter its values, models inside layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from enginepost.merge.recipe import DTYPES, _Reader, open_document
from enginepost.merge.registry import METHODS, MergeError, Param, find

METRICS = ("loss", "exact_match")
KEYS = ("base_model", "models", "methods", "parameters", "layers", "fitness", "held_out", "budget", "population", "sigma", "seed",
        "dtype")  # fmt: skip


@dataclass
class Fitness:
    """metric and data files, or python: "file.py:function" and None. template, max_length, max_new_tokens: of the data."""

    metric: str | None = None
    data: list[str] = field(default_factory=list)
    python: str | None = None
    template: str | None = None
    max_length: int = 1024
    max_new_tokens: int = 128


@dataclass
class Space:
    """The search as the file says it. ranges, fixed: by parameter. held_out: share, files, "file.py:function", or None."""

    file: str
    text: str
    base_model: str | None
    models: list[str]
    methods: list[str]
    ranges: dict[str, tuple[float, float]]
    fixed: dict[str, Any]
    fitness: Fitness
    held_out: float | list[str] | str | None
    layers: int = 1
    budget: int = 60
    population: int | None = None
    sigma: float = 0.25
    seed: int = 0
    dtype: str = "bfloat16"

    def parameter(self, name: str) -> Param:
        return next(METHODS[m].parameter(name) for m in self.methods if name in [p.name for p in METHODS[m].parameters])

    def values_of(self, name: str) -> int:
        """How many values of a searched parameter there are in one layer point."""
        if self.parameter(name).scope == "shared":
            return 1
        return len(self.models)

    @property
    def genes(self) -> int:
        chosen = len(self.methods) if len(self.methods) > 1 else 0
        return chosen + sum(self.layers * self.values_of(name) for name in self.ranges)

    def recipe(self, genes: np.ndarray) -> str:
        """mergekit YAML of a candidate; genes float `[self.genes]` in [0, 1]."""
        at = len(self.methods) if len(self.methods) > 1 else 0
        method = METHODS[self.methods[int(np.argmax(genes[:at]))] if at else self.methods[0]]
        known = {p.name: p for p in method.parameters}
        shared: dict[str, Any] = {}
        models: list[dict[str, Any]] = [{} for _ in self.models]
        for name, (low, high) in self.ranges.items():
            count = self.values_of(name)
            block = genes[at : at + self.layers * count].reshape(self.layers, count)
            at += self.layers * count
            if name not in known:
                continue
            values = np.round(low + (high - low) * block, 6)
            for i, owner in enumerate([shared] if known[name].scope == "shared" else models):
                points = [float(v) for v in values[:, i]]
                owner[name] = points[0] if self.layers == 1 else points
        shared |= {name: value for name, value in self.fixed.items() if name in known}
        content: dict[str, Any] = {
            "merge_method": method.name,
            "models": [
                {"model": model, **({"parameters": own} if own else {})}
                for model, own in zip(self.models, models, strict=True)
            ],
        }
        if self.base_model is not None:
            content["base_model"] = self.base_model
        if shared:
            content["parameters"] = shared
        content["dtype"] = self.dtype
        return yaml.safe_dump(content, sort_keys=False)


def read_space(path: str | os.PathLike[str]) -> Space:
    """Read the file of a search. MergeError names file, line and key of what will not do."""
    reader, node = open_document(path, "a search says at least models, methods, parameters and fitness")
    top = reader.items(node, "the search", KEYS)
    for key in ("models", "methods", "fitness"):
        if key not in top:
            raise MergeError(f"{path}: the search has no {key}.")
    home = Path(path).parent

    def value(key: str, default: Any) -> Any:
        return reader.value(top[key][1]) if key in top else default

    def whole(key: str, default: int, low: int) -> int:
        n = value(key, default)
        if type(n) is not int or n < low:
            raise MergeError(f"{reader.at(top[key][1])}: {key} is {n!r}; a whole number of at least {low} is meant.")
        return n

    models = [_place(reader.string(n, "a model"), home) for n in reader.sequence(top["models"][1], "models")]
    named = top["methods"][1]
    nodes = [named] if isinstance(named, yaml.ScalarNode) else reader.sequence(named, "methods")
    methods = [find(reader.string(n, "a method"), reader.at(n)).name for n in nodes]
    ranges, fixed = _parameters(reader, top, methods)
    held = value("held_out", None)
    if isinstance(held, str):
        held = held if held.partition(":")[0].endswith(".py") else [held]
    if not (held is None or isinstance(held, (str, list)) or (isinstance(held, float) and 0 < held < 1)):
        raise MergeError(
            f"{reader.at(top['held_out'][1])}: held_out is {held!r}; it is a share of the rows between 0 and 1, or files."
        )
    if isinstance(held, list):
        held = [_place(str(p), home) for p in held]
    sigma = value("sigma", 0.25)
    if not isinstance(sigma, (int, float)) or not 0 < sigma <= 1:
        raise MergeError(
            f"{reader.at(top['sigma'][1])}: sigma is {sigma!r}; the first step, between 0 and 1, is meant."
        )
    base = _place(reader.string(top["base_model"][1], "base_model"), home) if "base_model" in top else None
    space = Space(
        str(path), reader.text, base, models, methods, ranges, fixed, _fitness(reader, top, home), held,
        layers=whole("layers", 1, 1), budget=whole("budget", 60, 1),
        population=whole("population", 0, 2) if "population" in top else None, sigma=float(sigma),
        seed=whole("seed", 0, 0), dtype=reader.string(top["dtype"][1], "dtype", DTYPES) if "dtype" in top else "bfloat16",
    )  # fmt: skip
    if isinstance(held, float) and space.fitness.python:
        raise MergeError(
            f"{reader.at(top['held_out'][1])}: a python fitness has no rows to hold out; name held_out: file.py:function."
        )
    if space.genes < 2:
        raise MergeError(
            f"{path}: there are {space.genes} numbers to search, and at least 2 are needed: give parameters ranges [low, high]."
        )
    return space


def _place(path: str, home: Path) -> str:
    """A model or file as given, or relative to the search's file; absolute, so that the recipe found can be moved."""
    for place in (Path(path).expanduser(), home / path):
        if place.exists():
            return os.path.abspath(place)
    return path


def _parameters(
    reader: _Reader, top: dict[str, Any], methods: list[str]
) -> tuple[dict[str, tuple[float, float]], dict[str, Any]]:
    ranges: dict[str, tuple[float, float]] = {}
    fixed: dict[str, Any] = {}
    known = {p.name: p for m in methods for p in METHODS[m].parameters}
    for name, (key, node) in (
        reader.items(top["parameters"][1], "parameters", tuple(known)).items() if "parameters" in top else ()
    ):
        value = reader.value(node)
        if not isinstance(value, list):
            fixed[name] = known[name].check(value, reader.at(node))
            continue
        if len(value) != 2 or known[name].kind is not float:
            raise MergeError(
                f"{reader.at(key)}: {name} is {value!r}; a range [low, high] of a number, or one value, is meant."
            )
        low, high = (known[name].check(v, reader.at(node)) for v in value)
        if not low < high:
            raise MergeError(f"{reader.at(key)}: the range of {name} is from {low} to {high}; low must be below high.")
        ranges[name] = (low, high)
    return ranges, fixed


def _fitness(reader: _Reader, top: dict[str, Any], home: Path) -> Fitness:
    items = reader.items(
        top["fitness"][1], "fitness", ("metric", "data", "python", "template", "max_length", "max_new_tokens")
    )
    given = {name: reader.value(node) for name, (_, node) in items.items()}
    if ("python" in given) == ("data" in given):
        raise MergeError(
            f"{reader.at(top['fitness'][1])}: fitness needs either data and metric, or python: file.py:function."
        )
    if "data" in given:
        if given.get("metric") not in METRICS:
            raise MergeError(
                f"{reader.at(top['fitness'][1])}: metric is {given.get('metric')!r}; it can be {' or '.join(METRICS)}."
            )
        data = given["data"] if isinstance(given["data"], list) else [given["data"]]
        given["data"] = [_place(str(path), home) for path in data]
    else:
        file, _, function = str(given["python"]).partition(":")
        if not file.endswith(".py") or not function:
            raise MergeError(
                f"{reader.at(top['fitness'][1])}: python is {given['python']!r}; file.py:function is meant."
            )
    return Fitness(**given)
