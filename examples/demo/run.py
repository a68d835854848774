"""`make demo`: a base model from raw text, then an assistant from that base, measured before and after. No download, CPU only.

    python examples/demo/run.py [OUT]

1. A byte-level BPE tokenizer and a small Llama are made from nothing.
2. The base is trained on raw text (`method: pretrain`; continued pre-training is the same call with a base of one's own).
3. It is fine-tuned on instructions with LoRA (`method: sft`).
4. Both answer questions that no instruction has asked, and the answers are checked by computing them.
5. The assistant answers instructions at a temperature at which it errs; right and wrong answers to one question become pairs, and it
   is aligned with them (`method: dpo`). Measured before and after on the questions of 4, at that temperature.

Everything lands in OUT (default runs/demo) in the field's own formats.
"""

import itertools
import json
import pathlib
import shutil
import sys
import time

import tokenizers
import torch
import yaml
from rich.console import Console
from rich.table import Table
from task import Question, documents, questions
from tokenizers import decoders, models, pre_tokenizers, trainers

import enginepost
from enginepost.checkpoint import fuse
from enginepost.data.chat import HOME as TEMPLATES
from enginepost.model import create_model, save_model

HELD_OUT, SHOWN = 60, 6
TEMPERATURE, SAMPLES = 1.5, 8  # of the answers that become pairs
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
console = Console(highlight=False)


def make_base(directory: pathlib.Path, text: pathlib.Path) -> None:
    """A Hugging Face model directory with random weights and a tokenizer trained on the raw text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Numbers of up to three digits are one token each, as in Llama 3.
    numbers = pre_tokenizers.Split(tokenizers.Regex(r"\d{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([numbers, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    with open(text) as file:
        lines = [json.loads(line)["text"] for line in file]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    model = create_model({**CONFIG, "vocab_size": tokenizer.get_vocab_size()}, dtype=torch.float32, seed=0)
    save_model(model, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": SPECIAL[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text((TEMPLATES / "chatml.jinja").read_text())
    generation = {"eos_token_id": [tokenizer.token_to_id(t) for t in (SPECIAL[0], SPECIAL[2])]}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_messages(question: Question, answer: bool) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question.prompt}]
    return [*turns, {"role": "assistant", "content": question.answer}] if answer else turns


def train(recipe: pathlib.Path, **keys: object) -> str:
    """Write the recipe, so that it can be read and run again, and run it."""
    recipe.write_text(yaml.safe_dump(keys, sort_keys=False))
    console.print(f"[dim]enginepost train {recipe}[/dim]")
    return enginepost.train(recipe)


def answers(model: str | pathlib.Path, asked: list[Question], adapter: str | None = None) -> list[str]:
    loaded = enginepost.load(model, adapter=adapter, dtype="float32")
    return loaded.generate(messages=[as_messages(q, answer=False) for q in asked], max_new_tokens=40)


def sampled(model: pathlib.Path, adapter: str, asked: list[Question], seed: int) -> list[list[str]]:
    """SAMPLES answers to every question."""
    loaded = enginepost.load(model, adapter=adapter, dtype="float32")
    every = [as_messages(q, answer=False) for q in asked for _ in range(SAMPLES)]
    replies = loaded.generate(messages=every, max_new_tokens=40, temperature=TEMPERATURE, seed=seed)
    return [replies[i : i + SAMPLES] for i in range(0, len(replies), SAMPLES)]


def preferences(asked: list[Question], replies: list[list[str]]) -> list[dict]:
    """The right answer of each question beside up to three of its wrong ones, as the verifier sees them."""
    pairs = []
    for q, said in zip(asked, replies, strict=True):
        right = sorted({r for r in said if q.correct(r)})[:1]
        wrong = sorted({r for r in said if r and not q.correct(r)})[:3]
        for both in itertools.product(right, wrong):
            chosen, rejected = ([{"role": "assistant", "content": reply}] for reply in both)
            pairs.append({"prompt": as_messages(q, answer=False), "chosen": chosen, "rejected": rejected})
    return pairs


def align(out: pathlib.Path, base: pathlib.Path, adapter: str, known: list[Question], held_out: list[Question]) -> dict:
    """DPO from the adapter on; returns what is measured before and after."""
    pairs = write_rows(out / "pairs.jsonl", preferences(known, sampled(base, adapter, known, seed=1)))
    run = train(
        out / "dpo.yaml",
        model=str(base), adapter=adapter, data=str(pairs), output=str(out / "dpo"), method="dpo", dtype="fp32",
        max_length=128, batch_size=4, gradient_accumulation=1, max_steps=60, learning_rate=1e-4, validation=0.1,
        eval_every=60, checkpointing=False, save_every=500, log_every=10,
    )  # fmt: skip
    logged = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    last = next(m for m in reversed(logged) if "eval_loss" in m)
    before, after = (sampled(base, a, held_out, seed=2) for a in (adapter, f"{run}/adapter"))
    right = [sum(q.correct(r) for q, said in zip(held_out, x, strict=True) for r in said) for x in (before, after)]
    return {
        "exact_match": [n / (SAMPLES * len(held_out)) for n in right],
        "rewards/margins": [logged[0]["rewards/margins"], last["eval_rewards/margins"]],
        "rewards/accuracies": [logged[0]["rewards/accuracies"], last["eval_rewards/accuracies"]],
    }


def main(out: pathlib.Path) -> None:
    began = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    known, held_out = questions(seed=0, held_out=HELD_OUT)

    console.rule("1  raw text, a tokenizer, a model with random weights")
    raw = write_rows(
        out / "raw_text.jsonl", [{"text": text} for text in documents(known + held_out, seed=0, passes=100)]
    )
    rows = write_rows(out / "instructions.jsonl", [{"messages": as_messages(q, answer=True)} for q in known])
    make_base(out / "random", raw)

    console.rule("2  the base model: training on raw text")
    pretrained = train(
        out / "pretrain.yaml",
        model=str(out / "random"), data=str(raw), output=str(out / "pretrain"), method="pretrain", lora=None,
        dtype="fp32", max_length=128, batch_size=4, gradient_accumulation=1, epochs=1, learning_rate=4e-3,
        betas=[0.9, 0.98], checkpointing=False, save_every=500, log_every=10,
    )  # fmt: skip
    base = pathlib.Path(pretrained) / "model"

    console.rule("3  the assistant: LoRA on instructions")
    tuned = train(
        out / "sft.yaml",
        model=str(base), data=str(rows), output=str(out / "sft"), method="sft", dtype="fp32", max_length=128,
        batch_size=4, gradient_accumulation=1, epochs=16, learning_rate=2e-3, lora={"r": 32, "alpha": 32},
        checkpointing=False, save_every=500, log_every=10,
    )  # fmt: skip
    adapter = str(pathlib.Path(tuned) / "adapter")

    console.rule(f"4  {HELD_OUT} questions that no instruction has asked")
    before, after = answers(base, held_out), answers(base, held_out, adapter)
    right = [[q.correct(reply) for q, reply in zip(held_out, replies, strict=True)] for replies in (before, after)]
    report(held_out, before, after)
    score = {"base": sum(right[0]) / HELD_OUT, "tuned": sum(right[1]) / HELD_OUT}
    console.print(
        f"\nexact match on held-out questions: base [bold]{score['base']:.0%}[/bold], "
        f"fine-tuned [bold green]{score['tuned']:.0%}[/bold green]\n"
    )

    console.rule("5  preferences: its own answers, right beside wrong")
    aligned = align(out, base, adapter, known, held_out)
    (out / "metrics.json").write_text(
        json.dumps({"exact_match": score, "held_out": HELD_OUT, "dpo": aligned}, indent=2) + "\n"
    )
    fuse(base, str(out / "dpo" / "adapter"), out / "assistant")
    table = Table("DPO", "before", "after", box=None, pad_edge=False)
    table.add_row(
        f"exact match at temperature {TEMPERATURE}, {SAMPLES} answers a question",
        *(f"{x:.0%}" for x in aligned["exact_match"]),
    )
    for name in ("rewards/margins", "rewards/accuracies"):  # before the first step the policy is the reference: zero
        table.add_row(f"{name} (first step's pairs; pairs held out)", *(f"{x:.2f}" for x in aligned[name]))
    console.print(table)
    console.print(f"\n{time.perf_counter() - began:.0f} s in all\n")
    console.print(
        f"base model       {base}   (Hugging Face)\n"
        f"adapters         {adapter}, {out / 'dpo' / 'adapter'}   (PEFT)\n"
        f"fused assistant  {out / 'assistant'}\n"
        f"metrics          {tuned}/metrics.jsonl, {out / 'metrics.json'}\n",
        soft_wrap=True,
    )
    console.print("Next, with a model and data of your own:", style="bold")
    console.print(
        f"  .venv/bin/enginepost generate {out / 'assistant'} --prompt '{held_out[0].prompt}'\n"
        f"  .venv/bin/enginepost data preview your_rows.jsonl --model path/to/model\n"
        f"  .venv/bin/enginepost train examples/recipes/sft_lora.yaml model=path/to/model data=your_rows.jsonl",
        soft_wrap=True,
    )


def report(asked: list[Question], before: list[str], after: list[str]) -> None:
    table = Table("question", "right", "base", "fine-tuned", box=None, pad_edge=False, expand=True)
    for q, b, a in list(zip(asked, before, after, strict=True))[:SHOWN]:
        mark = "green" if q.correct(a) else "red"
        table.add_row(q.prompt, q.result, " ".join(b.split())[:60], f"[{mark}]{a}[/{mark}]")
    console.print(table)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
