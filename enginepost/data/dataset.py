"""`prepare`: records to training sequences, kept in flat arrays.

    records -> text and trained character spans -> ids and offsets (one tokenisation of the whole text) -> labels

A token is trained when it shares a character with a trained span (the rule of transformers' assistant masks). Labels come from
positions alone, never from token ids. Raw text (`text`, and `prompt_completion` given as text) gets bos where the tokenizer would
add it, and eos at its end; a rendered conversation gets neither, as its template wrote them.

method "sft": one sequence for each record. method "pretrain": `text` records only, every token a label; a document longer than
max_length is cut into pieces that share one token, so that each token after the first is a target exactly once.

Memory: 4 bytes of ids and 1 of label for each token, whatever the length of the text was.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from enginepost.data import records, spans
from enginepost.data.chat import resolve
from enginepost.data.files import DataError, Paths, find, read
from enginepost.data.packing import Sequence
from enginepost.data.tokenizer import Ids, Offsets, Tokenizer

BATCH_ROWS, BATCH_CHARACTERS = 512, 2_000_000  # tokenised at once
SHOWN = 5  # rows that an error names


@dataclass
class Report:
    """What happened to the rows. Lengths are token counts of the sequences kept."""

    rows: int = 0  # records read
    sequences: int = 0
    tokens: int = 0
    trained_tokens: int = 0  # targets of the loss
    truncated: int = 0  # rows cut to max_length and kept
    dropped: int = 0  # overlong rows left out: overlong "drop", or nothing trained was left after truncation
    skipped: int = 0  # empty documents
    untemplated: int = 0  # prompt/completion texts used as they are, though the model has a chat template
    straddling: int = 0  # rows with a token that begins in a prompt and ends in the answer
    no_stop: int = 0  # rows whose last trained token does not end a generation
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    formats: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> format -> rows

    def __str__(self) -> str:
        share = f"{self.trained_tokens / max(self.tokens, 1):.0%}"
        text = f"{self.rows:,} rows -> {self.sequences:,} sequences, {self.tokens:,} tokens, {share} trained on"
        if self.lengths.size:
            low, middle, high, top = np.percentile(self.lengths, [0, 50, 95, 100]).astype(int)
            text += f"; lengths {low:,} to {top:,} (median {middle:,}, p95 {high:,})"
        return "; ".join([text, *self.notes()])

    def notes(self) -> list[str]:
        """What a user should know about, in words."""
        notes = [
            (self.truncated, "rows truncated to max_length"),
            (self.dropped, "overlong rows dropped"),
            (self.skipped, "empty documents skipped"),
            (
                self.untemplated,
                "prompt/completion texts used without the model's chat template (`template: default` would apply it)",
            ),
            (self.straddling, "rows have a token that spans the end of a prompt and the start of its answer"),
            (self.no_stop, "rows do not end on a stop token, so the model will not learn to stop there"),
        ]
        return [f"{count:,} {words}" for count, words in notes if count]


class Dataset:
    """Sequences in flat arrays: ids int32 [N], labels bool [N], offsets int64 [n+1]. `dataset[i]` is a view, not a copy."""

    def __init__(
        self, ids: Ids, labels: NDArray[np.bool_], offsets: NDArray[np.int64], rows: NDArray[np.int64],
        files: NDArray[np.int32], names: list[str], report: Report,
    ) -> None:  # fmt: skip
        self.ids, self.labels, self.offsets, self.report = ids, labels, offsets, report
        self._rows, self._files, self._names = rows, files, names

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        a, b = self.offsets[index], self.offsets[index + 1]
        source = self._names[self._files[index]]
        return Sequence(self.ids[a:b], self.labels[a:b], int(self._rows[index]), source)

    def __iter__(self) -> Iterator[Sequence]:
        return (self[i] for i in range(len(self)))

    @property
    def sequences(self) -> list[Sequence]:
        return list(self)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def prepare(
    paths: Paths,
    tokenizer: Tokenizer,
    *,
    method: str = "sft",
    format: str = "auto",
    template: str | None = None,
    train_on: Literal["assistant", "all", "last"] = "assistant",
    max_length: int,
    overlong: Literal["error", "drop", "truncate"] = "error",
    vocab_size: int | None = None,
) -> Dataset:
    """Read, render and tokenise every record of `paths`.

    Args: paths a file, directory, glob or list of these; format a record format, or "auto" by each record's keys; template a chat
    template by name, file or source, default the model's own (naming one also renders prompt/completion texts as a user and an
    assistant turn); train_on which turns of a conversation are trained; max_length in tokens; overlong what to do with longer rows;
    vocab_size of the model, to refuse ids that it lacks.
    Raises DataError: no rows; a row that fits no format; a row that would train nothing; an overlong row; an id outside vocab_size.
    """
    _check("method", method, ("sft", "pretrain"))
    _check("train_on", train_on, ("assistant", "all", "last"))
    _check("overlong", overlong, ("error", "drop", "truncate"))
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 (a token and the one it predicts), got {max_length}")
    files = find(paths)
    names = [str(path) for path in files]
    reader = _Reader(tokenizer, method, format, template, train_on)
    build = _Builder(tokenizer, max_length, overlong, method, vocab_size, names)
    for number, path in enumerate(files):
        rows = (reader.row(number, row, f"{path}:{row}", value) for row, value in read(path))
        for batch in _batches(rows):
            build.add(batch)
    return build.finish()


@dataclass
class _Row:
    file: int
    number: int
    format: str
    text: str
    spans: list[spans.Span] | None  # None: everything is trained
    raw: bool  # no template wrote bos and eos


class _Reader:
    """Records as text and trained spans; any error names the record's place."""

    def __init__(
        self, tokenizer: Tokenizer, method: str, format: str, template: str | None, train_on: str
    ) -> None:  # fmt: skip
        self.tokenizer, self.method, self.template, self.train_on = tokenizer, method, template, train_on
        self.format = "text" if method == "pretrain" and format == "auto" else format
        self.source = cache(lambda tools: resolve(template, tokenizer, tools))

    def row(self, file: int, number: int, place: str, value: object) -> _Row:
        record = records.parse(value, place, self.format)
        if self.method == "pretrain" and record.format != "text":
            raise DataError(f"{place}: method pretrain reads documents (the key text), not {record.format} records")
        return self.rendered(file, number, place, record)

    def rendered(self, file: int, number: int, place: str, record: records.Record) -> _Row:
        """A record as text. Texts of a prompt and its answer become turns where the recipe names a template."""
        if record.format != "text" and record.messages is None and self.template is not None:
            turns = record.text[: record.prompt_length], record.text[record.prompt_length :]
            messages = [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)
            ]
            record = records.Record(record.format, messages=messages, train=[None, None])
        found: list[spans.Span] | None
        if record.messages is None:
            whole = record.prompt_length == 0 or self.train_on == "all"
            text, found = record.text, None if whole else [(record.prompt_length, len(record.text))]
        else:
            tokenizer = self.tokenizer
            try:
                source = self.source(record.tools is not None)
                text, found = spans.conversation(
                    record, source, self.train_on, tokenizer.special_tokens, tokenizer.specials
                )
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{place}: the text has half a surrogate pair ({text[error.start]!r}), which is no character"
            ) from error
        return _Row(file, number, record.format, text, found, record.messages is None)


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Rows in groups small enough to tokenise at once."""
    group: list[_Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row.text)
        if len(group) == BATCH_ROWS or size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Builder:
    """Collects sequences, and the rows that cannot be used, until all have been seen."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        overlong: str,
        method: str,
        vocab_size: int | None,
        names: list[str],
    ) -> None:
        self.tokenizer, self.max_length, self.overlong, self.method = tokenizer, max_length, overlong, method
        self.vocab_size, self.names = vocab_size, names
        self.report = Report()
        self.formats = [Counter[str]() for _ in names]
        self.ids: list[Ids] = []
        self.labels: list[NDArray[np.bool_]] = []
        self.lengths: list[int] = []
        self.places: list[tuple[int, int]] = []  # (file, row) of each sequence
        self.masked: list[str] = []
        self.too_long: list[tuple[str, int]] = []
        self.stops = set(tokenizer.stop_ids)

    def add(self, rows: list[_Row]) -> None:
        pending: list[tuple[Ids, NDArray[np.bool_]]] = []
        for row, ids, labels in self.encode(rows):
            pending += self._place(row, ids, labels)
        self.keep(pending)

    def keep(self, pending: list[tuple[Ids, NDArray[np.bool_]]]) -> None:
        if pending:
            self.ids.append(np.concatenate([ids for ids, _ in pending]))
            self.labels.append(np.concatenate([labels for _, labels in pending]))

    def encode(self, rows: list[_Row]) -> Iterator[tuple[_Row, Ids, NDArray[np.bool_]]]:
        """ids and labels of each row, empty ones left out; counts what happens."""
        plain = [row for row in rows if row.spans is None]
        spanned = [row for row in rows if row.spans is not None]
        bare = iter(self.tokenizer.encode_batch([row.text for row in plain]))
        located = iter(self.tokenizer.encode_batch_with_offsets([row.text for row in spanned]))
        for row in rows:
            self.report.rows += 1
            self.formats[row.file][row.format] += 1
            if row.spans is None:
                ids = next(bare)
                labels = np.ones(len(ids), dtype=np.bool_)
            else:
                ids, offsets = next(located)
                labels, straddling = _labels(offsets, row.spans)
                self.report.straddling += straddling
            if row.raw:
                if not row.text:
                    self.report.skipped += 1
                    continue
                ids, labels = self._enclose(ids, labels, row.spans is None)
                self.report.untemplated += row.format != "text" and bool(self.tokenizer.chat_templates)
            self._check_ids(ids, row)
            yield row, ids, labels

    def finish(self) -> Dataset:
        self._complain()
        ids = np.concatenate(self.ids)
        labels = np.concatenate(self.labels)
        lengths = np.array(self.lengths, dtype=np.int64)
        places = np.array(self.places, dtype=np.int64)
        report = self.report
        report.sequences, report.tokens, report.trained_tokens = len(lengths), len(ids), int(labels.sum())
        report.lengths = lengths
        report.formats = {name: dict(count) for name, count in zip(self.names, self.formats, strict=True)}
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Dataset(ids, labels, offsets, places[:, 1], places[:, 0].astype(np.int32), self.names, report)

    def _enclose(self, ids: Ids, labels: NDArray[np.bool_], whole: bool) -> tuple[Ids, NDArray[np.bool_]]:
        tokenizer = self.tokenizer
        if tokenizer.eos_id is None:
            raise DataError("raw text needs an end, and the tokenizer declares no eos_token (tokenizer_config.json)")
        if tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1].tolist() != [tokenizer.bos_id]:
            ids, labels = np.insert(ids, 0, tokenizer.bos_id), np.insert(labels, 0, whole)
        if ids[-1:].tolist() != [tokenizer.eos_id]:
            ids, labels = np.append(ids, np.int32(tokenizer.eos_id)), np.append(labels, True)
        return ids, labels

    def _place(self, row: _Row, ids: Ids, labels: NDArray[np.bool_]) -> list[tuple[Ids, NDArray[np.bool_]]]:
        """The sequences that a row gives: usually one, none when it cannot be used, several pieces of a long document."""
        place = f"{self.names[row.file]}:{row.number}"
        if self.method == "pretrain":
            step = self.max_length - 1
            starts = range(0, max(len(ids) - 1, 1), step)
            pieces = [(ids[a : a + self.max_length], labels[a : a + self.max_length]) for a in starts]
        elif len(ids) <= self.max_length:
            pieces = [(ids, labels)]
        elif self.overlong == "truncate":
            pieces = [(ids[: self.max_length], labels[: self.max_length])]
        else:
            self.too_long.append((place, len(ids)))
            self.report.dropped += 1
            return []
        pieces = [(ids, labels.copy()) for ids, labels in pieces]
        for _, labels in pieces:
            labels[:1] = False  # nothing precedes the first token, so nothing predicts it
        cut = self.method == "sft" and len(ids) > self.max_length
        if not pieces[-1][1].any():
            if cut:
                self.report.dropped += 1
            else:
                self.masked.append(place)
            return []
        self.report.truncated += cut
        if self.method == "sft" and not cut:
            last = pieces[-1][0][np.flatnonzero(pieces[-1][1])[-1]]
            self.report.no_stop += int(last) not in self.stops
        self.lengths += [len(ids) for ids, _ in pieces]
        self.places += [(row.file, row.number)] * len(pieces)
        return pieces

    def _check_ids(self, ids: Ids, row: _Row) -> None:
        if self.vocab_size is None or not ids.size or int(ids.max()) < self.vocab_size:
            return
        id = int(ids[ids >= self.vocab_size][0])
        raise DataError(
            f"{self.names[row.file]}:{row.number}: token {self.tokenizer.token(id)!r} has id {id}, but the model's vocabulary has"
            f" {self.vocab_size} rows (ids up to {self.vocab_size - 1}): the tokenizer and the model do not belong together"
        )

    def _complain(self) -> None:
        where = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
        if self.report.rows == 0:
            raise DataError(f"the data set is empty: no record in {where}")
        if self.masked:
            raise DataError(
                f"{len(self.masked)} of {self.report.rows} rows have no token to train on: {_some(self.masked)}. Each row needs an"
                " assistant turn that is not empty and not marked train: false (or set train_on: all)"
            )
        if self.too_long and self.overlong == "error":
            longest = max(self.too_long, key=lambda item: item[1])
            named = [f"{place} ({length} tokens)" for place, length in self.too_long]
            raise DataError(
                f"{len(named)} of {self.report.rows} rows are longer than max_length = {self.max_length}: {_some(named)};"
                f" the longest is {longest[0]} with {longest[1]}. Raise max_length, or set overlong: truncate or overlong: drop"
            )
        if not self.lengths:
            raise DataError(
                f"no sequence is left of {self.report.rows} rows in {where}: {'; '.join(self.report.notes())}"
            )


def _labels(offsets: Offsets, wanted: list[spans.Span]) -> tuple[NDArray[np.bool_], bool]:
    """Which tokens share a character with a span, and does one of them begin before its span does."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    labels = np.zeros(len(offsets), dtype=np.bool_)
    straddling = False
    for a, b in wanted:
        inside = (ends > a) & (starts < b)
        labels |= inside
        straddling |= bool((inside & (starts < a)).any())
    return labels, straddling


def _some(places: list[str]) -> str:
    rest = len(places) - SHOWN
    return ", ".join(islice(places, SHOWN)) + (f" and {rest} more" if rest > 0 else "")


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
