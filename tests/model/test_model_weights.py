"""Weights: saving, loading, memory, and every way in which a checkpoint can be that of another model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from golden import build, read, stream

from enginepost.checkpoint import Checkpoint, Writer, save_tensors
from enginepost.errors import EnginepostError
from enginepost.model import create_model, load_model, save_model

CASES = read()[0]
LLAMA = CASES["llama"]["config"]


@pytest.mark.parametrize("name", CASES)
def test_saved_under_the_names_of_transformers_and_loaded(name, tmp_path):
    case = CASES[name]
    model = build(case["config"])
    save_model(model, tmp_path)
    assert {n: list(Checkpoint(tmp_path).shape(n)) for n in Checkpoint(tmp_path).names} == case["parameters"]
    loaded = load_model(tmp_path, dtype=torch.float32)
    for (key, mine), (theirs, tensor) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert key == theirs and torch.equal(mine, tensor)


def test_config_is_kept_as_it_came(tmp_path):
    config = {**CASES["gemma3"]["saved_config"], "transformers_version": "9.9", "dtype": "float16"}
    save_model(create_model(config), tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text()) == {**config, "dtype": "bfloat16"}
    assert Checkpoint(tmp_path).dtype("model.norm.weight") == torch.bfloat16
    save_model(create_model(LLAMA), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == {**LLAMA, "torch_dtype": "float32", "architectures": ["LlamaForCausalLM"]}


def test_side_files_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_bytes(b'{"x":   1}\r\n')
    save_model(create_model(LLAMA), tmp_path / "out", source=source)
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == b'{"x":   1}\r\n'


def test_sharded_half_precision_and_tied_copies(tmp_path):
    model = build(CASES["llama_tied_mha"]["config"])
    tensors = {n: t.half() for n, t in model.checkpoint_tensors().items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # old exporters store the tied head, and buffers
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    with Writer(tmp_path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, shard_bytes=20000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.embedding, model.embedding.half().bfloat16())
    assert torch.equal(loaded.blocks[1].qkv.weight, model.blocks[1].qkv.weight.half().bfloat16())


PEAK = """
import sys, torch
from enginepost.model import load_model
def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
model = load_model(sys.argv[1])
print((resident("VmHWM") - before) / sum(p.numel() * 2 for p in model.parameters()))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_loading_holds_one_copy(tmp_path):
    save_model(create_model({**LLAMA, "vocab_size": 60000, "hidden_size": 480}, dtype=torch.bfloat16), tmp_path)
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.7  # 120 MB: the model, and the largest tensor's pages


def test_created_by_seed():
    one, two, other = (create_model(CASES["gemma2"]["config"], seed=s) for s in (1, 1, 2))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == name.endswith("norm")
    assert float(one.blocks[0].qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not one.norm.any()  # Gemma's norms add one
    assert (
        create_model(LLAMA).norm.eq(1).all()
        and not create_model(CASES["llama_biases"]["config"]).blocks[0].qkv.bias.any()
    )


def damaged(tmp_path, change) -> None:
    model = create_model(LLAMA)
    tensors = {n: t.clone() for n, t in model.checkpoint_tensors().items()}
    change(tensors)
    save_tensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing 'model.norm.weight'"),
        (lambda t: t.pop("lm_head.weight"), "missing 'lm_head.weight'"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}), "unexpected .*q_norm"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(12)}), "unexpected .*layers.2"),
        (
            lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.ones(48, 48)}),
            r"k_proj.weight' has shape \[48, 48\], but config.json asks for \[24, 48\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}),
            "'model.norm.weight' has dtype int32; expected float32",
        ),
    ],
)
def test_tensors_of_another_model(tmp_path, change, words):
    with pytest.raises(EnginepostError, match=words):
        damaged(tmp_path, change)


def test_bad_directories(tmp_path):
    with pytest.raises(EnginepostError, match="nowhere is not a directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(EnginepostError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(EnginepostError, match=r"config\.json: not valid JSON: .*line 1"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(EnginepostError, match="expected an object, got list"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "hidden_act": "relu"}))
    with pytest.raises(EnginepostError, match=rf"{tmp_path}: config\.json: hidden_act 'relu'"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(EnginepostError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_ids_outside_the_vocabulary():
    model = create_model(LLAMA)
    for wrong in (128, -1, 10**9):
        with pytest.raises(EnginepostError, match=rf"token id {wrong} at position 4 .*0 to 127"):
            model.hidden(*stream([1, 2, 3], [4, wrong, 5]))
    assert model.hidden(*stream([])).shape == (0, 48)
