"""Train, kill at a random moment, look at what is left, resume, until the run is complete; then compare with an unbroken run.

    python kill_driver.py RECIPE.json KILLS SEED

At least KILLS times, and on until one landed in the middle of a save.
Each attempt is a fork of this process, which has made the unbroken run itself, so an attempt costs no start-up. (One thread: a pool
of threads would not survive the fork.) Prints one JSON line: {"kills", "runs", "saves_hit"}
where saves_hit counts kills that left a half-written directory behind.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import torch

from enginepost.checkpoint import Checkpoint
from enginepost.recipe import load_recipe
from enginepost.train.loop import train


def attempt(recipe: dict, seconds: float | None) -> bool:
    """One process that trains or resumes, killed after `seconds`; True when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
            train(recipe, resume=True)
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise SystemExit(f"an attempt failed with status {os.WEXITSTATUS(status)}")
    return True


def check(run: pathlib.Path) -> bool:
    """Everything that is in the directory under its own name is whole. True when something hidden was left half-written."""
    if not run.exists():
        return False
    for directory in [*run.glob("checkpoint-*"), *run.glob("adapter"), *run.glob("model")]:
        for file in directory.glob("*.safetensors"):
            checkpoint = Checkpoint(file)
            assert all(torch.isfinite(checkpoint.tensor(n)).all() for n in checkpoint.names), file
        if directory.name.startswith("checkpoint-"):
            assert json.loads((directory / "trainer_state.json").read_text())["global_step"] > 0
            load_recipe(directory / "recipe.yaml")
            assert len(list(directory.glob("*.safetensors"))) == 2
    if (run / "recipe.yaml").exists():
        load_recipe(run / "recipe.yaml")
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]:
            json.loads(line)
    return (
        any(run.glob(".checkpoint-*.partial")) or any(run.glob(".model.partial")) or any(run.glob(".adapter.partial"))
    )


def result(run: pathlib.Path) -> dict[str, torch.Tensor]:
    path = run / "model" if (run / "model").exists() else run / "adapter" / "adapter_model.safetensors"
    checkpoint = Checkpoint(path)
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names}


def main(recipe: dict, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    whole, broken = pathlib.Path(recipe["output"] + "-whole"), pathlib.Path(recipe["output"])
    torch.set_num_threads(1)
    train({**recipe, "output": str(whole)})
    expected = result(whole)
    shutil.rmtree(whole)
    begin = time.perf_counter()
    attempt({**recipe, "output": str(whole)}, None)
    duration = time.perf_counter() - begin
    done = runs = hit = 0
    while done < kills or (hit == 0 and done < 10 * kills):
        shutil.rmtree(broken, ignore_errors=True)
        while not attempt(recipe, rng.uniform(0, 0.5 * duration)):
            done += 1
            hit += check(broken)
            if done >= kills:
                attempt(recipe, None)
                break
        check(broken)
        got = result(broken)
        assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in expected), "other bits"
        runs += 1
    print(json.dumps({"kills": done, "runs": runs, "saves_hit": hit}))


if __name__ == "__main__":
    main(json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]))
