"""Our side of the DPO benchmark: `enginepost.train` itself, timed by its own metrics.

    python -m bench.dpo_ours MODEL PAIRS.jsonl SETTINGS_JSON OUT.json

An optimizer step takes `rows` pairs, one micro-batch of one stream. Tokens are those of the rows, prompts twice. Memory is VmHWM.
"""

import json
import pathlib
import sys
import tempfile

import enginepost
from bench.train_ours import peak_bytes


def main(model: str, data: str, settings: dict, out: str) -> None:
    import torch

    from enginepost.recipe import load_recipe
    from enginepost.train.methods.preference import Dpo

    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        recipe = {
            "model": model,
            "data": data,
            "method": "dpo",
            "beta": settings["beta"],
            "share_prompts": settings.get("share_prompts", True),
            "max_length": settings["max_length"],
            "packing": False,
            "batch_size": settings.get("pairs", settings["rows"]),
            "gradient_accumulation": settings["rows"] // settings.get("pairs", settings["rows"]),
            "max_steps": settings["steps"],
            "learning_rate": settings["learning_rate"],
            "lora": {"r": settings["rank"], "alpha": settings["alpha"]},
            "checkpointing": settings.get("checkpointing", False),
            "output": scratch + "/run",
        }
        method = Dpo(load_recipe(recipe))
        lengths = method.rows.preferences.dataset.lengths.reshape(-1, 2).sum(1)
        tokens = [
            sum(int(lengths[i]) for micro in method.plan.step(n).micro_batches for i in micro)
            for n in range(1, settings["steps"] + 1)
        ]
        del method
        run = enginepost.train(recipe)
        lines = [json.loads(line) for line in pathlib.Path(run, "metrics.jsonl").read_text().splitlines()]
    report = {
        "steps": [
            {"seconds": m["elapsed_seconds"] - lines[0]["elapsed_seconds"], "tokens": n}
            for m, n in zip(lines, tokens, strict=True)
        ],
        "peak_bytes": peak_bytes(),
        "loss": [m["loss"] for m in lines],
    }
    pathlib.Path(out).write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
