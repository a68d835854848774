"""Reading every kind of file, and what a user is told when one is missing or broken."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enginepost.data import DataError, Tokenizer, prepare
from enginepost.data.files import find, read

ROWS = [{"text": "a\u2028b\r"}, {"text": "日本"}, {"text": "c"}]


def rows_of(path: Path) -> list:
    return list(read(path))


def test_jsonl_rows_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\n" + lines[1] + "\n" + lines[2]).encode())
    assert rows_of(path) == [(1, ROWS[0]), (3, ROWS[1]), (4, ROWS[2])]


def test_json_array_object_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert rows_of(path) == list(enumerate(ROWS, 1))
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert rows_of(path) == list(enumerate(ROWS, 1))
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert rows_of(path) == [(1, ROWS[0])]


def test_parquet_streams_row_groups_and_drops_null_struct_fields(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows = [
        {"messages": [{"role": "user", "content": str(i), **({"name": "n"} if i % 2 else {})}]} for i in range(3000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    assert rows_of(path) == list(enumerate(rows, 1))


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('prompt,completion\n"two\nlines, ""q""",b\nc,\n', encoding="utf-8-sig")
    expected = [{"prompt": 'two\nlines, "q"', "completion": "b"}, {"prompt": "c", "completion": ""}]
    assert rows_of(path) == list(enumerate(expected, 1))


def test_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "x.md"
    path.write_text("# one\n\ntwo\n")
    assert rows_of(path) == [(1, {"text": "# one\n\ntwo\n"})]


def test_find(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.txt", "a/README.md", "note.bin", ".hidden/x.jsonl", "z.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = [str(p.relative_to(tmp_path)) for p in find(tmp_path)]
    assert names == ["a/c.txt", "b.jsonl", "z.csv"]
    assert [p.name for p in find(str(tmp_path / "*.jsonl"))] == ["b.jsonl"]
    assert [p.name for p in find(str(tmp_path / "**/*.txt"))] == ["c.txt"]
    assert [p.name for p in find([tmp_path / "z.csv", tmp_path / "b.jsonl"])] == ["z.csv", "b.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "no such file or directory"),
        ("*.jsonl", "pattern matches no data file"),
        ("empty", "holds no data file"),
        ("x.bin", "unknown kind of file; use one of .jsonl"),
    ],
)
def test_nothing_found(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(DataError, match=message) as error:
        find(tmp_path / path)
    assert path in str(error.value)


def test_no_paths() -> None:
    with pytest.raises(DataError, match="no data files were given"):
        find([])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2: not valid JSON: .* column 9"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl, line 2: not UTF-8"),
        ("x.jsonl", b"[" * 100_000, r"x\.jsonl, line 1: "),
        ("x.json", b'[\n{"text": "a"},\n{"text": }]', r"x\.json, line 3: not valid JSON"),
        ("x.json", b'{"text": "a"}\n{"text": }\n', r"x\.json, line 2: not valid JSON"),
        ("x.json", b"", "the file is empty"),
        ("x.parquet", b"PAR1 nonsense PAR1", r"x\.parquet: not a readable parquet"),
        ("x.csv", b"text\na\nb,c\n", r"x\.csv:2 .*more fields than the header"),
        ("x.csv", b'text\n"a\n', r"x\.csv, line 2: not valid CSV"),
        ("x.csv", b"text\n\xff\n", r"x\.csv, after line .*not UTF-8"),
        ("x.txt", b"ab\xff", r"x\.txt: not UTF-8 text: .* byte 2"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows_of(path)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=5) | st.sampled_from(["[]", "{}", '[{"role": "user"}]']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "type", "text"]), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip
CALL = st.fixed_dictionaries({}, optional={"name": ANY, "arguments": ANY, "function": ANY, "id": ANY})
ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": ROLE | ANY, "content": st.text(max_size=4) | ANY, "train": ANY, "weight": ANY, "tool_calls": st.lists(CALL) | ANY,
        "from": ROLE | st.just("function_call") | ANY, "value": st.text(max_size=4) | ANY, "thinking": ANY,
    },
)  # fmt: skip
GOOD = st.fixed_dictionaries({"role": ROLE, "content": st.text(max_size=4)}, optional={"tool_calls": st.lists(CALL)})
TURNS = st.lists(GOOD, min_size=1, max_size=4) | st.lists(TURN, max_size=3) | ANY
RECORD = ANY | st.fixed_dictionaries(
    {},
    optional={
        "messages": TURNS, "conversations": TURNS, "prompt": TURNS, "completion": TURNS, "text": ANY, "instruction": ANY,
        "output": ANY, "input": ANY, "history": ANY, "system": ANY, "tools": ANY, "chat_template_kwargs": ANY,
    },
)  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]))
def test_any_bytes_give_records_or_a_data_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    try:
        rows_of(path)
    except DataError as error:
        assert str(path) in str(error)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=RECORD)
def test_any_json_gives_a_sequence_or_a_data_error(tmp_path: Path, tokenizer: Tokenizer, value: object) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(value))
    try:
        assert len(prepare(path, tokenizer, template="chatml", max_length=4096)) == 1
    except DataError as error:
        assert str(path) in str(error)


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    found = find(path)[0]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        rows_of(found)
