"""The example recipes, run at a small shape."""

import pathlib

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoints import save, tensors

from enginepost.merge import merge

RECIPES = pathlib.Path(__file__).parents[2] / "examples" / "recipes"


def test_dare_ties(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "meta-llama/Meta-Llama-3-8B",
        "NousResearch/Meta-Llama-3-8B-Instruct",
        "mlabonne/OrpoLlama-3-8B",
        "mlabonne/ChimeraLlama-3-8B",
    ]
    for i, name in enumerate(names):
        save(tmp_path / name, tensors(i))
    merge(RECIPES / "merge_dare_ties.yaml", tmp_path / "out")
    got, base, instruct = load_file(tmp_path / "out" / "model.safetensors"), tensors(0), tensors(1)
    name = "model.embed_tokens.weight"
    step, whole = (
        (got[name].float() - base[name].float()).flatten(),
        (instruct[name].float() - base[name].float()).flatten(),
    )
    # the expectation of the merge is the weighted sum of task vectors; the instruct model has most of the weight
    slope = float(step @ whole / (whole @ whole))
    assert abs(slope - 0.5) < 0.05


def test_language_and_instruct(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer_dir: pathlib.Path
) -> None:
    from enginepost.checkpoint import copy_side_files
    from enginepost.data import Tokenizer

    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("llama", "llama-finnish", "llama-instruct")):
        weights = tensors(i, torch.float32)
        vocabulary = Tokenizer.load(tiny_tokenizer_dir).vocab_size
        for large in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[large] = weights[large][:vocabulary].clone()
        save(tmp_path / "models" / name, weights, vocab_size=vocabulary)
        copy_side_files(tiny_tokenizer_dir, tmp_path / "models" / name)
    merge(RECIPES / "merge_language_instruct.yaml", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    base, finnish, instruct = (tensors(i, torch.float32) for i in range(3))
    for layer, weight in ((0, 0.6), (1, 0.8), (2, 1.0)):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = base[name] + (finnish[name] - base[name]) + weight * (instruct[name] - base[name])
        torch.testing.assert_close(got[name], expected.bfloat16())
    assert "im_start" in (tmp_path / "out" / "chat_template.jinja").read_text()
    Tokenizer.load(tmp_path / "out")
