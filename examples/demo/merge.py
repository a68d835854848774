"""Two skills, one model: the demo's base goes on reading, in Finnish, on one branch, and learns to answer questions in a chat on
another; a merge keeps both.

    python examples/demo/merge.py [OUT]        OUT default runs/demo-merge

1. The demo's base model (taken from runs/demo where `make demo` has left it).
2. Branch "finnish": continued pre-training on the exercises in Finnish, mixed with old text, as one does it. Measured: nats per
   token of Finnish text about exercises that this branch has not read.
3. Branch "assistant": fine-tuning on questions in a chat. Measured: nats per token of the right answers to questions never asked.
4. The task vectors of both are added to the base (task arithmetic), as examples/recipes/merge_language_instruct.yaml does with
   larger models. The share of each branch's gain over the base that the merged model keeps is printed.

Exact match is printed too, and it suffers more than the nats: a model of half a million weights has little room, and one token that
tips spoils an answer. More weight for one branch takes from the other.
"""

import itertools
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import torch
import yaml
from rich.table import Table
from rl import base_model
from run import HELD_OUT, answers, as_messages, console, train, write_rows
from task import OPERATIONS, Question, documents, questions

import enginepost
from enginepost.checkpoint import fuse
from enginepost.merge import merge

# Without its umlauts: the demo's tokenizer and base have never seen their bytes.
NUMBERS = "nolla yksi kaksi kolme nelja viisi kuusi seitseman kahdeksan yhdeksan".split()
VERBS = {"times": "kertaa", "plus": "plus"}
WEIGHTS = {"finnish": 0.7, "assistant": 1.0}
KEPT = 0.8  # of each skill's gain
COMMON: dict[str, Any] = {
    "dtype": "fp32", "max_length": 128, "batch_size": 4, "gradient_accumulation": 1, "checkpointing": False, "save_every": 500,
    "log_every": 10,
}  # fmt: skip


def in_finnish(q: Question) -> str:
    """One exercise as a sentence."""
    value = OPERATIONS[q.operation](q.a, q.b)
    topic = f"{NUMBERS[q.a]} {VERBS[q.operation]} {NUMBERS[q.b]}"
    return f"{topic} on {value}, ja {value} {NUMBERS[q.base]}-kannassa on {q.result}."


def branches(
    base: pathlib.Path, out: pathlib.Path, known: list[Question], old: list[Question], *, passes: int, epochs: int
) -> dict[str, pathlib.Path]:
    """Fine-tune the base on each skill with LoRA and fuse: {name: model directory}. The language goes into the MLPs alone:
    the less two branches share, the less they disturb each other."""
    topics = {q.topic: in_finnish(q) for q in known}
    new_text = [
        "\n".join(topics[line.partition(":")[0]] for line in text.split("\n")) for text in documents(known, 1, passes)
    ]
    old_text = list(itertools.islice(documents(old, seed=2, passes=passes), len(new_text)))
    text = write_rows(out / "reading.jsonl", [{"text": t} for t in new_text + old_text])
    rows = write_rows(out / "instructions.jsonl", [{"messages": as_messages(q, answer=True)} for q in known])
    mlp = ["gate_proj", "up_proj", "down_proj"]
    recipes: dict[str, dict[str, Any]] = {
        "finnish": {
            "method": "pretrain", "data": str(text), "epochs": 1, "learning_rate": 1e-3,
            "lora": {"r": 16, "alpha": 16, "targets": mlp},
        },
        "assistant": {
            "method": "sft", "data": str(rows), "epochs": epochs, "learning_rate": 2e-3, "lora": {"r": 32, "alpha": 32},
        },
    }  # fmt: skip
    made = {}
    for name, keys in recipes.items():
        made[name] = out / f"{name}-model"
        for old_run in (out / name, made[name]):
            shutil.rmtree(old_run, ignore_errors=True)
        run = train(out / f"{name}.yaml", model=str(base), output=str(out / name), **keys, **COMMON)
        fuse(base, f"{run}/adapter", made[name])
    return made


def join(base: pathlib.Path, made: dict[str, pathlib.Path], out: pathlib.Path) -> pathlib.Path:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"weight": WEIGHTS[name]}} for name, path in made.items()],
        "dtype": "float32",
    }
    (out / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    shutil.rmtree(out / "merged", ignore_errors=True)
    console.print(f"[dim]enginepost merge {out / 'merge.yaml'} {out / 'merged'}[/dim]")
    merge(out / "merge.yaml", out / "merged")
    return out / "merged"


def scores_of(path: pathlib.Path, held_out: list[Question]) -> dict[str, float]:
    """Nats per token of Finnish text and of right answers, and exact match of the model's own answers."""
    loaded = enginepost.load(path, dtype="float32")
    texts = loaded.logprobs([loaded.encode_prompt(in_finnish(q)) for q in held_out])
    said = []
    for q in held_out:
        prompt = loaded.chat_prompt(as_messages(q, answer=False))
        said.append(loaded.logprobs([*prompt, *loaded.tokenizer.encode(q.answer)])[len(prompt) - 1 :])
    right = [q.correct(reply) for q, reply in zip(held_out, answers(path, held_out), strict=True)]
    return {
        "finnish": -float(torch.cat(list(texts)).double().mean()),
        "assistant": -float(torch.cat(said).double().mean()),
        "exact_match": sum(right) / len(right),
    }


def measure(
    base: pathlib.Path, made: dict[str, pathlib.Path], merged: pathlib.Path, held_out: list[Question]
) -> dict[str, dict[str, float]]:
    """{model: {skill: nats per token}}, and under "kept" the share of each branch's gain that the merged model keeps."""
    scores = {name: scores_of(path, held_out) for name, path in {"base": base, **made, "merged": merged}.items()}
    scores["kept"] = {
        skill: (scores["base"][skill] - scores["merged"][skill]) / (scores["base"][skill] - scores[skill][skill])
        for skill in made
    }
    return scores


def main(out: pathlib.Path) -> None:
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    known, held_out = questions(seed=0, held_out=HELD_OUT)
    console.rule("1  the base model")
    raw = write_rows(out / "raw_text.jsonl", [{"text": t} for t in documents(known + held_out, seed=0, passes=100)])
    base = base_model(out, raw)
    console.rule("2, 3  two branches of it")
    made = branches(base, out, known, known + held_out, passes=8, epochs=16)
    console.rule("4  the merge")
    scores = measure(base, made, join(base, made, out), held_out)
    table = Table("model", "Finnish, nats per token", "right answers, nats per token", "exact match", box=None)
    for name in ("base", *made, "merged"):
        row = scores[name]
        table.add_row(name, f"{row['finnish']:.2f}", f"{row['assistant']:.2f}", f"{row['exact_match']:.0%}")
    table.add_row(
        "gain kept", *(f"{scores['kept'][skill]:.0%}" for skill in ("finnish", "assistant")), "", style="bold"
    )
    console.print(table)
    (out / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n")
    console.print(f"{time.perf_counter() - began:.0f} s; {out / 'merged'} is a Hugging Face model")
    if min(scores["kept"].values()) < KEPT:
        sys.exit(f"a skill kept less than {KEPT:.0%} of its gain")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-merge"))
