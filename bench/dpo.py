"""LoRA DPO of a 135M-parameter Llama shape: tokens of the rows per second and peak memory, beside TRL + PEFT.

The model, tokenizer, launching and clocks are those of `bench/train.py`; the peer gets the settings that were fastest there. Pairs
are a prompt and two answers, one token a word:

    ragged    prompts of 16 to 256 tokens, answers of 16 to 256, lognormal (means about 90 and 130)
    full      prompts of 256 and answers of 256 tokens: every row is 512 long, so that nobody pads
    apart     full, with the prompt of a pair computed twice on our side too (share_prompts: false)

Speed counts the tokens of both rows of a pair, prompts twice, for both trainers: what a pair is worth does not depend on how it is
computed. It is taken from the end of the first optimizer step to the end of the last; memory is VmHWM of the training process. The
reference of both is the model with its adapter switched off, in the same process.

An optimizer step is 4 ragged or 2 full pairs for both. The peer takes them in one batch, its fastest; ours in micro-batches of 2.
Ours runs before and after the peer, and the whole takes some nine minutes on two cores, most of them the peer's.
"""

import json
import math
import pathlib
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from bench import Options, Row, roof
from bench.train import EOS, HERE, MAX_LENGTH, PEERS, SHAPE, Result, Workload, write_model

STEPS = 3
MICRO = 2  # pairs of a micro-batch of ours
CASES = {"ragged": True, "full": True, "apart": False}  # case -> share_prompts


def write_pairs(path: pathlib.Path, count: int, full: bool, seed: int = 0) -> int:
    """Pairs of exact lengths, the end-of-sequence token that trainers append included. Returns the tokens of all rows."""
    rng = random.Random(seed)

    def length(mean: float) -> int:
        sigma = 0.7
        drawn = rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
        return 256 if full else min(256, max(16, round(drawn)))

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(SHAPE['vocab_size'] - 3)}" for _ in range(n))

    total = 0
    with open(path, "w") as f:
        for _ in range(count):
            prompt, chosen, rejected = length(100), length(150), length(150)
            total += 2 * prompt + chosen + rejected
            answers = {"chosen": f" {words(chosen - 1)}", "rejected": f" {words(rejected - 1)}"}
            f.write(json.dumps({"prompt": words(prompt), **answers}) + "\n")
    return total


def workload(directory: pathlib.Path, *, full: bool, threads: int, steps: int = STEPS) -> Workload:
    if not (directory / "model").exists():
        write_model(directory / "model")
    data = directory / f"{'full' if full else 'ragged'}.jsonl"
    pairs = 2 if full else 4
    write_pairs(data, pairs * steps, full)
    settings = {
        "rows": pairs, "steps": steps, "rank": 16, "alpha": 32, "max_length": MAX_LENGTH, "learning_rate": 5e-6, "beta": 0.1,
        "threads": threads, "eos": EOS,
    }  # fmt: skip
    return Workload(directory / "model", data, settings)


def ours(work: Workload, **settings: Any) -> Result:
    return work.launch([sys.executable, "-m", "bench.dpo_ours"], {"pairs": MICRO, **settings})


def trl(work: Workload, **settings: Any) -> Result:
    best: dict[str, Any] = {"dtype": "float32" if roof.widening_wins() else "bfloat16"}
    best["autocast"] = not roof.widening_wins()
    best["per_device_batch"] = work.settings["rows"]
    return work.launch([str(PEERS), str(HERE / "dpo_trl.py")], {"checkpointing": True, **best, **settings})


def run(options: Options) -> Iterator[Row]:
    dtype = "float32" if roof.widening_wins() else "bf16"
    peer = f"TRL DPOTrainer + PEFT, {dtype}, one batch, checkpointing"
    with tempfile.TemporaryDirectory() as scratch:
        theirs: dict[bool, list[Result]] = {}
        for case, share in CASES.items():
            full = case != "ragged"
            work = workload(pathlib.Path(scratch), full=full, threads=options.threads)
            mine = [ours(work, share_prompts=share)]
            if full not in theirs:
                theirs[full] = [trl(work)] if PEERS.exists() else []
                mine.append(ours(work, share_prompts=share))
            yield from _rows(case, mine, theirs.get(full, []), peer)


def _rows(case: str, mine: list[Result], theirs: list[Result], peer: str) -> Iterator[Row]:
    name = f"DPO LoRA r16 135M Llama bf16, {case} pairs"
    speeds = [r.tokens_per_second for r in mine]
    speed, memory = statistics.median(speeds), statistics.median(r.peak_bytes for r in mine) / 1e9
    spread = 100 * (max(speeds) - min(speeds)) / speed
    label = peer if theirs else None
    other = statistics.median(r.tokens_per_second for r in theirs) if theirs else None
    yield Row(name, "speed", "tokens/s", speed, label, other, better="higher", spread_percent=spread)
    other = statistics.median(r.peak_bytes for r in theirs) / 1e9 if theirs else None
    yield Row(name, "peak memory", "GB", memory, label, other)
