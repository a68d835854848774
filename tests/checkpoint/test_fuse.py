"""Fusing: the weights of PEFT's merge, one rounding, a complete directory, little memory, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enginepost.checkpoint import (
    Adapter,
    Checkpoint,
    CheckpointError,
    LoraWeights,
    Writer,
    fuse,
    save_tensors,
    write_adapter,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "adapters"


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "saved"])
def test_fused_model_is_the_one_that_peft_merges(tmp_path, kind):
    report = fuse(GOLDEN / "base", GOLDEN / kind, tmp_path / "out")
    base, merged = load_file(GOLDEN / "base" / "model.safetensors"), load_file(GOLDEN / kind / "merged.safetensors")
    fused = load_file(tmp_path / "out" / "model.safetensors")
    assert set(fused) == set(base) and report.tensors == len(base)
    for name, tensor in fused.items():
        if name in merged:
            torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tensor, base[name])
        else:
            assert torch.equal(tensor, base[name])
    assert report.fused + report.replaced == len(merged)
    assert (tmp_path / "out" / "config.json").read_bytes() == (GOLDEN / "base" / "config.json").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out"]


def make_base(directory: Path, dtype: torch.dtype, shards: bool = False, **config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (11, 8), "model.l.0.q_proj.weight": (9, 8), "model.l.0.q_proj.bias": (9,)}
    shapes |= {"model.l.1.q_proj.weight": (5, 8), "lm_head.weight": (11, 8), "scale": (), "none": (0, 8)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    with Writer(
        directory, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, shard_bytes=200 if shards else 1e9
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return tensors


def make_adapter(directory: Path, paths: dict[str, tuple[int, int]], dora: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for path, (outputs, inputs) in paths.items():
        A, B = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
        parts[path] = LoraWeights(A, B, torch.rand(outputs, generator=generator) + 1 if dora else None, 2, 6)
    adapter = Adapter({"r": 2, "lora_alpha": 6, "use_dora": dora, "base_model_name_or_path": "some/base"}, parts)
    write_adapter(directory, adapter)
    return adapter


BOTH = {"model.l.0.q_proj": (9, 8), "model.l.1.q_proj": (5, 8)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_rounded_once_in_any_blocks(tmp_path, monkeypatch, dtype, dora, block):
    """Against float64: half a unit in the last place of the dtype, which two roundings exceed, plus float32 noise."""
    monkeypatch.setattr(sys.modules["enginepost.checkpoint.fuse"], "BLOCK_BYTES", max(block, 4))
    base = make_base(tmp_path / "base", dtype)
    adapter = make_adapter(tmp_path / "adapter", BOTH, dora)
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    fused = Checkpoint(tmp_path / "out")
    for name, tensor in base.items():
        if name.removesuffix(".weight") not in adapter.parts:
            assert torch.equal(fused.tensor(name), tensor)
            continue
        part = adapter.parts[name.removesuffix(".weight")]
        exact = tensor.double() + 3 * part.B.double() @ part.A.double()
        if part.magnitude is not None:
            exact *= (part.magnitude.double() / exact.norm(dim=1))[:, None]
        error = (fused.tensor(name).double() - exact).abs()
        assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 2e-6).all()


def test_directory_is_complete_and_sharded_like_the_base(tmp_path):
    make_base(tmp_path / "base", torch.bfloat16, shards=True)
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    side = {"tokenizer.json": b"{ }\r\n", "tokenizer.model": bytes(range(256)), "chat_template.jinja": "é{{".encode()}
    side |= {"generation_config.json": b"{}", "additional_chat_templates/tool.jinja": b"x", "vocab.json": b"{}"}
    for name, content in side.items():
        (tmp_path / "base" / name).write_bytes(content)
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"no")
    make_adapter(tmp_path / "adapter", BOTH)
    calls: list[tuple[int, int, str]] = []
    (tmp_path / "out").mkdir()  # an empty directory is fine
    report = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=lambda *call: calls.append(call))
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in side.items())
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "base")
    assert len(theirs.files) > 1 and {n: ours.file(n).name for n in ours.names} == {
        n: theirs.file(n).name for n in theirs.names
    }
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((tmp_path / "base" / index).read_text())
    assert ours.metadata["format"] == "pt"
    assert [name for *_, name in calls] == theirs.names and calls[-1][0] == calls[-1][1] == report.nbytes
    again = fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "one", shard_bytes=1e9)
    assert (
        [path.name for path in Checkpoint(tmp_path / "one").files]
        == ["model.safetensors"]
        == [name for name in again.files if name.endswith(".safetensors")]
    )


@pytest.mark.parametrize("whole", [True, False])
def test_tokenizer_saved_with_the_adapter_wins(tmp_path, whole):
    make_base(tmp_path / "base", torch.float32)
    make_adapter(tmp_path / "adapter", BOTH)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / "base" / name).write_text("base")
    for name in ("tokenizer.json", "tokenizer_config.json") if whole else ("chat_template.jinja",):
        (tmp_path / "adapter" / name).write_text("adapter")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    del found["config.json"]
    if whole:  # the base's template does not belong to it
        expected = {"tokenizer.json": "adapter", "tokenizer_config.json": "adapter", "generation_config.json": "base"}
    else:
        expected = {"tokenizer.json": "base", "tokenizer_config.json": "base", "generation_config.json": "base"}
        expected["chat_template.jinja"] = "adapter"
    assert found == expected


def refused(tmp_path: Path, message: str, out: Path | None = None) -> None:
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        fuse(tmp_path / "base", tmp_path / "adapter", out or tmp_path / "out")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before  # nothing written, nothing left


def test_output_directories_that_are_refused(tmp_path):
    make_base(tmp_path / "base", torch.float32)
    make_adapter(tmp_path / "adapter", BOTH)
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    refused(tmp_path, "is an input", tmp_path / "base")
    refused(tmp_path, "is an input", tmp_path / "link")
    refused(tmp_path, "is an input", tmp_path / "base" / ".." / "adapter")
    refused(tmp_path, "not an empty directory", tmp_path / "full")
    refused(tmp_path, "not an empty directory", tmp_path / "full" / "x")
    refused(tmp_path, "does not exist; create it first", tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("paths", "config", "message"),
    [
        (
            BOTH | {"model.l.2.q_proj": (5, 8)},
            {},
            r"1 of 3 .* model.l.2.q_proj.weight \(the nearest are model.l.1.q_proj.weight",
        ),
        ({"nowhere": (5, 8)}, {}, "Is it the adapter's base model. It was trained on 'some/base'"),
        ({"model.l.0.q_proj": (9, 7)}, {}, r"q_proj.weight is \[9, 7\] in the adapter and \[9, 8\] in"),
        ({"model.l.0.q_proj": (8, 9)}, {}, r"is \[8, 9\] in the adapter and \[9, 8\]"),
        (BOTH, {"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantised \(bitsandbytes\)"),
        ({"lm_head": (11, 8)}, {"tie_word_embeddings": True}, "changes lm_head.weight, but .* ties embedding and head"),
        ({"lm_head": (11, 8)}, {"text_config": {"tie_word_embeddings": True}}, "ties embedding and head"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, paths, config, message):
    make_base(tmp_path / "base", torch.float32, **config)
    make_adapter(tmp_path / "adapter", paths)
    refused(tmp_path, message)


def test_head_of_an_untied_model_is_fused(tmp_path):
    base = make_base(tmp_path / "base", torch.float32, tie_word_embeddings=False)
    make_adapter(tmp_path / "adapter", {"lm_head": (11, 8)})
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not torch.equal(Checkpoint(tmp_path / "out").tensor("lm_head.weight"), base["lm_head.weight"])


def test_missing_head_means_tied(tmp_path):
    tensors = make_base(tmp_path / "base", torch.float32)
    del tensors["lm_head.weight"]
    save_tensors(tmp_path / "base" / "model.safetensors", tensors)
    make_adapter(tmp_path / "adapter", {"lm_head": (11, 8)})
    refused(tmp_path, "so it has no lm_head of its own")


def test_quantised_tensors_are_refused(tmp_path):
    tensors = make_base(tmp_path / "base", torch.float32)
    tensors["model.l.0.q_proj.weight"] = torch.zeros(36, 1, dtype=torch.uint8)
    save_tensors(tmp_path / "base" / "model.safetensors", tensors)
    make_adapter(tmp_path / "adapter", BOTH)
    refused(tmp_path, "q_proj.weight is torch.uint8, a quantised weight")


def test_base_without_config_or_weights(tmp_path):
    make_base(tmp_path / "base", torch.float32)
    make_adapter(tmp_path / "adapter", BOTH)
    (tmp_path / "base" / "config.json").write_text("[")
    refused(tmp_path, "config.json: the model configuration is not valid JSON")
    (tmp_path / "base" / "config.json").unlink()
    refused(tmp_path, "config.json: cannot be read")
    shutil.rmtree(tmp_path / "base")
    refused(tmp_path, "no such file or directory")


def test_failure_in_the_middle_leaves_nothing_and_killed_attempts_are_cleared(tmp_path):
    make_base(tmp_path / "base", torch.float32)
    make_adapter(tmp_path / "adapter", BOTH)
    before = sorted(os.listdir(tmp_path))

    def stop(*_: object) -> None:
        assert (tmp_path / ".out.partial").is_dir() and not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=stop)
    assert sorted(os.listdir(tmp_path)) == before
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "junk").write_text("left by a kill")
    fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"]) and not (tmp_path / "out" / "junk").exists()


MEASURE = """
import sys, threading, time
from enginepost.checkpoint import fuse
import torch
torch.set_num_threads(1)

def resident():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")]

fuse(*sys.argv[4:], sys.argv[3])  # a small one first: libraries, thread stacks
start, peak, running = resident(), [0, 0], True
def watch():
    while running:
        peak[:] = map(max, peak, resident())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
fuse(*sys.argv[1:3], sys.argv[3] + "-large")
running = False
thread.join()
print(*(p - s for p, s in zip(peak, start)))
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """200 MB of bfloat16 in four shards, the largest tensor 64 MB (128 MB in float32)."""
    shapes = {"model.embed_tokens.weight": (16000, 2000), "lm_head.weight": (16000, 2000)}
    shapes |= {f"model.l.{i}.q_proj.weight": (3000, 2000) for i in range(6)}
    (tmp_path / "base").mkdir()
    declared = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with Writer(tmp_path / "base", declared, shard_bytes=50e6) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.full(shape, 0.5, dtype=torch.bfloat16))
    (tmp_path / "base" / "config.json").write_text("{}")
    adapter = {f"model.l.{i}.q_proj": (3000, 2000) for i in range(6)} | {"lm_head": (16000, 2000)}
    make_adapter(tmp_path / "adapter", adapter, dora=True)
    make_base(tmp_path / "small", torch.bfloat16)
    make_adapter(tmp_path / "small-adapter", BOTH, dora=True)
    assert len(Checkpoint(tmp_path / "base").files) == 4
    arguments = [tmp_path / name for name in ("base", "adapter", "out", "small", "small-adapter")]
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    for directory in tmp_path.iterdir():  # pytest keeps the directories of several runs
        shutil.rmtree(directory)
    assert result.returncode == 0, result.stderr
    anonymous, mapped = (int(n) for n in result.stdout.split())
    print(f"fuse of 200 MB: peak growth {anonymous / 1e6:.0f} MB anonymous, {mapped / 1e6:.0f} MB mapped")
    assert 0 < anonymous < 48e6  # a few blocks; the largest tensor alone is 128 MB in float32
    assert mapped < 32e6  # pages are given back block by block
