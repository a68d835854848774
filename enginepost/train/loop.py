"""The training loop. One optimizer step:

    for each micro-batch (a pack of bins, one flat stream of tokens):
        hidden   = model.hidden(ids, cu_seqlens, positions)          [T, H]
        logprob  = linear_logprob(hidden, head, targets)             [T]; no [T, V] anywhere
        objective(logprob, N).backward()                             N = trained tokens of the whole step
    clip by the global norm, AdamW, next learning rate

Nothing in it depends on how a run was cut into processes: what a step does follows from the recipe, the data and the step's number.
"""

import hashlib
import json
import math
import os
import pathlib
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from enginepost.data import Batch, plan_batches
from enginepost.errors import EnginepostError
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.recipe import Recipe, load_recipe
from enginepost.train import weights
from enginepost.train.monitor import Monitor, SpikeWatch, resident_bytes
from enginepost.train.objectives.sft import sft_loss
from enginepost.train.optimizer import AdamW
from enginepost.train.rows import Rows, fingerprint, load_rows
from enginepost.train.schedule import Plan, learning_rate
from enginepost.train.state import RunDirectory, read_state, trainer_state, write_file

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LISTED_ROWS = 8  # rows named in an error; a pack may hold hundreds


class TrainingError(EnginepostError):
    """Training stopped: the message names the step and the rows."""


class Interrupted(EnginepostError):
    """Training stopped on SIGINT or SIGTERM, after a checkpoint. `signal` is the number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def train(recipe: str | os.PathLike[str] | Mapping[str, Any], *, resume: bool = False, **overrides: Any) -> str:
    """Train as the recipe says and return the run directory.

    Args: recipe: a YAML file or a mapping of its keys; resume: go on from the newest checkpoint of the run directory (from the
    beginning when it has none yet); overrides: recipe keys, the nested ones as `**{"lora.r": 8}`.
    Raises: EnginepostError for anything wrong with recipe, data, model or directory; Interrupted after Ctrl-C or SIGTERM.
    """
    settings = load_recipe(recipe, overrides)
    assert settings.output is not None
    with RunDirectory(settings, resume=resume) as run:
        result = run.path / ("model" if settings.lora is None else "adapter")
        if result.exists():
            print(f"{run.path} is complete: {result}")
            return settings.output
        _train(settings, run, result, command=_resume_command(recipe, overrides))
    return settings.output


def _train(recipe: Recipe, run: RunDirectory, result: pathlib.Path, command: str) -> None:
    rows, validation = load_rows(recipe)
    data = fingerprint(rows)
    checkpoint = next(reversed(run.checkpoints()), None)
    state = read_state(checkpoint) if checkpoint else None
    if state and state["enginepost"]["data"] != data:
        raise TrainingError(f"{checkpoint}: cannot resume: the training rows are not those the run began with")
    model = weights.load(recipe, DTYPES[recipe.dtype], checkpoint)
    optimizer = AdamW(
        weights.trainable(model),
        betas=(recipe.betas[0], recipe.betas[1]),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
    )
    step = 0
    history: list[dict[str, Any]] = []
    tokens = 0
    if state and checkpoint:
        step, history, tokens = state["global_step"], state["log_history"], state["num_input_tokens_seen"]
        weights.load_optimizer(optimizer, checkpoint, step)
    plan = Plan(rows.lengths, recipe)
    write_file(run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    monitor = Monitor(run.path, total=plan.total, step=step, history=history, tensorboard=recipe.tensorboard)

    def save(step: int, epoch: float) -> pathlib.Path:
        state = trainer_state(
            recipe,
            step=step,
            total=plan.total,
            epoch=epoch,
            tokens=tokens,
            history=monitor.history,
            data=data,
        )
        return run.save(step, lambda d: weights.save(recipe, model, optimizer, d), state)

    try:
        monitor.say(_summary(recipe, model, rows, validation, plan, checkpoint, step))
        spikes, mark, since = SpikeWatch(), time.perf_counter(), tokens
        with stop_signals() as stopped:
            while step < plan.total:
                step += 1
                todo = plan.step(step)
                batches = [rows.batch(micro) for micro in todo.micro_batches]
                lr = learning_rate(step, plan.total, recipe)
                loss, entropy, norm = optimizer_step(model, optimizer, batches, recipe, step=step, lr=lr, run=run)
                run.begun = True
                tokens += sum(len(b.ids) for b in batches)
                advice = spikes.check(norm)
                if advice:
                    monitor.say(f"step {step}: {advice}. Rows: {_listed(batches)}")
                if step == 1 or step == plan.total or step % recipe.log_every == 0:
                    now = time.perf_counter()
                    monitor.log(
                        {
                            "step": step,
                            "epoch": round(todo.epoch, 6),
                            "loss": loss,
                            "entropy": entropy,
                            "grad_norm": norm,
                            "learning_rate": lr,
                            "num_tokens": tokens,
                            "tokens_per_second": (tokens - since) / (now - mark),
                            "memory_gb": resident_bytes() / 1e9,
                            "elapsed_seconds": now - monitor.start,
                        }
                    )
                    mark, since = now, tokens
                if validation is not None and _due(step, recipe.eval_every, todo.ends_epoch, step == plan.total):
                    before = time.perf_counter()
                    monitor.log(
                        {
                            "step": step,
                            "epoch": round(todo.epoch, 6),
                            "eval_loss": evaluate(model, validation, recipe),
                        }
                    )
                    mark += time.perf_counter() - before  # tokens_per_second is that of training
                if stopped():
                    place = save(step, todo.epoch)
                    name = signal.Signals(stopped()).name
                    raise Interrupted(
                        f"stopped by {name} after step {step} of {plan.total}; saved {place}\ncontinue with: {command}",
                        stopped(),
                    )
                if step % recipe.save_every == 0 and step < plan.total:
                    save(step, todo.epoch)
        run.write_directory(result, lambda d: weights.save_result(recipe, model, d))
        monitor.say(f"done: {result}")
    finally:
        monitor.close()


def optimizer_step(
    model: Any,
    optimizer: AdamW,
    batches: list[Batch],
    recipe: Recipe,
    *,
    step: int,
    lr: float,
    run: RunDirectory | None = None,
) -> tuple[float, float, float]:
    """Forward and backward over the micro-batches, clip, update. Returns (loss and entropy in nats per trained token, gradient norm
    before clipping). Raises TrainingError, the weights untouched, when loss or norm is not finite."""
    optimizer.zero_grad()
    loss, entropy = accumulate(model, batches, recipe, step=step, run=run)
    norm = optimizer.grad_norm()
    if not math.isfinite(norm):
        raise _not_finite(f"the gradient norm became {norm}", step, batches, run)
    scale = 1.0 if recipe.clip is None or norm <= recipe.clip else recipe.clip / norm
    optimizer.step(lr=lr, grad_scale=scale)
    return loss, entropy, norm


def accumulate(
    model: Any, batches: list[Batch], recipe: Recipe, *, step: int = 1, run: RunDirectory | None = None
) -> tuple[float, float]:
    """Add the gradients of the mean loss over all trained tokens of `batches`; returns loss and mean entropy."""
    count = sum(int((b.targets != -100).sum()) for b in batches)
    if count == 0:
        raise TrainingError(f"step {step}: no token of its rows is trained on: {_listed(batches)}")
    total = spread = 0.0
    for index, batch in enumerate(batches):
        model.dropout_seed = step_seed(recipe.seed, step, index)
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob, _, entropy = linear_logprob(
            hidden, model.head_weight, batch.targets, softcap=model.spec.final_softcap, entropy=True
        )
        loss = sft_loss(logprob, count)
        value = loss.item()
        if not math.isfinite(value):
            raise _not_finite(
                f"the loss became {value} in micro-batch {index + 1} of {len(batches)}", step, [batch], run
            )
        loss.backward()
        total += value
        spread += entropy.detach().sum().item() / count
    return total, spread


@torch.no_grad()
def evaluate(model: Any, rows: Rows, recipe: Recipe) -> float:
    """Mean loss in nats per trained token of the validation rows."""
    plan = plan_batches(
        rows.lengths,
        batch_size=recipe.batch_size,
        max_length=recipe.max_length,
        packing=recipe.packing,
    )
    model.eval()
    total, count = 0.0, 0
    for micro in plan:
        batch = rows.batch(micro)
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob, _, _ = linear_logprob(hidden, model.head_weight, batch.targets, softcap=model.spec.final_softcap)
        total += sft_loss(logprob, 1).item()
        count += int((batch.targets != -100).sum())
    model.train()
    return total / max(count, 1)


def step_seed(seed: int, step: int, micro_batch: int) -> int:
    """Key of all randomness in one micro-batch (dropout)."""
    digest = hashlib.blake2b(f"{seed}:{step}:{micro_batch}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within, the first SIGINT or SIGTERM is only noted (the function given returns its number, else 0); a second one quits."""
    received = 0

    def note(number: int, frame: Any) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = number
        print("\nstopping after this step; once more to quit at once", flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _due(step: int, every: int | None, ends_epoch: bool, last: bool) -> bool:
    return last or (ends_epoch if every is None else step % every == 0)


def _listed(batches: list[Batch]) -> str:
    rows = [row for b in batches for row in b.rows]
    more = f" and {len(rows) - LISTED_ROWS} more" if len(rows) > LISTED_ROWS else ""
    return ", ".join(rows[:LISTED_ROWS]) + more


def _not_finite(what: str, step: int, batches: list[Batch], run: RunDirectory | None) -> TrainingError:
    saved = run.checkpoints() if run else []
    last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return TrainingError(
        f"step {step}: {what}; training stopped before the update and {last}. Rows: {_listed(batches)}. Look at these rows, lower "
        "learning_rate, or try dtype=fp32"
    )


def _resume_command(recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    if isinstance(recipe, Mapping):
        return "enginepost.train(..., resume=True)"
    keys = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    return shlex.join(["enginepost", "train", os.fspath(recipe), *keys, "--resume"])


def _summary(
    recipe: Recipe,
    model: nn.Module,
    rows: Rows,
    validation: Rows | None,
    plan: Plan,
    checkpoint: pathlib.Path | None,
    step: int,
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    kind = "full fine-tuning" if recipe.lora is None else f"LoRA r {recipe.lora.r}"
    begin = f"resuming from {checkpoint} at step {step}" if checkpoint else "from the beginning"
    return (
        f"{recipe.method}, {kind}, {recipe.dtype}: {_short(trained)} of {_short(total)} parameters trained; "
        f"{len(rows)} sequences, {0 if validation is None else len(validation)} for validation; {plan.total} steps, {begin}"
    )


def _short(n: int) -> str:
    """1234567 -> "1.2M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
