"""Side files: byte for byte, all of them, nothing else."""

import os

import pytest

from enginepost.checkpoint import CheckpointError, copy_side_files
from enginepost.checkpoint.side_files import SIDE_FILES


def test_every_side_file_is_copied_byte_for_byte(tmp_path):
    source, out = tmp_path / "source", tmp_path / "deep" / "out"
    (source / "additional_chat_templates").mkdir(parents=True)
    content = {name: f"{name}\r\n\0é".encode() for name in SIDE_FILES} | {
        "additional_chat_templates/rag.jinja": b"{{ x }}"
    }
    for name, data in content.items():
        (source / name).write_bytes(data)
    for name in ("config.json", "model.safetensors", "README.md", "additional_chat_templates/notes.txt"):
        (source / name).write_bytes(b"not this")
    assert sorted(copy_side_files(source, out)) == sorted(content)
    copied = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert copied == content


def test_replaces_what_is_there_and_keeps_the_rest(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for directory in (source, out):
        directory.mkdir()
        (directory / "tokenizer.json").write_text(directory.name)
    (out / "chat_template.jinja").write_text("mine")
    assert copy_side_files(source / "tokenizer.json", out) == ["tokenizer.json"]  # a file in the directory names it too
    assert (out / "tokenizer.json").read_text() == "source" and (out / "chat_template.jinja").read_text() == "mine"
    assert copy_side_files(out, out) == ["tokenizer.json", "chat_template.jinja"]
    assert (out / "tokenizer.json").read_text() == "source"


def test_bad_places(tmp_path):
    with pytest.raises(CheckpointError, match="no such model directory"):
        copy_side_files(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made a directory"):
        copy_side_files(tmp_path, tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]
