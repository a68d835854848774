"""Small checkpoints to merge: a Llama of three layers whose embedding is larger than a chunk of the smallest budget."""

import json
import pathlib

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 4000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights near those of seed 0."""
    shapes = {"model.embed_tokens.weight": (4000, 40), "model.norm.weight": (40,), "lm_head.weight": (4000, 40)}
    for i in range(3):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (40, 40),
            f"model.layers.{i}.self_attn.k_proj.weight": (20, 40),
            f"model.layers.{i}.mlp.down_proj.weight": (40, 56),
            f"model.layers.{i}.input_layernorm.weight": (40,),
        }
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        made[name] = torch.randn(shape, generator=common)
        if seed:
            made[name] += 0.02 * torch.randn(shape, generator=own) * torch.randn(shape, generator=own)
        made[name] = made[name].to(dtype)
    return made


def save(directory: pathlib.Path, weights: dict[str, torch.Tensor], **changes: object) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def two(family: pathlib.Path, method: str, parameters: str = "{}", model: str = "weight: 0.5, density: 0.6") -> str:
    """A recipe of base, a and b."""
    return f"""models:
  - model: {family}/a
    parameters: {{{model}}}
  - model: {family}/b
    parameters: {{{model}}}
base_model: {family}/base
merge_method: {method}
parameters: {parameters}
"""
