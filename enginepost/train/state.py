"""The run directory, which is whole at every instant: whatever is in it under its own name was written completely.

    recipe.yaml           every key of the run
    metrics.jsonl         one line a logged step
    checkpoint-<step>/    adapter or model in the field's format; optimizer.safetensors; recipe.yaml; trainer_state.json;
                         method.safetensors where the method keeps something of its own
    adapter/ or model/    the result, once the run is complete

The process that trains holds a lock on the run directory. A directory is written under a hidden name, every file and the directory
fsynced, then renamed; it is deleted by renaming it to a hidden name first. What a killed process left under a hidden name is
removed when the next one starts. A run that failed before its first step (a mistake in the data) leaves nothing behind.

There is no random state to save: dropout is keyed by (seed, step, micro-batch) and the order of rows by (seed, epoch), so the step
number is the data cursor and the generator in one.
"""

import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

from enginepost.checkpoint import CheckpointError
from enginepost.errors import EnginepostError
from enginepost.recipe import FREE_ON_RESUME, Recipe, changed_keys, load_recipe

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(EnginepostError):
    """The run directory cannot be used as asked, or cannot be written."""


class RunDirectory:
    """An open (locked) run directory. Use as a context manager."""

    def __init__(self, recipe: Recipe, *, resume: bool) -> None:
        """Create and lock the directory, or with `resume` take up what is there.

        Raises: RunError when the directory has something in it and `resume` is false, is no run directory, is in use, or its recipe
        differs in a key that would change the weights.
        """
        assert recipe.output is not None
        self.path = pathlib.Path(recipe.output)
        self.keep_last = recipe.keep_last
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: output is a file; give a directory")
        present = [p for p in self.path.iterdir() if not _ours(p)] if self.path.exists() else []
        saved = self.path / "recipe.yaml"
        if present and not resume:
            raise RunError(
                f"{self.path}: the run directory is not empty; continue that run with --resume, or choose another with "
                "output=DIRECTORY"
            )
        if present and not saved.exists():
            raise RunError(f"{self.path}: cannot resume: this is not a run directory (it has no recipe.yaml)")
        with writing(f"the run directory {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise RunError(f"{self.path}: another process is training into this directory") from None
        try:
            if saved.exists():
                self._check_recipe(load_recipe(saved), recipe)
            for leftover in self.path.glob(".*.partial"):
                _remove(leftover)
            write_file(saved, recipe.dump())
        except BaseException:
            os.close(self._lock)
            raise
        self.begun = bool(present)  # has anything been learned: set by the loop after its first step

    def _check_recipe(self, before: Recipe, after: Recipe) -> None:
        changed = changed_keys(before, after)
        if changed:
            a, b = before.model_dump(), after.model_dump()
            lines = [f"  {key}: {_dig(a, key)} -> {_dig(b, key)}" for key in changed]
            raise RunError(
                f"{self.path}: cannot resume with a changed recipe, as the result would be that of neither:\n"
                + "\n".join(lines)
                + "\nPut the old values back, or start a new run with output=DIRECTORY. "
                + f"({', '.join(sorted(FREE_ON_RESUME))} may change.)"
            )

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.begun:
            for name in ("recipe.yaml", "metrics.jsonl"):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        os.close(self._lock)

    def checkpoints(self) -> list[pathlib.Path]:
        """Complete checkpoints, oldest first."""
        found = [(int(m[1]), p) for p in self.path.iterdir() if (m := _CHECKPOINT.fullmatch(p.name))]
        return [p for _, p in sorted(found)]

    def save(self, step: int, write: Callable[[pathlib.Path], None], state: dict[str, Any]) -> pathlib.Path:
        """Write `checkpoint-<step>` and then delete all but the last `keep_last`.

        Args: write(directory) puts the tensors there; state: what goes to trainer_state.json.
        Raises: RunError when it cannot be written (a full disk); the checkpoints before it are untouched.
        """
        target = self.path / f"checkpoint-{step}"
        if not target.exists():

            def everything(directory: pathlib.Path) -> None:
                write(directory)
                shutil.copyfile(self.path / "recipe.yaml", directory / "recipe.yaml")
                (directory / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")

            self.write_directory(target, everything)
        for old in self.checkpoints()[: -self.keep_last]:
            hidden = self.path / f".{old.name}.partial"
            old.rename(hidden)
            shutil.rmtree(hidden)
        return target

    def write_directory(self, target: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
        """Run `write` on a hidden directory, make it durable, and give it its name."""
        partial = self.path / f".{target.name}.partial"
        last = self.checkpoints()
        intact = (
            f"{last[-1]} is intact; make room and continue with --resume"
            if last
            else "no checkpoint was written before it"
        )
        try:
            with writing(str(target), intact):
                _remove(partial)
                partial.mkdir()
                write(partial)
                _sync_tree(partial)
                partial.rename(target)
                _sync(self.path)
        except BaseException:
            _remove(partial)
            raise


def read_state(checkpoint: pathlib.Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint / 'trainer_state.json'}: cannot read the state of the run: {error}") from None
    assert isinstance(state, dict)
    return state


def trainer_state(
    recipe: Recipe,
    *,
    step: int,
    total: int,
    epoch: float,
    tokens: int,
    history: list[dict[str, Any]],
    data: str,
    method: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    """The state in the shape of transformers' TrainerState, which plotting tools read; `enginepost` holds what is ours."""
    evaluations = [m for m in history if "eval_loss" in m]
    best = min(evaluations, key=lambda m: m["eval_loss"], default=None)
    return {
        "best_global_step": best["step"] if best else None,
        "best_metric": best["eval_loss"] if best else None,
        "best_model_checkpoint": None,
        "epoch": epoch,
        "eval_steps": recipe.eval_every,
        "global_step": step,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": history,
        "logging_steps": recipe.log_every,
        "max_steps": total,
        "num_input_tokens_seen": tokens,
        "num_train_epochs": recipe.epochs,
        "save_steps": recipe.save_every,
        "stateful_callbacks": {},
        "total_flos": 0,
        "train_batch_size": recipe.batch_size,
        "trial_name": None,
        "trial_params": None,
        "enginepost": {"data": data, "method": method, "device": device},
    }


class writing:
    """Context that turns a failure to write (a full disk, no permission) into a RunError about `what`."""

    def __init__(self, what: str, consequence: str = "") -> None:
        self.what, self.consequence = what, consequence

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, CheckpointError)):
            reason = error.strerror or error if isinstance(error, OSError) else error
            after = f". {self.consequence}" if self.consequence else ""
            raise RunError(f"cannot write {self.what}: {reason}{after}") from error


def write_file(path: pathlib.Path, text: str) -> None:
    """Replace a small file in one step: hidden file, fsync, rename."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(str(path)):
        with open(partial, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
        _sync(path.parent)


def _ours(path: pathlib.Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(directory: pathlib.Path) -> None:
    for parent, _, files in os.walk(directory):
        for name in files:
            _sync(pathlib.Path(parent, name))
        _sync(pathlib.Path(parent))


def _dig(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values
