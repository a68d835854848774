"""Kernel families, one module each.

    from enginepost import kernels
    out, lse = kernels.attention(q, k, v, cu_seqlens)     # torch tensors, or anything with __dlpack__: numpy, jax

Every module holds the reference (plain PyTorch, the maths as one reads it), the torch op with its autograd, and the dispatch
to the native kernels. A family's name is its main function and its module in one: `kernels.attention(...)` and
`kernels.attention.reference(...)` both work, whatever was imported before (`nf4` and `merge` are several functions, so modules
only). `enginepost.kernels.backend` says which backend runs; `enginepost kernels` on the command line tests them.
"""

import importlib
from typing import Any

FAMILIES = (
    "attention",
    "linear_logprob",
    "linear_kl",
    "lora",
    "norm",
    "rope",
    "glu",
    "adamw",
    "nf4",
    "merge",
    "matmul",
)

_HOME = {
    "paged_attention": "attention",
    "lora_linear": "lora",
    "LoraPart": "lora",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope_frequencies": "rope",
    "adamw_step": "adamw",
    "global_norm": "adamw",
    "NF4Weight": "nf4",
    "Moment8": "adamw",
}


def __getattr__(name: str) -> Any:
    if name in FAMILIES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FAMILIES, *_HOME])
