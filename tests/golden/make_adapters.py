"""Golden adapters: PEFT makes them for a tiny Llama, trains nothing, fills them with random numbers, and merges them.

Run with the peers' environment (`make peers`):  .venv-peers/bin/python tests/golden/make_adapters.py

    tests/golden/adapters/base/           config.json, model.safetensors (float32)
    tests/golden/adapters/KIND/           adapter_config.json, adapter_model.safetensors as PEFT saves them,
                                          merged.safetensors: the tensors that merge_and_unload changed
"""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent / "adapters"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "lora": {"r": 3, "lora_alpha": 6, "target_modules": LINEAR},
    "rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*gate_proj": 5, "proj": 1},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "^model.layers.1.mlp.down_proj": 7},
    },
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "saved": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj"],
        "modules_to_save": ["lm_head", "norm"],
        "bias": "all",
    },
}


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    base_model().save_pretrained(HERE / "base")
    (HERE / "base" / "generation_config.json").unlink()
    for kind, options in KINDS.items():
        model = base_model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        adapted.peft_config["default"].base_model_name_or_path = "base"
        generator = torch.Generator().manual_seed(1)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(HERE / kind)
        (HERE / kind / "README.md").unlink()
        merged = adapted.eval().merge_and_unload().state_dict()
        changed = {
            name: tensor.contiguous() for name, tensor in merged.items() if not torch.equal(tensor, before[name])
        }
        save_file(changed, HERE / kind / "merged.safetensors", metadata={"format": "pt"})
        print(kind, len(changed), "tensors changed")


if __name__ == "__main__":
    main()
