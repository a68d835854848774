"""Two skills, one model: the demo's base learns Finnish on one branch and to answer questions on another, and a merge keeps both.

    python examples/demo/merge.py [OUT]        OUT default runs/demo-merge

1. The demo's base model (taken from runs/demo where `make demo` has left it).
2. Branch "finnish": the base goes on reading raw text, the exercises in Finnish. Measured: nats per token of Finnish text about
   exercises that the branch has not read.
3. Branch "assistant": the base learns to answer questions in a chat. Measured: exact match on questions that it was never asked.
4. Both task vectors are added to the base (task arithmetic), as examples/recipes/merge_language_instruct.yaml does with larger models.
   The share of each branch's gain over the base that the merged model keeps is printed.
"""

import json
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator

import torch
import yaml
from rich.table import Table
from rl import base_model
from run import HELD_OUT, answers, as_messages, console, train, write_rows
from task import BASES, OPERATIONS, Question, documents, questions

import enginepost
from enginepost.checkpoint import fuse
from enginepost.merge import merge

NUMBERS = "nolla yksi kaksi kolme neljä viisi kuusi seitsemän kahdeksan yhdeksän".split()
VERBS = {"times": "kertaa", "plus": "plus"}
WEIGHTS = {"finnish": 1.0, "assistant": 1.0}
KEPT = 0.8  # of each skill's gain


def in_finnish(q: Question) -> str:
    """One exercise as a sentence."""
    value = OPERATIONS[q.operation](q.a, q.b)
    topic = f"{NUMBERS[q.a]} {VERBS[q.operation]} {NUMBERS[q.b]}"
    return f"{topic} on {value}, ja {value} {NUMBERS[q.base]}-kannassa on {q.result}."


def finnish_documents(exercises: list[Question], passes: int) -> Iterator[str]:
    by_topic = {q.topic: in_finnish(q) for q in exercises}
    for text in documents(exercises, seed=1, passes=passes):
        yield "\n".join(by_topic[line.partition(":")[0]] for line in text.split("\n"))


def nats(model: str | pathlib.Path, texts: list[str]) -> float:
    """Mean loss in nats per token."""
    loaded = enginepost.load(model, dtype="float32")
    logprobs = loaded.logprobs([loaded.encode_prompt(text) for text in texts])
    return -float(torch.cat(list(logprobs)).double().mean())


def exact(model: str | pathlib.Path, asked: list[Question]) -> float:
    replies = answers(model, asked)
    return sum(q.correct(reply) for q, reply in zip(asked, replies, strict=True)) / len(asked)


def branches(
    base: pathlib.Path, out: pathlib.Path, known: list[Question], *, passes: int, epochs: int
) -> dict[str, pathlib.Path]:
    """Fine-tune the base on each skill, all weights for the language and LoRA for the questions: {name: model directory}."""
    text = write_rows(out / "finnish.jsonl", [{"text": t} for t in finnish_documents(known, passes)])
    rows = write_rows(out / "instructions.jsonl", [{"messages": as_messages(q, answer=True)} for q in known])
    common = {
        "model": str(base), "dtype": "fp32", "max_length": 128, "batch_size": 4, "gradient_accumulation": 1,
        "checkpointing": False, "save_every": 500, "log_every": 10,
    }  # fmt: skip
    finnish = {"method": "pretrain", "data": str(text), "epochs": 1, "lora": None, "learning_rate": 1e-3}
    assistant = {
        "method": "sft", "data": str(rows), "epochs": epochs, "lora": {"r": 32, "alpha": 32}, "learning_rate": 2e-3
    }  # fmt: skip
    for name, keys in (("finnish", finnish), ("assistant", assistant)):
        shutil.rmtree(out / name, ignore_errors=True)
        train(out / f"{name}.yaml", **{**common, **keys, "output": str(out / name)})
    fused = out / "assistant-model"
    shutil.rmtree(fused, ignore_errors=True)
    fuse(base, out / "assistant" / "adapter", fused)
    return {"finnish": out / "finnish" / "model", "assistant": fused}


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


def measure(
    base: pathlib.Path, made: dict[str, pathlib.Path], merged: pathlib.Path, held_out: list[Question]
) -> dict[str, dict[str, float]]:
    """{model: {skill: score}}, and under "kept" the share of the branch's gain that the merged model keeps."""
    texts = [in_finnish(q) for q in held_out]
    scores = {
        name: {"finnish": nats(path, texts), "assistant": exact(path, held_out)}
        for name, path in {"base": base, **made, "merged": merged}.items()
    }
    scores["kept"] = {
        skill: (scores["merged"][skill] - scores["base"][skill]) / (scores[skill][skill] - scores["base"][skill])
        for skill in made
    }
    return scores


def main(out: pathlib.Path) -> None:
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    known, held_out = questions(seed=0, held_out=HELD_OUT)
    assert set(BASES) <= set(range(len(NUMBERS)))
    console.rule("1  the base model")
    raw = write_rows(out / "raw_text.jsonl", [{"text": t} for t in documents(known + held_out, seed=0, passes=100)])
    base = base_model(out, raw)
    console.rule("2, 3  two branches of it")
    made = branches(base, out, known, passes=10, epochs=16)
    console.rule("4  the merge")
    scores = measure(base, made, join(base, made, out), held_out)
    table = Table("model", "Finnish, nats per token", "questions, exact match", box=None)
    for name in ("base", *made, "merged"):
        table.add_row(name, f"{scores[name]['finnish']:.3f}", f"{scores[name]['assistant']:.0%}")
    table.add_row("gain kept", *(f"{scores['kept'][skill]:.0%}" for skill in ("finnish", "assistant")), style="bold")
    console.print(table)
    (out / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n")
    console.print(f"{time.perf_counter() - began:.0f} s; {out / 'merged'} is a Hugging Face model")
    if min(scores["kept"].values()) < KEPT:
        sys.exit(f"a skill kept less than {KEPT:.0%} of its gain")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-merge"))
