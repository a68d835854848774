"""What many tests share: a tiny tokenizer and a tiny Llama, made on the spot (no download)."""

import json
import pathlib

import pytest

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "what is six times seven? forty two",
    "a small model learns a small task, one token at a time",
    "numbers: 0 1 2 3 4 5 6 7 8 9 10 11 12",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A byte-level BPE tokenizer of about 320 tokens with a ChatML template; eos is <|im_end|>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: pathlib.Path) -> pathlib.Path:
    """A float32 Llama of 2 layers and width 32, with the tiny tokenizer beside it."""
    from tokenizers import Tokenizer

    from enginepost.model import create_model, save_model

    size = Tokenizer.from_file(str(tiny_tokenizer_dir / "tokenizer.json")).get_vocab_size()
    directory = tmp_path_factory.mktemp("model")
    model = create_model({**TINY_CONFIG, "vocab_size": size}, seed=0)
    save_model(model, directory, source=tiny_tokenizer_dir)
    return directory
