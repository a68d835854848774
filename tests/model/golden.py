"""The golden models of tests/golden/make_models.py: the same seeded weights, what transformers computed with them."""

import functools
import importlib.util
import json
import pathlib

import torch
from safetensors.torch import load_file

from enginepost.model import ModelSpec, Transformer
from enginepost.model.layout import layout

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def read():
    golden = json.loads((GOLDEN / "models.json").read_text())
    return golden["cases"], golden["places"], load_file(GOLDEN / "models.safetensors")


def seeded(name: str, shape) -> torch.Tensor:
    return torch.from_numpy(script().seeded_weight(name, tuple(shape)))


def build(config: dict, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model with the golden weights."""
    spec = ModelSpec.from_config(config)
    model = Transformer(spec, config, dtype)
    tensors = model.checkpoint_tensors()
    for entry in layout(spec):
        tensors[entry.name].copy_(seeded(entry.name, entry.shape))
    return model.eval()


def stream(*sequences: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, cu_seqlens, positions) of packed sequences."""
    ends = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).to(torch.int32)
    return (
        torch.tensor([i for s in sequences for i in s], dtype=torch.int64),
        ends,
        torch.cat([torch.arange(len(s)) for s in sequences]),
    )
