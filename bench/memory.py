"""Memory and speed of LoRA on a 1.2B Llama shape, rung by rung: what each switch of docs/memory.md saves and costs.

    python -m bench memory
    python -m bench.memory MODEL_DIR            # the model is made there when it is not, and kept

Every rung is a process of its own, training on the same ragged texts in steps of about 1024 tokens. Memory is VmHWM of the process,
everything included (interpreter, libraries, tokenizer); the page cache is the system's and is not in it. Speed counts from the end
of the first step. The first rung, without the fused head, is the same trainer with the head in plain PyTorch (`[tokens, vocabulary]`
logits). The last three rungs are repeated in turn, since what they differ by is small. Losses of rungs that promise the same bits
are compared, and a difference is an error.
"""

import dataclasses
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from bench import Options, Row
from bench.train import Result, lengths, write_tokenizer
from bench.train_ours import peak_bytes

ARCHITECTURE = "llama-3.2-1b"
TOKENS = 1024  # of a step
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Rung:
    name: str
    keys: dict[str, Any]
    plain_head: bool = False
    same_as: str | None = None  # a rung with the same losses, to the bit


UNPACKED: dict[str, Any] = {"packing": False, "batch_size": 5, "checkpointing": False}
PACKED: dict[str, Any] = {"max_length": TOKENS, "checkpointing": False}
ON_DISK: dict[str, Any] = {"checkpointing": True, "quantize": "nf4", "weights": "disk"}
LADDER = [
    Rung("plain head, one row a bin", UNPACKED, plain_head=True),
    Rung("+ packing", PACKED, plain_head=True),
    Rung("+ fused head", PACKED),
    Rung("+ checkpointing", {**PACKED, "checkpointing": True}, same_as="+ fused head"),
    Rung("+ nf4", {**PACKED, "checkpointing": True, "quantize": "nf4"}),
    Rung("+ weights on disk", {**PACKED, **ON_DISK}, same_as="+ nf4"),
    Rung("+ MLP in chunks of 256 tokens", {**PACKED, **ON_DISK, "mlp_chunk": 256}),
]


def write_rows(path: pathlib.Path, count: int, vocab_size: int) -> None:
    rng = random.Random(1)
    with open(path, "w") as f:
        for n in lengths(count):
            f.write(json.dumps({"text": " ".join(f"w{rng.randrange(vocab_size - 3)}" for _ in range(n - 1))}) + "\n")


def prepare(model: pathlib.Path) -> int:
    """Make the model and its tokenizer unless they are there; returns the size of the vocabulary."""
    if not (model / "config.json").exists():
        from enginepost.model.architectures import architecture, init_model

        init_model(model, architecture(ARCHITECTURE))
    vocab_size = int(json.loads((model / "config.json").read_text())["vocab_size"])
    if not (model / "tokenizer.json").exists():
        write_tokenizer(model, vocab_size)
    return vocab_size


def measure(rung: Rung, model: pathlib.Path, scratch: pathlib.Path, threads: int) -> tuple[Result, list[float]]:
    """Train in a process of its own; returns the result and the losses."""
    out = scratch / "result.json"
    recipe = {
        "model": str(model), "data": str(scratch / "rows.jsonl"), "method": "pretrain", "format": "text",
        "gradient_accumulation": 1, "max_steps": STEPS, "lora": {"r": 16, "alpha": 32}, **rung.keys,
    }  # fmt: skip
    settings = {"recipe": recipe, "plain_head": rung.plain_head, "out": str(out)}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "ENGINEPOST_CACHE": str(model.parent / "cache")}
    command = [sys.executable, "-m", "bench.memory", "--child", json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{rung.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Result.read(out), json.loads(out.read_text())["loss"]


def child(settings: dict[str, Any]) -> None:
    import enginepost

    if settings["plain_head"]:
        import importlib

        head = importlib.import_module("enginepost.train.methods.sft")
        head.linear_logprob = head.linear_logprob.reference  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as scratch:
        run = enginepost.train({**settings["recipe"], "output": scratch + "/run"})
        lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    tokens = 0
    steps = []
    for line in lines:
        steps.append({"seconds": line["elapsed_seconds"], "tokens": line["num_tokens"] - tokens})
        tokens = line["num_tokens"]
    report = {"steps": steps, "peak_bytes": peak_bytes(), "loss": [line["loss"] for line in lines]}
    pathlib.Path(settings["out"]).write_text(json.dumps(report))


def climb(model: pathlib.Path, options: Options, rungs: list[Rung]) -> Iterator[Row]:
    vocab_size = prepare(model)
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        write_rows(scratch / "rows.jsonl", 8 * STEPS, vocab_size)
        seen: dict[str, list[Result]] = {}
        losses: dict[str, list[float]] = {}
        last = rungs[-3:]
        for rung in [*rungs, *last, *last]:
            result, loss = measure(rung, model, scratch, options.threads)
            seen.setdefault(rung.name, []).append(result)
            losses[rung.name] = loss
            if rung.same_as in losses and losses[rung.same_as] != loss:
                raise RuntimeError(
                    f"{rung.name}: losses {loss} are not those of {rung.same_as}, {losses[rung.same_as]}"
                )
    before: Rung | None = None
    for rung in rungs:
        speed = statistics.median(r.tokens_per_second for r in seen[rung.name])
        peak = max(r.peak_bytes for r in seen[rung.name]) / 1e9
        peer = None if before is None else before.name
        older = [] if before is None else seen[before.name]
        case = f"LoRA r16 {ARCHITECTURE} bf16 {TOKENS} tokens a step: {rung.name}"
        yield Row(case, "peak memory", "GB", peak, peer, max((r.peak_bytes for r in older), default=0) / 1e9 or None)
        yield Row(
            case, "speed", "tokens/s", speed, peer,
            statistics.median(r.tokens_per_second for r in older) if older else None, better="higher",
        )  # fmt: skip
        before = rung


def run(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        yield from climb(pathlib.Path(scratch, "model"), options, LADDER)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(json.loads(sys.argv[2]))
    else:
        from bench.__main__ import line

        wanted = [r for r in LADDER if not sys.argv[2:] or any(word in r.name for word in sys.argv[2:])]
        for row in climb(pathlib.Path(sys.argv[1]), Options(int(os.environ.get("OMP_NUM_THREADS", "2")), 7), wanted):
            print(line(row), flush=True)
