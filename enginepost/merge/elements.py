"""Methods that decide element by element which model speaks: sce, nearswap, arcee_fusion, ram, ramplus_tl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.kernels.merge import BLOCK
from enginepost.merge.registry import Param, method
from enginepost.merge.tensors import Chunk, Inputs

Params = Mapping[str, Any]


def _sorted_value(inputs: Inputs, value: Callable[[Chunk], Tensor], places: Callable[[np.ndarray], list[int]]) -> Any:
    """float32 values at places of the ascending order of value(chunk), and how many equal values come before each place.

    Counts by the upper 16 bits, then by the lower 16 of the values that share them; `places` is given the counts by upper bits."""
    upper = np.zeros(1 << 16, dtype=np.int64)
    for chunk in inputs.chunks():
        upper += np.bincount(_ordered(value(chunk)) >> 16, minlength=upper.size)
    below = np.concatenate([[0], np.cumsum(upper)])
    wanted = places(upper)
    prefixes = [int(np.searchsorted(below, place, side="right")) - 1 for place in wanted]
    lower = {prefix: np.zeros(1 << 16, dtype=np.int64) for prefix in prefixes}
    for chunk in inputs.chunks():
        bits = _ordered(value(chunk))
        for prefix, counts in lower.items():
            counts += np.bincount(bits[bits >> 16 == prefix] & 0xFFFF, minlength=counts.size)
    found = []
    for place, prefix in zip(wanted, prefixes, strict=True):
        smaller = below[prefix] + np.concatenate([[0], np.cumsum(lower[prefix])])
        low = int(np.searchsorted(smaller, place, side="right")) - 1
        found.append((_unordered(prefix << 16 | low), place - int(smaller[low])))
    return found


def _ordered(value: Tensor) -> np.ndarray:
    """int64 in [0, 2^32) that sort as the float32 values do."""
    bits = value.reshape(-1).float().numpy().view(np.uint32).astype(np.int64)
    return np.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


def _unordered(bits: int) -> float:
    raw = bits - 0x80000000 if bits >= 0x80000000 else 0xFFFFFFFF - bits
    return float(np.array(raw, dtype=np.uint32).view(np.float32))


def _block_sums(values: Tensor) -> float:
    """float64 sum in blocks, so that it does not depend on where chunks end."""
    flat = values.reshape(-1).double().numpy()
    return sum((float(np.sum(flat[i : i + BLOCK])) for i in range(0, flat.size, BLOCK)), 0.0)


# SCE: keep the elements on which the models differ most, weigh models by the size of their change, erase minority signs.


def _variance(chunk: Chunk) -> Tensor:
    return torch.stack(chunk.d).var(dim=0, unbiased=False)


def _sce_reduce(inputs: Inputs, p: Params) -> dict[str, Any]:
    density = p["select_topk"]
    facts: dict[str, Any] = {"kind": "all", "seen": 0}
    if density <= 0:
        facts["kind"] = "none"
    elif density < 1:
        nonzero = sum(int(torch.count_nonzero(_variance(chunk))) for chunk in inputs.chunks())
        kept = int(nonzero * density)
        if kept == 0:
            facts["kind"] = "none"
        else:
            [(facts["threshold"], facts["skip"])] = _sorted_value(
                inputs, _variance, lambda upper: [inputs.numel - kept]
            )
            facts["kind"] = "top"
    squares = np.zeros(len(inputs.models))
    counting = dict(facts)
    for chunk in inputs.chunks():
        for i, d in enumerate(_sce_kept(chunk, counting)):
            for at in range(0, d.numel(), BLOCK):
                squares[i] += float(np.sum(np.square(d[at : at + BLOCK].double().numpy())))
    mean = squares / max(1, inputs.numel)
    with np.errstate(invalid="ignore"):  # infinite inputs are found and named afterwards
        facts["weights"] = (mean / mean.sum() if mean.sum() >= 1e-6 else np.full(len(mean), 1 / len(mean))).tolist()
    return facts


def _sce_kept(chunk: Chunk, facts: dict[str, Any]) -> list[Tensor]:
    """Task vectors with the elements of low variance zeroed; advances facts["seen"]."""
    if facts["kind"] == "all":
        return chunk.d
    if facts["kind"] == "none":
        return [torch.zeros_like(d) for d in chunk.d]
    variance = _variance(chunk).float()
    equal = variance == facts["threshold"]
    keep = (variance > facts["threshold"]) | equal & (torch.cumsum(equal, 0) + facts["seen"] > facts["skip"])
    facts["seen"] += int(equal.sum())
    return [torch.where(keep, d, 0.0) for d in chunk.d]


@method(
    "sce",
    reduce=_sce_reduce,
    base="required",
    parameters=[
        Param("select_topk", float, 1.0, low=0.0, about="share of the differing elements that stays, by variance"),
        Param("int8_mask", bool, False, about="accepted for mergekit's sake; it has no effect"),
    ],
    paper="https://arxiv.org/abs/2408.07990",
    about="select by variance, weigh by squared change, erase minority signs",
)
def sce(chunk: Chunk, p: Params, facts: dict[str, Any]) -> Tensor:
    kept = _sce_kept(chunk, facts)
    majority = torch.where(sum(kept[1:], kept[0].clone()) >= 0, 1.0, -1.0)
    weights = [(torch.sign(d) == majority) * w for d, w in zip(kept, facts["weights"], strict=True)]
    merged = sum((d * w for d, w in zip(kept, weights, strict=True)), torch.zeros_like(chunk.b))
    return chunk.b + merged / sum(weights[1:], weights[0].clone()).clamp(min=1e-6)


@method(
    "nearswap",
    base="required",
    models=(1, 1),
    parameters=[Param("t", about="differences up to t are taken whole, larger ones up to t in size")],
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    about="move the base towards the other model by at most t an element",
)
def nearswap(chunk: Chunk, p: Params, facts: None) -> Tensor:
    other = chunk.x[0]
    weight = (p["t"] / (chunk.b - other).abs().clamp(min=1e-6)).clamp(0, 1)
    return weight * other + (1 - weight) * chunk.b


# Arcee fusion: change only the elements that matter, by magnitude of the change and divergence of their row.


def _importance(chunk: Chunk) -> Tensor:
    p, q = torch.softmax(chunk.x[0], -1) + 1e-8, torch.softmax(chunk.b, -1) + 1e-8
    return chunk.d[0].abs() * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)


def _fusion_threshold(inputs: Inputs, p: Params) -> float:
    places = [int(np.float32(q) * np.float32(inputs.numel - 1)) for q in (0.25, 0.5, 0.75)]
    (lower, _), (median, _), (upper, _) = _sorted_value(inputs, _importance, lambda counts: places)
    return float(np.float32(median) + np.float32(1.5) * (np.float32(upper) - np.float32(lower)))


@method(
    "arcee_fusion",
    reduce=_fusion_threshold,
    base="required",
    models=(1, 1),
    rows=lambda p: True,
    paper="https://arcee.ai",
    about="take the elements whose change matters: |change| x KL of its row, above median + 1.5 IQR (exact quantiles)",
)
def arcee_fusion(chunk: Chunk, p: Params, facts: float) -> Tensor:
    return chunk.b + torch.where(_importance(chunk) >= facts, chunk.d[0], 0.0)


# Reinforced agent merging: what one model changed is kept whole, what several changed is averaged.


def _ram_masks(chunk: Chunk, p: Params) -> tuple[list[Tensor], Tensor]:
    changed = [d.abs() > p["epsilon"] for d in chunk.d]
    return changed, sum((c.to(torch.int32) for c in changed), torch.zeros_like(chunk.b, dtype=torch.int32))


def _ram_sum(chunk: Chunk, p: Params, boosts: list[float]) -> Tensor:
    changed, count = _ram_masks(chunk, p)
    total = torch.zeros_like(chunk.b)
    for d, mine, boost in zip(chunk.d, changed, boosts, strict=True):
        total += torch.where(mine, torch.where(count == 1, d * boost, d / count.clamp(min=1)), 0.0)
    return chunk.b + total


_EPSILON = Param("epsilon", float, 1e-5, low=0.0, about="a change counts above this")


@method("ram", base="required", parameters=[_EPSILON], paper="https://arxiv.org/abs/2601.13572",
        about="unique changes are kept, shared ones averaged")  # fmt: skip
def ram(chunk: Chunk, p: Params, facts: None) -> Tensor:
    return _ram_sum(chunk, p, [1.0] * len(chunk.models))


def _ram_counts(inputs: Inputs, p: Params) -> list[float]:
    """1 + r * clip(shared / unique, 0, alpha) of each model."""
    shared, unique = np.zeros(len(inputs.models)), np.zeros(len(inputs.models))
    for chunk in inputs.chunks():
        changed, count = _ram_masks(chunk, p)
        for i, mine in enumerate(changed):
            shared[i] += int((mine & (count > 1)).sum())
            unique[i] += int((mine & (count == 1)).sum())
    rho = shared / np.maximum(unique, p["epsilon"])
    return (1 + p["r"] * np.clip(rho, 0, p["alpha"])).tolist()


@method(
    "ramplus_tl",
    reduce=_ram_counts,
    base="required",
    parameters=[
        _EPSILON,
        Param("r", float, 0.1, about="how much unique changes grow"),
        Param("alpha", float, 0.2, about="bound of shared / unique"),
    ],
    paper="https://arxiv.org/abs/2601.13572",
    about="ram with unique changes enlarged where much is shared",
)
def ramplus_tl(chunk: Chunk, p: Params, facts: list[float]) -> Tensor:
    return _ram_sum(chunk, p, facts)
