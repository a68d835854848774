"""The model card of a merge: front matter, the recipe, and the family tree as Mermaid text and as an SVG.

The tree is walked through what local ancestors say of themselves: `mergekit_config.yml` (a merge), or the `base_model` of a card's
front matter (a fine-tune). What is not on this machine is a leaf.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import yaml

from enginepost.errors import EnginepostError
from enginepost.merge.recipe import ModelRef, Recipe, parse_recipes
from enginepost.merge.registry import METHODS


@dataclass
class Tree:
    """A family: {label: how it was made} and (parent, child) pairs, children last."""

    made: dict[str, str] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)


def family(recipe: Recipe, name: str, places: Mapping[ModelRef, tuple[Path, Path | None]]) -> Tree:
    """The tree above a merge called `name`; `places` are the directories of its models and adapters."""
    tree = Tree()
    for ref in recipe.references():
        directory, adapter = places[ref]
        label = _ancestors(tree, directory, set())
        if adapter is not None:
            both = f"{label} + {adapter.name}"
            tree.made.setdefault(both, "adapter")
            _edge(tree, label, both)
            label = both
        _edge(tree, label, name)
    tree.made[name] = recipe.method.name
    return tree


def _edge(tree: Tree, parent: str, child: str) -> None:
    if (parent, child) not in tree.edges and parent != child:
        tree.edges.append((parent, child))


def _ancestors(tree: Tree, directory: Path, above: set[Path]) -> str:
    """Add a model and what is known of its ancestors; returns its label."""
    directory = directory.resolve()
    label = directory.name
    if directory in above or len(above) > 50:
        return label
    parents, made = _parents(directory)
    tree.made.setdefault(label, made)
    for parent in parents:
        place = next((p for p in (Path(parent).expanduser(), directory.parent / parent) if p.is_dir()), None)
        if place is not None:
            _edge(tree, _ancestors(tree, place, above | {directory}), label)
        else:
            tree.made.setdefault(parent, "")
            _edge(tree, parent, label)
    return label


def _parents(directory: Path) -> tuple[list[str], str]:
    config = directory / "mergekit_config.yml"
    if config.is_file():
        try:
            recipe = parse_recipes(config.read_text(encoding="utf-8"), str(config))[-1]
            return [ref.path for ref in recipe.references()], recipe.method.name
        except (EnginepostError, OSError, UnicodeDecodeError):
            pass
    try:
        text = (directory / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        base = front.get("base_model") if isinstance(front, dict) else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        base = None
    if isinstance(base, str):
        return [base], "fine-tune"
    if isinstance(base, list):
        return [str(b) for b in base], "fine-tune"
    return [], ""


def mermaid(tree: Tree) -> str:
    """A flow chart, ancestors on top."""
    number = {label: f"m{i}" for i, label in enumerate(tree.made)}
    lines = ["graph TD"]
    for label, made in tree.made.items():
        text = label.replace('"', "'") + (f"<br/><i>{made}</i>" if made else "")
        lines.append(f'    {number[label]}["{text}"]')
    lines += [f"    {number[parent]} --> {number[child]}" for parent, child in tree.edges]
    return "\n".join(lines)


def svg(tree: Tree) -> str:
    """The same drawn: one row per generation."""
    depth = {label: 0 for label in tree.made}
    for _ in depth:  # longest path from an ancestor
        for parent, child in tree.edges:
            depth[child] = max(depth[child], min(depth[parent] + 1, len(depth)))
    rows: dict[int, list[str]] = {}
    for label, level in depth.items():
        rows.setdefault(level, []).append(label)
    width = max(8 * max(len(label) for label in depth) + 24, 120)
    total = max(len(row) for row in rows.values()) * (width + 20) + 20
    place = {
        label: (int((total - len(row) * (width + 20) + 20) / 2) + i * (width + 20), 20 + level * 90)
        for level, row in rows.items()
        for i, label in enumerate(row)
    }
    height = 90 * len(rows) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#fff"/>'
    ]
    for parent, child in tree.edges:
        (x, y), (u, v) = place[parent], place[child]
        parts.append(
            f'<path d="M{x + width // 2} {y + 50} C {x + width // 2} {y + 75}, {u + width // 2} {v - 25}, {u + width // 2} {v}" '
            'fill="none" stroke="#888"/>'
        )
    for label, (x, y) in place.items():
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="50" rx="6" fill="#eef3fa" stroke="#4a6fa5"/>')
        parts.append(f'<text x="{x + width // 2}" y="{y + 22}" text-anchor="middle">{escape(label)}</text>')
        made = escape(tree.made[label])
        parts.append(f'<text x="{x + width // 2}" y="{y + 40}" text-anchor="middle" fill="#666">{made}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def card(recipe: Recipe, name: str, tree: Tree) -> str:
    """README.md of the merged model."""
    references = [str(ref) for ref in recipe.references()]
    front = yaml.safe_dump(
        {"base_model": references, "library_name": "transformers", "tags": ["mergekit", "merge", "enginepost"]},
        sort_keys=False,
    )
    method = METHODS[recipe.method.name]
    linked = f"[{method.name}]({method.paper})" if method.paper else method.name
    base = f", with {recipe.base_model} as the base" if recipe.base_model else ""
    listed = "\n".join(f"* {ref}" for ref in references if ref != str(recipe.base_model)) or "* (the base alone)"
    return (
        f"---\n{front}---\n# {name}\n\nA merge of language models by {linked} ({method.about}){base}, made with enginepost.\n\n"
        f"## Models\n\n{listed}\n\n## Family tree\n\n```mermaid\n{mermaid(tree)}\n```\n\n"
        f"## Recipe\n\n```yaml\n{recipe.text.rstrip()}\n```\n"
    )
