"""Golden logits and greedy continuations of tiny random models, one or more per family and rotary type.

    .venv-peers/bin/python tests/golden/make_models.py

Writes models.json (configs as written by hand with the old keys and as transformers saves them, ids, greedy continuations) and
models.safetensors (float32 logits at PLACES). The weights themselves are not stored: `seeded_weight` makes them from their
names, here and in the tests.
"""

import json
import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
LENGTH = 26
PLACES = [0, 1, 3, 6, 9, 13, 18, 22, 25]
NEW_TOKENS = 12


def seeded_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values in a range that the name gives; element i is a hash of (name, i), so no library's generator is involved."""
    count = int(np.prod(shape))
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    uniform = (x >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0  # [-1, 1)
    if name.endswith("norm.weight"):
        values = 1.0 + 0.3 * uniform
    elif name.endswith(".bias"):
        values = 0.3 * uniform
    else:
        width = 0.5 if "embed" in name else (12.0 / shape[-1]) ** 0.5
        values = width * uniform
    return values.astype(np.float32).reshape(shape)


BASE = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "bos_token_id": 1, "eos_token_id": 127, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LONG = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
GEMMA = {
    "num_hidden_layers": 4,
    "head_dim": 20,
    "num_key_value_heads": 1,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
}

# name: model_type and the config keys that differ from BASE (None = absent), spelled as checkpoints before transformers 5 do
CASES: dict[str, dict] = {
    "llama": {"model_type": "llama"},
    "llama_tied_mha": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 14},
    "llama_llama3": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "llama_yarn": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "llama_yarn_mscale": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0, "beta_slow": 2.0,
            "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 6},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4, "tie_word_embeddings": True},
    "qwen2_windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 22, "tie_word_embeddings": True},
    "qwen3_biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 3, "rope_theta": 1e6,
               "rope_local_base_freq": 100.0},
    "gemma3_linear": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2, "rope_theta": 1e5,
                      "rope_local_base_freq": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3": {"model_type": "phi3", "sliding_window": 7},
    "phi3_longrope": {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 20},
    "phi3_longrope_crossing": {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 30},
    "phi3_partial": {"model_type": "phi3", "head_dim": None, "hidden_size": 80, "partial_rotary_factor": 0.6,
                     "tie_word_embeddings": True, "rope_scaling": LONG, "original_max_position_embeddings": 16},
    "olmo2": {"model_type": "olmo2"},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2, "rope_theta": 5e6},
    "smollm3_windows": {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1],
                        "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": 0.2,
                "logits_scaling": 1.7, "tie_word_embeddings": True},
}  # fmt: skip


def main() -> None:
    import torch
    import transformers
    from safetensors.numpy import save_file

    torch.set_num_threads(1)
    cases, tensors = {}, {}
    for name, changes in CASES.items():
        old = {k: v for k, v in {**BASE, **changes}.items() if v is not None or k in ("sliding_window", "pad_token_id")}
        kind = {k: v for k, v in json.loads(json.dumps(old)).items() if k != "model_type"}
        config = transformers.AutoConfig.for_model(old["model_type"], **kind)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(seeded_weight(key, tuple(parameter.shape))))
        model.eval()
        ids = [(7 * i * i + 3 * i + 11) % 127 for i in range(LENGTH)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            mask = torch.ones(1, LENGTH, dtype=torch.int64)
            greedy = model.generate(
                torch.tensor([ids]), attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None
            )[0, LENGTH:]
        saved = json.loads(config.to_json_string())
        saved["architectures"] = [type(model).__name__]
        cases[name] = {
            "config": old, "saved_config": saved, "ids": ids, "greedy": greedy.tolist(),
            "parameters": {k: list(p.shape) for k, p in model.named_parameters()},
        }  # fmt: skip
        tensors[name] = logits[PLACES].numpy()
        print(f"{name:24} logits std {logits.std():.3f}, {len(set(greedy.tolist()))} distinct tokens")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    text = f'{{"transformers": "{transformers.__version__}", "places": {PLACES}, "cases": {{\n{lines}\n}}}}\n'
    (HERE / "models.json").write_text(text)
    save_file(tensors, HERE / "models.safetensors")


if __name__ == "__main__":
    main()
