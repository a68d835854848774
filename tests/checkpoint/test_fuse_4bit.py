"""Fusing over 4-bit weights: both honest bases, against the arithmetic in float64, and what is said about them."""

import json

import pytest
import torch

from enginepost.checkpoint import Checkpoint, CheckpointError, fuse, quantize, read_adapter
from enginepost.kernels import nf4
from enginepost.model import adapter_tensors, add_lora, create_model, load_model, save_adapter, save_model

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINEPOST_CACHE", str(tmp_path / "cache"))


def adapted(directory, out, kind, dora=False):
    model = load_model(directory, torch.bfloat16, quantize=kind)
    add_lora(model, r=4, alpha=8, use_dora=dora)
    with torch.no_grad():
        for i, tensor in enumerate(adapter_tensors(model).values()):
            if tensor.ndim == 2:
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)) / 10)
    save_adapter(model, out)


def expected(directory, adapter_dir, kind):
    """{name: float64 weights} with the update, from the round trip of the original where a kind is given."""
    base, adapter = Checkpoint(directory), read_adapter(adapter_dir)
    found = {}
    for path, part in adapter.parts.items():
        weight = base.tensor(f"{path}.weight")
        if kind is not None:
            quant_type, double = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "fp4": ("fp4", False)}[kind]
            weight = nf4.reference_dequantize(nf4.quantize(weight, quant_type=quant_type, double=double), torch.float32)
        weight = weight.double() + 2.0 * part.B.double() @ part.A.double()
        if part.magnitude is not None:
            weight *= (part.magnitude.double() / weight.norm(dim=1))[:, None]
        found[f"{path}.weight"] = weight
    return found


@pytest.fixture
def directory(tmp_path):
    save_model(create_model(CONFIG, torch.bfloat16, seed=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", ["original", "nf4", "nf4-double", "fp4"])
def test_either_base(base, dora, directory, tmp_path):
    adapted(directory, tmp_path / "adapter", "nf4", dora)
    report = fuse(directory, tmp_path / "adapter", tmp_path / "out", base=base)
    assert (report.base, report.trained_over, report.fused) == (base, "nf4", 14)
    out, original = Checkpoint(tmp_path / "out"), Checkpoint(directory)
    wanted = expected(directory, tmp_path / "adapter", None if base == "original" else base)
    for name in original.names:
        assert out.dtype(name) == torch.bfloat16
        if name in wanted:  # computed in float32, rounded once
            error = (out.tensor(name).double() - wanted[name]).abs()
            assert (error <= 2**-8 * wanted[name].abs() + 1e-6).all(), name
        else:
            assert torch.equal(out.tensor(name), original.tensor(name))
    load_model(tmp_path / "out")


def test_a_model_in_4_bits_gives_its_own_weights(directory, tmp_path):
    """Fused into the 4-bit checkpoint = fused into the round trip of what it was made from, to the bit; 16 bits come out."""
    quantize(directory, tmp_path / "bnb", double=True)
    adapted(directory, tmp_path / "adapter", "nf4-double")
    report = fuse(tmp_path / "bnb", tmp_path / "adapter", tmp_path / "a")
    assert report.base == "4bit" and report.trained_over == "nf4-double"
    fuse(directory, tmp_path / "adapter", tmp_path / "b", base="nf4-double")
    a, b = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b")
    assert a.names and set(a.names) == set(b.names)
    assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.names)
    assert "quantization_config" not in json.loads((tmp_path / "a/config.json").read_text())
    with pytest.raises(CheckpointError, match="is in 4 bits, so its 4-bit weights are the only base"):
        fuse(tmp_path / "bnb", tmp_path / "adapter", tmp_path / "c", base="original")
    with pytest.raises(CheckpointError, match="base 'int8' is not known; use original, nf4, nf4-double, fp4"):
        fuse(directory, tmp_path / "adapter", tmp_path / "c", base="int8")
    assert not (tmp_path / "c").exists()


def test_an_adapter_over_16_bits_says_nothing(directory, tmp_path):
    adapted(directory, tmp_path / "adapter", None)
    report = fuse(directory, tmp_path / "adapter", tmp_path / "out")
    assert report.base == "original" and report.trained_over is None
