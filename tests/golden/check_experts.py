"""Mixtures that `enginepost merge-moe` wrote, loaded by transformers: nothing missing, nothing left over, and the answers right.

    .venv/bin/python tests/golden/check_experts.py make DIR
    .venv-peers/bin/python tests/golden/check_experts.py check DIR

`make` writes small dense models and mixtures of them. Where all experts are one model, a mixture whose weights sum to 1 answers as
that model does; so Mixtral and Qwen3 MoE are compared with the dense model, and of Qwen2 MoE the shared expert is silenced first.
"""

import json
import pathlib
import sys

import torch

COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 97, "max_position_embeddings": 128, "rope_theta": 20000.0,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
}
CASES = {"llama": [False, True], "mistral": [False], "qwen2": [True], "qwen3": [False]}  # with a shared expert


def make(home: pathlib.Path) -> None:
    from enginepost.merge import assemble
    from enginepost.model import create_model, save_model

    for family, (architecture, more) in FAMILIES.items():
        config = {**COMMON, **more, "model_type": family, "architectures": [architecture]}
        for i, name in enumerate(("a", "b")):
            save_model(create_model(config, seed=i), home / family / name)
        for shared in CASES[family]:
            for sources in ("aa", "ab"):
                lines = [f"base_model: {home}/{family}/a", "gate_mode: random", "dtype: float32", "experts:"]
                lines += [f"  - source_model: {home}/{family}/{s}" for s in sources]
                lines += ["shared_experts:", f"  - source_model: {home}/{family}/a"] if shared else []
                recipe = home / f"{family}-{sources}-{shared}.yaml"
                recipe.write_text("\n".join(lines) + "\n")
                print(assemble(recipe, home / f"{family}-{sources}-{shared}").text())


def check(home: pathlib.Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None] * 7 % 97
    for family, variants in CASES.items():
        dense = AutoModelForCausalLM.from_pretrained(home / family / "a", dtype=torch.float32)
        for shared in variants:
            for sources in ("aa", "ab"):
                place = home / f"{family}-{sources}-{shared}"
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    place, dtype=torch.float32, output_loading_info=True
                )
                problems = {k: sorted(v) for k, v in loaded.items() if v and "keys" in k}
                assert not problems, (place, problems)
                if shared:
                    for layer in model.model.layers:
                        layer.mlp.shared_expert.down_proj.weight.data.zero_()
                with torch.no_grad():
                    difference = (model(ids).logits - dense(ids).logits).abs().max().item()
                kind = json.loads((place / "config.json").read_text())["model_type"]
                print(f"{place.name}: {kind}, largest difference from the dense model {difference:.2g}")
                assert (difference < 1e-4) == (sources == "aa")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
