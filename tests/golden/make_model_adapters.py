"""Golden logits of the models of make_models.py under PEFT adapters.

    .venv-peers/bin/python tests/golden/make_model_adapters.py

Writes model_adapters.json (settings, the adapter's tensors by name and shape) and model_adapters.safetensors (float32 logits at the
places of make_models.py). Base and adapter weights come from `seeded_weight`.
"""

import json
import pathlib

from make_models import CASES, LENGTH, PLACES, seeded_weight

HERE = pathlib.Path(__file__).parent
# name: (model, LoraConfig arguments)
ADAPTERS = {
    "all_linear": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
    "biases": ("llama_biases", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "down_proj", "up_proj"]}),
    "rslora_patterns": (
        "qwen3",
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "k_proj", "gate_proj"], "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.v_proj": 2, r"gate_\w+": 3}, "alpha_pattern": {"k_proj": 16},
        },
    ),
    "regex": ("gemma2", {"r": 3, "lora_alpha": 6, "target_modules": r".*\.(1|3)\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "dora": ("olmo2", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True}),
    "fused": ("phi3", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
}  # fmt: skip


def main() -> None:
    import peft
    import torch
    import transformers
    from safetensors.numpy import save_file

    torch.set_num_threads(1)
    cases, tensors = {}, {}
    for name, (base, settings) in ADAPTERS.items():
        old = {k: v for k, v in json.loads((HERE / "models.json").read_text())["cases"][base]["config"].items()}
        assert base in CASES
        config = transformers.AutoConfig.for_model(old.pop("model_type"), **old)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        fill(model.named_parameters(), seeded_weight)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        saved = peft.get_peft_model_state_dict(model)
        with torch.no_grad():
            for key, tensor in saved.items():
                if "magnitude" in key:  # as trained: off the norms that it starts with
                    tensor.mul_(1 + 0.2 * torch.from_numpy(seeded_weight(key, tuple(tensor.shape))))
                else:
                    tensor.copy_(torch.from_numpy(seeded_weight(key, tuple(tensor.shape))) * 0.5)
            ids = [(7 * i * i + 3 * i + 11) % 127 for i in range(LENGTH)]
            tensors[name] = model(torch.tensor([ids])).logits[0][PLACES].numpy()
        cases[name] = {"model": base, "settings": settings, "shapes": {k: list(t.shape) for k, t in saved.items()}}
        print(f"{name:18} {len(saved)} tensors, logits std {tensors[name].std():.3f}")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    (HERE / "model_adapters.json").write_text(f'{{"peft": "{peft.__version__}", "cases": {{\n{lines}\n}}}}\n')
    save_file(tensors, HERE / "model_adapters.safetensors")
    (HERE / "model_adapters.safetensors").chmod(0o644)


def fill(parameters, rule) -> None:
    import torch

    with torch.no_grad():
        for key, parameter in parameters:
            parameter.copy_(torch.from_numpy(rule(key, tuple(parameter.shape))))


if __name__ == "__main__":
    main()
