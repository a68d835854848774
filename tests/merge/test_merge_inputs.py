"""Recipes with `modules`, and inputs in 4 bits."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from enginepost.checkpoint import dequantize, quantize, read_quantized
from enginepost.checkpoint.reader import Checkpoint
from enginepost.kernels import nf4
from enginepost.merge import MergeError, merge
from enginepost.model import load_model, save_model

CONFIG = {
    "architectures": ["SeeingForConditionalGeneration"], "model_type": "seeing", "torch_dtype": "float32",
    "text_config": {"num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 20}, "vision_config": {"num_hidden_layers": 2},
}  # fmt: skip
SHAPES = {
    "language_model.embed_tokens.weight": (20, 8), "language_model.norm.weight": (8,), "vision.patch.weight": (6, 4),
    **{f"language_model.layers.{i}.mlp.weight": (8, 8) for i in range(3)},
    **{f"vision.blocks.{i}.mlp.weight": (6, 6) for i in range(2)},
}  # fmt: skip


@pytest.fixture
def seeing(tmp_path: pathlib.Path) -> dict[str, dict[str, torch.Tensor]]:
    """Two models of a language and a vision part."""
    made = {}
    for seed, name in enumerate(("a", "b")):
        g = torch.Generator().manual_seed(seed)
        made[name] = {n: torch.randn(shape, generator=g) for n, shape in SHAPES.items()}
        (tmp_path / name).mkdir()
        save_file(made[name], tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    return made


def write(tmp_path: pathlib.Path, vision: str = "vision", more: str = "") -> pathlib.Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""modules:
  language_model:
    slices:
      - sources:
          - {{model: {tmp_path}/a, layer_range: [0, 1], parameters: {{weight: 0.25}}}}
          - {{model: {tmp_path}/b, layer_range: [1, 2], parameters: {{weight: 0.75}}}}
      - sources:
          - {{model: {tmp_path}/a, layer_range: [1, 3]}}
          - {{model: {tmp_path}/b, layer_range: [1, 3]}}
        parameters: {{weight: [0.0, 1.0]}}
    parameters: {{weight: 0.5}}
  {vision}:
    models:
      - {{model: {tmp_path}/a, parameters: {{weight: 2.0}}}}
      - {{model: {tmp_path}/b, parameters: {{weight: -1.0}}}}
{more}merge_method: linear
parameters: {{normalize: false}}
""")
    return path


def test_modules_are_merged_each_in_its_own_way(
    seeing: dict[str, dict[str, torch.Tensor]], tmp_path: pathlib.Path
) -> None:
    merge(write(tmp_path), tmp_path / "out")
    got, a, b = load_file(tmp_path / "out" / "model.safetensors"), seeing["a"], seeing["b"]
    assert set(got) == set(SHAPES)
    for name in got:
        if name.startswith("vision"):
            wanted = 2 * a[name] - b[name]
        elif ".layers.0." in name:  # layer 0 of a with layer 1 of b, by the weights of the sources
            wanted = 0.25 * a[name] + 0.75 * b[name.replace("layers.0", "layers.1")]
        elif ".layers." in name:  # the slice's gradient
            wanted = int(name.split(".")[2] == "2") * (a[name] + b[name])
        elif "embed" in name:  # before the layers: the first slice's sources
            wanted = 0.25 * a[name] + 0.75 * b[name]
        else:  # behind them: the last slice's parameters, at the beginning of a gradient
            wanted = torch.zeros(8)
        torch.testing.assert_close(got[name], wanted, rtol=1e-6, atol=1e-6, msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3 and config["vision_config"]["num_hidden_layers"] == 2


def test_modules_that_do_not_exist(seeing: dict[str, dict[str, torch.Tensor]], tmp_path: pathlib.Path) -> None:
    with pytest.raises(MergeError, match="no module 'hearing'"):
        merge(write(tmp_path, vision="hearing"), tmp_path / "out")


@pytest.mark.parametrize("double", [False, True])
def test_4_bit_inputs_on_request(tiny_model_dir: pathlib.Path, tmp_path: pathlib.Path, double: bool) -> None:
    """Refused without the option; with it, the merge of the dequantised models, and no copy is left behind."""
    model = load_model(tiny_model_dir, dtype=torch.float32)
    save_model(model, tmp_path / "plain", source=tiny_model_dir)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    save_model(model, tmp_path / "whole", source=tiny_model_dir)
    quantize(tmp_path / "whole", tmp_path / "small", double=double)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"models:\n  - {{model: {tmp_path}/plain, parameters: {{weight: 0.5}}}}\n"
        f"  - {{model: {tmp_path}/small, parameters: {{weight: 0.5}}}}\nmerge_method: linear\n"
    )
    with pytest.raises(MergeError, match=r"is quantised.*--dequantize"):
        merge(recipe, tmp_path / "out")
    [report] = merge(recipe, tmp_path / "out", dequantize=True)
    assert any("was dequantised" in note for note in report.notes)
    got, plain = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "plain")
    coded = Checkpoint(tmp_path / "small")
    dequantize(tmp_path / "small", tmp_path / "numbers")
    numbers = Checkpoint(tmp_path / "numbers")
    assert set(numbers.names) == set(got.names) == set(plain.names)
    for name in plain.names:
        if "_proj" in name:
            value = nf4.dequantize(read_quantized(coded, name))
            assert torch.equal(numbers.tensor(name), value)
            # what transformers would have: the error of 4 bits, not more
            error = (value - Checkpoint(tmp_path / "whole").tensor(name)).norm() / value.norm()
            assert 0.01 < error < 0.2
        torch.testing.assert_close(
            got.tensor(name), 0.5 * plain.tensor(name) + 0.5 * numbers.tensor(name), rtol=0, atol=1e-6
        )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    load_model(tmp_path / "numbers")
