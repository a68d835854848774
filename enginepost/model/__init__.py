"""Models: `config.json` -> ModelSpec, one decoder-only transformer for all families, its weights, LoRA."""

from enginepost.model.lora import adapter_off, adapter_tensors, add_lora, load_adapter, save_adapter
from enginepost.model.spec import ConfigError, ModelSpec
from enginepost.model.transformer import Transformer
from enginepost.model.weights import create_model, load_model, save_model

__all__ = [
    "ConfigError",
    "ModelSpec",
    "Transformer",
    "adapter_off",
    "adapter_tensors",
    "add_lora",
    "create_model",
    "load_adapter",
    "load_model",
    "save_adapter",
    "save_model",
]
