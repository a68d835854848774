"""The peer of the training benchmark: TRL's SFTTrainer with PEFT. Runs in .venv-peers and imports nothing of ours.

    .venv-peers/bin/python bench/train_trl.py MODEL DATA.jsonl SETTINGS_JSON OUT.json

Settings (see `bench/train.py`): rows (per optimizer step), steps, rank, alpha, max_length, learning_rate, threads, and what is
TRL's own: per_device_batch, packing, padding_free, sampling, checkpointing, dtype (weights), autocast.
Writes {"steps": [{"seconds": since the first step's end, "tokens": real tokens}], "peak_bytes", "loss", "versions"}.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any


def main(model: str, data: str, settings: dict, out: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(settings["threads"])
    import peft
    import trl
    from datasets import Dataset

    with open(data) as f:
        dataset = Dataset.from_list([json.loads(line) for line in f])
    accumulation = settings["rows"] // settings["per_device_batch"]
    if settings["packing"]:  # a "row" is now a bin of max_length tokens, with several rows in it
        accumulation = 1
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            per_device_train_batch_size=settings["per_device_batch"],
            gradient_accumulation_steps=accumulation,
            max_steps=settings["steps"],
            max_length=None if settings["padding_free"] and not settings["packing"] else settings["max_length"],
            packing=settings["packing"],
            padding_free=settings["padding_free"],
            train_sampling_strategy=settings["sampling"],
            gradient_checkpointing=settings["checkpointing"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=1,
            bf16=settings["autocast"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=0,
            model_init_kwargs={"dtype": settings["dtype"]},
        )
        lora = peft.LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=0.0, target_modules="all-linear"
        )
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=dataset, peft_config=lora)
        report = timed(trainer, accumulation)
    with open(out, "w") as f:
        json.dump(report, f)


def timed(trainer: Any, accumulation: int) -> dict:
    """Train, and report as the benchmarks read it: tokens are those of the attention mask, whatever the padding."""
    import peft
    import torch
    import transformers
    import trl

    batches: list[int] = []  # real tokens of each micro-batch, in the order the loader made them
    collate = trainer.data_collator

    def counted(examples: list) -> dict:
        batch = collate(examples)
        mask = batch.get("attention_mask")
        batches.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    steps = [
        {"seconds": end - ends[0], "tokens": sum(batches[i * accumulation : (i + 1) * accumulation])}
        for i, end in enumerate(ends)
    ]
    return {
        "steps": steps,
        "peak_bytes": peak_bytes(),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)},
    }


def peak_bytes() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
