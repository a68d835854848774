"""Whole runs of the trainer on a GPU: the CPU's losses, the same bits twice, and the same bits when a run is killed and resumed.

    python -m bench.gpu trainer

A small Llama with random weights learns a few rows, in float32, in bfloat16, in 4 bits with what can wait in host memory there,
and with all weights. A step's loss may differ from the CPU's by TOLERANCE of it: the CPU adds up in another order, and with
bfloat16 that moves the last of its 8 bits. Anything else raises. A run in a process of its own kills itself with SIGKILL in the
middle of a step, and this process resumes it.
"""

import contextlib
import importlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from bench import Row
from bench.gpu import all_of

STEPS, SAVE_EVERY, KILLED_IN = 8, 3, 5
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}
ON_HOST = {"quantize": "nf4-double", "weights": "host", "checkpointing": "host", "mlp_chunk": 40}
FLAVOURS: dict[str, dict[str, Any]] = {
    "QLoRA, weights and block inputs on the host, MLP in chunks": ON_HOST,
    "LoRA with dropout, bf16": {"lora": {"r": 8, "dropout": 0.1}},
    "LoRA, fp32": {"dtype": "fp32"},
    "all weights, bf16, 8-bit moments": {"lora": None, "optimizer": "adamw8bit"},
}
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 64,
         "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 300}


def run(device: torch.device, small: bool, seconds: float) -> Iterator[Row]:
    flavours = dict(list(FLAVOURS.items())[:2]) if small else FLAVOURS
    with tempfile.TemporaryDirectory() as scratch, named_cuda(device):
        base = prepare(pathlib.Path(scratch), {**SHAPE, **SMALL} if small else SHAPE, longest=48 if small else 500)
        killed = {name: start_to_be_killed({**base, **keys}, name, device) for name, keys in flavours.items()}
        try:
            yield from all_of(
                (name, checks(name, {"dtype": "bf16", **base, **keys}, killed[name])) for name, keys in flavours.items()
            )
        finally:
            for process in killed.values():
                process.kill()
                process.wait()


def checks(name: str, recipe: dict[str, Any], killed: "subprocess.Popen[bytes]") -> Iterator[Row]:
    """killed: a run of this recipe that is to kill itself."""
    here = losses(train(recipe, f"{name}, cpu", "cpu"))
    first, second = (train(recipe, f"{name}, {i}", "cuda") for i in (1, 2))
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses(first), here, strict=True))
    yield from agreed(f"{name}: losses beside the CPU's, relative", worst, TOLERANCE[recipe["dtype"]])
    yield from agreed(f"{name}: bytes that differ between two runs", different(first, second), 0)
    if killed.wait() != -signal.SIGKILL:
        raise RuntimeError(f"{name}: the run that was to kill itself ended with {killed.returncode}")
    resumed = train(recipe, f"{name}, killed", "cuda", resume=True)
    yield from agreed(f"{name}: bytes that differ after a kill", different(first, resumed), 0)


def agreed(case: str, found: float, allowed: float) -> Iterator[Row]:
    """The row of a check, then RuntimeError where it fails."""
    yield Row(f"trainer, {case}", "difference", "", found, "allowed", allowed)
    if not found <= allowed:
        raise RuntimeError(f"{case}: {found:.3g}, allowed {allowed:.3g}")


def prepare(scratch: pathlib.Path, shape: dict[str, Any], longest: int) -> dict[str, Any]:
    """A model, its tokenizer and rows of up to `longest` words; the keys that all recipes share."""
    from bench.train import write_tokenizer
    from enginepost.model.architectures import architecture, init_model

    os.environ["ENGINEPOST_CACHE"] = str(scratch / "cache")
    init_model(scratch / "model", {**architecture("llama-3.2-1b"), **shape})
    write_tokenizer(scratch / "model", shape["vocab_size"])
    draw = random.Random(1)
    rows = [[draw.randrange(shape["vocab_size"] - 3) for _ in range(draw.randint(5, longest))] for _ in range(40)]
    text = "".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in rows)
    (scratch / "rows.jsonl").write_text(text)
    return {
        "model": str(scratch / "model"), "data": str(scratch / "rows.jsonl"), "method": "pretrain", "format": "text",
        "max_length": longest + 12, "batch_size": 1, "gradient_accumulation": 2, "max_steps": STEPS, "save_every": SAVE_EVERY,
        "learning_rate": 1e-3, "lora": {"r": 8, "alpha": 16}, "output": str(scratch / "run"),
    }  # fmt: skip


def train(recipe: dict[str, Any], name: str, device: str, resume: bool = False) -> pathlib.Path:
    import enginepost

    output = f"{recipe['output']}, {name}"
    with contextlib.redirect_stdout(sys.stderr):
        return pathlib.Path(enginepost.train({**recipe, "output": output, "device": device}, resume=resume))


def losses(output: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def different(one: pathlib.Path, other: pathlib.Path) -> int:
    """Bytes that differ in the results of two runs; a loss that differs counts as one."""
    count = sum(a != b for a, b in zip(losses(one), losses(other), strict=True))
    files = [sorted(p for name in ("adapter", "model") for p in (o / name).glob("*.safetensors")) for o in (one, other)]
    if not files[0]:
        raise RuntimeError(f"{one} has no result")
    for a, b in zip(*files, strict=True):
        x, y = (torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in (a, b))
        count += int((x != y).sum()) if len(x) == len(y) else max(len(x), len(y))
    return count


@contextlib.contextmanager
def named_cuda(device: torch.device) -> Iterator[None]:
    """Within, the pretended device is what `device: cuda` means."""
    loop: Any = importlib.import_module("enginepost.train.loop")
    before = loop.choose
    if device.type != "cuda":
        loop.choose = lambda name, say=None: torch.device("cpu") if name == "cpu" else device
    try:
        yield
    finally:
        loop.choose = before


def start_to_be_killed(recipe: dict[str, Any], name: str, device: torch.device) -> "subprocess.Popen[bytes]":
    settings = {"recipe": recipe, "name": f"{name}, killed", "pretended": device.type != "cuda"}
    flags = ["-S"] if sys.flags.no_site else []
    cache = {"ENGINEPOST_CACHE": f"{recipe['output']}-cache-{len(name)}"}  # filled while this process fills its own
    command = [sys.executable, *flags, "-m", "bench.gpu.trainer", json.dumps(settings)]
    return subprocess.Popen(command, env={**os.environ, **cache}, stdout=subprocess.DEVNULL)


def to_be_killed(settings: dict[str, Any]) -> None:
    """A run that ends with SIGKILL after the gradients of a step are there."""
    loop: Any = importlib.import_module("enginepost.train.loop")
    accumulate, calls = loop.accumulate, iter(range(1, STEPS + 1))

    def accumulate_and_die(*args: Any, **kwargs: Any) -> Any:
        done = accumulate(*args, **kwargs)
        if next(calls) == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    loop.accumulate = accumulate_and_die
    with contextlib.ExitStack() as stack:
        if settings["pretended"]:
            sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
            stack.enter_context(named_cuda(stack.enter_context(importlib.import_module("pretend_gpu").present())))
        train(settings["recipe"], settings["name"], "cuda")


if __name__ == "__main__":
    to_be_killed(json.loads(sys.argv[1]))
