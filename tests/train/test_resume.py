"""Interrupted and resumed = uninterrupted, bit for bit; and what a run directory refuses."""

import errno
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from whole_runs import assert_same_bits, assert_same_run, interrupt_after, metrics, weights_of

import enginepost.train.loop as loop
from enginepost.data import Tokenizer
from enginepost.errors import EnginepostError
from enginepost.generate import load
from enginepost.recipe import load_recipe
from enginepost.train.loop import Interrupted, train
from enginepost.train.state import RunDirectory, RunError

MakeRecipe = Callable[..., dict[str, Any]]

FLAVOURS: dict[str, dict[str, Any]] = {
    "lora dropout fp32": {"lora": {"r": 4, "alpha": 8, "dropout": 0.3}},
    "lora dropout bf16": {"lora": {"r": 4, "alpha": 8, "dropout": 0.3}, "dtype": "bf16"},
    "dora bf16": {"lora": {"r": 4, "alpha": 8, "dora": True}, "dtype": "bf16"},
    "lora over nf4": {"quantize": "nf4-double", "dtype": "bf16"},
    "lora from disk": {"weights": "disk", "lora": {"r": 4, "alpha": 8, "dropout": 0.3}},
    "mlp in chunks": {"mlp_chunk": 7, "dtype": "bf16", "lora": {"r": 4, "alpha": 8, "dropout": 0.3}},
    "full fp32": {"lora": None},
    "full bf16, adamw8bit": {"lora": None, "dtype": "bf16", "optimizer": "adamw8bit"},
    "full bf16 in backward": {
        "lora": None,
        "dtype": "bf16",
        "optimizer_in_backward": True,
        "clip": None,
        "gradient_accumulation": 1,
        "optimizer": "adamw8bit",
        "mlp_chunk": 16,
    },
    "full bf16": {"lora": None, "dtype": "bf16"},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_interrupted_and_resumed_has_the_same_bits(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    keys = {**FLAVOURS[flavour], "max_steps": 9, "validation": 0.2, "weight_decay": 0.1}
    whole = train(recipe(**keys, output=str(tmp_path / "whole")))
    cut = recipe(**keys, output=str(tmp_path / "cut"))
    for steps in (2, 4):  # stops after step 2, then after step 6
        with monkeypatch.context() as m:
            interrupt_after(m, steps)
            with pytest.raises(Interrupted, match="stopped by SIGTERM after step"):
                train(cut, resume=steps != 2)
    checkpoints = sorted(p.name for p in pathlib.Path(cut["output"]).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-6"]
    train(cut, resume=True)
    assert_same_run(whole, cut["output"])


def test_dropout_matters_and_differs_by_step(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """Without this the test above would say nothing about dropout."""
    with_dropout = train(recipe(**FLAVOURS["lora dropout fp32"], output=str(tmp_path / "a")))
    without = train(recipe(output=str(tmp_path / "b")))
    other_seed = train(recipe(**FLAVOURS["lora dropout fp32"], seed=1, output=str(tmp_path / "c")))
    a, b, c = (weights_of(run) for run in (with_dropout, without, other_seed))
    name = next(n for n in a if n.endswith("lora_B.weight"))
    assert not torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])


def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        train(recipe())
    assert stop.value.signal == signal.SIGINT
    assert f"saved {tmp_path}/run/checkpoint-3" in str(stop.value) and "resume=True" in str(stop.value)
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_ctrl_c_quits_at_once(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.optimizer_step

    def step(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "optimizer_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe())


def test_trains_in_a_thread(recipe: MakeRecipe) -> None:
    """Signal handlers can only be set in the main thread; elsewhere training goes without them."""
    thread = threading.Thread(target=train, args=(recipe(max_steps=1),))
    thread.start()
    thread.join()
    assert weights_of(recipe()["output"])


def test_checkpoints_and_their_state(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    run = pathlib.Path(train(recipe(max_steps=9, save_every=2, keep_last=2, validation=0.2, eval_every=4)))
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter", "checkpoint-6", "checkpoint-8", "metrics.jsonl", "recipe.yaml",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoint-8").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "recipe.yaml", "trainer_state.json",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    state = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["save_steps"]) == (8, 9, 2)
    logged = [m for m in metrics(str(run)) if m["step"] <= 8]
    assert state["log_history"] == logged
    evaluations = {m["step"]: m["eval_loss"] for m in logged if "eval_loss" in m}
    assert set(evaluations) == {4, 8} and state["best_metric"] == min(evaluations.values())
    assert load_recipe(run / "recipe.yaml") == load_recipe(
        recipe(max_steps=9, save_every=2, validation=0.2, eval_every=4)
    )


def test_full_checkpoint_is_a_model_directory(recipe: MakeRecipe) -> None:
    from enginepost.model import load_model

    run = pathlib.Path(train(recipe(lora=None, save_every=3)))
    for directory in (run / "checkpoint-3", run / "model"):
        assert load_model(directory, dtype=torch.float32).spec.hidden_size == 32
        assert (directory / "tokenizer.json").exists()


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_the_result_keeps_the_template_it_was_trained_with(recipe: MakeRecipe, lora: Any) -> None:
    run = pathlib.Path(train(recipe(lora=lora, template="zephyr", max_steps=1)))
    result = run / ("adapter" if lora else "model")
    assert "<|assistant|>" in Tokenizer.load(result).chat_template
    base = recipe()["model"]
    assert "<|assistant|>" not in Tokenizer.load(base).chat_template
    used = load(base, adapter=result, dtype="float32") if lora else load(result, dtype="float32")
    assert "<|assistant|>" in used.tokenizer.chat_template


def test_continues_from_an_adapter(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    first = train(recipe(lora={"r": 3, "alpha": 6}))
    start = weights_of(first)
    settings = recipe(adapter=f"{first}/adapter", output=str(tmp_path / "second"), max_steps=1, learning_rate=1e-6)
    del settings["lora"]
    second = train(settings)
    end = weights_of(second)
    assert all(torch.allclose(start[n], end[n], atol=2e-6) for n in start) and any(
        not torch.equal(start[n], end[n]) for n in start
    )


def test_refuses_a_directory_in_use_or_not_empty(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    settings = recipe(max_steps=2)
    train(settings)
    with pytest.raises(RunError, match="not empty; continue that run with --resume"):
        train(settings)
    assert train(settings, resume=True) == settings["output"]  # complete: nothing to do
    with RunDirectory(load_recipe(settings), resume=True), pytest.raises(RunError, match="another process is training"):
        RunDirectory(load_recipe(settings), resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"not empty|not a run directory"):
            train(recipe(output=str(tmp_path / "other")), resume=resume)
    assert (tmp_path / "other" / "thesis.tex").exists()
    with pytest.raises(RunError, match="output is a file"):
        train(recipe(output=settings["data"]))


def test_resume_refuses_a_changed_recipe_or_changed_rows(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(settings)
    with pytest.raises(
        RunError, match=r"cannot resume with a changed recipe(.|\n)*seed: 0 -> 1(.|\n)*lora\.r: 4 -> 8"
    ) as error:
        train(settings, resume=True, seed=1, **{"lora.r": 8})
    assert "batch_size" not in str(error.value)
    file = pathlib.Path(settings["data"])
    before = file.read_text()
    file.write_text(before.replace("fox", "cat"))
    with pytest.raises(EnginepostError, match="cannot resume: the training rows are not those"):
        train(settings, resume=True)
    file.write_text(before)
    train(settings, resume=True, save_every=1, log_every=2)


def test_resume_before_the_first_checkpoint_starts_anew(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    whole = train(recipe(output=str(tmp_path / "whole")))
    settings = recipe()
    with RunDirectory(load_recipe(settings), resume=False) as run:
        run.begun = True
        (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.9}\n{"step": 2, "lo')
        (run.path / ".checkpoint-3.partial").mkdir()
        (run.path / ".checkpoint-3.partial" / "optimizer.safetensors").write_text("half")
    train(settings, resume=True)
    assert_same_bits(weights_of(whole), weights_of(settings["output"]))
    assert [m["step"] for m in metrics(settings["output"])] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / ".checkpoint-3.partial").exists()


def test_damaged_checkpoint_is_an_error_not_a_crash(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe()
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(settings)
    checkpoint = pathlib.Path(settings["output"], "checkpoint-2")
    state = (checkpoint / "trainer_state.json").read_text()
    (checkpoint / "trainer_state.json").write_text(state[:50])
    with pytest.raises(RunError, match=r"trainer_state\.json: cannot read the state"):
        train(settings, resume=True)
    (checkpoint / "trainer_state.json").write_text(state)
    tensors = (checkpoint / "optimizer.safetensors").read_bytes()
    (checkpoint / "optimizer.safetensors").write_bytes(tensors[:-100])
    with pytest.raises(EnginepostError, match=r"optimizer\.safetensors"):
        train(settings, resume=True)


@pytest.mark.parametrize("flavour", ["lora dropout fp32", "full bf16"])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_full_disk_while_saving(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, flavour: str, call: str
) -> None:
    """The second checkpoint meets a full disk: a clear error, the first is intact, and the run goes on from it."""
    keys = {**FLAVOURS[flavour], "save_every": 2}
    whole = train(recipe(**keys, output=str(tmp_path / "whole")))
    settings = recipe(**keys)
    original = getattr(os, call)

    def full(*args: Any) -> Any:
        if pathlib.Path(settings["output"], ".checkpoint-4.partial").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        with pytest.raises(EnginepostError, match=r"(?i)no space|full") as error:
            train(settings)
    run = pathlib.Path(settings["output"])
    assert f"{run}/checkpoint-2 is intact" in str(error.value)
    assert not [
        p for p in run.iterdir() if p.name.endswith(".partial") or p.name in ("checkpoint-4", "adapter", "model")
    ]
    train(settings, resume=True)
    assert_same_bits(weights_of(whole), weights_of(run))
