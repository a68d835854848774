"""Files as a stream of records, each with the place it came from.

    .jsonl          one JSON object a line; row = line number
    .json           a JSON array of objects (row = its number in the array), one object, or JSON lines under that name
    .parquet        row = row number
    .csv            first line is the header; row = record number, the header not counted
    .txt .md        one document per file, {"text": the whole file}; row = 1

Rows count from 1. jsonl, parquet and csv are streamed: the raw text of the file is never held as a whole.
"""

import csv
import glob
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from enginepost.errors import EnginepostError

Paths = str | PathLike[str] | Iterable[str | PathLike[str]]
Row = tuple[int, Any]


class DataError(EnginepostError):
    """Something in the user's data, tokenizer or chat template."""


def find(paths: Paths) -> list[Path]:
    """The files that `paths` means: a file, a directory, a glob, or a list of these, in the order given.

    A directory gives every supported file below it, sorted by path; hidden files and README.md are passed over.
    Raises DataError when a path or glob matches nothing, or a file has a suffix that is not supported.
    """
    given = [paths] if isinstance(paths, str | PathLike) else list(paths)
    if not given:
        raise DataError("no data files were given: name a file, a directory or a glob")
    return [file for path in given for file in _expand(str(path))]


def read(path: Path) -> Iterator[Row]:
    """(row, record) for each record of one file, in order; `record` is whatever the file holds, usually a dict."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: a {path.suffix or 'nameless'} file is not supported; use one of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _expand(path: str) -> list[Path]:
    here = Path(path).expanduser()
    if here.is_dir():
        files = sorted(p for p in here.rglob("*") if p.is_file() and _belongs(p, here))
        if not files:
            raise DataError(f"{path}: the directory holds no data file ({', '.join(READERS)})")
        return files
    if here.exists():
        if here.suffix.lower() not in READERS:
            raise DataError(f"{path}: unknown kind of file; use one of {', '.join(READERS)}")
        return [here]
    if glob.has_magic(path):
        files = [Path(p) for p in sorted(glob.glob(str(here), recursive=True))]
        files = [p for p in files if p.is_file() and p.suffix.lower() in READERS]
        if not files:
            raise DataError(f"{path}: the pattern matches no data file ({', '.join(READERS)})")
        return files
    raise DataError(f"{path}: no such file or directory (looked from {Path.cwd()})")


def _belongs(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in READERS and not hidden and path.name.lower() != "readme.md"


def _jsonl(path: Path) -> Iterator[Row]:
    # Read as bytes: lines then end at \n alone, never at the other line ends that a JSON string may hold.
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode().rstrip())
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 text: {error.reason}") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
                ) from error
            except RecursionError as error:
                raise DataError(f"{path}, line {number}: JSON nested too deeply") from error


def _json(path: Path) -> Iterator[Row]:
    text = _text_of(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # JSON lines under the name .json
            yield from _jsonl(path)
            return
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            + ("; the file is empty" if not text.strip() else "")
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deeply") from error
    yield from enumerate(data if isinstance(data, list) else [data], 1)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        row = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    # A struct column gives every row the keys of all rows, absent ones as None.
                    yield row, _without_none(record)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        try:
            for number, record in enumerate(rows, 1):
                if None in record:
                    raise DataError(f"{path}:{number} (line {rows.reader.line_num}): more fields than the header has")
                yield number, {key: value for key, value in record.items() if value is not None}
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.reader.line_num}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, after line {rows.reader.line_num}: not UTF-8 text: {error.reason}") from error


def _document(path: Path) -> Iterator[Row]:
    yield 1, {"text": _text_of(path)}


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".txt": _document, ".md": _document,
}  # fmt: skip
