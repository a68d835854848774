"""The table of docs/memory.md that says what `enginepost plan` predicts of GPUs: the longest sequence under a cap of memory.

    python -m bench.predicted

Nothing is measured and no GPU is needed. Longest of one sequence a micro-batch with QLoRA; the host memory beside a figure is what
pinned block inputs and weights then take, so what the machine around the card must have.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from enginepost.plan import plan
from enginepost.plan.memory import step_peak

CASES = [
    ("Llama 3.1 8B, r 32", "llama-3.1-8b", 32, ("8GB", "12GB", "16GB", "24GB")),
    ("Llama 3.1 70B, r 8", "llama-3.1-70b", 8, ("12GB",)),
]
LONG: dict[str, Any] = {"checkpointing": "host", "mlp_chunk": 1024}
COLUMNS: list[tuple[str, dict[str, Any]]] = [
    ("resident", {"weights": "resident"}),
    ("host", {"weights": "host"}),
    ("resident, long", {"weights": "resident", **LONG}),
    ("host, long", {"weights": "host", **LONG}),
]


def table() -> Iterator[str]:
    """Its lines, in Markdown."""
    yield "| model | memory | " + " | ".join(name for name, _ in COLUMNS) + " |"
    yield "|---|---|" + "---|" * len(COLUMNS)
    for title, model, rank, caps in CASES:
        for cap in caps:
            found = [longest(model, rank, cap, keys) for _, keys in COLUMNS]
            yield f"| {title} | {cap[:-2]} GB | " + " | ".join(found) + " |"


def longest(model: str, rank: int, cap: str, keys: dict[str, Any]) -> str:
    recipe = {"model": model, "data": "rows.jsonl", "quantize": "nf4-double", "lora": {"r": rank}, **keys}
    made = plan({**recipe, "gradient_accumulation": 1}, on=cap)
    if not made.longest_context:
        return "does not fit"
    host = step_peak(dataclasses.replace(made.setup, tokens=made.longest_context)).host
    pinned = sum(nbytes for item, nbytes in host.items() if item != "process")
    return f"{made.longest_context:,}" + (f" ({pinned / 1e9:.0f} GB)" if pinned else "")


if __name__ == "__main__":
    print("\n".join(table()))
