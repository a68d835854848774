"""Methods kto, reward, prm and distill; reward models on disk; `score`."""

import json
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from whole_runs import assert_same_run, interrupt_after, metrics

from enginepost.checkpoint import Checkpoint
from enginepost.cli import app
from enginepost.data import Tokenizer
from enginepost.errors import EnginepostError
from enginepost.model import create_model, load_model, save_model
from enginepost.model.scorer import load_scorer
from enginepost.recipe import load_recipe
from enginepost.score import score
from enginepost.train import methods, weights
from enginepost.train.answers import answer_sums, token_logprobs
from enginepost.train.loop import Interrupted, accumulate, train
from enginepost.train.methods.distill import Distill
from enginepost.train.objectives.preference import kto_loss

WORDS = "the quick brown fox jumps over a lazy dog what is six times seven forty two one token at time".split()
MakeRecipe = Callable[..., dict[str, Any]]


def text(rng: random.Random, least: int = 1) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, 7)))


def write(path: pathlib.Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def graded(tmp_path: pathlib.Path) -> str:
    rng = random.Random(2)
    rows = [{"prompt": text(rng), "completion": " " + text(rng, 2), "label": i % 3 > 0} for i in range(14)]
    return write(tmp_path / "graded.jsonl", rows)


@pytest.fixture
def pairs(tmp_path: pathlib.Path) -> str:
    """The better answer names a number, the worse one a fox."""
    rng = random.Random(3)
    rows = [
        {"prompt": text(rng), "chosen": f" forty two {text(rng)}", "rejected": f" a fox {text(rng)}", "margin": 0.5}
        for _ in range(24)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def steps(tmp_path: pathlib.Path) -> str:
    rng = random.Random(4)
    rows = []
    for _ in range(20):
        right = [rng.random() < 0.5 for _ in range(rng.randint(1, 3))]
        rows.append(
            {
                "prompt": text(rng),
                "completions": ["six times seven" if r else "lazy dog" for r in right],
                "labels": right,
            }
        )
    return write(tmp_path / "steps.jsonl", rows)


def gradients(model: Any, method: Any, cut: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    parameters = {**weights.trainable(model), **method.module_tensors()}
    for p in parameters.values():
        p.grad = None
    loss, _ = accumulate(model, method, method.work(method.rows, cut))
    return loss, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def stir(model: Any) -> None:
    with torch.no_grad():
        for name, p in weights.trainable(model).items():
            if name.endswith(".B"):
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("name", ["kto", "reward", "prm"])
def test_cutting_a_step_changes_nothing(recipe: MakeRecipe, graded: str, pairs: str, steps: str, name: str) -> None:
    data = {"kto": graded, "reward": pairs, "prm": steps}[name]
    method = methods.create(load_recipe(recipe(method=name, data=data)))
    model = weights.load(method.recipe, torch.float32, None)
    stir(model)
    method.attach(model)
    loss, whole = gradients(model, method, [list(range(8))])
    assert len(whole) == len(weights.trainable(model)) + len(method.module_tensors())
    for cut in ([[i] for i in range(8)], [[3, 1, 2], [0, 7], [4, 5, 6]]):
        other, grads = gradients(model, method, cut)
        assert other == pytest.approx(loss, rel=2e-6)
        assert all((grads[n] - g).norm() <= 5e-6 * g.norm() for n, g in whole.items())


def test_kto_by_hand(recipe: MakeRecipe, graded: str) -> None:
    """The loss of a step from sequences put together here, one at a time."""
    method = methods.create(load_recipe(recipe(method="kto", data=graded, desirable_weight=1.5)))
    model = weights.load(method.recipe, torch.float32, None)
    stir(model)
    method.attach(model)
    found = method.rows.preferences
    members = [2, 5, 13]

    def ratio(ids: np.ndarray, start: int) -> float:
        row = torch.from_numpy(ids.astype(np.int64))
        cu, positions = torch.tensor([0, len(row)], dtype=torch.int32), torch.arange(len(row))

        def total(m: Any) -> float:
            log_p = torch.log_softmax(m.logits(m.hidden(row, cu, positions)).double(), dim=-1)
            return log_p[torch.arange(start - 1, len(row) - 1), row[start:]].sum().item()

        with torch.no_grad():
            return total(model) - total(load_model(method.recipe.model, dtype=torch.float32))

    starts = [int(s.labels.argmax()) for s in found.dataset]
    ratios = [ratio(found.dataset[i].ids, starts[i]) for i in members]
    others = []
    for i in members:
        j = (i + 1) % len(found)
        ids = np.concatenate([found.dataset[i].ids[: starts[i]], found.dataset[j].ids[starts[j] :]])
        others.append(ratio(ids, starts[i]))
    kl = max(0.0, sum(others) / 3)
    losses, _ = kto_loss(
        torch.tensor(ratios, dtype=torch.float64), torch.from_numpy(found.desirable[members]), kl, desirable_weight=1.5
    )
    work = method.work(method.rows, [[2], [5, 13]])
    loss, shown = accumulate(model, method, work)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert shown["kl"] == pytest.approx(kl, abs=1e-4)
    good = [r for r, i in zip(ratios, members, strict=True) if found.desirable[i]]
    assert shown["rewards/chosen"] == pytest.approx(0.1 * sum(good) / len(good), rel=1e-4)
    batch = method.rows.batch(members)
    with torch.no_grad():
        live = answer_sums(token_logprobs(model, batch)[0], batch) - method.reference_logps(model, method.rows, batch)
    assert live.tolist() == pytest.approx(ratios, abs=1e-4)


def test_kto_runs_and_begins_at_one_half(recipe: MakeRecipe, graded: str, tmp_path: pathlib.Path) -> None:
    lines = metrics(train(recipe(method="kto", data=graded, validation=0.3, max_steps=4)))
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-6) and lines[0]["kl"] == 0
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "entropy",
    } <= lines[0].keys()
    assert any("eval_loss" in m and "eval_kl" in m for m in lines)
    paired = write(tmp_path / "p.jsonl", [{"prompt": "what is", "chosen": " six", "rejected": " seven"}] * 3)
    assert len(methods.create(load_recipe(recipe(method="kto", data=paired))).rows) == 6


@pytest.mark.parametrize("lora", [{"r": 8, "alpha": 16}, None], ids=["lora", "full"])
def test_reward_model_learns_saves_and_scores(
    recipe: MakeRecipe, pairs: str, tmp_path: pathlib.Path, lora: Any
) -> None:
    run = train(
        recipe(method="reward", data=pairs, validation=0.25, max_steps=18, learning_rate=5e-3, lora=lora, centring=0.01)
    )
    last = [m for m in metrics(run) if "eval_loss" in m][-1]
    assert last["eval_accuracy"] > 0.8 and last["eval_margin"] > 0.5
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= metrics(run)[0].keys()
    result = pathlib.Path(run, "adapter" if lora else "model")
    config = json.loads((result / ("adapter_config.json" if lora else "config.json")).read_text())
    if lora:
        assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
        weight = Checkpoint(result / "adapter_model.safetensors").tensor("base_model.model.score.weight")
    else:
        assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "LABEL_0"}
        assert config["num_labels"] == 1 and config["pad_token_id"] is not None
        names = Checkpoint(result).names
        assert "lm_head.weight" not in names
        weight = Checkpoint(result).tensor("score.weight")
    assert tuple(weight.shape) == (1, 32)
    found = score(result, pairs, dtype=torch.float32)
    assert found.accuracy is not None and found.accuracy > 0.9 and found.labelled == 24
    # By hand: the last hidden state of one row, times score.weight.
    scorer, tokenizer = load_scorer(result, torch.float32), Tokenizer.load(result)
    record = json.loads(pathlib.Path(pairs).read_text().splitlines()[3])
    ids = torch.tensor([*tokenizer.encode(record["prompt"] + record["chosen"]), tokenizer.eos_id])
    with torch.no_grad():
        hidden = scorer.model.hidden(ids, torch.tensor([0, len(ids)], dtype=torch.int32), torch.arange(len(ids)))
    assert found.rows[3]["chosen"] == pytest.approx((hidden[-1] @ weight[0].float()).item(), abs=1e-4)
    done = CliRunner().invoke(
        app, ["score", str(result), pairs, "--out", str(tmp_path / "s.jsonl"), "--dtype", "float32"]
    )
    assert done.exit_code == 0 and f"agrees with {found.accuracy:.1%} of 24 labels" in done.output
    written = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert written == found.rows
    plain = write(tmp_path / "plain.jsonl", [{"prompt": record["prompt"], "completion": record["chosen"]}])
    assert score(result, plain, dtype=torch.float32).rows[0]["score"] == pytest.approx(
        found.rows[3]["chosen"], abs=1e-4
    )


def test_margins_come_from_the_rows(recipe: MakeRecipe, pairs: str) -> None:
    """With an untrained head scores are near 0: -logsigmoid(-0.5) a pair."""
    method = methods.create(load_recipe(recipe(method="reward", data=pairs)))
    assert method.rows.preferences.margins.tolist() == [0.5] * 24
    model = weights.load(method.recipe, torch.float32, None)
    method.attach(model)
    with torch.no_grad():
        method.head.weight.zero_()
    loss, _ = accumulate(model, method, method.work(method.rows, [[0, 1]]))
    assert loss == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-6)


def test_process_reward_model(recipe: MakeRecipe, steps: str, tmp_path: pathlib.Path) -> None:
    run = train(recipe(method="prm", data=steps, max_steps=25, learning_rate=5e-3, lora=None))
    result = pathlib.Path(run, "model")
    config = json.loads((result / "config.json").read_text())
    assert config["architectures"] == ["LlamaForTokenClassification"] and config["id2label"] == {
        "0": "wrong",
        "1": "right",
    }
    assert tuple(Checkpoint(result).tensor("score.bias").shape) == (2,)
    found = score(result, steps, dtype=torch.float32)
    rows = [json.loads(line) for line in pathlib.Path(steps).read_text().splitlines()]
    assert [len(e["steps"]) for e in found.rows] == [len(r["labels"]) for r in rows]
    assert found.accuracy == 1.0
    assert all(
        (p > 0.5) == label
        for e, r in zip(found.rows, rows, strict=True)
        for p, label in zip(e["steps"], r["labels"], strict=True)
    )
    method = methods.create(load_recipe(recipe(method="prm", data=steps)))
    batch = method.rows.batch([0])
    newline = Tokenizer.load(result).encode("seven\n")[-1]
    assert set(batch.ids[batch.predict + 1].tolist()) == {newline}


def test_distillation_pulls_the_student_to_its_teacher(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    settings = recipe()
    config = json.loads(pathlib.Path(settings["model"], "config.json").read_text())
    save_model(create_model(config, seed=9), tmp_path / "teacher", source=settings["model"])
    keys = {
        "method": "distill",
        "teacher": str(tmp_path / "teacher"),
        "lora": None,
        "max_steps": 12,
        "validation": 0.25,
    }
    for kind in ("forward", "reverse", "js"):
        lines = metrics(train(recipe(**keys, divergence=kind, output=str(tmp_path / kind), learning_rate=5e-3)))
        losses = [m["loss"] for m in lines if "loss" in m]
        assert losses[-1] < 0.8 * losses[0], kind
        assert lines[-1]["eval_divergence"] == pytest.approx(lines[-1]["eval_loss"])
    same = metrics(
        train(recipe(**{**keys, "teacher": settings["model"], "max_steps": 1}, output=str(tmp_path / "same")))
    )
    assert same[0]["loss"] == pytest.approx(0, abs=1e-6)
    mixed = methods.create(load_recipe(recipe(**keys, sft_weight=0.25, temperature=2.0)))
    model = weights.load(mixed.recipe, torch.float32, None)
    mixed.attach(model)
    work = mixed.work([[0, 1]])
    loss, shown = accumulate(model, mixed, work)
    assert loss == pytest.approx(0.75 * shown["divergence"] + 0.25 * shown["nll_loss"], rel=1e-6)


def test_mistakes(recipe: MakeRecipe, graded: str, pairs: str, tmp_path: pathlib.Path) -> None:
    base = recipe()["model"]
    with pytest.raises(EnginepostError, match=r"names \['LlamaForCausalLM'\], which gives tokens, not scores"):
        score(base, pairs)
    with pytest.raises(EnginepostError, match="needs at least 2 of them"):
        train(
            recipe(
                method="kto", data=write(tmp_path / "one.jsonl", [{"prompt": "a", "completion": " fox", "label": True}])
            )
        )
    small = {**json.loads(pathlib.Path(base, "config.json").read_text()), "vocab_size": 500}
    save_model(create_model(small), tmp_path / "other", source=base)
    with pytest.raises(EnginepostError, match=r"teacher: .*its vocabulary has 500 tokens"):
        train(recipe(method="distill", teacher=str(tmp_path / "other")))
    with pytest.raises(EnginepostError, match=r"reference: .* has a vocabulary of 500"):
        train(recipe(method="dpo", data=pairs, reference=str(tmp_path / "other")))


def test_distillation_from_a_cache(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole vocabulary in the cache is the live teacher; five tokens are the first of its softmax, and a lower bound."""
    settings = recipe()
    config = json.loads(pathlib.Path(settings["model"], "config.json").read_text())
    teacher = create_model(config, seed=9)
    save_model(teacher, tmp_path / "teacher", source=settings["model"])
    keys: dict[str, Any] = {
        "method": "distill", "teacher": str(tmp_path / "teacher"), "validation": 0.25, "temperature": 1.5, "max_steps": 4,
    }  # fmt: skip
    live = metrics(train(recipe(**keys, output=str(tmp_path / "live"))))
    full = metrics(train(recipe(**keys, output=str(tmp_path / "full"), teacher_top_k=config["vocab_size"])))
    for name in ("loss", "eval_loss"):
        expected = [m[name] for m in live if name in m]
        assert expected and [m[name] for m in full if name in m] == pytest.approx(expected, rel=1e-4)

    few = metrics(train(recipe(**keys, output=str(tmp_path / "few"), teacher_top_k=5)))
    assert 0 < few[0]["loss"] < live[0]["loss"]
    assert capsys.readouterr().out.count("written to") == 2
    with monkeypatch.context() as m:  # the cache is enough
        m.setattr("enginepost.train.methods.distill.load_model", None)
        again = metrics(train(recipe(**keys, output=str(tmp_path / "again"), teacher_top_k=5)))
    assert [m["loss"] for m in again if "loss" in m] == [m["loss"] for m in few if "loss" in m]

    found = methods.create(load_recipe(recipe(**keys, teacher_top_k=5)))
    assert isinstance(found, Distill)
    found.attach(weights.load(found.recipe, torch.float32, None))
    work = found.work([[4, 0, 2]], rows=found.validation)
    batch, rows = work.micro_batches[0], found.validation
    assert rows is not None
    z = (
        teacher.logits(teacher.hidden(batch.ids, batch.cu_seqlens, batch.positions))[batch.targets != -100].double()
        / 1.5
    )
    values, ids = z.log_softmax(-1).topk(5)
    kept_ids, kept = found.shown[id(rows.dataset)].of([int(rows.index[i]) for i in (4, 0, 2)])
    assert torch.equal(kept_ids, ids)
    torch.testing.assert_close(kept.double(), values, rtol=0, atol=1e-5)

    for change in ({"temperature": 1.0}, {"teacher": settings["model"]}, {"train_on": "all"}):
        train(
            recipe(
                **{**keys, **change, "max_steps": 1}, output=str(tmp_path / f"{len(change)}{change}"), teacher_top_k=5
            )
        )
        assert "written to" in capsys.readouterr().out, change
    with pytest.raises(EnginepostError, match=r"teacher_top_k: 100000: the vocabulary has"):
        train(recipe(**keys, output=str(tmp_path / "many"), teacher_top_k=100_000))


@pytest.mark.parametrize("method", ["kto", "reward", "prm", "distill", "distill_from_cache"])
def test_interrupted_and_resumed_has_the_same_bits(
    recipe: MakeRecipe, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    graded: str, pairs: str, steps: str, method: str,
) -> None:  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "kto": {"data": graded},
        "reward": {"data": pairs},
        "prm": {"data": steps},
        "distill": {"teacher": recipe()["model"], "sft_weight": 0.25},
        "distill_from_cache": {"teacher": recipe()["model"], "teacher_top_k": 7, "divergence": "js"},
    }
    keys = {
        "method": method.removesuffix("_from_cache"),
        "validation": 0.25,
        "max_steps": 5,
        "lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        **own[method],
    }
    whole = train(recipe(**keys, output=str(tmp_path / "whole")))
    cut = recipe(**keys, output=str(tmp_path / "cut"))
    with monkeypatch.context() as m:
        interrupt_after(m, 2)
        with pytest.raises(Interrupted, match="after step 2"):
            train(cut)
    train(cut, resume=True)
    assert_same_run(whole, cut["output"])
