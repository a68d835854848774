"""The small byte-level BPE tokenizer of the golden files, and rows written to a file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from enginepost.data import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(GOLDEN / "templates" / "tokenizer")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
