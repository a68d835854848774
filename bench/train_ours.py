"""Our side of the training benchmark: `enginepost.train` itself, timed by its own metrics.

    python -m bench.train_ours MODEL DATA.jsonl SETTINGS_JSON OUT.json

Arguments and report are those of `bench/train_lean.py`. An optimizer step takes `rows` rows, as the peers' does: one row in each
bin, `bins` of them to a micro-batch, concatenated to one stream. Memory is VmHWM of this process.
"""

import itertools
import json
import math
import pathlib
import sys
import tempfile

import enginepost


def main(model: str, data: str, settings: dict, out: str) -> None:
    import torch

    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        run = enginepost.train(
            {
                "model": model,
                "data": data,
                "method": "pretrain",
                "format": "text",
                "max_length": settings["max_length"],
                "packing": False,
                "batch_size": settings.get("bins", 4),
                "gradient_accumulation": math.ceil(settings["rows"] / settings.get("bins", 4)),
                "max_steps": settings["steps"],
                "learning_rate": settings["learning_rate"],
                "lora": {"r": settings["rank"], "alpha": settings["alpha"]},
                "checkpointing": settings.get("checkpointing", False),
                "output": scratch + "/run",
            }
        )
        lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    tokens = [first["num_tokens"], *(b["num_tokens"] - a["num_tokens"] for a, b in itertools.pairwise(lines))]
    report = {
        "steps": [
            {"seconds": m["elapsed_seconds"] - first["elapsed_seconds"], "tokens": n}
            for m, n in zip(lines, tokens, strict=True)
        ],
        "peak_bytes": peak_bytes(),
        "loss": [m["loss"] for m in lines],
    }
    pathlib.Path(out).write_text(json.dumps(report))


def peak_bytes() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
