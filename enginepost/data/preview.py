"""A coloured view of training data: what is trained on, what is only read, and what happened to the rows.

Green is trained on, dim is context, special tokens are underlined, a line end is shown as ⏎. Where there is no colour (a file, a
pipe), 【 】 stand around what is trained on. Each sequence is decoded from its
ids, so this is what the model sees, not what the file says.
"""

from itertools import groupby
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from enginepost.data.dataset import Dataset, prepare
from enginepost.data.files import Paths
from enginepost.data.packing import Sequence, best_fit
from enginepost.data.preferences import METHODS, prepare_preferences
from enginepost.data.prompts import Prompts, load_prompts
from enginepost.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def show_prompts(
    paths: Paths, tokenizer_dir: "str | Path", *, template: str | None = None, max_tokens: int, overlong: str = "error",
    rows: int = 3, console: "Console | None" = None,
) -> Prompts:  # fmt: skip
    """Print `rows` prompts as roll-outs see them, with the columns that rewards are given. Errors are those of `load_prompts`."""
    from rich.console import Console
    from rich.panel import Panel

    console = console or Console()
    tokenizer = Tokenizer.load(tokenizer_dir)
    prompts = load_prompts(paths, tokenizer, template=template, max_tokens=max_tokens, overlong=overlong)
    plain = console.color_system is None or console.no_color
    for prompt in prompts.rows[:rows]:
        ids = np.array(prompt.ids, dtype=np.int32)
        sequence = Sequence(ids, np.zeros(len(ids), dtype=np.bool_), 0, prompt.place)
        columns = ", ".join(prompt.columns) or "none"
        title = f"{prompt.place} · {len(ids):,} tokens · columns: {columns}"
        console.print(
            Panel(coloured(sequence, tokenizer, brackets=plain), title=title, title_align="left", border_style="dim")
        )
    console.print(prompts.report, highlight=False)
    return prompts


def show(
    paths: Paths,
    tokenizer_dir: "str | Path",
    *,
    method: str = "sft",
    format: str = "auto",
    template: str | None = None,
    train_on: Literal["assistant", "all", "last"] = "assistant",
    max_length: int = 2048,
    overlong: Literal["error", "drop", "truncate"] = "error",
    rows: int = 3,
    console: "Console | None" = None,
) -> Dataset:
    """Prepare `paths` as training would and print `rows` sequences, then the counts. Errors are those of `prepare`."""
    from rich.console import Console
    from rich.panel import Panel

    console = console or Console()
    plain = console.color_system is None or console.no_color
    tokenizer = Tokenizer.load(tokenizer_dir)
    sides, lengths = [""], None
    if method in METHODS:
        found = prepare_preferences(
            paths, tokenizer, kind=METHODS[method], template=template, max_length=max_length, overlong=overlong
        )
        dataset = found.dataset
        if found.kind == "paired":
            sides, lengths = [", chosen", ", rejected"], dataset.lengths.reshape(-1, 2).sum(1) - found.shared()
        elif found.desirable is not None:
            console.print(f"{int(found.desirable.sum()):,} good answers, {int((~found.desirable).sum()):,} bad ones")
    else:
        dataset = prepare(
            paths, tokenizer, method="pretrain" if method == "pretrain" else "sft", format=format, template=template,
            train_on=train_on, max_length=max_length, overlong=overlong,
        )  # fmt: skip
    for index in range(min(rows * len(sides), len(dataset))):
        sequence, side = dataset[index], sides[index % len(sides)]
        title = f"{sequence.place}{side} · {len(sequence.ids):,} tokens, {int(sequence.labels.sum()):,} trained on"
        console.print(
            Panel(coloured(sequence, tokenizer, brackets=plain), title=title, title_align="left", border_style="dim")
        )
    legend = (
        "【trained on】  context"
        if plain
        else "[bold green]trained on[/]  [dim]context[/]  [underline]special token[/]"
    )
    console.print(legend)
    console.print(summary(dataset, max_length * len(sides), lengths))
    for note in dataset.report.notes():
        console.print(f"note: {note}", style="yellow", markup=False)
    return dataset


def coloured(sequence: Sequence, tokenizer: Tokenizer, *, brackets: bool = False) -> "Text":
    """The text of one sequence, styled by label; with brackets also marked in the text itself."""
    from rich.text import Text

    special = set(tokenizer.specials.values())
    kinds = [(label, id in special) for id, label in zip(sequence.ids.tolist(), sequence.labels.tolist(), strict=True)]
    text, done, at, inside = Text(), "", 0, False
    for (label, marked), run in groupby(kinds):
        at += len(list(run))
        # Decoded from the start, as a run alone may lose its first space or half a character.
        so_far = tokenizer.decode(sequence.ids[:at])
        if brackets and label != inside:
            text.append("【" if label else "】")
        style = ("bold green" if label else "dim") + (" underline" if marked else "")
        text.append(so_far[len(done) :].replace("\n", "⏎\n"), style)
        done, inside = so_far, label
    if brackets and inside:
        text.append("】")
    return text


def summary(dataset: Dataset, bin_length: int, packed: NDArray[np.int64] | None = None) -> "Table":
    """Counts, lengths, the trained share and how full the packed bins are. packed: tokens of what is packed as one (a pair)."""
    from rich.table import Table

    report, lengths = dataset.report, dataset.lengths
    packed = lengths if packed is None else packed
    bins = best_fit(np.arange(len(packed)), packed, bin_length)
    low, middle, high, top = np.percentile(lengths, [0, 50, 95, 100])
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, formats in report.formats.items():
        table.add_row(
            "file", f"{name}  ({', '.join(f'{count:,} {kind}' for kind, count in formats.items()) or 'no record'})"
        )
    table.add_row("rows", f"{report.rows:,} read, {report.sequences:,} sequences")
    table.add_row(
        "left out",
        f"{report.truncated:,} truncated, {report.dropped:,} dropped as overlong, {report.skipped:,} empty documents skipped",
    )
    table.add_row("length", f"min {low:,.0f}, median {middle:,.0f}, p95 {high:,.0f}, max {top:,.0f} tokens")
    table.add_row(
        "tokens",
        f"{report.tokens:,}, of which {report.trained_tokens:,} trained on ({report.trained_tokens / report.tokens:.1%})",
    )
    fill = int(packed.sum()) / (len(bins) * bin_length)
    table.add_row("packing", f"{len(bins):,} bins of {bin_length:,} tokens, {fill:.1%} full")
    return table
