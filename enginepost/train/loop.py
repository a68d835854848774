"""The training loop. One optimizer step:

    work = method.step(model, step)              micro-batches (packs of bins, one flat stream of tokens each)
    for each micro-batch:
        method.loss(model, work, i).backward()   its share: divided by what the whole step is divided by
    clip by the global norm, AdamW, next learning rate

What differs between methods is behind `enginepost.train.methods`. Nothing here depends on how a run was cut into processes: what a
step does follows from the recipe, the data and the step's number.
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

from enginepost.device import choose, deterministic, fetch
from enginepost.errors import EnginepostError
from enginepost.model.layout import layout
from enginepost.model.residency import WeightsError
from enginepost.model.spec import ModelSpec
from enginepost.recipe import Recipe, load_recipe
from enginepost.train import budget, methods, weights
from enginepost.train.heap import LARGE, SMALL, give_back
from enginepost.train.methods.method import Method, Metrics, MicroBatch, Work, add_metrics, mean_metrics
from enginepost.train.monitor import Monitor, SpikeWatch, memory_used
from enginepost.train.optimizer import AdamW, NotFinite
from enginepost.train.schedule import learning_rate
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
        complete = [run.path / name for name in ("model", "adapter") if (run.path / name).exists()]
        if complete:
            print(f"{run.path} is complete: {complete[0]}")
            return settings.output
        _train(settings, run, command=_resume_command(recipe, overrides))
    return settings.output


def _train(recipe: Recipe, run: RunDirectory, command: str) -> None:
    device = choose(recipe.device, say=print)
    recipe = recipe.model_copy(update={"device": str(device)})
    method = methods.create(recipe)
    method.recipe = recipe = budget.settle(recipe, say=print)
    give_back(SMALL if recipe.checkpointing else LARGE)
    with budget.guarded(recipe), deterministic(device):
        _steps(recipe, run, method, command)


def _steps(recipe: Recipe, run: RunDirectory, method: Method, command: str) -> None:
    checkpoint = next(reversed(run.checkpoints()), None)
    state = read_state(checkpoint) if checkpoint else None
    if state and state["enginepost"]["data"] != method.data:
        raise TrainingError(f"{checkpoint}: cannot resume: the training rows are not those the run began with")
    began = state["enginepost"].get("device", "cpu") if state else method.device.type
    if began != method.device.type:
        print(
            f"note: the run began on {began} and goes on on {method.device.type}, whose kernels round otherwise",
            flush=True,
        )
    model = weights.load(recipe, DTYPES[recipe.dtype], checkpoint)
    method.attach(model)
    optimizer = AdamW(
        {**weights.trainable(model), **method.module_tensors()},
        betas=(recipe.betas[0], recipe.betas[1]),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        bits=8 if recipe.optimizer == "adamw8bit" else 32,
        in_backward=recipe.optimizer_in_backward,
        host=recipe.optimizer_states == "host",
    )
    step = 0
    history: list[dict[str, Any]] = []
    tokens = 0
    if state and checkpoint:
        step, history, tokens = state["global_step"], state["log_history"], state["num_input_tokens_seen"]
        weights.load_method(method.module_tensors(), checkpoint)
        weights.load_optimizer(optimizer, checkpoint, step)
        method.restore(state["enginepost"].get("method", {}), weights.read_method(checkpoint))
    else:
        method.begin(model)
    write_file(run.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    monitor = Monitor(run.path, total=method.total, step=step, history=history, tensorboard=recipe.tensorboard)

    def save(step: int, epoch: float) -> pathlib.Path:
        state = trainer_state(
            recipe,
            step=step,
            total=method.total,
            epoch=epoch,
            tokens=tokens,
            history=monitor.history,
            data=method.data,
            method=method.state(),
            device=method.device.type,
        )
        tensors = {**method.module_tensors(), **method.tensors()}
        return run.save(step, lambda d: weights.save(recipe, model, optimizer, d, tensors), state)

    try:
        monitor.say(_summary(recipe, model, method, checkpoint, step))
        epoch = 0.0  # passed at the end of the step before
        spikes, mark, since = SpikeWatch(), time.perf_counter(), tokens
        with stop_signals() as stopped:
            while step < method.total:
                step += 1
                work = method.step(model, step)
                lr = learning_rate(step, method.total, recipe)
                try:
                    loss, metrics, norm = optimizer_step(model, optimizer, method, work, step=step, lr=lr, run=run)
                except WeightsError as error:  # nothing of this step has been learned: what was before it can be kept
                    kept = step > 1 and not method.state() and not method.tensors()
                    saved = f"; saved {save(step - 1, epoch)}" if kept else ""
                    raise WeightsError(f"step {step}: {error}{saved}\ncontinue with: {command}") from None
                epoch = work.epoch
                method.updated(model, work)
                run.begun = True
                tokens += work.tokens
                last = step == method.total
                advice = spikes.check(norm)
                if advice:
                    monitor.say(f"step {step}: {advice}. Rows: {_listed(work.micro_batches)}")
                if step == 1 or last or step % recipe.log_every == 0:
                    now = time.perf_counter()
                    monitor.log(
                        {
                            "step": step,
                            "epoch": round(work.epoch, 6),
                            "loss": loss,
                            **metrics,
                            **dict(zip(work.metrics, fetch(list(work.metrics.values())), strict=True)),
                            "grad_norm": norm,
                            "learning_rate": lr,
                            "num_tokens": tokens,
                            "tokens_per_second": (tokens - since) / (now - mark),
                            **memory_used(method.device),
                            "elapsed_seconds": now - monitor.start,
                        }
                    )
                    mark, since = now, tokens
                if _due(step, recipe.eval_every, work.ends_epoch, last):
                    before = time.perf_counter()
                    evaluation = method.evaluate(model)
                    if evaluation is not None:
                        monitor.log({"step": step, "epoch": round(work.epoch, 6), **evaluation})
                    mark += time.perf_counter() - before  # tokens_per_second is that of training
                if stopped():
                    place = save(step, work.epoch)
                    name = signal.Signals(stopped()).name
                    raise Interrupted(
                        f"stopped by {name} after step {step} of {method.total}; saved {place}\ncontinue with: {command}",
                        stopped(),
                    )
                if step % recipe.save_every == 0 and not last:
                    save(step, work.epoch)
        result = run.path / method.result_name()
        run.write_directory(result, lambda d: method.save_result(model, d))
        monitor.say(f"done: {result}")
    finally:
        monitor.close()


def optimizer_step(
    model: Any,
    optimizer: AdamW,
    method: Method,
    work: Work,
    *,
    step: int,
    lr: float,
    run: RunDirectory | None = None,
) -> tuple[float, dict[str, float], float]:
    """Forward and backward over the micro-batches, clip, update. Returns (loss, metrics, gradient norm before clipping).

    Raises TrainingError when loss or norm is not finite: the weights untouched, but for a norm with `optimizer_in_backward`."""
    recipe = method.recipe
    if optimizer.in_backward and len(work.micro_batches) != 1:
        raise TrainingError(
            f"step {step}: {recipe.method} makes {len(work.micro_batches)} micro-batches of it, and with optimizer_in_backward "
            "the first would move the weights before the others have been seen; remove the key optimizer_in_backward"
        )
    optimizer.zero_grad(lr=lr)
    try:
        loss, metrics = accumulate(model, method, work, step=step, run=run)
    except NotFinite as error:
        raise _not_finite(str(error), step, work.micro_batches, run, "in the middle of") from None
    norm = optimizer.grad_norm()
    if not math.isfinite(norm):
        raise _not_finite(f"the gradient norm became {norm}", step, work.micro_batches, run)
    scale = 1.0 if recipe.clip is None or norm <= recipe.clip else recipe.clip / norm
    optimizer.step(lr=lr, grad_scale=scale)
    return loss, metrics, norm


def accumulate(
    model: Any, method: Method, work: Work, *, step: int = 1, run: RunDirectory | None = None
) -> tuple[float, dict[str, float]]:
    """Add the gradients of the loss of a step; returns the loss (for sft nats per trained token) and the metrics."""
    losses: list[torch.Tensor] = []
    metrics: Metrics = {}

    def finite(value: float, index: int) -> None:
        if not math.isfinite(value):
            where = f"micro-batch {index + 1} of {len(work.micro_batches)}"
            raise _not_finite(f"the loss became {value} in {where}", step, [work.micro_batches[index]], run)

    for index in range(len(work.micro_batches)):
        model.dropout_seed = step_seed(method.recipe.seed, step, index)
        loss, share = method.loss(model, work, index)
        if loss.device.type == "cpu":
            finite(loss.item(), index)
        loss.backward()
        losses.append(loss.detach())
        add_metrics(metrics, share)
    values = fetch(losses)  # on a GPU the first time that a step waits for it
    for index, value in enumerate(values):
        finite(value, index)
    return sum(values), mean_metrics(metrics)


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


def _listed(batches: list[MicroBatch]) -> str:
    rows = [row for b in batches for row in b.rows]
    more = f" and {len(rows) - LISTED_ROWS} more" if len(rows) > LISTED_ROWS else ""
    return ", ".join(rows[:LISTED_ROWS]) + more


def _not_finite(
    what: str, step: int, batches: list[MicroBatch], run: RunDirectory | None, when: str = "before"
) -> TrainingError:
    saved = run.checkpoints() if run else []
    last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
    return TrainingError(
        f"step {step}: {what}; training stopped {when} the update and {last}. Rows: {_listed(batches)}. Look at these rows, lower "
        "learning_rate, or try dtype=fp32"
    )


def _resume_command(recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    if isinstance(recipe, Mapping):
        return "enginepost.train(..., resume=True)"
    keys = [
        f"{key}={value if isinstance(value, str) else json.dumps(value, default=repr)}"
        for key, value in overrides.items()
    ]
    return shlex.join(["enginepost", "train", os.fspath(recipe), *keys, "--resume"])


def _frozen_elements(spec: ModelSpec) -> int:
    """Of the linear layers of the blocks, where these are no parameters."""
    return sum(math.prod(entry.shape) for entry in layout(spec) if entry.linear)


def _summary(recipe: Recipe, model: Any, method: Method, checkpoint: pathlib.Path | None, step: int) -> str:
    parameters = [*model.parameters(), *method.module_tensors().values()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters) + (_frozen_elements(model.spec) if model.frozen else 0)
    kind = "full fine-tuning" if recipe.lora is None else f"LoRA r {recipe.lora.r}"
    if recipe.quantize is not None:
        kind += f" over {recipe.quantize}"
    if recipe.weights != "resident":
        kind += f", weights on {recipe.weights}"
    begin = f"resuming from {checkpoint} at step {step}" if checkpoint else "from the beginning"
    return (
        f"{recipe.method}, {kind}, {recipe.dtype} on {method.device}: {_short(trained)} of {_short(total)} parameters "
        f"trained; {method.size}; {method.total} steps, {begin}"
    )


def _short(n: int) -> str:
    """1234567 -> "1.2M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
