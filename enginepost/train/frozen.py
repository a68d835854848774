"""The reference policy: what the run began with, as one set of weights in memory where that can be.

LoRA from a base             the same model with its adapter switched off
LoRA that goes on            the same model with the tensors of the first adapter in the places of the present ones
full fine-tuning             a second model
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from enginepost.checkpoint import read_adapter
from enginepost.model import adapter_off, load_model
from enginepost.model.lora import updates
from enginepost.recipe import Recipe

Reference = Callable[[], AbstractContextManager[Any]]


def reference_of(recipe: Recipe, model: Any) -> Reference:
    """A function that gives a context in which its value is the reference policy; nothing of it gets a gradient there."""
    if recipe.lora is None:
        other = load_model(recipe.model, dtype=model.dtype, device=model.embedding.device).requires_grad_(False)
        return lambda: contextlib.nullcontext(other)
    if recipe.adapter is None:
        return lambda: _switched_off(model)
    first = _first_adapter(model, recipe.adapter)
    return lambda: _in_place(model, first)


def _first_adapter(model: Any, directory: str | Path) -> list[tuple[nn.Parameter, Tensor]]:
    parts = read_adapter(directory).parts
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for path, update in updates(model).items():
        part = parts[path]
        pairs += [(update.A, part.A), (update.B, part.B)]
        if update.magnitude is not None and part.magnitude is not None:
            pairs.append((update.magnitude, part.magnitude))
    return [(own, first.to(own.dtype).clone()) for own, first in pairs]


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[Any]:
    with torch.no_grad(), adapter_off(model):
        yield model


@contextlib.contextmanager
def _in_place(model: Any, first: list[tuple[nn.Parameter, Tensor]]) -> Iterator[Any]:
    present = [own.data for own, _ in first]
    with torch.no_grad():
        try:
            for own, tensor in first:
                own.data = tensor
            yield model
        finally:
            for (own, _), tensor in zip(first, present, strict=True):
                own.data = tensor
