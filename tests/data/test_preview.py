"""The coloured view: styles follow labels, counts are the report's."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from enginepost.data import DataError, Tokenizer, prepare
from enginepost.data.preview import coloured, show

MODEL = Path(__file__).parent.parent / "golden" / "templates" / "tokenizer"
ROW = {"messages": [{"role": "user", "content": "naïve 😀?"}, {"role": "assistant", "content": "[bold]6[/] 😀"}]}


def test_styles_follow_labels(jsonl: Callable[..., Path], tokenizer: Tokenizer) -> None:
    dataset = prepare(jsonl(ROW), tokenizer, template="chatml", max_length=64)
    view = coloured(dataset[0], tokenizer)
    assert view.plain.replace("⏎", "") == tokenizer.decode(dataset[0].ids)
    parts = [(view.plain[span.start : span.end], span.style) for span in view.spans]
    assert parts == [
        ("<|im_start|>", "dim underline"), ("user⏎\nnaïve 😀?", "dim"), ("<|im_end|>", "dim underline"), ("⏎\n", "dim"),
        ("<|im_start|>", "dim underline"), ("assistant⏎\n", "dim"), ("[bold]6[/] 😀", "bold green"),
        ("<|im_end|>", "bold green underline"), ("⏎\n", "dim"),
    ]  # fmt: skip


def test_show(jsonl: Callable[..., Path]) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    path = jsonl(*[ROW] * 10, {"text": "x" * 100}, {"text": ""})
    dataset = show(path, MODEL, template="chatml", max_length=64, overlong="truncate", rows=2, console=console)
    text = console.export_text()
    assert text.count("tokens, 16 trained on ") == 2 and "[bold]6[/] 😀" in text and f"{path.name}:1 " in text
    for part in (
        "12 read, 11 sequences", "10 messages, 2 text", "1 truncated, 0 dropped as overlong, 1 empty documents skipped",
        f"{len(dataset.ids)}, of which {dataset.report.trained_tokens} trained on", "bins of 64 tokens", "max 64 tokens",
        "note: 10 rows do not end on a stop token",
    ):  # fmt: skip
        assert part in text, part


def test_brackets_where_there_is_no_colour(jsonl: Callable[..., Path]) -> None:
    out = io.StringIO()
    show(jsonl(ROW), MODEL, template="chatml", console=Console(width=120, file=out))
    assert "【[bold]6[/] 😀<|im_end|>】⏎" in out.getvalue() and "【trained on】" in out.getvalue()
    colour = io.StringIO()
    show(
        jsonl(ROW),
        MODEL,
        template="chatml",
        console=Console(width=120, file=colour, force_terminal=True, no_color=False),
    )
    assert "【" not in colour.getvalue() and "\x1b[1;32m[bold]6" in colour.getvalue()


def test_show_pairs_and_grades(jsonl: Callable[..., Path]) -> None:
    out = io.StringIO()
    pair = {"prompt": [{"role": "user", "content": "a b"}]}
    pair |= {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    show(
        jsonl(*[pair] * 4),
        MODEL,
        method="dpo",
        template="chatml",
        max_length=64,
        rows=1,
        console=Console(width=120, file=out),
    )
    text = out.getvalue()
    assert (
        ":1, chosen · " in text
        and ":1, rejected · " in text
        and "【yes<|im_end|>】" in text
        and "【no<|im_end|>】" in text
    )
    assert ":2, " not in text and "bins of 128 tokens" in text and "4 read, 8 sequences" in text
    out = io.StringIO()
    show(jsonl(*[pair] * 3), MODEL, method="kto", template="chatml", console=Console(width=120, file=out))
    assert "3 good answers, 3 bad ones" in out.getvalue()


def test_show_refuses_what_training_refuses(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no token to train on"):
        show(jsonl({"messages": ROW["messages"][:1]}), MODEL, template="chatml")
