"""LoRA: PEFT's logits, names and matching; saving and loading; gradients; what is drawn."""

import json

import pytest
import torch
from golden import GOLDEN, build, read, seeded, stream
from safetensors.torch import load_file

from enginepost.errors import EnginepostError
from enginepost.model import (
    adapter_off,
    adapter_tensors,
    add_lora,
    create_model,
    load_adapter,
    save_adapter,
    save_model,
)
from enginepost.model.layout import linear_modules
from enginepost.model.lora import updates

MODELS, PLACES, BASE_LOGITS = read()
CASES = json.loads((GOLDEN / "model_adapters.json").read_text())["cases"]
LOGITS = load_file(GOLDEN / "model_adapters.safetensors")
LLAMA = MODELS["llama"]["config"]


def adapted(name: str):
    """The model of a golden case with its adapter, whose weights are seeded."""
    case = CASES[name]
    settings = dict(case["settings"])
    model = build(MODELS[case["model"]]["config"])
    add_lora(model, alpha=settings.pop("lora_alpha"), **settings)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            if "magnitude" in key:
                tensor.mul_(1 + 0.2 * seeded(key, tensor.shape))
            else:
                tensor.copy_(0.5 * seeded(key, tensor.shape))
    return model, MODELS[case["model"]]["ids"]


@torch.no_grad()
def logits_of(model, ids):
    return model.logits(model.hidden(*stream(ids)))


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_peft(name):
    model, _ = adapted(name)
    assert {k: list(t.shape) for k, t in adapter_tensors(model).items()} == CASES[name]["shapes"]


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_with_peft(name):
    model, ids = adapted(name)
    wanted = LOGITS[name]
    assert (logits_of(model, ids)[PLACES] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    with adapter_off(model):
        base = BASE_LOGITS[CASES[name]["model"]]
        assert (logits_of(model, ids)[PLACES] - base).abs().max() <= 1e-4 * base.abs().max()
    assert torch.equal(logits_of(model, ids)[PLACES], logits_of(model, ids)[PLACES])
    assert (logits_of(model, ids)[PLACES] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_few_rows_agree_with_many(name):
    model, ids = adapted(name)
    assert (logits_of(model, ids[:9]) - logits_of(model, ids)[:9]).abs().max() <= 1e-5 * 10


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(name, tmp_path):
    model, ids = adapted(name)
    save_adapter(model, tmp_path / "adapter", base_model="some/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base" and config["peft_type"] == "LORA"
    other = build(MODELS[CASES[name]["model"]]["config"])
    load_adapter(other, tmp_path / "adapter")
    for (key, mine), (theirs, tensor) in zip(
        adapter_tensors(model).items(), adapter_tensors(other).items(), strict=True
    ):
        assert key == theirs and torch.equal(mine, tensor) and tensor.requires_grad
    assert torch.equal(logits_of(model, ids), logits_of(other, ids))
    assert other.lora_settings.r == model.lora_settings.r
    assert other.lora_settings.rank_pattern == model.lora_settings.rank_pattern
    save_adapter(other, tmp_path / "again", base_model="some/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


def test_starts_as_the_base_and_only_the_adapter_trains():
    for dora in (False, True):
        model = build(LLAMA)
        before = logits_of(model, MODELS["llama"]["ids"])
        add_lora(model, r=4, alpha=8, use_dora=dora)
        assert (logits_of(model, MODELS["llama"]["ids"]) - before).abs().max() < 1e-5
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert trained == {id(t) for t in adapter_tensors(model).values()}
        assert all(t.dtype == torch.float32 for t in adapter_tensors(model).values())


def test_drawn_as_nn_linear_draws():
    model, twin, other = (create_model(LLAMA) for _ in range(3))
    for m, seed in ((model, 5), (twin, 5), (other, 6)):
        add_lora(m, r=8, alpha=8, seed=seed)
    for path, update in updates(model).items():
        bound = update.A.shape[1] ** -0.5
        assert 0.9 * bound < update.A.abs().max() <= bound
        assert float(update.A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not update.B.any()
        assert torch.equal(update.A, updates(twin)[path].A) and not torch.equal(update.A, updates(other)[path].A)


def test_bfloat16_base_keeps_float32_adapter(tmp_path):
    model = create_model(LLAMA, dtype=torch.bfloat16)
    save_model(model, tmp_path)
    add_lora(model, r=4, alpha=8)
    model.logits(model.hidden(*stream([1, 2, 3]))).sum().backward()
    assert all(t.grad.dtype == torch.float32 for n, t in adapter_tensors(model).items() if "lora_B" in n)


@pytest.mark.parametrize("name", ["all_linear", "dora", "fused"])
def test_gradients_against_finite_differences(name):
    model, ids = adapted(name)
    model.double()
    found = updates(model)
    for linear in [m for m in model.modules() if hasattr(m, "parts") and m.parts]:
        assert all(p.A.dtype == torch.float64 for p in linear.parts)  # the parts are the parameters themselves
    weights = torch.linspace(-1, 1, 48, dtype=torch.float64)
    loss = lambda: (model.hidden(*stream(ids[:9], ids[3:5])) @ weights).sum()  # noqa: E731
    loss().backward()
    for update in list(found.values())[::5]:
        for parameter in (update.A, update.B, update.magnitude):
            if parameter is None:
                continue
            direction = torch.randn_like(parameter)
            with torch.no_grad():
                step = 1e-6
                parameter.add_(direction, alpha=step)
                above = loss()
                parameter.add_(direction, alpha=-2 * step)
                below = loss()
                parameter.add_(direction, alpha=step)
            slope = ((above - below) / (2 * step)).item()
            # DoRA's rule takes the norm as constant, so A and B do not follow the function itself
            if update.magnitude is None or parameter is update.magnitude:
                assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "w_proj"], "'w_proj' is no linear layer of a llama model; .*q_proj"),
        (["lm_head"], "'lm_head' is no linear layer"),
        ("nothing", "matches no module; .*'model.layers.0.self_attn.q_proj'"),
        ("(", "not a valid regular expression"),
    ],
)
def test_target_errors(targets, words):
    with pytest.raises(EnginepostError, match=words):
        add_lora(create_model(LLAMA), r=4, alpha=8, target_modules=targets)


def test_targets_by_path():
    model = create_model(LLAMA)
    add_lora(model, r=2, alpha=2, target_modules=["layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"])
    assert list(updates(model)) == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"]
    assert len(linear_modules(model.spec)) == 14


def test_other_errors(tmp_path):
    model = create_model(LLAMA)
    with pytest.raises(EnginepostError, match="no LoRA adapter to save"):
        save_adapter(model, tmp_path)
    add_lora(model, r=2, alpha=2)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(EnginepostError, match="already"):
        add_lora(model, r=2, alpha=2)
    with pytest.raises(EnginepostError, match="fuse"):
        save_model(model, tmp_path / "b")
    with pytest.raises(EnginepostError, match=r"q_proj has lora_B \[48, 2\].*another model"):
        load_adapter(create_model({**LLAMA, "num_attention_heads": 2, "head_dim": 16}), tmp_path / "a")
    with pytest.raises(EnginepostError, match="no such linear layer"):
        load_adapter(create_model({**LLAMA, "num_hidden_layers": 1}), tmp_path / "a")
    with pytest.raises(EnginepostError, match="no such linear layer"):
        load_adapter(create_model(MODELS["phi3"]["config"]), tmp_path / "a")
    with pytest.raises(EnginepostError, match="at least 1, got 0"):
        add_lora(create_model(LLAMA), r=0, alpha=2)
