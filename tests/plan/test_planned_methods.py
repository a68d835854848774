"""The planner against whole runs of the methods that hold more than a step on their tokens: pairs, references, teachers, roll-outs.

Answers are longer than there is room for, so that every bin is full, as the planner takes it to be.
"""

import json
import pathlib
from typing import Any

import pytest
from peaks import SHAPE, close, peak_of_run

from enginepost.model.architectures import architecture, init_model
from enginepost.plan import plan

WORDS = "the quick brown fox jumps over the lazy dog what is six times seven forty two".split()
REWARD = "def long(completion_ids, **columns):\n    return [float(sum(ids) % 7) for ids in completion_ids]\n"


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(i * i + seed) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: pathlib.Path) -> pathlib.Path:
    """A directory with rows of every kind, a reward function and a small model that teaches."""
    directory = tmp_path_factory.mktemp("methods")
    pairs = [{"prompt": "the", "chosen": " " + text(i, 900), "rejected": " " + text(i + 7, 900)} for i in range(8)]
    graded = [
        {"prompt": "the", "completion": r[side], "label": side == "chosen"}
        for r in pairs
        for side in ("chosen", "rejected")
    ]
    rows = {"pairs": pairs, "graded": graded, "texts": [{"text": text(i, 900)} for i in range(8)],
            "prompts": [{"prompt": text(i, 20)} for i in range(8)]}  # fmt: skip
    for name, said in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in said))
    (directory / "rewards.py").write_text(REWARD)
    teacher = {**architecture("llama-3.1-8b"), **SHAPE, "num_hidden_layers": 12}
    init_model(directory / "teacher", teacher, tokenizer=tiny_tokenizer_dir)
    return directory


ROLL = {"data": "prompts", "rollout_prompts": 4, "num_generations": 8, "max_completion_length": 200, "batch_size": 2,
        "max_length": 256, "rewards": "rewards.py:long"}  # fmt: skip
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"data": "pairs"}),
    ("dpo", {"data": "pairs", "checkpointing": False}),
    ("dpo", {"data": "pairs", "checkpointing": False, "share_prompts": False}),
    ("dpo", {"data": "pairs", "lora": None, "max_length": 256}),
    ("dpo", {"data": "pairs", "reference": "teacher", "max_length": 256}),
    ("orpo", {"data": "pairs", "dtype": "fp32", "max_length": 256}),
    ("kto", {"data": "graded", "batch_size": 2, "checkpointing": False}),
    ("reward", {"data": "pairs", "checkpointing": False}),
    ("distill", {"data": "texts", "teacher": "teacher"}),
    ("distill", {"data": "texts", "teacher": "teacher", "teacher_top_k": 16, "checkpointing": False}),
    ("grpo", ROLL),
    ("ppo", {**ROLL, "checkpointing": False, "num_generations": 4}),
    ("gkd", {**ROLL, "teacher": "teacher", "lmbda": 1.0, "num_generations": 1, "rewards": None}),
]  # fmt: skip


def measured(models: pathlib.Path, tokenizer: pathlib.Path, method: str, keys: dict[str, Any]) -> tuple[float, float]:
    said = {"method": method, "max_length": 512, "overlong": "truncate", **keys}
    said["data"] = str(models / f"{said['data']}.jsonl")
    for key in ("reference", "teacher", "rewards"):
        if said.get(key):
            said[key] = str(models / said[key])
    if method in ("grpo", "ppo", "gkd"):
        said |= {"overlong": None, "gradient_accumulation": None}
    return peak_of_run(models, tokenizer, "llama-3.2-1b", said)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=[f"{m} {k}" for m, k in SLOW])
def test_whole_runs_take_what_was_planned(
    case: tuple[str, dict[str, Any]], models: pathlib.Path, tiny_tokenizer_dir: pathlib.Path
) -> None:
    close(*measured(models, tiny_tokenizer_dir, *case))


def test_a_run_on_pairs_takes_what_was_planned(models: pathlib.Path, tiny_tokenizer_dir: pathlib.Path) -> None:
    close(
        *measured(models, tiny_tokenizer_dir, "dpo", {"data": "pairs", "lora": None, "max_length": 64, "dtype": "fp32"})
    )


def item(name: str, method: str, **keys: Any) -> float:
    said = {"model": "llama-3.2-1b", "data": "d", "method": method, "max_length": 512, **keys}
    return plan(said, on="24GB").peak.items.get(name, 0.0)


def test_other_models_are_what_arithmetic_says() -> None:
    """Llama 3.1 8B has 8,030,261,248 weights, Llama 3.2 1B 1,235,814,400; the policy with its adapter off is no other model."""
    small, large = 2 * 1_235_814_400, 2 * 8_030_261_248
    assert item("others", "dpo") == item("others", "kto") == item("others", "orpo") == 0
    assert item("others", "dpo", lora=None) == small
    assert item("others", "dpo", reference="llama-3.1-8b") == item("others", "distill", teacher="llama-3.1-8b") == large
    # In 4 bits and streamed, as the policy's frozen weights are.
    assert item("others", "dpo", reference="llama-3.1-8b", quantize="nf4") < 0.4 * large
    assert item("others", "dpo", lora={"dora": True}) == item("adapters", "dpo", lora={"dora": True})
    assert item("others", "ppo", rewards=[{"model": "llama-3.1-8b"}]) >= large - 2 * 128_256 * 4096


def test_what_is_kept_on_disk_is_not_held_while_training() -> None:
    for method, keys in (
        ("dpo", {"reference": "llama-3.1-8b", "precompute": True}),
        ("distill", {"teacher": "llama-3.1-8b", "teacher_top_k": 64}),
    ):
        made = plan(
            {
                "model": "llama-3.2-1b",
                "data": "d",
                "method": method,
                "max_length": 16384,
                "checkpointing": False,
                **keys,
            },
            on="24GB",
        )
        assert not made.peak.when.startswith("the pass of") and "others" not in made.peak.items
        short = plan({"model": "llama-3.2-1b", "data": "d", "method": method, "max_length": 128, **keys}, on="24GB")
        assert short.peak.when.startswith("the pass of the") and "optimizer" not in short.peak.items


def test_a_pair_is_two_sequences_and_a_roll_out_has_a_cache() -> None:
    made = {
        m: plan({"model": "llama-3.2-1b", "data": "d", "method": m, "max_length": 512}, on="24GB")
        for m in ("sft", "dpo")
    }
    assert made["dpo"].setup.tokens == 2 * made["sft"].setup.tokens
    assert made["sft"].longest_context and made["dpo"].longest_context
    assert made["dpo"].longest_context == pytest.approx(made["sft"].longest_context / 2, rel=0.1)
    # 64 completions of 8 prompts: 256 tokens of each; of a token 2 x 16 layers x 8 heads x 64 numbers; a GPU sets all slots aside.
    token = 2 * 16 * 8 * 64 * 2
    assert item("cache", "grpo", rewards="r.py:f") == 65 * 512 * token
    on_cpu = plan(
        {"model": "llama-3.2-1b", "data": "d", "method": "grpo", "max_length": 512, "rewards": "r.py:f"}, memory="24GB"
    )
    assert on_cpu.peak.items["cache"] == (64 + 8) * 256 * token
