"""The demo's arithmetic at reduced size: a model taught more wrong answers than right ones learns from rewards which is which."""

import importlib.util
import json
import pathlib
import random
from typing import Any

import pytest

import enginepost
from enginepost.checkpoint import Checkpoint
from enginepost.generate import load
from enginepost.model import create_model, save_model

TASK = pathlib.Path(__file__).parents[2] / "examples" / "demo" / "task.py"
spec = importlib.util.spec_from_file_location("demo_task", TASK)
assert spec is not None and spec.loader is not None
task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(task)
QUESTIONS = [task.Question(a, "times", b, base) for a in (3, 4, 6) for b in (3, 5, 7) for base in (7, 8)]
BY_PROMPT = {q.prompt: q for q in QUESTIONS}


def exact_match(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    return [
        float(BY_PROMPT[p[-1]["content"]].correct(c[0]["content"])) for p, c in zip(prompts, completions, strict=True)
    ]


def asked(question: Any) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.prompt}]


def score(model: str | pathlib.Path, adapter: str | None = None) -> float:
    loaded = load(model, adapter=adapter, dtype="float32")
    replies = loaded.generate(messages=[asked(q) for q in QUESTIONS], max_new_tokens=8)
    return sum(q.correct(r) for q, r in zip(QUESTIONS, replies, strict=True)) / len(QUESTIONS)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: pathlib.Path) -> pathlib.Path:
    """A model that answers each question with the right number once in three times, and with one wrong number otherwise."""
    out = tmp_path_factory.mktemp("arithmetic")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    size = Checkpoint(tiny_model_dir).shape("lm_head.weight")[0]
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 16,
        "vocab_size": size,
        "tie_word_embeddings": True,
    }
    save_model(create_model({**config, **small}, seed=1), out / "random", source=tiny_model_dir)
    rng, rows = random.Random(0), []
    for q in QUESTIONS:
        wrong = task.digits(int(q.result, q.base) + rng.choice((-3, -2, -1, 1, 2, 3)), q.base)
        for said in (q.result, wrong, wrong):
            rows.append({"messages": [*asked(q), {"role": "assistant", "content": said}]})
    (out / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": asked(q)}) + "\n" for q in QUESTIONS))
    enginepost.train(
        {
            "model": str(out / "random"), "data": str(out / "rows.jsonl"), "output": str(out / "sft"), "dtype": "fp32",
            "lora": None, "max_length": 128, "batch_size": 4, "gradient_accumulation": 1, "epochs": 25,
            "learning_rate": 3e-3, "checkpointing": False, "save_every": 10**6, "log_every": 100,
        }
    )  # fmt: skip
    return out


@pytest.mark.parametrize("method", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_exact_match_rises(taught: pathlib.Path, method: str) -> None:
    """By ten points and more in the whole, where the demo's bar is ten; for ppo the KL also ends in the band."""
    base = taught / "sft" / "model"
    own: dict[str, Any] = {"num_mini_batches": 2, "num_generations": 8, "rollout_prompts": 18, "max_steps": 20}
    if method == "ppo":
        own |= {"num_iterations": 2, "max_steps": 40, "target_kl": 1.0, "kl_horizon": 500, "value_coef": 0.5}
    run = enginepost.train(
        {
            "model": str(base), "data": str(taught / "prompts.jsonl"), "output": str(taught / method), "method": method,
            "dtype": "fp32", "max_length": 512, "batch_size": 4, "max_completion_length": 8, "rewards": [exact_match],
            "learning_rate": 3e-3, "schedule": "constant", "lora": {"r": 8, "alpha": 16}, "checkpointing": False, **own,
        }
    )  # fmt: skip
    before, after = score(base), score(base, f"{run}/adapter")
    logged = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert after >= before + 0.1 and logged[-1]["reward"] > logged[0]["reward"] + 0.1
    if method == "ppo":  # four steps share a roll-out; the band is where the controller's error is not clipped
        late = [m["objective/kl"] for m in logged[-16::4]]
        assert 0.8 < sum(late) / len(late) < 1.2, late
