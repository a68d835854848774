"""The reader against files that the `safetensors` package writes, and against every way in which a file can lie."""

import gc
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from enginepost.checkpoint import Checkpoint, CheckpointError, save_tensors
from enginepost.checkpoint.format import MAX_HEADER

INDEX = "model.safetensors.index.json"


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def without(key: str) -> dict:
    return {name: value for name, value in entry().items() if name != key}


def file_with(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return path


def test_reads_what_safetensors_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.tensor(1.5),
        "d": torch.empty(0, 4, dtype=torch.int32),
        "e": torch.tensor([True, False]),
        "f": torch.randn(3, generator=generator).to(torch.float8_e5m2),
        "g": torch.arange(3, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "é"})
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names) == set(tensors) and len(checkpoint) == 7
    assert checkpoint.metadata == {"format": "pt", "note": "é"}
    assert checkpoint.files == [tmp_path / "model.safetensors"]
    for name, tensor in tensors.items():
        ours = checkpoint.tensor(name)
        assert name in checkpoint
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert ours.shape == tensor.shape and ours.dtype == tensor.dtype
        assert torch.equal(ours.float(), tensor.float())
        assert checkpoint.nbytes(name) == tensor.numel() * tensor.element_size()
    assert Checkpoint(tmp_path / "model.safetensors").names == checkpoint.names


def test_tensor_outlives_the_checkpoint(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.arange(1000)})
    view = Checkpoint(tmp_path / "x.safetensors").tensor("a")[10:]
    gc.collect()
    assert torch.equal(view, torch.arange(10, 1000))


def test_views_share_the_file_and_writes_stay_here(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(4), "b": torch.ones(4)})
    before = path.read_bytes()
    checkpoint = Checkpoint(path)
    a = checkpoint.tensor("a")
    assert a.data_ptr() == checkpoint.tensor("a").data_ptr()
    a.fill_(5)
    assert path.read_bytes() == before and checkpoint.tensor("b").eq(1).all()


def resident(checkpoint_path: Path) -> int:
    """Resident bytes of the mappings of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(checkpoint_path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_drop_gives_pages_back_and_the_view_stays_good(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(1_000_000), "b": torch.ones(3), "none": torch.empty(0)})
    checkpoint = Checkpoint(path)
    view = checkpoint.tensor("a")
    total = view.sum()
    assert resident(path) > 7_000_000
    checkpoint.drop("a")
    checkpoint.drop("none")
    assert resident(path) < 1_000_000
    assert view.sum() == total and checkpoint.tensor("b").sum() == 3


def test_file_larger_than_memory(tmp_path):
    """A sparse file of 64 GB opens and reads at both ends; mapped the usual way it would be refused (ENOMEM)."""
    size = 1 << 36
    text = json.dumps({"a": entry("F32", (size // 4,), (0, size))}).encode()
    header = raw(text + b" " * (-len(text) % 8))
    path = file_with(tmp_path, header)
    with open(path, "r+b") as file:
        file.truncate(len(header) + size)
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 3.0))
    tensor = Checkpoint(path).tensor("a")
    assert (tensor[0], tensor[-1]) == (0, 3)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_misaligned_data_is_copied(tmp_path, shift):
    values = torch.arange(5, dtype=torch.float32)
    header = {
        "pad": entry("U8", (shift,), (0, shift)),
        "a": entry("F32", (5,), (shift, shift + 20)),
        "s": entry("BF16", (), (shift + 20, shift + 22)),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = file_with(tmp_path, raw(text, bytes(shift) + values.numpy().tobytes() + b"\x80\x3f"))
    checkpoint = Checkpoint(path)
    assert torch.equal(checkpoint.tensor("a"), values) and checkpoint.tensor("a").data_ptr() % 4 == 0
    assert checkpoint.tensor("s").shape == () and float(checkpoint.tensor("s")) == 1.0


def test_edges_that_are_valid(tmp_path):
    assert Checkpoint(file_with(tmp_path, raw({}))).names == []
    assert Checkpoint(file_with(tmp_path, raw(b"{}      "))).names == []
    shapes = {"a": entry("F32", (0, 7), (0, 0)), "b": entry("F32", (), (0, 4)), "c": entry("F32", (3, 0), (4, 4))}
    checkpoint = Checkpoint(file_with(tmp_path, raw(shapes, bytes(4))))
    assert [tuple(checkpoint.tensor(name).shape) for name in "abc"] == [(0, 7), (), (3, 0)]
    assert Checkpoint(file_with(tmp_path, raw({"__metadata__": {}, "a": entry()}, bytes(8)))).names == ["a"]


HUGE = 10**30
BROKEN = {
    "empty file": (b"", "0 bytes is too short"),
    "short file": (b"\x08\0\0", "3 bytes is too short"),
    "oversized header": (raw({}, length=MAX_HEADER + 1), "header claims 100000001 bytes"),
    "header of -1 bytes": (b"\xff" * 8 + b"{}", "header claims 18446744073709551615 bytes"),
    "header of 0 bytes": (raw(b""), "header claims 0 bytes"),
    "header past the end": (raw({}, length=3), "claims 3 bytes but the file has only 2"),
    "not UTF-8": (raw(b'{"\xff":1}'), "not UTF-8"),
    "UTF-16": (raw('{"a":1}'.encode("utf-16")), "does not begin with"),
    "not JSON": (raw(b"{nonsense}"), "not valid JSON"),
    "text after it": (raw(b"{} {}"), "not valid JSON"),
    "list": (raw([1]), "does not begin with"),
    "leading space": (raw(b" {}"), "does not begin with"),
    "nesting bomb": (raw(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "number bomb": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "name twice": (raw(b'{"a":1,"b":2,"a":3}'), "key 'a' twice"),
    "key twice": (raw(b'{"a":{"dtype":"F32","dtype":"F16"}}'), "key 'dtype' twice"),
    "half a surrogate": (raw(b'{"\\ud800":{}}'), "not valid Unicode"),
    "metadata list": (raw({"__metadata__": []}), "__metadata__ must be"),
    "metadata number": (raw({"__metadata__": {"a": 1}}), "__metadata__ must be"),
    "metadata surrogate": (raw(b'{"__metadata__":{"a":"\\udc00"}}'), "not valid Unicode"),
    "entry is a string": (raw({"a": "F32"}), "expected an object"),
    "no dtype": (raw({"a": without("dtype")}, bytes(8)), "key 'dtype' is missing"),
    "no shape": (raw({"a": without("shape")}, bytes(8)), "key 'shape' is missing"),
    "no offsets": (raw({"a": without("data_offsets")}, bytes(8)), "key 'data_offsets' is missing"),
    "unknown dtype": (raw({"a": entry("F31")}, bytes(8)), "dtype 'F31' is unknown"),
    "dtype is a list": (raw({"a": entry([])}, bytes(8)), r"dtype \[\] is unknown"),
    "shape is a number": (raw({"a": {**entry(), "shape": 2}}, bytes(8)), "shape 2 is not a list"),
    "shape of floats": (raw({"a": entry(shape=[2.0])}, bytes(8)), r"shape \[2.0\] is not a list"),
    "shape of booleans": (raw({"a": entry(shape=[True, 2])}, bytes(8)), "is not a list of sizes"),
    "negative size": (raw({"a": entry(shape=[-1, -2])}, bytes(8)), "is not a list of sizes"),
    "huge size": (raw({"a": entry(shape=[HUGE])}, bytes(8)), "beyond what memory"),
    "huge empty": (raw({"a": entry(shape=[0, 2**62], offsets=(0, 0))}), "beyond what memory"),
    "65 dimensions": (raw({"a": entry(shape=[1] * 65, offsets=(0, 4))}, bytes(4)), "65 dimensions"),
    "shape too large": (raw({"a": entry(shape=[3])}, bytes(8)), r"span 8 bytes, but F32 \[3\] takes 12"),
    "dtype too wide": (raw({"a": entry("F64")}, bytes(8)), r"span 8 bytes, but F64 \[2\] takes 16"),
    "one offset": (raw({"a": entry(offsets=[8])}, bytes(8)), "is not .begin, end."),
    "offsets of strings": (raw({"a": entry(offsets=["0", "8"])}, bytes(8)), "is not .begin, end."),
    "negative offset": (raw({"a": entry(offsets=[-8, 0])}, bytes(8)), "is not .begin, end."),
    "reversed offsets": (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "span -8 bytes"),
    "huge offsets": (
        raw({"a": entry(offsets=[HUGE, HUGE + 8])}, bytes(8)),
        "bytes before tensor 'a' belong to no tensor",
    ),
    "out of range": (raw({"a": entry(offsets=[0, 8])}, bytes(7)), "ends at byte .* but the file has .* truncated"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "'a' and 'b' overlap by 4 bytes"),
    "same bytes": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlap by 8 bytes"),
    "empty inside another": (
        raw({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, bytes(8)),
        "overlap by 4 bytes",
    ),
    "gap at the start": (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "4 bytes before tensor 'a'"),
    "gap between": (raw({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "4 bytes before tensor 'b'"),
    "bytes after": (raw({"a": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "bytes of nothing": (raw({}, bytes(3)), "3 bytes after the last tensor"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "pickle": (b"PK\x03\x04" + bytes(range(1, 60)), "PyTorch pickle"),
    "gguf": (b"GGUF\x03\0\0\x01" + bytes(60), "GGUF"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_explained(tmp_path, case):
    content, message = BROKEN[case]
    path = file_with(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1500


def test_unknown_name_suggests_the_nearest(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"model.layers.0.weight": torch.zeros(1)})
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    for call in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype, checkpoint.drop, checkpoint.file):
        with pytest.raises(CheckpointError, match=r"'model.layer.0.weight'; the nearest are model.layers.0.weight"):
            call("model.layer.0.weight")


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        Checkpoint(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint(tmp_path / "pipe.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "neither model.safetensors nor"),
        (
            ["pytorch_model.bin", "config.json"],
            r"only PyTorch pickles \('pytorch_model.bin'\).*Convert them to safetensors",
        ),
        (["pytorch_model-00001-of-00002.bin"], "Convert them to safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter, not a model"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "the index is missing"),
        (["consolidated.safetensors"], "give the path of the file itself"),
        (["model.gguf"], "only GGUF"),
    ],
)
def test_directories_without_weights_are_explained(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def sharded(directory: Path, weight_map: dict | None = None) -> Path:
    directory.mkdir(exist_ok=True)
    save_tensors(directory / "s1.safetensors", {"a": torch.zeros(2), "b": torch.ones(3)})
    save_tensors(directory / "s2.safetensors", {"c": torch.full((2, 2), 2.0)})
    full = {"a": "s1.safetensors", "b": "s1.safetensors", "c": "s2.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map or full}))
    return directory


def test_sharded_checkpoint(tmp_path):
    checkpoint = Checkpoint(sharded(tmp_path))
    assert checkpoint.names == ["a", "b", "c"] and checkpoint.tensor("c").sum() == 8
    assert checkpoint.file("b").name == "s1.safetensors" and [path.name for path in checkpoint.files] == [
        "s1.safetensors",
        "s2.safetensors",
    ]


def test_shards_behind_links_as_in_the_hugging_face_cache(tmp_path):
    sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert Checkpoint(tmp_path / "snapshot").tensor("b").sum() == 3


S1, S2 = "s1.safetensors", "s2.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../blobs/s1.safetensors"}, "plain name"),
        ({"a": "/etc/x.safetensors"}, "plain name"),
        ({"a": ".."}, "plain name"),
        ({"a": "..\\s1.safetensors"}, "plain name"),
        ({"a": "s1.bin"}, "plain name"),
        ({"a": "s1\0.safetensors"}, "plain name"),
        ({"a": 3}, "plain name"),
        ({"a": None}, "plain name"),
        ({"a": "x" * 5000 + ".safetensors"}, "1 of them are missing"),
        ({"a": S1, "b": S1, "c": S2, "d": S2}, "puts 'd' here, but the file does not hold it"),
        ({"a": S1, "c": S2}, "holds 'b', which the index"),
        ({"a": S1, "b": S2, "c": S2}, "puts 'b' here|holds 'b'"),
        ({"a": S1, "b": S1, "c": S2, "z": "s9.safetensors"}, r"1 of them are missing \('s9.safetensors'\)"),
    ],
)
def test_indexes_that_lie(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(sharded(tmp_path, weight_map))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "weight_map"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": []}', "weight_map"),
        (b'{"weight_map": {"a": "s1.safetensors", "a": "s2.safetensors"}}', "key 'a' twice"),
    ],
)
def test_broken_indexes(tmp_path, text, message):
    (sharded(tmp_path) / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_single_file_and_index_together(tmp_path):
    sharded(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="holds both"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert Checkpoint(tmp_path).names == ["a"]  # an index of the single file is no contradiction


SEED_FILE = raw(
    {"__metadata__": {"format": "pt"}, "ab": entry("BF16", (2, 3), (0, 12)), "c": entry("F32", (), (12, 16))},
    bytes(range(16)),
)


@settings(
    max_examples=400,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SEED_FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(-12, 12),
)
def test_damage_is_an_error_or_a_valid_file(tmp_path, edits, cut):
    """Change a few bytes, cut or extend: our answer is a CheckpointError, or tensors equal to the reference reader's."""
    content = bytearray(SEED_FILE)
    for position, value in edits:
        content[position] = value
    content = content[:cut] if cut < 0 else content + bytes(cut)
    path = file_with(tmp_path, bytes(content))
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError:
        return
    ours = {name: checkpoint.tensor(name) for name in checkpoint.names}
    theirs = load(bytes(content))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].contiguous().view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
