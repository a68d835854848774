"""Whole trainings on a device of their own (tests/pretend_gpu.py): the same bits as on the CPU, and no tensor in the wrong place."""

import json
import pathlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pretend_gpu
import pytest
import torch
from whole_runs import interrupt_after, metrics

import enginepost
from enginepost.device import choose
from enginepost.errors import EnginepostError
from enginepost.recipe import load_recipe
from enginepost.score import score
from enginepost.train import budget, loop
from enginepost.train.loop import Interrupted, train

WORDS = "the quick brown fox jumps over a lazy dog what is six times seven forty two".split()
MakeRecipe = Callable[..., dict[str, Any]]
TIMES = ("tokens_per_second", "elapsed_seconds", "memory_gb", "host_memory_gb")


@pytest.fixture(autouse=True)
def device_named_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pretended device is what `device: cuda` means."""
    monkeypatch.setattr(
        loop, "choose", lambda name, say=None: torch.device("cpu") if name == "cpu" else pretend_gpu.DEVICE
    )
    yield


def outcome(run: str) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Bytes of every weights file of a run and its metrics but for times."""
    files = {str(p.relative_to(run)): p.read_bytes() for p in sorted(pathlib.Path(run).rglob("*.safetensors"))}
    return files, [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(run)]


def both(recipe: MakeRecipe, tmp_path: pathlib.Path, **keys: Any) -> list[str]:
    """The run on the CPU and that on the device: everything they leave must be the same."""
    held = {} if keys.get("method") == "gkd" else {"validation": 0.2}
    keys = {"max_steps": 3, "save_every": 2, **held, **keys}
    here = train(recipe(**keys, device="cpu", output=str(tmp_path / "cpu")))
    with pretend_gpu.present():
        there = train(recipe(**keys, device="cuda", output=str(tmp_path / "device")))
    files, lines = outcome(here)
    found, shown = outcome(there)
    assert found.keys() == files.keys() and len(files) >= 3
    assert [name for name in files if found[name] != files[name]] == []
    assert shown == lines
    return list(pretend_gpu.waits)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dtype": "bf16", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "dora": True}, "checkpointing": False},
        {"dtype": "bf16", "lora": None, "optimizer": "adamw8bit", "mlp_chunk": 8},
        {"lora": None, "optimizer_in_backward": True, "clip": None, "gradient_accumulation": 1},
        {"optimizer_states": "host", "dtype": "bf16", "lora": None},
        {"checkpointing": "host"},
        {"quantize": "nf4", "weights": "host"},
        {"quantize": "nf4-double", "weights": "disk", "checkpointing": "host", "mlp_chunk": 16},
    ],
    ids=lambda keys: ",".join(f"{k}={v}" for k, v in keys.items()) or "lora",
)
def test_sft(recipe: MakeRecipe, tmp_path: pathlib.Path, keys: dict[str, Any]) -> None:
    both(recipe, tmp_path, **keys)


def written(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text(rng: random.Random, least: int = 1) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, 9)))


def answers(tmp_path: pathlib.Path, kind: str) -> str:
    """Rows of pairs, graded answers or steps."""
    rng = random.Random(3)
    rows: list[dict[str, Any]] = []
    for i in range(12):
        row: dict[str, Any] = {"prompt": text(rng)}
        if kind == "pairs":
            row |= {"chosen": f" {text(rng, 2)}", "rejected": f" {text(rng, 2)}", "margin": 0.25}
        elif kind == "graded":
            row |= {"completion": f" {text(rng, 2)}", "label": i % 3 > 0}
        else:
            row |= {"completions": [text(rng) for _ in range(1 + i % 3)], "labels": [i % 2 == 0] * (1 + i % 3)}
        rows.append(row)
    return written(tmp_path / f"{kind}.jsonl", rows)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("pairs", {"method": "dpo", "loss": {"sigmoid": 0.7, "ipo": 0.1, "sft": 0.2}}),
        ("pairs", {"method": "dpo", "wpo": True, "ld_alpha": 0.5, "precompute": True}),
        ("pairs", {"method": "dpo", "lora": {"r": 4, "dora": True}, "quantize": "nf4", "weights": "host"}),
        ("pairs", {"method": "dpo", "lora": {"r": 4, "dora": True}}),
        ("pairs", {"method": "dpo", "quantize": "nf4", "weights": "host"}),
        ("pairs", {"method": "orpo", "lora": None}),
        ("pairs", {"method": "simpo", "sft_weight": 0.1}),
        ("pairs", {"method": "reward"}),
        ("graded", {"method": "kto"}),
        ("steps", {"method": "prm"}),
    ],
    ids=str,
)
def test_answers(recipe: MakeRecipe, tmp_path: pathlib.Path, kind: str, keys: dict[str, Any]) -> None:
    both(recipe, tmp_path, data=answers(tmp_path, kind), **keys)


@pytest.mark.parametrize("own", [{"sft_weight": 0.25}, {"teacher_top_k": 7, "divergence": "js"}], ids=str)
def test_distill(recipe: MakeRecipe, tmp_path: pathlib.Path, own: dict[str, Any]) -> None:
    both(recipe, tmp_path, method="distill", teacher=recipe()["model"], **own)


def odd_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 for i in ids) / max(1, len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "grpo", "beta": 0.1, "num_iterations": 2, "num_mini_batches": 2},
        {"method": "grpo", "loss": "gspo", "num_mini_batches": 2, "dtype": "bf16", "top_p": 0.9},
        {"method": "rloo", "temperature": 0.8, "num_mini_batches": 2, "quantize": "nf4"},
        {"method": "ppo", "target_kl": 0.05, "kl_horizon": 100, "num_iterations": 2},
        {"method": "gkd", "num_mini_batches": 2},
    ],
    ids=str,
)
def test_roll_outs(recipe: MakeRecipe, tmp_path: pathlib.Path, keys: dict[str, Any]) -> None:
    rng = random.Random(1)
    rows = [{"prompt": text(rng), "completion": " forty two"} for _ in range(8)]
    model = recipe()["model"]
    own = {"teacher": model} if keys["method"] == "gkd" else {"rewards": [odd_ids]}
    base = {
        "model": model, "data": written(tmp_path / "prompts.jsonl", rows), "max_length": 64, "max_completion_length": 8,
        "batch_size": 2, "rollout_prompts": 2, "num_generations": 3, "learning_rate": 3e-3, "dtype": "fp32",
        "lora": {"r": 4, "alpha": 8},
    }  # fmt: skip
    both(lambda **given: {**base, **own, **given}, tmp_path, **keys)


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"device": "cuda", "quantize": "nf4", "weights": "host", "checkpointing": "host", "dtype": "bf16"}
    with pretend_gpu.present():
        whole = train(recipe(**keys, output=str(tmp_path / "whole")))
        cut = recipe(**keys, output=str(tmp_path / "cut"))
        with monkeypatch.context() as m:
            interrupt_after(m, 3)
            with pytest.raises(Interrupted):
                train(cut)
        train(cut, resume=True)
    files, lines = outcome(whole)
    found, shown = outcome(cut["output"])
    assert {n: b for n, b in found.items() if n.startswith("adapter")} == {
        n: b for n, b in files.items() if n.startswith("adapter")
    }
    assert shown == lines


def test_a_run_may_go_on_on_another_device_and_says_so(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted):
            train(recipe(device="cpu"))
    with pretend_gpu.present():
        train(recipe(device="cuda"), resume=True)
    assert "the run began on cpu and goes on on pretend" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_step_waits_for_the_device_twice(recipe: MakeRecipe, tmp_path: pathlib.Path, method: str) -> None:
    """For the numbers of the step, and for the gradient norm; the number of micro-batches plays no part."""
    keys: dict[str, Any] = {"method": method, "save_every": 100, "batch_size": 1}
    if method == "dpo":
        keys["data"] = answers(tmp_path, "pairs")
    counts = []
    for steps, micro in ((2, 2), (6, 2), (2, 4), (6, 4)):
        given = recipe(**keys, max_steps=steps, gradient_accumulation=micro, device="cuda", eval_every=100)
        with pretend_gpu.present():
            train({**given, "output": str(tmp_path / f"{steps}-{micro}")})
            counts.append(len(pretend_gpu.waits))
    assert counts[1] - counts[0] == counts[3] - counts[2], pretend_gpu.waits
    assert (counts[1] - counts[0]) / 4 <= 3, pretend_gpu.waits


def test_memory_is_chosen_for_the_card_and_held_to(
    recipe: MakeRecipe, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretend_gpu.present():
        train(recipe(device="cuda", memory="4GB"))
    assert pretend_gpu.caps.pop() == pytest.approx((4e9 - 0.6e9) / 2**33)
    said = re.search(r"memory: checkpointing=false weights=resident: ([\d.]+) of 4.00 GB", capsys.readouterr().out)
    assert said is not None and 0.6 <= float(said[1]) < 0.7  # the context of a GPU's process, and next to nothing


def test_out_of_memory_is_the_plan_for_the_card(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loop, "optimizer_step", fail)
    with (
        pretend_gpu.present(),
        pytest.raises(
            budget.OutOfMemory, match=r"(?s)^out of memory on NVIDIA GeForce RTX 4060: the run needs 0\.6. GB"
        ),
    ):
        train(recipe(device="cuda"))


def test_a_card_that_is_full_is_answered_with_the_plan(recipe: MakeRecipe) -> None:
    """The allocator itself says no, in the middle of a step."""
    with pretend_gpu.present():
        before = pretend_gpu.memory.now  # what earlier tests left
        train(recipe(device="cuda", max_steps=1))
        pretend_gpu.memory.most_allowed = before + 0.9 * (pretend_gpu.memory.most - before)
        with pytest.raises(budget.OutOfMemory, match=r"(?s)^out of memory on NVIDIA GeForce RTX 4060: the run needs"):
            train(recipe(device="cuda", output=recipe()["output"] + "-full"))


def test_a_model_on_the_device_answers_as_on_the_cpu(tiny_model_dir: pathlib.Path) -> None:
    """Greedy and drawn, several prompts and one; log-probabilities; ids that the model does not have."""
    texts = ["the quick brown", "what is six times seven?", "a"]

    def answers(device: torch.device) -> list[Any]:
        model = enginepost.load(tiny_model_dir, dtype="float32", device=device)
        drawn = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3}
        found: list[Any] = [
            model.generate(texts, max_new_tokens=9),
            model.generate(texts[:1], max_new_tokens=9, **drawn),
        ]
        found += [model.generate(texts, max_new_tokens=9, **drawn), model.logits([5, 6, 7]).cpu().tolist()]
        found += [x.cpu().tolist() for x in model.logprobs([[5, 6, 7, 8], [9, 10]])]
        with pytest.raises(EnginepostError, match="token id 100000 at position 1 of the batch"):
            model.logprobs([5, 100_000])
        with pytest.raises(EnginepostError, match="token id 100000"):
            model.generate([[5, 100_000]], max_new_tokens=2)
        return found

    with pretend_gpu.present():
        there = answers(pretend_gpu.DEVICE)
    assert there == answers(torch.device("cpu"))


def test_scores_on_the_device(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """A reward model, a process reward model, and a reward model that judges roll-outs."""
    for kind, method in (("pairs", "reward"), ("steps", "prm")):
        data = answers(tmp_path, kind)
        run = train(
            recipe(method=method, data=data, lora=None, max_steps=1, device="cpu", output=str(tmp_path / method))
        )
        here = score(f"{run}/model", data, dtype=torch.float32)
        with pretend_gpu.present():
            there = score(f"{run}/model", data, dtype=torch.float32, device=pretend_gpu.DEVICE)
        assert there == here
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": word} for word in WORDS])
    keys = {"method": "rloo", "rewards": [{"model": str(tmp_path / "reward" / "model")}], "rollout_prompts": 2}
    own = {"num_generations": 2, "max_completion_length": 5, "max_length": 64}
    base = {k: v for k, v in recipe().items() if k != "gradient_accumulation"}
    both(lambda **given: {**base, "data": prompts, **own, **given}, tmp_path, **keys)


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpu", "expected auto, cpu, cuda or cuda:1"), ("cuda:x", "expected auto, cpu, cuda or cuda:1")],
)
def test_names_that_are_no_device(recipe: MakeRecipe, name: str, words: str) -> None:
    with pytest.raises(EnginepostError, match=f"device: {words}"):
        load_recipe(recipe(device=name))
    with pytest.raises(EnginepostError, match=words):
        choose(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_a_gpu_that_is_not_there_is_said(tiny_model_dir: pathlib.Path) -> None:
    with pytest.raises(EnginepostError, match=r"device cuda:1: this torch is built without CUDA|torch finds no GPU"):
        enginepost.load(tiny_model_dir, device="cuda:1")
    assert choose("auto") == torch.device("cpu")
