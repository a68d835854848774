"""The loss curve of a DPO run with TRL: a tiny Llama in float32, full fine-tuning, 50 steps of 4 pairs.

    .venv-peers/bin/python tests/golden/make_dpo_curve.py

Writes dpo_curve.json: the config, the rows in the order in which TRL sees them, its losses and metrics by step.
The weights are those of `seeded_weight`, made from their names here and in the test. The tokenizer has a token a word.
"""

import json
import pathlib
import random
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

STEPS, PAIRS, WORDS = 50, 4, 61
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": WORDS + 3,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 128, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
    "torch_dtype": "float32",
}  # fmt: skip
SETTINGS = {"learning_rate": 1e-3, "beta": 0.3}


def rows() -> list[dict[str, str]]:
    """Chosen answers prefer small words, rejected ones large words; lengths are ragged."""
    rng = random.Random(5)

    def words(low: int, high: int, least: int = 1) -> str:
        return " ".join(f"w{rng.randint(low, high)}" for _ in range(rng.randint(least, 9)))

    return [
        {"prompt": words(0, WORDS - 1), "chosen": " " + words(0, 40, 2), "rejected": " " + words(20, WORDS - 1, 2)}
        for _ in range(STEPS * PAIRS)
    ]  # fmt: skip


def main() -> None:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
    from make_models import seeded_weight
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    special = ["<eos>", "<pad>", "<unk>"]
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    plain = tokenizers.Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    plain.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )

    def model() -> transformers.PreTrainedModel:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float()
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.copy_(torch.from_numpy(seeded_weight(name, tuple(p.shape))))
        return made

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset: object = None) -> SequentialSampler:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = InOrder(
            model=model(), ref_model=model(), processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows()),
            args=DPOConfig(
                output_dir=scratch, per_device_train_batch_size=PAIRS, gradient_accumulation_steps=1, max_steps=STEPS,
                lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
                logging_strategy="steps", save_strategy="no", report_to=[], use_cpu=True, bf16=False, fp16=False,
                gradient_checkpointing=False, disable_dropout=True, max_length=128, seed=0, disable_tqdm=True, **SETTINGS,
            ),
        )  # fmt: skip
        trainer.train()
    names = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "logits/chosen",
             "logits/rejected", "entropy")  # fmt: skip
    history = [h for h in trainer.state.log_history if "loss" in h]
    golden = {
        "trl": trl.__version__, "config": CONFIG, "settings": SETTINGS, "rows": rows(),
        "curve": {name: [float(h[name]) for h in history] for name in names},
    }  # fmt: skip
    path = HERE / "dpo_curve.json"
    path.write_text(json.dumps(golden) + "\n")
    print(path, path.stat().st_size, golden["curve"]["loss"][:3], golden["curve"]["loss"][-3:])


if __name__ == "__main__":
    main()
