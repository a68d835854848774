"""Models: `config.json` -> ModelSpec, one decoder-only transformer for all families, its weights, LoRA.

architectures.json    the config.json of public models, for random weights of their shape and for planning
spec.py, layout.py    what a config means, and which tensors it makes; neither these nor this page import torch
rotary.py             rotary embeddings
transformer.py        the model
weights.py, lora.py   load, create, save; adapters
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.model.lora import adapter_off as adapter_off
    from enginepost.model.lora import adapter_tensors as adapter_tensors
    from enginepost.model.lora import add_lora as add_lora
    from enginepost.model.lora import load_adapter as load_adapter
    from enginepost.model.lora import save_adapter as save_adapter
    from enginepost.model.spec import ConfigError as ConfigError
    from enginepost.model.spec import ModelSpec as ModelSpec
    from enginepost.model.transformer import Transformer as Transformer
    from enginepost.model.weights import create_model as create_model
    from enginepost.model.weights import load_model as load_model
    from enginepost.model.weights import save_model as save_model

_HOME = {
    **dict.fromkeys(("ConfigError", "ModelSpec"), "spec"),
    "Transformer": "transformer",
    **dict.fromkeys(("create_model", "load_model", "save_model"), "weights"),
    **dict.fromkeys(("adapter_off", "adapter_tensors", "add_lora", "load_adapter", "save_adapter"), "lora"),
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
