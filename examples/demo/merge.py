"""Two skills, one model: on one branch the demo's base reads about something new, on another it learns to answer questions, and a
merge keeps both.

    python examples/demo/merge.py [OUT]        OUT default runs/demo-merge

1. The demo's base model (taken from runs/demo where `make demo` has left it). It knows times and plus in other bases.
2. Branch "reader": continued pre-training on text about minus, mixed with old text, as one does it. Measured: the share of
   subtractions that it completes rightly.
3. Branch "assistant": fine-tuning on questions about times and plus in a chat. Measured: exact match on questions never asked.
4. The task vectors of both are added to the base (`merge_method: task_arithmetic`), as examples/recipes/merge_language_instruct.yaml
   does with larger models. The share of each branch's gain over the base that the merged model keeps is printed, and what none of
   the three could do before: answer questions about minus.
"""

import itertools
import json
import pathlib
import shutil
import sys
import time

import yaml
from rich.table import Table
from rl import base_model
from run import HELD_OUT, answers, as_messages, console, train, write_rows
from task import BASES, WORDS, Question, digits, documents, questions

import enginepost
from enginepost.checkpoint import fuse
from enginepost.merge import merge

WEIGHTS = {"reader": 1.0, "assistant": 1.0}
KEPT = 0.8  # of each skill's gain


class Subtraction(Question):
    """a minus b, in a base; else like a question of task.py."""

    __slots__ = ()

    @property
    def result(self) -> str:
        return digits(self.a - self.b, self.base)

    @property
    def answer(self) -> str:
        value = self.a - self.b
        return f"{WORDS[self.a]} minus {WORDS[self.b]} is {value}, and {value} in base {WORDS[self.base]} is {self.result}."


def subtractions(bases: tuple[int, ...] = BASES) -> list[Question]:
    return [Subtraction(a, "minus", b, base) for a in range(2, 10) for b in range(2, 10) if a > b for base in bases]


def completes(model: str | pathlib.Path, facts: list[Question]) -> float:
    """Share of sentences of the raw text that the model ends rightly."""
    loaded = enginepost.load(model, dtype="float32")
    texts = loaded.generate([f"{q.topic}:" for q in facts], max_new_tokens=24)
    return sum(q.correct(text.strip().partition(".")[0]) for q, text in zip(facts, texts, strict=True)) / len(facts)


def exact(model: str | pathlib.Path, asked: list[Question]) -> float:
    replies = answers(model, asked)
    return sum(q.correct(reply) for q, reply in zip(asked, replies, strict=True)) / len(asked)


def branches(
    base: pathlib.Path,
    out: pathlib.Path,
    known: list[Question],
    old: list[Question],
    facts: list[Question],
    *,
    passes: int,
    epochs: int,
) -> dict[str, pathlib.Path]:
    """Fine-tune the base on each skill, all weights for reading and LoRA for the questions: {name: model directory}."""
    new_text, old_text = list(documents(facts, seed=1, passes=passes)), documents(old, seed=2, passes=passes)
    mixed = new_text + list(itertools.islice(old_text, len(new_text)))
    text = write_rows(out / "reading.jsonl", [{"text": t} for t in mixed])
    rows = write_rows(out / "instructions.jsonl", [{"messages": as_messages(q, answer=True)} for q in known])
    common = {
        "model": str(base), "dtype": "fp32", "max_length": 128, "batch_size": 4, "gradient_accumulation": 1,
        "checkpointing": False, "save_every": 500, "log_every": 10,
    }  # fmt: skip
    reader = {"method": "pretrain", "data": str(text), "epochs": 1, "lora": None, "learning_rate": 1e-3}
    assistant = {
        "method": "sft", "data": str(rows), "epochs": epochs, "lora": {"r": 32, "alpha": 32}, "learning_rate": 2e-3
    }  # fmt: skip
    for name, keys in (("reader", reader), ("assistant", assistant)):
        shutil.rmtree(out / name, ignore_errors=True)
        train(out / f"{name}.yaml", **{**common, **keys, "output": str(out / name)})
    fused = out / "assistant-model"
    shutil.rmtree(fused, ignore_errors=True)
    fuse(base, out / "assistant" / "adapter", fused)
    return {"reader": out / "reader" / "model", "assistant": fused}


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
    base: pathlib.Path,
    made: dict[str, pathlib.Path],
    merged: pathlib.Path,
    facts: list[Question],
    asked: list[Question],
) -> dict[str, dict[str, float]]:
    """{model: {skill: score}}, and under "kept" the share of the branch's gain that the merged model keeps."""
    scores = {
        name: {"reader": completes(path, facts), "assistant": exact(path, asked), "both": exact(path, facts)}
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
    facts = subtractions()
    console.rule("1  the base model")
    raw = write_rows(out / "raw_text.jsonl", [{"text": t} for t in documents(known + held_out, seed=0, passes=100)])
    base = base_model(out, raw)
    console.rule("2, 3  two branches of it")
    made = branches(base, out, known, known + held_out, facts, passes=40, epochs=16)
    console.rule("4  the merge")
    scores = measure(base, made, join(base, made, out), facts, held_out)
    table = Table("model", "completes minus", "answers times and plus", "answers minus", box=None)
    for name in ("base", *made, "merged"):
        table.add_row(name, *(f"{scores[name][skill]:.0%}" for skill in ("reader", "assistant", "both")))
    table.add_row("gain kept", *(f"{scores['kept'][skill]:.0%}" for skill in ("reader", "assistant")), "", style="bold")
    console.print(table)
    (out / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n")
    console.print(f"{time.perf_counter() - began:.0f} s; {out / 'merged'} is a Hugging Face model")
    if min(scores["kept"].values()) < KEPT:
        sys.exit(f"a skill kept less than {KEPT:.0%} of its gain")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo-merge"))
