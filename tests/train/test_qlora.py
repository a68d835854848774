"""Training over frozen weights in 4 bits and on disk: the same losses to the bit wherever they are, and files that break."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
from whole_runs import assert_same_bits, assert_same_run, metrics, timeless, weights_of

import enginepost.train.loop as loop
from enginepost.checkpoint import quantize
from enginepost.errors import EnginepostError
from enginepost.model import create_model, load_model, save_model
from enginepost.model.residency import WeightsError
from enginepost.recipe import RecipeError, load_recipe
from enginepost.train.loop import train

MakeRecipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: pathlib.Path) -> pathlib.Path:
    """The tiny model with more layers than slots, so that weights on disk come and go."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    directory = tmp_path_factory.mktemp("model-of-4-layers")
    save_model(create_model({**config, "num_hidden_layers": 4}, seed=0), directory, source=tiny_model_dir)
    return directory


@pytest.mark.parametrize("keys", [{"quantize": "nf4"}, {"quantize": "nf4-double", "dtype": "bf16"}, {}])
def test_same_bits_from_disk(recipe: MakeRecipe, tmp_path: pathlib.Path, keys: dict[str, Any]) -> None:
    keys = {**keys, "validation": 0.2, "max_steps": 4}
    resident = train(recipe(**keys, output=str(tmp_path / "a")))
    assert metrics(resident)[-1]["eval_loss"] > 0
    for i, more in enumerate(({"weights": "disk"}, {"weights": "disk", "checkpointing": False}, {"weights": "host"})):
        assert_same_run(resident, train(recipe(**keys, **more, output=str(tmp_path / f"b{i}"))))


def test_straight_from_a_4bit_checkpoint(
    recipe: MakeRecipe, tmp_path: pathlib.Path, tiny_model_dir: pathlib.Path
) -> None:
    quantize(tiny_model_dir, tmp_path / "bnb", double=True)
    stored = train(recipe(model=str(tmp_path / "bnb"), output=str(tmp_path / "a")))
    assert_same_run(stored, train(recipe(quantize="nf4-double", output=str(tmp_path / "b"))))
    plain = metrics(train(recipe(output=str(tmp_path / "c"))))
    assert plain[0]["loss"] != metrics(stored)[0]["loss"]  # the comparison above compares 4 bits with 4 bits
    with pytest.raises(EnginepostError, match="its weights are in 4 bits and cannot train"):
        train(recipe(model=str(tmp_path / "bnb"), lora=None, output=str(tmp_path / "d")))
    assert not (tmp_path / "d").exists()


def test_it_learns(recipe: MakeRecipe) -> None:
    losses = [line["loss"] for line in metrics(train(recipe(quantize="nf4", max_steps=30, learning_rate=1e-2)))]
    assert losses[-1] < losses[0] - 0.4


def test_the_copy_is_made_once(
    recipe: MakeRecipe, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: pathlib.Path
) -> None:
    words = f"quantising {tiny_model_dir} to fp4, once"
    train(recipe(quantize="fp4", max_steps=1, output=str(tmp_path / "a")))
    assert words in capsys.readouterr().out
    train(recipe(quantize="fp4", max_steps=1, output=str(tmp_path / "b")))
    shown = capsys.readouterr().out
    assert words not in shown and "over fp4" in shown
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1


@pytest.mark.parametrize("how", ["truncated", "unreadable"])
def test_a_file_that_breaks_in_mid_run_costs_nothing(
    recipe: MakeRecipe, tmp_path: pathlib.Path, tiny_model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    keys = {"model": str(model), "weights": "disk", "max_steps": 6}
    whole = train(recipe(**keys, output=str(tmp_path / "whole")))
    original, steps = loop.optimizer_step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4 and how == "truncated":
            os.truncate(weights, len(content) // 2)
        elif steps == 4:
            m.setattr(os, "preadv", unreadable)
        return original(*args, **kwargs)

    def unreadable(*_: Any) -> int:
        raise OSError(5, os.strerror(5))

    cut = recipe(**keys, output=str(tmp_path / "cut"))
    with monkeypatch.context() as m:
        m.setattr(loop, "optimizer_step", step)
        with pytest.raises(WeightsError) as broken:
            train(cut)
    for words in ("step 4: ", str(weights), f"saved {tmp_path}/cut/checkpoint-3", "resume=True"):
        assert words in str(broken.value)
    if how == "truncated":
        with pytest.raises(EnginepostError, match=r"model\.safetensors"):
            train(cut, resume=True)
        weights.write_bytes(content)
    train(cut, resume=True)
    assert_same_run(whole, cut["output"])


@pytest.mark.parametrize(("key", "value"), [("quantize", "nf4"), ("weights", "disk"), ("weights", "host")])
def test_all_weights_cannot_train_frozen(tmp_path: pathlib.Path, key: str, value: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\ndata: d\nlora: null\n{key}: {value}\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml:4: {key}: only frozen weights .*remove the key {key}"):
        load_recipe(file)


def test_the_adapter_works_on_either_base(recipe: MakeRecipe, tiny_model_dir: pathlib.Path) -> None:
    run = train(recipe(quantize="nf4", max_steps=2))
    for kind in (None, "nf4"):
        load_model(tiny_model_dir, adapter=f"{run}/adapter", quantize=kind)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_update_in_backward_changes_no_bit(recipe: MakeRecipe, tmp_path: pathlib.Path, dtype: str) -> None:
    keys = {"dtype": dtype, "clip": None, "gradient_accumulation": 1, "lora": None, "optimizer": "adamw8bit"}
    runs = [
        train(recipe(**keys, optimizer_in_backward=fused, output=str(tmp_path / str(fused)))) for fused in (True, False)
    ]
    assert_same_bits(*map(weights_of, runs))
    for x, y in zip(*map(timeless, runs), strict=True):
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-9)
        assert {k: v for k, v in x.items() if k != "grad_norm"} == {k: v for k, v in y.items() if k != "grad_norm"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"gradient_accumulation": 1}, r"clip: with optimizer_in_backward it must be null, got 1\.0"),
        ({"clip": None}, r"gradient_accumulation: with optimizer_in_backward it must be 1, got 2"),
    ],
)
def test_update_in_backward_needs_one_pass_and_no_clip(recipe: MakeRecipe, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe(lora=None, optimizer_in_backward=True, **keys))
