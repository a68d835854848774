"""The planner against whole runs: anonymous resident memory of a process that trains, at its peak, within 10 %.

What a process holds before it trains is most of a small run, so what the run adds to it must also be right by itself.
"""

import pathlib
from typing import Any

import pytest
from peaks import close, peak_of_run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: pathlib.Path) -> pathlib.Path:
    """A directory of models, one of each name that is asked for; beside them `rows.txt`."""
    directory = tmp_path_factory.mktemp("planned")
    words = "the quick brown fox jumps over the lazy dog what is six times seven forty two".split()
    (directory / "rows.txt").write_text(" ".join(words[i * i % len(words)] for i in range(20_000)))
    return directory


SLOW: list[tuple[str, dict[str, Any]]] = [
    ("llama-3.2-1b", {}),
    ("llama-3.2-1b", {"checkpointing": False}),
    ("llama-3.2-1b", {"dtype": "fp32", "checkpointing": False, "max_length": 512}),
    ("llama-3.2-1b", {"batch_size": 2, "checkpointing": False}),
    ("llama-3.2-1b", {"lora": {"r": 128}, "gradient_accumulation": 2, "max_length": 512}),
    ("llama-3.2-1b", {"lora": None, "max_length": 512}),
    ("llama-3.1-8b", {"lora": None, "dtype": "fp32", "max_length": 512}),
    ("llama-3.1-8b", {"lora": None, "checkpointing": False, "gradient_accumulation": 2, "max_length": 512}),
    ("llama-3.2-1b", {"quantize": "nf4", "max_length": 512}),
    ("llama-3.1-8b", {"quantize": "nf4-double", "weights": "disk", "max_length": 512}),
    ("llama-3.1-8b", {"weights": "disk", "checkpointing": False}),
    ("llama-3.2-1b", {"mlp_chunk": 256, "batch_size": 2}),
    ("llama-3.2-1b", {"mlp_chunk": 256, "checkpointing": False}),
    ("llama-3.1-8b", {"mlp_chunk": 128, "lora": None, "max_length": 512}),
    ("qwen3-0.6b", {"checkpointing": False}),
    ("gemma-2-2b", {"checkpointing": False}),
    ("llama-3.2-1b", {"lora": {"dora": True}, "checkpointing": False, "max_length": 512}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=[f"{n} {k}" for n, k in SLOW])
def test_whole_runs_take_what_was_planned(
    case: tuple[str, dict[str, Any]], models: pathlib.Path, tiny_tokenizer_dir: pathlib.Path
) -> None:
    close(*peak_of_run(models, tiny_tokenizer_dir, *case))


def test_a_run_takes_what_was_planned(models: pathlib.Path, tiny_tokenizer_dir: pathlib.Path) -> None:
    keys = {"lora": None, "max_length": 128, "dtype": "fp32"}
    close(*peak_of_run(models, tiny_tokenizer_dir, "llama-3.2-1b", keys))
