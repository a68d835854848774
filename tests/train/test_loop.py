"""The loop: it learns, its metrics are right, and how rows are cut into micro-batches changes nothing."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from whole_runs import metrics

from enginepost.kernels.linear_logprob import reference as logprob_reference
from enginepost.recipe import load_recipe
from enginepost.train import weights
from enginepost.train.loop import DTYPES, accumulate, train
from enginepost.train.methods.sft import Sft
from enginepost.train.rows import Rows, load_rows
from enginepost.train.schedule import Plan, learning_rate

MakeRecipe = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_it_learns(recipe: MakeRecipe, dtype: str, lora: Any) -> None:
    run = train(recipe(dtype=dtype, lora=lora, max_steps=10, learning_rate=1e-2, validation=0.2, eval_every=5))
    lines = metrics(run)
    losses = [m["loss"] for m in lines if "loss" in m]
    evaluations = [m["eval_loss"] for m in lines if "eval_loss" in m]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.2
    assert len(evaluations) == 2 and evaluations[-1] < losses[0] - 0.2


def test_metrics_are_what_they_say(recipe: MakeRecipe) -> None:
    settings = recipe(max_steps=5, validation=0.25, clip=None)
    run = train(settings)
    lines = metrics(run)
    steps = [m for m in lines if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4, 5]
    r = load_recipe(settings)
    rows, validation = load_rows(r)
    assert validation is not None and len(validation) == 6 and len(rows) == 18
    plan = Plan(rows.lengths, r)
    tokens = 0
    for m in steps:
        step = plan.step(m["step"])
        tokens += sum(int(rows.lengths[i]) for micro in step.micro_batches for i in micro)
        assert m["num_tokens"] == tokens
        assert m["epoch"] == pytest.approx(step.epoch, abs=1e-6)
        assert m["learning_rate"] == learning_rate(m["step"], 5, r)
        assert m["tokens_per_second"] > 0 and m["memory_gb"] > 0.05
    ends = [m["step"] for m in steps if plan.step(m["step"]).ends_epoch]
    assert [m["step"] for m in lines if "eval_loss" in m] == sorted({*ends, 5})
    assert steps[0]["elapsed_seconds"] < steps[-1]["elapsed_seconds"]


def test_first_loss_is_that_of_plain_torch(recipe: MakeRecipe) -> None:
    """Row by row, with full logits and torch's cross entropy, against the loop's packed loss."""
    settings = recipe(max_steps=1)
    loss = metrics(train(settings))[0]["loss"]
    r = load_recipe(settings)
    rows, _ = load_rows(r)
    model = weights.load(r, torch.float32, None)
    total, count = 0.0, 0
    for i in (i for micro in Plan(rows.lengths, r).step(1).micro_batches for i in micro):
        s = rows.dataset[i]
        ids = torch.from_numpy(s.ids.astype("int64"))
        with torch.no_grad():
            hidden = model.hidden(ids, torch.tensor([0, len(ids)], dtype=torch.int32), torch.arange(len(ids)))
            logits = model.logits(hidden)[:-1].double()
        targets = torch.where(torch.from_numpy(s.labels)[1:], ids[1:], torch.tensor(-100))
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    assert loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_cut_of_rows_changes_neither_loss_nor_gradients(recipe: MakeRecipe, lora: Any) -> None:
    """8 rows as 1 x 8, 8 x 1, 2 x 4, packed and with recomputation: the same to 1e-6 relative in float32."""
    r = load_recipe(recipe(lora=lora))
    method = Sft(r)
    model = weights.load(r, torch.float32, None)
    if lora:  # B starts at zero, which would make every gradient of A zero
        with torch.no_grad():
            for name, p in weights.trainable(model).items():
                if name.endswith(".B"):
                    p.normal_(0, 0.02, generator=torch.Generator().manual_seed(len(name)))

    def run(cut: list[list[int]], checkpointing: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        model.checkpointing = checkpointing
        loss, _ = accumulate(model, method, method.work(cut))
        return loss, {n: p.grad.clone() for n, p in weights.trainable(model).items() if p.grad is not None}

    loss, gradients = run([list(range(8))])
    assert len(gradients) == len(weights.trainable(model)) and all(g.abs().max() > 0 for g in gradients.values())
    cuts: dict[str, tuple[list[list[int]], bool]] = {
        "8x1": ([[i] for i in range(8)], False),
        "2x4": ([[0, 1, 2, 3], [4, 5, 6, 7]], False),
        "packed": ([[5, 2, 7], [0, 6], [3], [1, 4]], False),
        "recomputed": ([list(range(8))], True),
    }
    for name, (cut, checkpointing) in cuts.items():
        other, theirs = run(cut, checkpointing)
        assert other == pytest.approx(loss, rel=1e-6), name
        for key, g in gradients.items():
            error = (theirs[key] - g).norm() / g.norm()
            assert error < 1e-6, f"{name} {key}: {error:.2e}"


def test_packed_and_unpacked_runs_end_alike(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    """One step over all rows (so the order is no matter), packed or one row a bin, gives the same loss and norm."""
    a = metrics(train(recipe(max_steps=1, packing=True, gradient_accumulation=64)))[0]
    b = metrics(
        train(recipe(max_steps=1, packing=False, batch_size=1, gradient_accumulation=64, output=str(tmp_path / "b")))
    )[0]
    assert a["num_tokens"] == b["num_tokens"]
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)


def test_bf16_full_accumulates_in_float32(recipe: MakeRecipe) -> None:
    """Over 8 micro-batches the float32 accumulator is nearer to the float32 gradient than a bfloat16 sum."""
    from enginepost.train.optimizer import AdamW

    r = load_recipe(recipe(lora=None, dtype="bf16", checkpointing=False))
    method = Sft(r)
    work = method.work([[i] for i in range(16)])
    model = weights.load(r, torch.bfloat16, None)
    accumulate(model, method, work)
    summed = {n: p.grad.float().clone() for n, p in model.named_parameters()}  # torch's own sum, in bfloat16
    model.zero_grad()
    optimizer = AdamW(weights.trainable(model), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    accumulate(model, method, work)
    assert all(p.grad is None for p in model.parameters())
    ours = optimizer.gradients()
    exact: dict[str, torch.Tensor] = {}
    plain = weights.load(r, torch.bfloat16, None)
    for batch in work.micro_batches:
        hidden = plain.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob, _, _ = logprob_reference(hidden, plain.head_weight, batch.targets)
        plain.zero_grad()
        (-logprob.sum() / work.count).backward()
        for n, p in plain.named_parameters():
            exact[n] = exact.get(n, torch.zeros(())) + p.grad.double()
    near = sum(float((ours[n] - exact[n]).norm() ** 2) for n in exact)
    far = sum(float((summed[n] - exact[n]).norm() ** 2) for n in exact)
    assert near < far / 2


def test_validation_rows_are_not_trained_on(recipe: MakeRecipe) -> None:
    rows, validation = load_rows(load_recipe(recipe(validation=0.3)))
    assert validation is not None
    assert sorted([*rows.index, *validation.index]) == list(range(24)) and len(validation) == 7
    again = load_rows(load_recipe(recipe(validation=0.3, seed=1)))[1]
    assert again is not None and set(again.index) != set(validation.index)


def test_pieces_of_a_document_stay_on_one_side(recipe: MakeRecipe, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} the quick brown fox " * 20}) + "\n" for i in range(6)))
    rows, validation = load_rows(load_recipe(recipe(data=str(file), method="pretrain", max_length=32, validation=0.4)))
    assert isinstance(validation, Rows)
    left, right = ({rows.dataset[int(i)].row for i in side.index} for side in (rows, validation))
    assert len(rows) > 6 and left and right and not left & right


def test_tensorboard(recipe: MakeRecipe) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(recipe(max_steps=2, tensorboard=True, validation=0.2))
    events = EventAccumulator(str(pathlib.Path(run, "tensorboard")))
    events.Reload()
    losses = [m["loss"] for m in metrics(run) if "loss" in m]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)
    assert len(events.Scalars("eval/loss")) >= 1


def test_callable_package(recipe: MakeRecipe) -> None:
    """`enginepost.train(...)` is the trainer before and after its modules are imported."""
    import enginepost

    run = enginepost.train(recipe(), max_steps=1)  # type: ignore[operator]
    assert metrics(run)[-1]["step"] == 1 and math.isfinite(metrics(run)[-1]["loss"])
    assert enginepost.train.loop.DTYPES is DTYPES  # type: ignore[attr-defined]
