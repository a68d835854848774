"""Whole merges of pico Llamas against mergekit 0.1.5 (tests/golden/make_merge_models.py)."""

import json
import pathlib

import pytest
import torch
from safetensors.torch import load_file

from enginepost.merge import merge

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "merge_models"
RECIPES = json.loads((GOLDEN / "recipes.json").read_text())
RESULTS = load_file(GOLDEN / "results.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_like_mergekit(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[name]["recipe"])
    merge(recipe, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = {key.split("/", 1)[1]: value for key, value in RESULTS.items() if key.startswith(f"{name}/")}
    assert set(ours) == set(theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == RECIPES[name]["vocab_size"]
    assert config["num_hidden_layers"] == RECIPES[name]["layers"]
    tokens = vocabulary(tmp_path / "out")
    theirs_tokens = RECIPES[name]["tokens"]
    assert set(tokens) == set(theirs_tokens)
    # a union may number its added tokens in another order: compare rows token by token
    for key, value in theirs.items():
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            order = torch.tensor([theirs_tokens[token] for token in tokens])
            torch.testing.assert_close(
                ours[key][torch.tensor(list(tokens.values()))], value[order], rtol=1e-6, atol=1e-6
            )
            assert ours[key].shape == value.shape
        else:
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)


def vocabulary(directory: pathlib.Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(with_added_tokens=True)
