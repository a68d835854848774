"""Adapters in a recipe, tokenizers that disagree, gradients, and the command line."""

import json
import pathlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import save, tensors
from typer.testing import CliRunner

from enginepost.checkpoint import Adapter, LoraWeights, fuse, write_adapter
from enginepost.cli import app
from enginepost.merge import MergeError, merge
from enginepost.merge.recipe import evaluate

Write = Callable[[str], pathlib.Path]


def test_a_model_with_an_adapter(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 40, generator=g), torch.randn(40, 4, generator=g)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "a",
    }
    path = "model.layers.1.self_attn.q_proj"
    write_adapter(tmp_path / "lora", Adapter(config, {path: LoraWeights(a, b, None, 4, 8.0)}))
    fuse(family / "a", tmp_path / "lora", tmp_path / "fused")
    recipe = "models: [{{model: {}}}, {{model: {}/b}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    merge(write(recipe.format(f"{family}/a+{tmp_path}/lora", family)), tmp_path / "one")
    merge(write(recipe.format(f"{tmp_path}/fused", family)), tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not torch.equal(one[path + ".weight"], load_file(family / "a" / "model.safetensors")[path + ".weight"])
    assert "lora" in (tmp_path / "one" / "README.md").read_text()
    assert not (tmp_path / "one" / "adapters").exists()


def test_tokenizers_that_disagree(write: Write, tmp_path: pathlib.Path) -> None:
    for name, words in (("a", ["x", "y"]), ("b", ["y", "x"])):
        save(tmp_path / name, tensors(1))
        tokenizer = {
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "x"},
            "added_tokens": [],
        }
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write(
        f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nmerge_method: linear\nparameters: {{weight: 1}}"
    )
    with pytest.raises(MergeError, match=r"2 tokens different ids .*tokenizer: \{source: base\}"):
        merge(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "tensor", "t", "value"),
    [
        (0.5, "x", 0.3, 0.5),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.75, 0.5),
        ([0.2], "x", 1.0, 0.2),
        ([1, 2], "x", 1.0, 2),
        ([True, False], "x", 0.5, True),
        (["l1", "density"], "x", 1.0, "density"),
        ([("mlp", 1.0), (None, 2.0)], "a.mlp.b", 0.0, 1.0),
        ([("mlp", 1.0), (None, [2.0, 4.0])], "attn", 0.5, 3.0),
        ([("mlp", 1.0)], "attn", 0.5, None),
    ],
)
def test_settings(setting: object, tensor: str, t: float, value: object) -> None:
    assert evaluate(setting, tensor, t) == value


def test_command_line(family: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    recipe = write(
        f"models: [{{model: {family}/a}}, {{model: {family}/b}}]\nmerge_method: linear\nparameters: {{weight: 1, t: 2}}\n"
    )
    done = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0 and "would write" in done.output and "does not use t" in done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "out"), "--threads", "1", "--memory", "64"])
    assert done.exit_code == 0 and "15 tensors" in done.output
    assert (tmp_path / "out" / "model.safetensors").exists()
