"""The peer of the DPO benchmark: TRL's DPOTrainer with PEFT. Runs in .venv-peers and imports nothing of ours.

    .venv-peers/bin/python bench/dpo_trl.py MODEL PAIRS.jsonl SETTINGS_JSON OUT.json

Settings as in `bench/dpo.py`, and what is TRL's own: per_device_batch, checkpointing, dtype (weights), autocast. Tokens are counted
by the attention mask: both rows of a pair, no padding.
"""

import json
import os
import sys
import tempfile

from train_trl import timed  # beside this file: neither needs our package


def main(model: str, data: str, settings: dict, out: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(settings["threads"])
    import peft
    import trl
    from datasets import Dataset

    with open(data) as f:
        dataset = Dataset.from_list([json.loads(line) for line in f])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.DPOConfig(
            output_dir=scratch,
            use_cpu=True,
            per_device_train_batch_size=settings["per_device_batch"],
            gradient_accumulation_steps=settings["rows"] // settings["per_device_batch"],
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
        report = timed(trainer, settings["rows"] // settings["per_device_batch"])
    with open(out, "w") as f:
        json.dump(report, f)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4])
