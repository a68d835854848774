"""Reinforcement learning on the demo's task, from its base: an assistant that is right now and then learns from being told so.

    python examples/demo/rl.py [METHOD] [OUT]        METHOD grpo (default), dapo, rloo or ppo; OUT default runs/demo-rl

1. A base model from raw text, as in run.py (taken from runs/demo where `make demo` has left it).
2. A short fine-tuning with LoRA: it answers in the right form and is often wrong.
3. The method, from that adapter: it answers the same questions, and a Python function says whether the number is right. No answer is
   shown to it.
4. Before and after are compared on questions that neither has asked.
"""

import json
import pathlib
import shutil
import sys
import time
from typing import Any

from run import HELD_OUT, answers, as_messages, console, make_base, train, write_rows
from task import documents, questions

import enginepost

# What each method needs beside the common keys: as many completions and about as many updates for all.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", "rollout_prompts": 16, "num_generations": 8, "num_mini_batches": 4},
    "dapo": {
        "method": "grpo", "loss": "dapo", "rollout_prompts": 16, "num_generations": 8, "num_mini_batches": 2,
        "learning_rate": 5e-4, "max_steps": 120,
    },
    "rloo": {"method": "rloo", "rollout_prompts": 32, "num_generations": 4, "num_mini_batches": 4, "beta": 0.0},
    "ppo": {
        "method": "ppo", "rollout_prompts": 32, "num_generations": 4, "num_iterations": 2, "num_mini_batches": 2,
        "value_coef": 0.5, "target_kl": 5.0, "kl_horizon": 200, "learning_rate": 5e-4, "max_steps": 200,
    },
}  # fmt: skip


def exact_match(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """1 where the last number of the reply is right: the question says all that is needed to compute it."""
    known, held_out = questions(seed=0, held_out=HELD_OUT)
    by_prompt = {q.prompt: q for q in known + held_out}
    return [
        float(by_prompt[p[-1]["content"]].correct(c[0]["content"])) for p, c in zip(prompts, completions, strict=True)
    ]


def base_model(out: pathlib.Path, raw: pathlib.Path) -> pathlib.Path:
    """The demo's base, trained unless it is there already."""
    made = pathlib.Path("runs/demo/pretrain/model")
    if made.exists():
        return made
    if not (out / "pretrain" / "model").exists():
        make_base(out / "random", raw)
        train(
            out / "pretrain.yaml",
            model=str(out / "random"), data=str(raw), output=str(out / "pretrain"), method="pretrain", lora=None,
            dtype="fp32", max_length=128, batch_size=4, gradient_accumulation=1, epochs=1, learning_rate=4e-3,
            betas=[0.9, 0.98], checkpointing=False, save_every=500, log_every=10,
        )  # fmt: skip
    return out / "pretrain" / "model"


def main(name: str, out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in ("sft", name):
        shutil.rmtree(out / old, ignore_errors=True)
    known, held_out = questions(seed=0, held_out=HELD_OUT)
    raw = write_rows(out / "raw_text.jsonl", [{"text": t} for t in documents(known + held_out, seed=0, passes=100)])
    rows = write_rows(out / "instructions.jsonl", [{"messages": as_messages(q, answer=True)} for q in known])
    asked = write_rows(out / "prompts.jsonl", [{"prompt": as_messages(q, answer=False)} for q in known])

    console.rule("1  the base model")
    base = base_model(out, raw)
    console.rule("2  a short fine-tuning")
    tuned = train(
        out / "sft.yaml",
        model=str(base), data=str(rows), output=str(out / "sft"), method="sft", dtype="fp32", max_length=128,
        batch_size=4, gradient_accumulation=1, epochs=4, learning_rate=2e-3, lora={"r": 32, "alpha": 32},
        checkpointing=False, save_every=500, log_every=10,
    )  # fmt: skip
    start = f"{tuned}/adapter"

    console.rule(f"3  {name}: answers of its own, and a function that says which are right")
    began = time.perf_counter()
    # From Python a reward function is given as it is; in a recipe it is `rewards: examples/demo/rl.py:exact_match`.
    run = enginepost.train(
        {
            "model": str(base), "adapter": start, "data": str(asked), "output": str(out / name), "dtype": "fp32",
            "max_length": 1024, "batch_size": 4, "max_completion_length": 40, "rewards": [exact_match], "learning_rate": 1e-3,
            "schedule": "constant", "max_steps": 160, "checkpointing": False, "log_every": 4, "save_every": 40,
            **METHODS[name],
        }
    )  # fmt: skip
    seconds = time.perf_counter() - began

    console.rule(f"4  {HELD_OUT} questions that were never asked")
    before, after = answers(base, held_out, start), answers(base, held_out, f"{run}/adapter")
    score = [
        sum(q.correct(r) for q, r in zip(held_out, replies, strict=True)) / HELD_OUT for replies in (before, after)
    ]
    logged = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    measured = {
        "exact_match": {"sft": score[0], name: score[1]},
        "seconds": seconds,
        "reward": [m["reward"] for m in logged],
    }
    if name == "ppo":
        measured["kl"] = [m["objective/kl"] for m in logged]
        late = measured["kl"][len(logged) // 2 :]
        console.print(
            f"KL over the second half: mean {sum(late) / len(late):.2f} nats a completion, from {min(late):.2f} to {max(late):.2f}; "
            f"target {METHODS[name]['target_kl']}"
        )
    (out / f"{name}.json").write_text(json.dumps(measured, indent=2) + "\n")
    console.print(
        f"exact match on held-out questions: fine-tuned [bold]{score[0]:.0%}[/bold], after {name} "
        f"[bold green]{score[1]:.0%}[/bold green]   ({seconds:.0f} s of {name})"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(arguments[0] if arguments else "grpo", pathlib.Path(arguments[1] if len(arguments) > 1 else "runs/demo-rl"))
