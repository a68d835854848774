"""The peer of the DPO benchmark: TRL's DPOTrainer with PEFT. Runs in .venv-peers and imports nothing of ours.

    .venv-peers/bin/python bench/dpo_trl.py MODEL PAIRS.jsonl SETTINGS_JSON OUT.json

Settings as in `bench/dpo.py`, and what is TRL's own: per_device_batch, checkpointing, dtype (weights), autocast. Tokens are counted
by the attention mask: both rows of a pair, no padding.
"""

import json
import os
import sys
import tempfile
import time


def main(model: str, data: str, settings: dict, out: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(settings["threads"])
    import peft
    import transformers
    import trl
    from datasets import Dataset

    with open(data) as f:
        dataset = Dataset.from_list([json.loads(line) for line in f])
    accumulation = settings["rows"] // settings["per_device_batch"]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.DPOConfig(
            output_dir=scratch,
            use_cpu=True,
            per_device_train_batch_size=settings["per_device_batch"],
            gradient_accumulation_steps=accumulation,
            max_steps=settings["steps"],
            max_length=settings["max_length"],
            beta=settings["beta"],
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
        trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=dataset, peft_config=lora)
        batches: list[int] = []  # real tokens of each micro-batch, in the order the loader made them
        collate = trainer.data_collator

        def counted(examples: list) -> dict:
            batch = collate(examples)
            batches.append(int(batch["attention_mask"].sum()))
            return batch

        trainer.data_collator = counted
        ends: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *_: object, **__: object) -> None:
                ends.append(time.perf_counter())

        trainer.add_callback(Clock())
        trainer.train()
        with open("/proc/self/status") as f:
            peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))
    steps = [
        {"seconds": end - ends[0], "tokens": sum(batches[i * accumulation : (i + 1) * accumulation])}
        for i, end in enumerate(ends)
    ]
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    versions = {m.__name__: m.__version__ for m in (torch, transformers, trl, peft)}
    with open(out, "w") as f:
        json.dump({"steps": steps, "peak_bytes": peak, "loss": losses, "versions": versions}, f)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
