"""Runs the tasks of a merge: a few threads, one tensor each, every tensor read, combined and written chunk by chunk.

Inputs are memory maps, so reading is touching pages; while one thread waits for the disk another computes and a third writes. The
private memory is threads x chunk x (bytes that a method needs per element), and the chunk is chosen to keep that within the budget,
so it does not grow with the tensors. The order of the work and the size of chunks do not change a bit of the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from enginepost.kernels import merge as kernel
from enginepost.kernels.merge import BLOCK
from enginepost.merge.apply import merged_chunks, one_thread, place
from enginepost.merge.output import Output
from enginepost.merge.plan import Read, Task
from enginepost.merge.recipe import Recipe
from enginepost.merge.registry import MergeError
from enginepost.merge.tensors import CHUNK, CPU, Chunk, Inputs

Progress = Callable[[int, int, str], None]  # bytes of output finished, bytes in all, tensor just finished


@dataclass(frozen=True)
class Limits:
    """Threads at work; elements of a chunk (methods that work on rows take whole rows, at least one); and the bytes that a thread
    may keep between the passes of its method. device: where methods that can (`Method.gpu`) do their arithmetic."""

    threads: int
    chunk: int
    spare: float
    device: torch.device = CPU


def limits(recipe: Recipe, tasks: list[Task], threads: int | None, budget: float, device: torch.device = CPU) -> Limits:
    """How many threads and what chunk keep private memory within `budget` bytes."""
    inputs = max((len(task.models) + 1 for task in tasks), default=1)
    per_element = 8 * inputs + 40  # float32 of inputs and task vectors, and the temporaries of a combination
    widest = max(
        (
            recipe.method.columns(task.parameters, task.shape)
            for task in tasks
            if not task.copied and recipe.method.rows(task.parameters)
        ),
        default=0,
    )
    least = max(BLOCK, widest)
    wanted = threads or min(8, os.cpu_count() or 1)
    for count in range(wanted, 0, -1):
        chunk = int(budget * 2 / 3 / count / per_element)
        if chunk >= least:
            return Limits(count, min(CHUNK, max(BLOCK, chunk // BLOCK * BLOCK)), budget / 3 / count, device)
    raise MergeError(
        f"a memory budget of {budget / 1e6:.0f} MB is too small for {inputs} models: at least "
        f"{least * per_element * 1.5 / 1e6 + 1:.0f} MB are needed, for one chunk of {least} elements."
    )


def execute(
    recipe: Recipe, tasks: list[Task], output: Output, limit: Limits, *, seed: int = 0, progress: Progress | None = None
) -> None:
    """Make every tensor that `output` does not have yet. Raises MergeError for NaN or Inf in a source, or a full disk."""
    shared = survey(recipe, tasks, limit, seed)
    waiting = sorted((task for task in tasks if task.name not in output.done), key=lambda task: -task.numel)
    finished = sum(task.numel * task.dtype.itemsize for task in tasks if task.name in output.done)
    stop = threading.Event()
    lock = threading.Lock()

    def work(task: Task) -> None:
        nonlocal finished
        if stop.is_set():
            return
        try:
            _make(recipe, task, output, limit, seed, shared, stop)
        except BaseException:
            stop.set()
            raise
        if progress is not None:
            with lock:
                finished += task.numel * task.dtype.itemsize
                progress(finished, output.total_size, task.name)

    with one_thread(), pool_of(limit) as pool:
        futures = [pool.submit(work, task) for task in waiting]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt: let the threads end
            stop.set()
            raise
        for future in done:
            future.result()


def pool_of(limit: Limits) -> ThreadPoolExecutor:
    """Threads that work on one tensor each."""

    def begin() -> None:
        torch.set_num_threads(1)
        if limit.device.type == "cuda":
            torch.cuda.set_device(limit.device)

    return ThreadPoolExecutor(limit.threads, initializer=begin)


def _make(
    recipe: Recipe, task: Task, output: Output, limit: Limits, seed: int, shared: dict[str, Any], stop: threading.Event
) -> None:
    digest = xxhash.xxh3_128()
    if task.copied:
        read = task.reads[0]
        digest.update(output.write(task.name, 0, read.checkpoint.tensor(read.name).reshape(-1)))
    else:
        inputs = inputs_of(recipe, task, limit, seed, shared)

        def check(chunk: Chunk) -> None:
            if not inputs.finite:
                _check(task, chunk)

        for start, piece in merged_chunks(recipe.method, inputs, task.parameters, task.dtype, check):
            digest.update(output.write(task.name, start, piece.cpu()))
            if stop.is_set():
                return
    output.finish(task.name, digest.hexdigest())
    for read in task.reads:
        read.checkpoint.drop(read.name)


def inputs_of(recipe: Recipe, task: Task, limit: Limits, seed: int, shared: dict[str, Any]) -> Inputs:
    """The inputs of a task; `shared`: what `survey` found."""
    inputs = place(recipe.method, task.inputs(recipe, seed, limit.chunk), task.parameters, limit.device)
    inputs.shared, inputs.spare = shared, limit.spare
    return inputs


def _check(task: Task, chunk: Chunk) -> None:
    """NaN and Inf in a source are errors, named and counted."""
    pieces = [*chunk.models, *([chunk.base] if chunk.base is not None else [])]
    for read, piece in zip(task.reads, pieces, strict=True):
        if kernel.nonfinite(piece):
            raise MergeError(_describe(read))


def _describe(read: Read) -> str:
    flat = read.checkpoint.tensor(read.name).reshape(-1)
    nan = sum(int(torch.isnan(flat[i : i + CHUNK]).sum()) for i in range(0, flat.numel(), CHUNK))
    inf = sum(int(torch.isinf(flat[i : i + CHUNK]).sum()) for i in range(0, flat.numel(), CHUNK))
    return (
        f"{read.model}: tensor {read.name} ({read.checkpoint.file(read.name)}) holds {nan} NaN and {inf} infinite values of "
        f"{flat.numel()}. The checkpoint is damaged or its training diverged, and a merge would spread them; no output was made."
    )


def survey(recipe: Recipe, tasks: list[Task], limit: Limits, seed: int) -> dict[str, Any]:
    """What a method decides over the whole model, before the first tensor."""
    method = recipe.method
    whole = [task for task in tasks if not task.copied and method.whole_model(task.parameters)]
    if not whole or method.survey is None:
        return {}
    with one_thread(limit.device):
        facts = method.survey([(inputs_of(recipe, task, limit, seed, {}), task.parameters) for task in whole])
    for task in whole:
        for read in task.reads:
            read.checkpoint.drop(read.name)
    return facts


class Bar:
    """A line of progress on a terminal: share, rate of output, time left."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, transient=False)
        self._task = self._bar.add_task("merging", total=None)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        self._bar.start()  # with the first tensor, so that an error before it stands alone
        self._bar.update(self._task, completed=done, total=total)
