"""`evolve`: search for a merge by CMA-ES (Hansen 2016, arXiv 1604.00772; the `cmaes` library), candidates merged in memory.

One model is loaded; every candidate is merged straight into its weights from the mapped inputs, which all candidates share, and then
scored. Nothing is written but the record. The search asks the same questions in the same order for the same seed, so that resuming
is replaying: the record's candidates are asked for again and answered from the record.

OUT holds evolve.json (the record), progress.svg, and best.yaml, a recipe for `enginepost merge`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from enginepost.checkpoint import write_bytes, write_json
from enginepost.checkpoint.atomic import make_directory
from enginepost.device import choose
from enginepost.generate.language_model import LanguageModel
from enginepost.merge.apply import merged_chunks, one_thread
from enginepost.merge.executor import Limits, inputs_of, limits, pool_of, survey
from enginepost.merge.fitness import scores
from enginepost.merge.models import Model, locate, open_model
from enginepost.merge.plan import Task, make_tasks
from enginepost.merge.recipe import ModelRef, Recipe, parse_recipes
from enginepost.merge.registry import MergeError
from enginepost.merge.search_space import Space, read_space
from enginepost.merge.tensors import CPU

RECORD, BEST, PLOT = "evolve.json", "best.yaml", "progress.svg"


@dataclass
class EvolveReport:
    """best, held_out: scores of the best candidate. recipe: its file. baselines: {model: (fitness, held-out score)}. data: which
    data the scores used. devices: where candidates were scored."""

    directory: Path
    best: float
    held_out: float | None
    recipe: Path
    evaluations: int
    data: str
    seed: int
    baselines: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    devices: list[str] = field(default_factory=list)

    def text(self) -> str:
        def shown(pair: tuple[float, float | None]) -> str:
            return f"{pair[0]:.4g}" + ("" if pair[1] is None else f" (held out {pair[1]:.4g})")

        lines = [self.data, f"best of {self.evaluations} candidates: {shown((self.best, self.held_out))}"]
        lines += [f"  {name}: {shown(pair)}" for name, pair in self.baselines.items()]
        if len(self.devices) > 1:
            lines.append(f"note: candidates were scored on {' and on '.join(self.devices)}, which round otherwise")
        lines.append(f"next: enginepost merge {self.recipe} OUT --seed {self.seed}")
        return "\n".join(lines)


def evolve(
    search: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    memory: float = 512e6,
    device: str = "cpu",
    progress: Callable[[int, int, float, float], None] | None = None,
) -> EvolveReport:
    """Search for the merge with the best fitness.

    Args:
        search: the YAML of the search (see search_space.py).
        out: directory of the record; an existing one of the same search is resumed.
        budget, seed: instead of the file's. A larger budget goes on where a finished search ended.
        device: "cpu", "cuda", "cuda:1" or "auto": where the model lies, is merged into and is scored. Scores of a GPU are rounded
            otherwise than those of the CPU, merges are not.
        progress: called after every candidate with (done, budget, its fitness, the best so far).
    Raises: MergeError for a search, models or data that will not do.
    """
    from cmaes import CMA

    space = read_space(search)
    space.budget = budget or space.budget
    space.seed = space.seed if seed is None else seed
    out = Path(os.path.abspath(out))
    where = choose(device)
    merger = _Merger(space, threads, memory, where)
    score, held_score, told = scores(space, merger.donor.directory)
    record = _open_record(out, space, told, where)
    history: list[dict[str, Any]] = record["history"]
    if not record["baselines"]:
        for ref, model in merger.models.items():
            merger.copy(model)
            record["baselines"][str(ref)] = [score(merger.model), held_score(merger.model) if held_score else None]
    optimizer = CMA(
        mean=np.full(space.genes, 0.5), sigma=space.sigma, bounds=np.array([[0.0, 1.0]] * space.genes), seed=space.seed,
        population_size=space.population,
    )  # fmt: skip
    done: list[tuple[np.ndarray, float]] = []
    for number in range(space.budget):
        genes = optimizer.ask()
        if number < len(history):
            if not np.allclose(genes, history[number]["genes"], rtol=0, atol=1e-9):
                raise MergeError(
                    f"{out / RECORD}: its candidates are not those that this search asks for; use a new directory."
                )
        else:
            history.append(_evaluate(space, merger, genes, score))
            entry = history[-1]
            if entry["fitness"] is not None and entry is _best(history):
                entry["held_out"] = held_score(merger.model) if held_score else None
            _save(out, record)
            if progress is not None:
                best = _best(history)
                nan = float("nan")
                progress(
                    number + 1,
                    space.budget,
                    *(e["fitness"] if e and e["fitness"] is not None else nan for e in (entry, best)),
                )
        worst = min((e["fitness"] for e in history[: number + 1] if e["fitness"] is not None), default=0.0)
        value = history[number]["fitness"]
        done.append((genes, -(worst - 1.0 if value is None else value)))
        if len(done) == optimizer.population_size:
            optimizer.tell(done)
            done = []
    best = _best(history)
    if best is None:
        raise MergeError(f"{out / RECORD}: no candidate could be merged; the first said: {history[0]['error']}")
    write_bytes(out / BEST, best["recipe"].encode())
    baselines = {name: (pair[0], pair[1]) for name, pair in record["baselines"].items()}
    return EvolveReport(
        out, best["fitness"], best.get("held_out"), out / BEST, len(history), told, space.seed, baselines, record["devices"]
    )  # fmt: skip


def _best(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first of the fittest."""
    scored = [entry for entry in history if entry["fitness"] is not None]
    return max(scored, key=lambda entry: entry["fitness"]) if scored else None


def _evaluate(
    space: Space, merger: _Merger, genes: np.ndarray, score: Callable[[LanguageModel], float]
) -> dict[str, Any]:
    text = space.recipe(genes)
    entry: dict[str, Any] = {"genes": genes.tolist(), "recipe": text, "fitness": None}
    try:
        merger.merge(text)
    except MergeError as error:  # parameters that a method refuses: the search learns to stay away
        return {**entry, "error": str(error)}
    return {**entry, "fitness": score(merger.model)}


class _Merger:
    """The opened inputs, and one model whose weights every merge overwrites."""

    def __init__(self, space: Space, threads: int | None, memory: float, device: torch.device = CPU) -> None:
        self.space, self.threads, self.memory, self.device = space, threads, memory, device
        self.recipe = self.parse(space.recipe(np.full(space.genes, 0.5)))
        self.models: dict[ModelRef, Model] = {}
        for ref in self.recipe.references():
            place, adapter = locate(ref, space.file, {})
            if adapter is not None:
                raise MergeError(
                    f"{space.file}: {ref} has an adapter; fuse it first (`enginepost fuse`) and name the result."
                )
            self.models[ref] = open_model(ref, place)
        self.donor = next(iter(self.models.values()))
        from enginepost.merge.run import _check_architectures
        from enginepost.model import load_model

        _check_architectures(self.recipe, self.models)
        net = load_model(self.donor.directory, dtype=getattr(torch, space.dtype), device=device)
        self.model = LanguageModel(net, self.donor.directory)
        self.places = net.checkpoint_tensors()

    def parse(self, text: str) -> Recipe:
        return parse_recipes(text, self.space.file)[0]

    def merge(self, text: str) -> None:
        """Merge a recipe into the model, the same bits that `enginepost merge` writes."""
        recipe = self.parse(text)
        tasks = [task for task in make_tasks(recipe, self.models, {}) if task.name in self.places]
        limit = limits(recipe, tasks, self.threads, self.memory, self.device)
        shared = survey(recipe, tasks, limit, self.space.seed)
        with one_thread(), pool_of(limit) as pool:
            list(pool.map(lambda task: self._tensor(recipe, task, limit, shared), tasks))

    def _tensor(self, recipe: Recipe, task: Task, limit: Limits, shared: dict[str, Any]) -> None:
        flat = self.places[task.name].view(-1)
        inputs = inputs_of(recipe, task, limit, self.space.seed, shared)
        for start, piece in merged_chunks(recipe.method, inputs, task.parameters, task.dtype):
            flat[start : start + piece.numel()].copy_(piece)

    def copy(self, model: Model) -> None:
        """An input as it is."""
        for name, place in self.places.items():
            place.copy_(model.checkpoint.tensor(name))


def _open_record(out: Path, space: Space, told: str, device: torch.device) -> dict[str, Any]:
    """The record so far, or a new one."""
    says = {"search": space.text, "seed": space.seed, "data": told}
    path = out / RECORD
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise MergeError(f"{out}: exists, is not empty and has no {RECORD}; name a new directory.")
        make_directory(out)
        return {**says, "devices": [device.type], "baselines": {}, "history": []}
    record = json.loads(path.read_text(encoding="utf-8"))
    for key, value in says.items():
        if record.get(key) != value:
            raise MergeError(
                f"{path}: is of another search (its {key} differs); use a new directory, or the file as it was."
            )
    record["devices"] = sorted({*record.get("devices", []), device.type})
    return dict(record)


def _save(out: Path, record: dict[str, Any]) -> None:
    write_json(out / RECORD, record)
    write_bytes(out / PLOT, plot(record).encode())


def plot(record: Mapping[str, Any]) -> str:
    """SVG: the fitness of every candidate, the best so far, its held-out score, and the inputs' own fitness as dashed lines."""
    history = record["history"]
    points = [(i + 1, e["fitness"]) for i, e in enumerate(history) if e["fitness"] is not None]
    held = [(i + 1, e["held_out"]) for i, e in enumerate(history) if e.get("held_out") is not None]
    lines = {name: pair[0] for name, pair in record["baselines"].items()}
    values = [y for _, y in points + held] + list(lines.values())
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if high <= low else (low, high)
    width, height, left, right, edge = 760, 380, 70, 150, 40

    def x(n: float) -> float:
        return left + (width - left - right) * (n / max(len(history), 1))

    def y(v: float) -> float:
        return height - edge - (height - 2 * edge) * (v - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="#fff"/>'
    ]
    for i in range(5):
        v = low + (high - low) * i / 4
        parts.append(f'<path d="M{left} {y(v):.1f} H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.4g}</text>')
    for name, v in lines.items():
        parts.append(f'<path d="M{left} {y(v):.1f} H{width - right}" stroke="#888" stroke-dasharray="5 4"/>')
        label = _escape(Path(name).name)
        parts.append(f'<text x="{width - right + 6}" y="{y(v) + 4:.1f}" fill="#666">{label}</text>')
    best = -float("inf")
    steps: list[str] = []
    for n, v in points:
        parts.append(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3" fill="#4a6fa5" fill-opacity="0.5"/>')
        best = max(best, v)
        steps.append(f"{'L' if steps else 'M'}{x(n):.1f} {y(best):.1f}")
    parts.append(f'<path d="{" ".join(steps)}" fill="none" stroke="#4a6fa5" stroke-width="2"/>')
    parts += [
        f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="4" fill="none" stroke="#c0392b" stroke-width="2"/>'
        for n, v in held
    ]
    parts.append(f'<text x="{left}" y="20" fill="#4a6fa5">fitness, and the best so far</text>')
    parts.append(f'<text x="{left + 220}" y="20" fill="#c0392b">held-out score of the best</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" text-anchor="middle">candidate</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _escape(text: str) -> str:
    from xml.sax.saxutils import escape

    return escape(text)
