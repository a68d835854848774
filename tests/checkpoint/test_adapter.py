"""PEFT adapters: read what PEFT wrote (tests/golden/make_adapters.py), write what PEFT reads, refuse what we would get wrong."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enginepost.checkpoint import (
    Adapter,
    Checkpoint,
    CheckpointError,
    LoraWeights,
    parse_adapter,
    read_adapter,
    save_tensors,
    write_adapter,
)
from enginepost.checkpoint.adapter import DEFAULTS, pattern_value

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "adapters"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("kind", "parts"), [("lora", 14), ("rslora", 14), ("dora", 6)])
def test_merged_weights_are_those_of_peft(kind, parts):
    adapter = read_adapter(GOLDEN / kind)
    base, merged = Checkpoint(GOLDEN / "base"), Checkpoint(GOLDEN / kind / "merged.safetensors")
    assert len(adapter.parts) == parts and {path + ".weight" for path in adapter.parts} == set(merged.names)
    for path, part in adapter.parts.items():
        weight = base.tensor(path + ".weight").double() + adapter.scaling(path) * part.B.double() @ part.A.double()
        if part.magnitude is not None:
            weight *= (part.magnitude.double() / weight.norm(dim=1))[:, None]
        torch.testing.assert_close(weight, merged.tensor(path + ".weight").double(), rtol=1e-5, atol=1e-6)


def test_patterns_decide_rank_and_alpha():
    parts = read_adapter(GOLDEN / "rslora").parts
    expected = {  # r from rank_pattern, alpha from alpha_pattern; "proj" matches no whole name
        "model.layers.0.self_attn.q_proj": (2, 8),
        "model.layers.0.self_attn.k_proj": (4, 3),
        "model.layers.1.self_attn.k_proj": (4, 8),
        "model.layers.0.mlp.gate_proj": (4, 8),
        "model.layers.1.mlp.gate_proj": (5, 8),
        "model.layers.1.mlp.down_proj": (4, 7),
    }
    assert {path: (parts[path].r, parts[path].alpha) for path in expected} == expected
    adapter = read_adapter(GOLDEN / "rslora")
    assert adapter.scaling("model.layers.0.self_attn.q_proj") == pytest.approx(8 / 2**0.5)


def test_the_first_pattern_wins():
    patterns = {"layers.1.q": 1, "q": 2, "(k|v)": 3, "^model.v": 4}
    found = {
        path: pattern_value(patterns, path, 0) for path in ("m.layers.1.q", "m.layers.11.q", "m.xq", "v", "model.v")
    }
    assert found == {"m.layers.1.q": 1, "m.layers.11.q": 2, "m.xq": 0, "v": 3, "model.v": 3}


def test_whole_tensors_are_not_forgotten():
    with pytest.raises(
        CheckpointError, match=r"replaces whole tensors of the model \(lm_head.weight, .* and 10 more\)"
    ):
        read_adapter(GOLDEN / "saved")
    adapter = read_adapter(GOLDEN / "saved", full_tensors=True)
    merged = Checkpoint(GOLDEN / "saved" / "merged.safetensors")
    assert set(adapter.full) | {path + ".weight" for path in adapter.parts} == set(merged.names)
    assert all(torch.equal(tensor, merged.tensor(name)) for name, tensor in adapter.full.items())


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "saved"])
def test_written_again_it_is_the_same(tmp_path, kind):
    write_adapter(tmp_path, read_adapter(GOLDEN / kind, full_tensors=True))
    ours, theirs = (Checkpoint(d / "adapter_model.safetensors") for d in (tmp_path, GOLDEN / kind))
    unwrap = {name.replace(".base_layer.", "."): name for name in theirs.names}
    assert set(ours.names) == set(unwrap)
    assert all(torch.equal(ours.tensor(name), theirs.tensor(unwrap[name])) for name in ours.names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == json.loads((GOLDEN / kind / "adapter_config.json").read_text())
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def small_adapter(**config) -> Adapter:
    generator = torch.Generator().manual_seed(3)

    def part(outputs: int, inputs: int, r: int = 2, alpha: float = 4) -> LoraWeights:
        A, B = torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)
        return LoraWeights(
            A, B, torch.rand(outputs, generator=generator) + 1 if config.get("use_dora") else None, r, alpha
        )

    parts = {"model.layers.0.self_attn.q_proj": part(16, 16), "model.layers.1.mlp.down_proj": part(16, 20, 3, 5)}
    patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}}
    return Adapter({"r": 2, "lora_alpha": 4, **patterns, **config}, parts)


def test_written_configuration_is_complete(tmp_path):
    write_adapter(tmp_path / "new", small_adapter(use_dora=True, base_model_name_or_path="base"))
    text = (tmp_path / "new" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM" and config["bias"] == "none"
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["inference_mode"] is True
    assert list(config) == sorted(config) and text.startswith('{\n  "alpha_pattern"')
    names = Checkpoint(tmp_path / "new" / "adapter_model.safetensors").names
    assert f"{Q}.lora_magnitude_vector" in names and f"{Q}.lora_A.weight" in names
    again = read_adapter(tmp_path / "new")
    assert again.parts["model.layers.1.mlp.down_proj"].r == 3


def test_alphas_are_written_as_integers(tmp_path):
    adapter = small_adapter(lora_alpha=4.0, alpha_pattern={"down_proj": 5.0})
    write_adapter(tmp_path, adapter)
    text = (tmp_path / "adapter_config.json").read_text()
    assert '"lora_alpha": 4,' in text and '"down_proj": 5\n' in text


def test_written_rank_must_be_the_configured_one(tmp_path):
    adapter = small_adapter()
    adapter.config["alpha_pattern"] = {}
    with pytest.raises(
        CheckpointError, match=r"down_proj has r = 3, alpha = 5, and its configuration says r = 3, alpha = 4"
    ):
        write_adapter(tmp_path, adapter)
    assert os.listdir(tmp_path) == []


CHECK = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base, adapter, fused = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
left = set(load_file(adapter + "/adapter_model.safetensors")) - {
    name.replace(".default", "").removesuffix(".weight") if "magnitude" in name else name.replace(".default", "")
    for name in model.state_dict()
}
ids = torch.arange(20)[None]
with torch.no_grad():
    ours = AutoModelForCausalLM.from_pretrained(fused).eval()(ids).logits
    theirs, plain = model(ids).logits, AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
print(json.dumps({"left": sorted(left), "error": (ours - theirs).abs().max().item(), "change": (plain - theirs).abs().max().item()}))
"""


@pytest.mark.skipif(not (PEERS.parents[1] / "installed").exists(), reason="needs `make peers`")
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_peft_loads_what_we_write(tmp_path, options):
    """PEFT's logits with our adapter on the base are those of the model that we fuse."""
    from enginepost.checkpoint import fuse

    write_adapter(tmp_path / "adapter", small_adapter(**options))
    fuse(GOLDEN / "base", tmp_path / "adapter", tmp_path / "fused")
    command = [PEERS, "-c", CHECK, GOLDEN / "base", tmp_path / "adapter", tmp_path / "fused"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["left"] == []
    assert answer["change"] > 0.1 and answer["error"] < 1e-4 * answer["change"]


def damaged(tmp_path: Path, config: dict | None = None, tensors: dict | None = None, drop: str | None = None) -> Path:
    """A copy of the golden LoRA with some of its configuration and tensors changed."""
    shutil.copytree(GOLDEN / "lora", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    checkpoint = Checkpoint(GOLDEN / "lora" / "adapter_model.safetensors")
    content = {name: checkpoint.tensor(name) for name in checkpoint.names if name != drop} | (tensors or {})
    save_tensors(tmp_path / "adapter" / "adapter_model.safetensors", content)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens = \[1\] is not supported"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"x": 1}}, "something_new"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base weights",
        ),
        ({"init_lora_weights": []}, "init_lora_weights"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0"),
        ({"r": "3"}, "r is '3'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"rank_pattern": {"q": "x"}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: rank_pattern gives it the rank 0"),
        ({"rank_pattern": {"q_proj": 2.5}}, "q_proj: rank_pattern gives it the rank 2.5"),
        ({"r": 10**400}, "r is 1000"),
        ({"alpha_pattern": {"(": 1}}, "is not a regular expression"),
        ({"r": 4}, r"lora_A is \[3, 20\] and lora_B is \[16, 3\]; with the r = 4"),
        ({"rank_pattern": {"q_proj": 2}}, r"q_proj: lora_A is \[3, 16\] .* with the r = 2"),
        ({"use_dora": True}, "has no lora_magnitude_vector and adapter_config.json says use_dora = True"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        read_adapter(damaged(tmp_path, config))


def test_initialisations_that_leave_the_base_alone(tmp_path):
    for number, value in enumerate((False, "gaussian", "eva", "orthogonal")):
        assert read_adapter(damaged(tmp_path / str(number), {"init_lora_weights": value})).parts


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(3, 16)},
            "does not begin with 'base_model.model.'",
        ),
        ({f"{Q}.lora_B.bias": torch.zeros(16)}, "lora_B.bias is of a kind that is not supported"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 9)}, "lora_embedding_A is of a kind"),
        (
            {"base_model.model.x.experts.base_layer.lora_A.weight": torch.zeros(3, 9)},
            "base_layer.lora_A.weight is of a kind",
        ),
        (
            {"base_model.model.x.token_adapter.trainable_tokens_delta": torch.zeros(3, 9)},
            "trainable_tokens_delta is of a kind",
        ),
        ({f"{Q}.lora_magnitude_vector": torch.ones(16)}, "has a lora_magnitude_vector and .* use_dora = False"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 16, dtype=torch.int8)}, "is torch.int8"),
        ({f"{Q}.lora_A.weight": torch.zeros(3, 16, 1)}, r"lora_A is \[3, 16, 1\]"),
        ({f"{Q}.lora_B.weight": torch.zeros(16, 5)}, r"lora_B is \[16, 5\]"),
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "replaces whole tensors"),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        read_adapter(damaged(tmp_path, tensors=tensors))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", "(", "x"]) | st.text(max_size=4), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from([*DEFAULTS, "new_option"]), JSON, min_size=1, max_size=3))
def test_any_configuration_is_read_or_refused(changes):
    config = json.loads((GOLDEN / "lora" / "adapter_config.json").read_text()) | changes
    checkpoint = Checkpoint(GOLDEN / "lora" / "adapter_model.safetensors")
    try:
        adapter = parse_adapter(config, {name: checkpoint.tensor(name) for name in checkpoint.names}, "here")
    except CheckpointError:
        return
    assert all(math.isfinite(adapter.scaling(path)) and part.r == 3 for path, part in adapter.parts.items())


@pytest.mark.parametrize("kind", ["A", "B"])
def test_half_a_pair(tmp_path, kind):
    with pytest.raises(CheckpointError, match=rf"layers.0.self_attn.q_proj: lora_{kind} is missing"):
        read_adapter(damaged(tmp_path, drop=f"{Q}.lora_{kind}.weight"))


def test_dora_magnitude_of_the_wrong_size(tmp_path):
    adapter = small_adapter(use_dora=True)
    path, part = next(iter(adapter.parts.items()))
    adapter.parts[path] = part._replace(magnitude=torch.ones(3))
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector is \[3\]; expected \[16\]"):
        write_adapter(tmp_path, adapter)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config.json: cannot be read"):
        read_adapter(tmp_path / "nothing")
    shutil.copytree(GOLDEN / "lora", tmp_path / "run" / "reward")
    with pytest.raises(CheckpointError, match="these directories in it are adapters: reward"):
        read_adapter(tmp_path / "run")
    directory = tmp_path / "run" / "reward"
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_adapter(directory)
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no such file; an adapter directory holds"):
        read_adapter(directory)
    save_tensors(directory / "adapter_model.safetensors", {})
    with pytest.raises(CheckpointError, match="holds no adapter weights"):
        read_adapter(directory)
    for text, message in ((b"[]", "JSON object"), (b"{", "not valid JSON"), (b'{"r":1,"r":2}', "twice")):
        (directory / "adapter_config.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(directory)
