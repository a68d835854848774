"""Frozen weights in 4 bits and out of memory: the same bits whatever the place, the slots and the direction; files that change."""

import gc
import itertools
import os
import pathlib
from typing import Any

import pytest
import torch
from golden import build, read, stream

from enginepost.checkpoint import Checkpoint, quantize
from enginepost.checkpoint.cache import quantized_copy
from enginepost.errors import EnginepostError
from enginepost.generate.decode import generate
from enginepost.kernels import nf4
from enginepost.kernels.lora import matrices
from enginepost.model import adapter_tensors, add_lora, load_model, save_model
from enginepost.model.blob import blob_layout
from enginepost.model.layout import block_bytes, layout
from enginepost.model.residency import WeightsError
from enginepost.model.spec import ModelSpec

CASES = read()[0]
KINDS = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "fp4": ("fp4", False)}
FIVE_LAYERS = {**CASES["llama"]["config"], "num_hidden_layers": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("ENGINEPOST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    save_model(build(FIVE_LAYERS), tmp_path / "model")
    return tmp_path / "model"


def one_step(model: Any, checkpointing: bool = True, dora: bool = False) -> dict[str, torch.Tensor]:
    """Hidden states and gradients of two micro-batches and an evaluation between them."""
    add_lora(model, r=3, alpha=8, dropout=0.2, use_dora=dora)
    model.checkpointing = checkpointing
    found = {}
    for i, ids in enumerate(([5, 1, 2, 9, 4, 77, 3], [8, 8, 2])):
        model.train()
        model.dropout_seed = i
        hidden = model.hidden(*stream(ids, ids[:3]))
        hidden.square().sum().backward()
        model.eval()
        with torch.no_grad():
            found[f"hidden {i}"] = model.hidden(*stream(ids))
    return found | {name: t.grad for name, t in adapter_tensors(model).items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_blobs_have_the_size_that_the_config_says(name, kind, tmp_path):
    config = CASES[name]["config"]
    save_model(build(config), tmp_path / "model")
    spec = ModelSpec.from_config(config)
    checkpoint = Checkpoint(tmp_path / "model" if kind is None else quantized_copy(tmp_path / "model", kind))
    for dtype in (torch.float32, torch.bfloat16):
        for i in range(len(spec.layers)):
            found = blob_layout(checkpoint, spec, i, dtype)
            assert found.nbytes == block_bytes(spec, i, quantize=kind, itemsize=dtype.itemsize)
            used = sorted((p.start, p.start + p.nbytes) for p in found.pieces)
            assert used[0][0] == 0 and used[-1][1] <= found.nbytes < used[-1][1] + 64
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))  # no two overlap


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_quantised_one_by_one(kind, directory):
    """The codes and scales in memory are those of each checkpoint matrix by itself; everything else stays in the model's dtype."""
    model = load_model(directory, torch.bfloat16, quantize=kind)
    original = Checkpoint(directory)
    quant_type, double = KINDS[kind]
    for entry in layout(model.spec):
        if not entry.linear:
            mine = dict(model.named_parameters())[entry.parameter][entry.start : entry.stop]
            assert mine.dtype == torch.bfloat16 and torch.equal(mine, original.tensor(entry.name).bfloat16())
            continue
        found = matrices(model.get_submodule(entry.parameter.removesuffix(".weight")).weight)
        at = 0
        mine = next(m for m in found if (at := at + m.shape[0]) > entry.start)
        wanted = nf4.quantize(original.tensor(entry.name), quant_type=quant_type, double=double)
        assert mine.shape == wanted.shape and mine.offset == wanted.offset and mine.nested == double
        assert torch.equal(mine.packed, wanted.packed) and torch.equal(mine.scales(), wanted.scales())


def test_computes_what_the_round_trip_computes(directory, tmp_path):
    """Against the model whose weights are the 4-bit numbers written out, in float64."""
    quantize(directory, tmp_path / "bnb", double=True)
    model = load_model(tmp_path / "bnb", torch.float32)
    plain = build(FIVE_LAYERS).double()
    for entry in layout(plain.spec):
        if entry.linear:
            weight = nf4.quantize(Checkpoint(directory).tensor(entry.name), double=True)
            dict(plain.named_parameters())[entry.parameter].data[entry.start : entry.stop] = nf4.dequantize(
                weight
            ).double()
    ids = stream([5, 1, 2, 9, 4, 77, 3])
    for m in (model, plain):
        add_lora(m, r=3, alpha=8)
        m.hidden(*ids).square().sum().backward()
    assert (model.hidden(*ids) - plain.hidden(*ids)).abs().max() < 1e-4 * plain.hidden(*ids).abs().max()
    for (name, mine), wanted in zip(adapter_tensors(model).items(), adapter_tensors(plain).values(), strict=True):
        assert (mine.grad - wanted.grad).abs().max() <= 1e-4 * wanted.grad.abs().max() + 1e-7, name


@pytest.mark.parametrize("kind", [None, "nf4-double"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_same_bits_wherever_the_weights_are(kind, checkpointing, directory):
    for dtype in (torch.float32, torch.bfloat16):
        wanted = one_step(load_model(directory, dtype, quantize=kind), checkpointing)
        for weights, slots in (("host", 2), ("disk", 1), ("disk", 2), ("disk", 3), ("disk", 9)):
            model = load_model(directory, dtype, quantize=kind, weights=weights, slots=slots)
            assert (model.stream is None) == (weights == "host")  # a CPU computes from host memory
            assert_same(one_step(model, checkpointing), wanted)


def test_same_bits_with_dora(directory):
    wanted = one_step(load_model(directory, torch.float32, quantize="nf4"), dora=True)
    assert_same(one_step(load_model(directory, torch.float32, quantize="nf4", weights="disk"), dora=True), wanted)


def test_same_answers_in_generation(directory):
    prompts = [[5, 1, 2], [9, 4, 77, 3]]
    answers = [
        generate(load_model(directory, torch.float32, quantize="nf4", weights=w), prompts, max_new_tokens=8)
        for w in ("resident", "disk")
    ]
    assert answers[0] == answers[1]


def test_only_the_slots_are_in_memory(directory):
    model = load_model(directory, torch.float32, weights="disk", slots=3)
    assert model.stream.nbytes == 3 * block_bytes(model.spec, 0, itemsize=4)
    one_step(model)
    assert 1 <= sum(block.qkv.weight is not None for block in model.blocks) <= 3


def test_blocks_are_asked_for_ahead_in_the_direction_of_travel(directory, monkeypatch):
    model = load_model(directory, torch.float32, weights="disk", slots=2)
    asked: list[int] = []
    fetch = model.stream._fetch
    monkeypatch.setattr(model.stream, "_fetch", lambda i, blob: (asked.append(i), fetch(i, blob))[1])
    one_step(model)
    # Forward, backward, evaluation, and again: one ahead, and nothing that a slot still holds (4 and 3 when backward begins).
    assert asked == [0, 1, 2, 3, 4, *[2, 1, 0], *[2, 3, 4, 0], *[1, 2, 3, 4], *[2, 1, 0], *[2, 3, 4, 0]]


def test_some_matrices_of_a_fused_layer_left_as_they_were(directory, tmp_path):
    quantize(directory, tmp_path / "bnb", skip=("k_proj", "model.layers.1"))
    model = load_model(tmp_path / "bnb", torch.bfloat16)
    kinds = [type(m).__name__ for m in matrices(model.blocks[0].qkv.weight)]
    assert kinds == ["NF4Weight", "Tensor", "NF4Weight"]
    assert torch.equal(matrices(model.blocks[0].qkv.weight)[1], Checkpoint(directory).tensor(
        "model.layers.0.self_attn.k_proj.weight").bfloat16())  # fmt: skip
    assert isinstance(model.blocks[1].qkv.weight, torch.Tensor) and model.blocks[1].qkv.weight.shape == (96, 48)
    streamed = load_model(tmp_path / "bnb", torch.bfloat16, weights="disk")
    assert_same(one_step(streamed), one_step(model))


def damage(directory: pathlib.Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = directory / "model.safetensors"
    if how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "rewritten":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))
    elif how == "unreadable":

        def fail(*_: Any) -> int:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr(os, "preadv", fail)
    else:
        monkeypatch.setattr(os, "preadv", lambda *_: 0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("truncated", r"model\.safetensors: was changed while it was in use: it has \d+ bytes and had \d+"),
        ("rewritten", r"model\.safetensors: was changed while it was in use: its content was written anew"),
        ("unreadable", r"model\.safetensors: cannot be read at byte \d+: Input/output error"),
        ("short", r"model\.safetensors: ends at byte \d+, \d+ bytes too early"),
    ],
)
@pytest.mark.parametrize("when", ["forward", "backward", "backward without checkpointing"])
def test_files_that_change_under_a_run(how, words, when, directory, monkeypatch):
    model = load_model(directory, torch.float32, weights="disk", slots=2)
    add_lora(model, r=2, alpha=4)
    model.checkpointing = "without" not in when
    model.hidden(*stream([1, 2, 3])).sum().backward()
    if "backward" in when:
        loss = model.hidden(*stream([1, 2, 3])).sum()
    damage(directory, how, monkeypatch)
    with pytest.raises(
        WeightsError, match=rf"of (block [0-4]|model.embed_tokens.weight) cannot be read any more: .*{words}.*resume"
    ):
        loss.backward() if "backward" in when else model.hidden(*stream([1, 2, 3]))


def test_a_file_that_is_deleted_or_replaced_stays_readable(directory):
    model = load_model(directory, torch.float32, weights="disk", slots=1)
    wanted = model.hidden(*stream([1, 2, 3]))
    (directory / "model.safetensors").unlink()
    assert torch.equal(model.hidden(*stream([1, 2, 3])), wanted)


def test_a_stream_ends_with_its_model(directory):
    before = set(os.listdir("/proc/self/fd"))
    for checkpointing in (True, False):
        model = load_model(directory, torch.float32, weights="disk")
        model.checkpointing = checkpointing
        model.hidden(*stream([1, 2, 3]))
        model.hidden(*stream([1, 2, 3])).sum().backward()
    del model
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_refusals(directory, tmp_path):
    model = load_model(directory, torch.float32, quantize="nf4")
    with pytest.raises(EnginepostError, match="in 4 bits or streamed"):
        save_model(model, tmp_path / "out")
    with pytest.raises(EnginepostError, match="quantize 'int4' is not known; use nf4, nf4-double, fp4"):
        load_model(directory, quantize="int4")
    with pytest.raises(EnginepostError, match="weights 'gpu' is not known; use resident, host, disk"):
        load_model(directory, weights="gpu")
    quantize(directory, tmp_path / "bnb")
    with pytest.raises(EnginepostError, match="is quantised already; leave quantize out"):
        load_model(tmp_path / "bnb", quantize="nf4")
