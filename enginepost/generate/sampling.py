"""The next token from logits: greedy, or drawn after temperature, top-k and top-p, in this order.

    p = softmax(z / temperature)        top-k: the k likeliest        top-p: the fewest likeliest whose sum reaches top_p

A draw is the inverse of the cumulative distribution at one uniform number, which each sequence takes from a generator of its own:
what one prompt gets does not depend on its neighbours. Top-p: Holtzman et al. 2020 (arXiv 1904.09751), section 3.1.
"""

import numpy as np
import torch
from torch import Tensor

from enginepost.device import tensor
from enginepost.errors import EnginepostError


def check_sampling(temperature: float, top_p: float, top_k: int, max_new_tokens: int) -> None:
    """Raise EnginepostError that names the setting out of range."""
    if not temperature >= 0:
        raise EnginepostError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise EnginepostError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise EnginepostError(f"top_k must be 0 (all tokens) or more, got {top_k}")
    if max_new_tokens < 1:
        raise EnginepostError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def uniform(generator: np.random.Generator) -> float:
    """A number in [0, 1 - 2^-32]: so far from 1 that the draw never falls past the last token."""
    return int(generator.integers(2**32)) / 2**32


def next_tokens(logits: Tensor, draws: list[float], *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """logits float32 `[S, V]`, one uniform draw per row (not looked at when greedy) -> token ids int64 `[S]`."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, dim=-1)
    ids = None
    if top_k:
        p, ids = p.topk(min(top_k, p.shape[-1]), dim=-1)
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        if ids is None:
            p, ids = p.sort(dim=-1, descending=True)
        before = _cumulative(p) - p
        p = torch.where(before < top_p, p, 0.0)
    total = _cumulative(p.double())
    u = tensor(draws, p.device, torch.float64).unsqueeze(1)
    place = torch.searchsorted(total, u * total[:, -1:], right=True)
    return (place if ids is None else ids.gather(1, place)).squeeze(1)


def _cumulative(p: Tensor) -> Tensor:
    """p `[S, V]` summed up along its rows. On a GPU the scan of a single row adds in an order that varies; that of several does
    not."""
    if p.device.type != "cpu" and p.shape[0] == 1:
        return p.expand(2, -1).cumsum(-1)[:1]
    return p.cumsum(-1)
