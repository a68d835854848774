"""`prepare_preferences`: preference records to token sequences in flat arrays.

    paired     sequences 2i (chosen) and 2i + 1 (rejected) of one prompt
    unpaired   one sequence a record, with `desirable`
    stepwise   one sequence a record, with `classes`: 1 right, 0 wrong at the token that ends a step, -1 elsewhere

Labels mark the tokens of the answers (of the steps' ends). The whole text is tokenised once, and the prompt alone a second time:
where its tokens are not the first of the whole text's, an answer would begin inside a token, which is an error that shows both.
Steps are tokenised apart, each with the separator that ends it, so that a step's end is a token of its own (as TRL has it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from enginepost.data import records
from enginepost.data.chat import render
from enginepost.data.dataset import Dataset, _Builder, _check, _Reader, _Row
from enginepost.data.files import DataError, Paths, find, read
from enginepost.data.preference_records import PARSERS, Graded, Pair, Steps
from enginepost.data.tokenizer import Ids, Tokenizer

Kind = Literal["paired", "unpaired", "stepwise"]
GROUP = 256  # records tokenised at once
METHODS: dict[str, Kind] = {
    "dpo": "paired", "orpo": "paired", "simpo": "paired", "cpo": "paired", "reward": "paired", "kto": "unpaired",
    "prm": "stepwise",
}  # fmt: skip
"""What each method reads."""


@dataclass
class Preferences:
    """Sequences, and what the records say of them. `n` records of a kind.

    margins float64 [n], 0 where a record has none, or None when no record has one (paired); desirable bool [n] (unpaired);
    classes int8 [N], one a token of `dataset.ids` (stepwise).
    """

    kind: Kind
    dataset: Dataset
    margins: NDArray[np.float64] | None = None
    desirable: NDArray[np.bool_] | None = None
    classes: NDArray[np.int8] | None = None

    def __len__(self) -> int:
        return len(self.dataset) // (2 if self.kind == "paired" else 1)

    def shared(self) -> NDArray[np.int64]:
        """Tokens that both sequences of a pair begin with, before the first token that is trained on: [n]."""
        found = []
        for i in range(len(self)):
            a, b = self.dataset[2 * i], self.dataset[2 * i + 1]
            most = min(int(a.labels.argmax()), int(b.labels.argmax()))
            differs = np.flatnonzero(a.ids[:most] != b.ids[:most])
            found.append(int(differs[0]) if differs.size else most)
        return np.array(found, dtype=np.int64)


def prepare_preferences(
    paths: Paths,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    template: str | None = None,
    max_length: int,
    overlong: Literal["error", "drop", "truncate"] = "error",
    vocab_size: int | None = None,
    separator: str = "\n",
) -> Preferences:
    """Read, render and tokenise every record of `paths`.

    Args: kind of the records; template as in `prepare`; max_length tokens of one sequence; overlong for a record with a longer one:
    "error", "drop" it whole, or "truncate" the ends of its answers; separator: what ends a step (stepwise).
    Raises DataError: no rows; a row of no known shape, with an empty answer, two answers that are the same, a label that is not
    boolean; a prompt whose tokens are not the first of prompt and answer; an overlong row; an id outside vocab_size.
    """
    _check("kind", kind, tuple(PARSERS))
    _check("overlong", overlong, ("error", "drop", "truncate"))
    files = find(paths)
    builder = _Preferences(
        tokenizer, kind, template, max_length, overlong, vocab_size, [str(f) for f in files], separator
    )
    for number, path in enumerate(files):
        group: list[tuple[int, int, Any]] = []
        for row, value in read(path):
            group += [(number, row, found) for found in PARSERS[kind](value, f"{path}:{row}")]
            if len(group) >= GROUP:
                builder.add(group)
                group = []
        builder.add(group)
    return builder.finish()


class _Preferences:
    """Collects sequences of records; a record is kept or left out as a whole."""

    def __init__(
        self, tokenizer: Tokenizer, kind: Kind, template: str | None, max_length: int, overlong: str,
        vocab_size: int | None, names: list[str], separator: str,
    ) -> None:  # fmt: skip
        self.tokenizer, self.kind, self.template, self.separator = tokenizer, kind, template, separator
        self.max_length, self.overlong = max_length, overlong
        self.reader = _Reader(tokenizer, "sft", "auto", template, "assistant")
        self.base = _Builder(tokenizer, max_length, overlong, "sft", vocab_size, names)
        self.margins: list[float | None] = []
        self.desirable: list[bool] = []
        self.classes: list[NDArray[np.int8]] = []

    def add(self, group: list[tuple[int, int, Any]]) -> None:
        if not group:
            return
        if self.kind == "stepwise":
            for file, number, steps in group:
                self._steps(file, number, steps)
            return
        rows = [row for file, number, found in group for row in self._rows(file, number, found)]
        before = self.base.report.rows
        encoded = list(self._encode(rows))
        self.base.report.rows = before + len(group)
        each = len(rows) // len(group)
        for at, (_, _, found) in enumerate(group):
            self._keep(encoded[at * each : (at + 1) * each], found)

    def finish(self) -> Preferences:
        dataset = self.base.finish()
        if self.kind == "stepwise":
            return Preferences("stepwise", dataset, classes=np.concatenate(self.classes))
        if self.kind == "unpaired":
            return Preferences("unpaired", dataset, desirable=np.array(self.desirable, dtype=np.bool_))
        given = any(m is not None for m in self.margins)
        return Preferences("paired", dataset, np.array([m or 0.0 for m in self.margins]) if given else None)

    def _rows(self, file: int, number: int, found: Pair | Graded) -> list[_Row]:
        sides = [found.chosen, found.rejected] if isinstance(found, Pair) else [found.answer]
        place = f"{self.base.names[file]}:{number}"
        rows = [self.reader.rendered(file, number, place, side) for side in sides]
        for row in rows:
            if not row.spans:
                raise DataError(
                    f"{place}: the chat template writes nothing of the answer, so there is nothing to compare"
                )
        if len(rows) == 2:
            a, b = (_prompt(row) for row in rows)
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                raise DataError(
                    f"{place}: the prompt is written differently before chosen and rejected: at character {at}, "
                    f"{a[at : at + 60]!r} and {b[at : at + 60]!r}. Give both the same prompt, or another template"
                )
        return rows

    def _encode(self, rows: list[_Row]) -> Iterator[tuple[_Row, Ids, NDArray[np.bool_]]]:
        prompts = iter(self.tokenizer.encode_batch([_prompt(row) for row in rows]))
        for row, ids, labels in self.base.encode(rows):
            prompt = next(prompts)
            start = int(labels.argmax())
            bos = (
                row.raw
                and len(ids) > start >= 1
                and ids[0] == self.tokenizer.bos_id
                and prompt[:1].tolist() != [ids[0]]
            )
            first = ids[int(bos) : start]
            if not np.array_equal(prompt, first):
                raise DataError(self._straddling(row, prompt, ids[int(bos) :], len(first)))
            yield row, ids, labels

    def _straddling(self, row: _Row, prompt: Ids, ids: Ids, length: int) -> str:
        same = next((i for i, (x, y) in enumerate(zip(prompt, ids, strict=False)) if x != y), min(len(prompt), length))
        a, b = ([self.tokenizer.token(int(i)) for i in side[max(0, same - 1) : same + 4]] for side in (prompt, ids))
        return (
            f"{self.base.names[row.file]}:{row.number}: the tokens of the prompt are not the first tokens of prompt and answer, so "
            f"the answer would begin inside a token: the prompt alone reads {a} there, with the answer it reads {b}. Move white "
            f"space from the end of the prompt ({_prompt(row)[-20:]!r}) to the start of the answer, or name a chat template"
        )

    def _keep(self, encoded: list[tuple[_Row, Ids, NDArray[np.bool_]]], found: Pair | Graded) -> None:
        report, (row, *_) = self.base.report, encoded[0]
        longest = max(len(ids) for _, ids, _ in encoded)
        if longest > self.max_length and self.overlong != "truncate":
            self.base.too_long.append((f"{self.base.names[row.file]}:{row.number}", longest))
            report.dropped += 1
            return
        cut = [(ids[: self.max_length], labels[: self.max_length].copy()) for _, ids, labels in encoded]
        for _, labels in cut:
            labels[:1] = False
        if not all(labels.any() for _, labels in cut):
            report.dropped += 1
            return
        if len(cut) == 2 and np.array_equal(cut[0][0], cut[1][0]):  # the same once their ends are cut off
            report.dropped += 1
            return
        report.truncated += longest > self.max_length
        for (_, ids, _), (_, labels) in zip(encoded, cut, strict=True):
            if len(ids) <= self.max_length:
                report.no_stop += int(ids[np.flatnonzero(labels)[-1]]) not in self.base.stops
        self._append(row, cut)
        if isinstance(found, Pair):
            self.margins.append(found.margin)
        else:
            self.desirable.append(found.desirable)

    def _append(self, row: _Row, sequences: list[tuple[Ids, NDArray[np.bool_]]]) -> None:
        self.base.keep(sequences)
        self.base.lengths += [len(ids) for ids, _ in sequences]
        self.base.places += [(row.file, row.number)] * len(sequences)

    def _steps(self, file: int, number: int, found: Steps) -> None:
        report, place = self.base.report, f"{self.base.names[file]}:{number}"
        row = _Row(
            file,
            number,
            found.format,
            self._prompt_of(found, place),
            None,
            isinstance(found.prompt, str) and self.template is None,
        )
        pieces = self.tokenizer.encode_batch([row.text, *(step + self.separator for step in found.steps)])
        if row.raw and self.tokenizer.adds_bos and pieces[0][:1].tolist() != [self.tokenizer.bos_id]:
            pieces[0] = np.insert(pieces[0], 0, self.tokenizer.bos_id)  # type: ignore[arg-type]
        classes = [np.full(len(piece), -1, dtype=np.int8) for piece in pieces]
        for piece, label in zip(classes[1:], found.labels, strict=True):
            piece[-1] = label
        ids, flags = np.concatenate(pieces), np.concatenate(classes)
        report.rows += 1
        self.base.formats[file][found.format] += 1
        self.base._check_ids(ids, row)
        if len(ids) > self.max_length:
            if self.overlong == "truncate" and (flags[: self.max_length] >= 0).any():
                ids, flags = ids[: self.max_length], flags[: self.max_length]
                report.truncated += 1
            else:
                if self.overlong != "truncate":
                    self.base.too_long.append((place, len(ids)))
                report.dropped += 1
                return
        self._append(row, [(ids, flags >= 0)])
        self.classes.append(flags)

    def _prompt_of(self, found: Steps, place: str) -> str:
        if isinstance(found.prompt, str) and self.template is None:
            return found.prompt
        prompt = found.prompt if isinstance(found.prompt, list) else [{"role": "user", "content": found.prompt}]
        messages = records.conversation(found.format, prompt, {}, place).messages or []
        try:
            return render(messages, self.reader.source(False), None, True, **self.tokenizer.special_tokens)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error


def _prompt(row: _Row) -> str:
    """The text before the first answer."""
    assert row.spans
    return row.text[: row.spans[0][0]]
