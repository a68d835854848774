"""The streaming writer and the atomic files under it: round trips with the `safetensors` package, and what failures leave."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from enginepost.checkpoint import Checkpoint, CheckpointError, Writer, atomic, save_tensors, write_bytes, write_json
from enginepost.checkpoint.format import DTYPES

SAMPLE = {
    "model.embed.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "layer.bf16": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "layer.f16": torch.randn(3, generator=torch.Generator().manual_seed(1)).to(torch.float16),
    "counts": torch.arange(-3, 4),
    "mask": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "f8": torch.arange(7, dtype=torch.float32).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
}


def declared(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [x.reshape(-1).view(torch.uint8) if x.numel() else torch.empty(0) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(*flat))


def write(directory: Path, tensors: dict[str, torch.Tensor], **options) -> None:
    with Writer(directory, declared(tensors), **options) as writer:
        for name in reversed(list(tensors)):  # any order
            writer.write(name, tensors[name])


def test_one_file_loads_with_safetensors(tmp_path):
    write(tmp_path, SAMPLE)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert set(loaded) == set(SAMPLE) and all(same(loaded[name], SAMPLE[name]) for name in SAMPLE)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_every_dtype_round_trips(tmp_path):
    tensors = {
        name: torch.arange(96, dtype=torch.uint8).view(dtype) for name, dtype in DTYPES.items() if name != "BOOL"
    }
    save_tensors(tmp_path / "all.safetensors", tensors)
    checkpoint = Checkpoint(tmp_path / "all.safetensors")
    assert all(same(checkpoint.tensor(name), tensors[name]) for name in tensors)


def test_shards_and_index_as_hugging_face_names_them(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)} | {"wide": torch.zeros(40)}
    write(tmp_path, tensors, shard_bytes=100)
    names = sorted(os.listdir(tmp_path))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 9 * 40}
    for file in names[:-1]:
        loaded = load_file(tmp_path / file)
        assert sorted(loaded) == sorted(name for name, f in index["weight_map"].items() if f == file)
        assert all(same(loaded[name], tensors[name]) for name in loaded)
    assert set(index["weight_map"]) == set(tensors)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint.names) == set(tensors)


def test_parts_in_any_order(tmp_path):
    whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    with Writer(tmp_path, {"w": (torch.float32, (6, 5)), "s": (torch.float32, ())}) as writer:
        writer.write("w", whole[4:], start=20)
        writer.write("s", torch.tensor([4.0]), start=0)
        writer.write("w", whole[:2].t().contiguous().t(), start=0)  # not contiguous
        writer.write("w", whole[2:4].reshape(-1), start=10)
        with pytest.raises(CheckpointError, match="already written"):
            writer.write("w", whole[:1], start=10)
    assert same(load_file(tmp_path / "model.safetensors")["w"], whole)


@pytest.mark.parametrize(
    ("name", "tensor", "start", "message"),
    [
        ("x", torch.zeros(2), None, r"'x' was not declared; the nearest|'x' was not declared; it holds 1"),
        ("w", torch.zeros(2, 3, dtype=torch.float16), None, "declared as torch.float32, and torch.float16"),
        ("w", torch.zeros(3, 2), None, r"declared with shape \[2, 3\], and \[3, 2\]"),
        ("w", torch.zeros(4), 3, "outside the shape"),
        ("w", torch.zeros(1), -1, "outside the shape"),
    ],
)
def test_wrong_writes_are_named(tmp_path, name, tensor, start, message):
    with pytest.raises(CheckpointError, match=message), Writer(tmp_path, {"w": (torch.float32, (2, 3))}) as writer:
        writer.write(name, tensor, start)
    assert os.listdir(tmp_path) == []


def test_close_wants_every_tensor(tmp_path):
    writer = Writer(tmp_path, {"a": (torch.float32, (2,)), "b": (torch.float32, (4,))})
    writer.write("a", torch.zeros(2))
    writer.write("b", torch.zeros(3), start=0)
    with pytest.raises(CheckpointError, match="1 of 2 declared tensors were not written in full, the first is 'b'"):
        writer.close()
    assert os.listdir(tmp_path) == []


def test_exception_leaves_the_old_checkpoint(tmp_path):
    write(tmp_path, {"a": torch.ones(2)})
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, {"a": (torch.float32, (2,))}) as writer:
        writer.write("a", torch.zeros(2))
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("old", "new"), [(100, 1e9), (1e9, 100), (100, 50), (100, 100)])
def test_replacing_leaves_only_the_new_checkpoint(tmp_path, old, new):
    (tmp_path / "model-notes.safetensors.txt").write_text("mine")
    write(tmp_path, {f"t{i}": torch.zeros(10) for i in range(6)}, shard_bytes=old)
    write(tmp_path, {f"t{i}": torch.ones(10) for i in range(6)}, shard_bytes=new)
    checkpoint = Checkpoint(tmp_path)
    assert all(checkpoint.tensor(name).eq(1).all() for name in checkpoint.names)
    weights = [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]
    assert sorted(weights) == sorted({path.name for path in checkpoint.files})
    assert (tmp_path / "model-notes.safetensors.txt").exists()


@pytest.mark.parametrize(("old", "new"), [(100, 1e9), (1e9, 100), (100, 50), (100, 100)])
def test_killed_between_renames_never_mixes(tmp_path, monkeypatch, old, new):
    """Stop after each rename or removal in turn: what is left reads as all old, all new, or is refused."""
    outcomes = set()
    for stop in range(12):
        directory = tmp_path / str(stop)
        write(directory, {f"t{i}": torch.zeros(10) for i in range(6)}, shard_bytes=old)
        steps = 0

        def killer(real, stop=stop):
            def call(*args, **kwargs):
                nonlocal steps
                if steps == stop:
                    raise KeyboardInterrupt
                steps += 1
                return real(*args, **kwargs)

            return call

        tensors = {f"t{i}": torch.ones(10) for i in range(6)}
        writer = Writer(directory, declared(tensors), shard_bytes=new)
        for name in tensors:
            writer.write(name, tensors[name])
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killer(os.replace))
            patch.setattr(Path, "unlink", killer(Path.unlink))
            try:
                writer.close()
            except KeyboardInterrupt:
                pass
        try:
            checkpoint = Checkpoint(directory)
            values = {float(v) for name in checkpoint.names for v in checkpoint.tensor(name)}
            assert len(values) == 1
            outcomes |= values
        except CheckpointError:
            outcomes.add("refused")
    assert 1.0 in outcomes


def test_stale_temporary_file_is_replaced(tmp_path):
    (tmp_path / ".model.safetensors.tmp").write_bytes(b"left by a killed run")
    write(tmp_path, {"a": torch.ones(2)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    first = Writer(tmp_path, {"a": (torch.float32, (2,))})
    first.write("a", torch.zeros(2))
    second = Writer(tmp_path, {"a": (torch.float32, (2,))})
    with pytest.raises(CheckpointError, match="another process"):
        first.close()
    second.write("a", torch.ones(2))
    second.close()
    assert Checkpoint(tmp_path).tensor("a").tolist() == [1, 1]


def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"not enough disk space: 41\d\d bytes are needed .* and 1000 are free"):
        Writer(tmp_path, {"a": (torch.float32, (1000,))})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_full_disk_in_the_middle(tmp_path, monkeypatch, call):
    write(tmp_path, {"a": torch.ones(1000)})
    before = (tmp_path / "model.safetensors").read_bytes()
    real = getattr(os, call)
    written = 0

    def full(*args):
        nonlocal written
        if call == "pwrite":
            written += len(args[1])
            if written < 500:
                return real(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match=r"model.safetensors: the disk is full: 4\d\d\d bytes are needed"):
        write(tmp_path, {"a": torch.zeros(1000)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_really_full_disk():
    """/dev/full answers ENOSPC to every write; the message is the same one."""
    file = atomic.AtomicFile.__new__(atomic.AtomicFile)
    file.path, file.size, file.temporary = Path("/tmp/weights"), 7, Path("/nonexistent/weights.tmp")
    file._file = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(CheckpointError, match="/tmp/weights: the disk is full: 7 bytes"):
        file.write_at(b"1234567", 0)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    write(tmp_path, SAMPLE)
    monkeypatch.undo()
    assert all(same(load_file(tmp_path / "model.safetensors")[name], SAMPLE[name]) for name in SAMPLE)


def test_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be made a directory"):
        Writer(tmp_path / "file", {"a": (torch.float32, (1,))})


def test_dtype_without_a_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"'q'.*complex128"):
        save_tensors(tmp_path / "x.safetensors", {"q": torch.zeros(2, dtype=torch.complex128)})


def test_layout_is_checked(tmp_path):
    tensors = declared({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="layout"):
        Writer(tmp_path, tensors, layout={"model.safetensors": ["a"]})
    with pytest.raises(CheckpointError, match="plain"):
        Writer(tmp_path, tensors, layout={"../model.safetensors": ["a", "b"]})


def test_missing_directory_and_small_files(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        write_bytes(tmp_path / "nowhere" / "x", b"1")
    write_bytes(tmp_path / "x", b"1")
    write_bytes(tmp_path / "x", b"22")
    assert (tmp_path / "x").read_bytes() == b"22"
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert sorted(os.listdir(tmp_path)) == ["x", "x.json"]
