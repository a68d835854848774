"""Kernel families, one module each: `attention`, `linear_logprob`, `lora`, `norm`, `rope`, `glu`, `adamw`, `merge`.

Every module holds the reference (plain PyTorch, the maths as one reads it), the torch op with its autograd, and the dispatch
to the native kernels. `enginepost.kernels.backend` says which backend runs.
"""

import importlib
from typing import Any

_HOME = {
    "attention": "attention",
    "linear_logprob": "linear_logprob",
    "lora_linear": "lora",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope": "rope",
    "rope_frequencies": "rope",
    "glu": "glu",
    "adamw_step": "adamw",
    "global_norm": "adamw",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
