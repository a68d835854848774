"""Bad input is one clear message that says what, where, and what to do; and what was good on disk stays."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from enginepost.checkpoint import Checkpoint, save_tensors
from enginepost.errors import EnginepostError
from enginepost.train.loop import TrainingError, train
from enginepost.train.state import RunError

MakeRecipe = Callable[..., dict[str, Any]]


def message(settings: dict[str, Any], **more: Any) -> str:
    with pytest.raises(EnginepostError) as error:
        train(settings, **more)
    return str(error.value)


def file(path: pathlib.Path, *rows: Any) -> str:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def test_missing_files(recipe: MakeRecipe) -> None:
    assert "nowhere.jsonl" in message(recipe(data="nowhere.jsonl"))
    assert "no/such/model" in message(recipe(model="no/such/model"))
    assert "no/such/adapter" in message({k: v for k, v in recipe(adapter="no/such/adapter").items() if k != "lora"})


def test_empty_data_set(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    text = message(recipe(data=file(tmp_path / "empty.jsonl")))
    assert "empty" in text and "empty.jsonl" in text


def test_json_error_names_file_and_line(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    text = message(recipe(data=file(tmp_path / "bad.jsonl", chat("a", "b"), '{"messages": [')))
    assert "bad.jsonl, line 2" in text


def test_wrong_keys_name_the_row_the_keys_and_the_formats(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    text = message(recipe(data=file(tmp_path / "odd.jsonl", chat("a", "b"), {"question": "x", "reply": "y"})))
    assert "odd.jsonl:2" in text and "question" in text and "reply" in text
    assert all(name in text for name in ("messages", "alpaca", "sharegpt"))


def test_row_with_all_labels_masked(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    rows = [chat("a", "b"), {"messages": [{"role": "user", "content": "no answer"}]}]
    text = message(recipe(data=file(tmp_path / "masked.jsonl", *rows)))
    assert "masked.jsonl:2" in text and "no token to train on" in text


def test_overlong_row(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    data = file(tmp_path / "long.jsonl", chat("a", "b"), chat("x " * 300, "y"))
    text = message(recipe(data=data))
    assert "long.jsonl:2" in text and "max_length = 128" in text and "overlong" in text
    train(recipe(data=data, overlong="drop", max_steps=1))


def test_ids_outside_the_vocabulary(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    model = tmp_path / "small"
    shutil.copytree(recipe()["model"], model)
    config = json.loads((model / "config.json").read_text())
    config["vocab_size"] = 100
    (model / "config.json").write_text(json.dumps(config))
    text = message(recipe(model=str(model)))
    assert "rows.jsonl:1" in text and "vocabulary has 100" in text


def test_nothing_is_written_before_the_input_is_good(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """A mistake in the data does not leave a run directory that must be removed before trying again."""
    message(recipe(data="nowhere.jsonl"))
    message(recipe(lora={"targets": ["nonesuch"]}))
    assert not pathlib.Path(recipe()["output"]).exists()
    train(recipe(max_steps=1))


def poisoned(model: str, directory: pathlib.Path, token: str) -> str:
    """A copy of the model whose embedding of `token` is NaN, so that only rows with that token are bad."""
    from enginepost.data import Tokenizer

    shutil.copytree(model, directory)
    checkpoint = Checkpoint(directory)
    tensors = {name: checkpoint.tensor(name).clone() for name in checkpoint.names}
    (identity,) = Tokenizer.load(directory).encode(token)
    tensors["model.embed_tokens.weight"][identity] = float("nan")
    save_tensors(directory / "model.safetensors", tensors)
    return str(directory)


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_nan_loss_stops_names_step_and_rows_and_keeps_the_checkpoint(
    recipe: MakeRecipe, tmp_path: pathlib.Path, lora: Any
) -> None:
    model = poisoned(recipe()["model"], tmp_path / "poisoned", "Z")
    rows = [chat(f"six times {i}", "forty two") for i in range(12)]
    rows[7] = chat("six times Z", "forty two")
    settings = recipe(
        model=model, lora=lora, data=file(tmp_path / "nan.jsonl", *rows), packing=False, batch_size=1,
        gradient_accumulation=2, max_steps=60, save_every=1, keep_last=1, seed=1,
    )  # fmt: skip
    with pytest.raises(TrainingError) as error:
        train(settings)
    text = str(error.value)
    assert "the loss became nan in micro-batch" in text and "nan.jsonl:8" in text and "nan.jsonl:3" not in text
    run = pathlib.Path(settings["output"])
    (last,) = run.glob("checkpoint-*")
    step = int(last.name.split("-")[1])
    assert text.startswith(f"step {step + 1}: ") and f"the last good checkpoint is {last}" in text
    good = Checkpoint(last / "adapter_model.safetensors" if lora else last)
    bad = [n for n in good.names if not torch.isfinite(good.tensor(n)).all()]
    assert bad == ([] if lora else ["model.embed_tokens.weight"])  # the poison itself
    assert "the loss became nan" in message(settings, resume=True)


def test_divergence_stops(recipe: MakeRecipe) -> None:
    text = message(recipe(lora=None, learning_rate=1e18, clip=None, max_steps=20, warmup_ratio=0.0))
    assert "became" in text and "learning_rate" in text and "no checkpoint was written yet" in text


def test_infinite_gradient_with_a_finite_loss_stops(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import enginepost.train.methods.sft as sft

    original = sft.sft_loss
    # The square root's slope at zero is infinite: zero times that is a gradient of nan under a finite loss.
    monkeypatch.setattr(
        sft, "sft_loss", lambda logprob, n: original(logprob, n) + (logprob.double().sum() * 0).abs().sqrt()
    )
    text = message(recipe())
    assert "step 1: the gradient norm became nan" in text and "rows.jsonl:" in text


def test_full_disk_at_the_very_end(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import enginepost.train.weights as weights

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = recipe(max_steps=4, save_every=2)
    with monkeypatch.context() as m:
        m.setattr(weights, "save_result", full)
        with pytest.raises(RunError, match=r"run/adapter: No space left on device\. .*checkpoint-2 is intact") as error:
            train(settings)
    assert "--resume" in str(error.value)
    train(settings, resume=True)
    assert pathlib.Path(settings["output"], "adapter", "adapter_config.json").exists()
