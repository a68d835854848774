"""Task arithmetic and everything that trims, drops or elects task vectors: TIES, DARE, breadcrumbs, DELLA.

    d_i = x_i - b;  m_i = mask;  v_i = w_i s_i m_i d_i;  out = b + lambda * (sum of the v_i, elected by sign, normalised)

                       mask m_i                                       s_i (rescale)            election      normalize
    task_arithmetic    none                                           -                        no            false
    ties               the `density` largest magnitudes               L1 norm, if asked        yes           true
    dare_*             each element with probability `density`        L1 norm (or 1/density)   dare_ties     false
    breadcrumbs*       `density` after the largest `gamma` went       L1 norm, if asked        *_ties        false
    della*             at random, likelier with rank in its row       L1 norm (or 1/density)   della         della

Where mergekit and the papers differ, mergekit's way is the default:
    rescale_rule: "l1" makes the masked tensor as long as it was in L1 norm; "density" divides by density (DARE, arXiv 2311.03099).
    trim: "tensor" ranks within a tensor; "model" over all tensors of the model together (TIES' own code). Ties then all stay.
    magnitude_ties: "exact" keeps exactly the number of elements; "all" keeps every element as large as the last one kept.
    zero_sign: the elected sign where the sum is exactly zero: "positive", or the "majority" of the tensor (TIES' own code).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.kernels import merge as kernel
from enginepost.kernels.merge import LOW_BITS, Select
from enginepost.merge.registry import MergeError, Method, Param, register
from enginepost.merge.tensors import Chunk, Inputs

Params = Mapping[str, Any]


def _kept_range(p: Params, i: int, n: int) -> tuple[int, int] | None:
    """[first, end) of the ascending order of magnitudes that stays; None = all."""
    density = p["density"][i]
    if density >= 1:
        return None
    if "gamma" not in p:
        return (n - max(1, int(density * n)), n) if density > 0 and n else (0, 0)
    target, top = int(density * n), int(p["gamma"][i] * n)
    first = max(0, n - target - top)
    return first, first + target


_SAMPLE_FROM = 1 << 21  # elements; above, a sample tells which magnitudes to count closely
_EVERY = 17  # one run in so many is the sample; odd, so that it comes by all columns
_WIDEST = 32  # upper halves that a window spans at most


def _at_places(pieces: list[Inputs], model: int, places: list[int]) -> list[tuple[int, int]]:
    """(bits, how many are smaller) of the elements at these places of the ascending order of magnitudes.

    Counts by the upper halves of the bits say in which window of magnitudes a place lies; one pass then counts that window by all
    bits, and what is below it. In a large tensor the first count is of a sample. Should a place lie outside its window after all,
    everything is counted once more, without sampling."""
    total = sum(inputs.numel for inputs in pieces)
    for every in (_EVERY, 1) if total >= _SAMPLE_FROM else (1,):
        tables = np.zeros((2, 1 << kernel.TOP_BITS), dtype=np.int64)
        for chunk in (chunk for inputs in pieces for chunk in inputs.chunks()):
            kernel.magnitude_counts(chunk.models[model], chunk.base, tables, every)
        upto = np.cumsum(tables.sum(0))
        windows = [_window(upto, place, total) for place in places]
        counts = np.zeros(sum(1 + width for _, width in windows), dtype=np.int64)
        for chunk in (chunk for inputs in pieces for chunk in inputs.chunks()):
            kernel.window_counts(chunk.models[model], chunk.base, windows, counts)
        found = []
        for place, (low, width) in zip(places, windows, strict=True):
            smaller, counts = np.cumsum(counts[: 1 + width]), counts[1 + width :]
            at = int(np.searchsorted(smaller, place, side="right")) - 1  # smaller[i]: how many have bits below low + i
            if 0 <= at < width:
                found.append((low + at, int(smaller[at])))
        if len(found) == len(places):
            return found
    raise AssertionError("a full count misses no place")


def _window(upto: np.ndarray, place: int, total: int) -> tuple[int, int]:
    """(low, width) of the magnitudes among which a place lies: surely, if `upto` counts everything, else within 6 sigma."""
    sampled = int(upto[-1])
    if sampled == total:
        return int(np.searchsorted(upto, place, side="right")) << LOW_BITS, 1 << LOW_BITS
    share = place / total
    reach = 6 * np.sqrt(sampled * share * (1 - share)) + 6
    first, last = (int(np.searchsorted(upto, share * sampled + x, side="right")) for x in (-reach, reach))
    last = max(first, min(last, first + _WIDEST - 1, len(upto) - 1))
    return first << LOW_BITS, (last + 1 - first) << LOW_BITS


def _magnitude_select(pieces: list[Inputs], model: int, kept: tuple[int, int], n: int, ties: str) -> Select:
    first, end = kept
    if first >= end:
        return Select("none")
    if first == 0 and end == n:
        return Select("all")
    places = [first] if end >= n else [first, end]
    found = _at_places(pieces, model, places)
    bits, smaller = found[0]
    select = Select("magnitude", low=bits, low_skip=first - smaller)
    if end < n:
        bits, smaller = found[1]
        select.high, select.high_keep = bits, end - smaller
    if ties == "all":
        select.low_skip = 0
        select.high_keep = n if select.low == select.high else select.high_keep
    return select


def _selects(inputs: Inputs, p: Params, kind: str) -> list[Select]:
    selects = []
    for i in range(len(inputs.models)):
        density = p["density"][i]
        if density >= 1 or not kind:
            selects.append(Select("all"))
            continue
        if kind == "magnitude":
            if p["trim"] == "model":
                select = replace(inputs.shared["selects"][i])
            else:
                kept = _kept_range(p, i, inputs.numel)
                assert kept is not None
                select = _magnitude_select([inputs], i, kept, inputs.numel, p["magnitude_ties"])
        elif density <= 0:
            select = Select("none")
        elif kind == "random":
            select = Select("random", density=density, key=inputs.random_key(i))
        else:
            epsilon = p["epsilon"][i]
            if density + epsilon >= 1 or density - epsilon <= 0:
                raise MergeError(
                    f"{inputs.name}: della draws with probabilities from density - epsilon to density + epsilon, which must lie "
                    f"between 0 and 1; density is {density} and epsilon {epsilon}."
                )
            select = Select("ranked", density=density, epsilon=epsilon, key=inputs.random_key(i))
            if p["rescale"] and inputs.numel * len(inputs.models) / 8 <= inputs.spare:
                select.masks = {}  # made once, for the sums and for the result
        if p["rescale"] and select.kind not in ("all", "none"):
            select.scale = _scale(inputs, i, select, p)
        selects.append(select)
    return selects


def _scale(inputs: Inputs, i: int, select: Select, p: Params) -> float:
    if p["rescale_rule"] == "density":
        return 1.0 / p["density"][i]
    sums = np.zeros(2)
    counting = replace(select)
    for chunk in inputs.chunks():
        assert chunk.base is not None
        kernel.masked_sums(chunk.models[i], chunk.base, counting, chunk.start, chunk.columns, sums)
    return 1.0 if sums.min() < 1e-7 else float(sums[0] / sums[1])


def _reduce(kind: str, elect: bool) -> Any:
    def reduce(inputs: Inputs, p: Params) -> dict[str, Any]:
        facts: dict[str, Any] = {"selects": _selects(inputs, p, kind), "zero_sign": 1}
        if elect and p["zero_sign"] == "majority":
            signs = 0
            trial = {"selects": [replace(s) for s in facts["selects"]], "zero_sign": 1}
            for chunk in inputs.chunks():
                signs += _task_sum(chunk, p, trial, torch.empty(chunk.numel, device=inputs.device), elect)
            facts["zero_sign"] = (signs > 0) - (signs < 0)
        return facts

    return reduce


def _task_sum(chunk: Chunk, p: Params, facts: dict[str, Any], out: Tensor, elect: bool) -> int:
    assert chunk.base is not None
    return kernel.task_sum(
        chunk.base, chunk.models, facts["selects"], p["weight"], out, elect=elect, normalize=p["normalize"],
        scale=p["lambda"], zero_sign=facts["zero_sign"], start=chunk.start, columns=chunk.columns,
    )  # fmt: skip


def _combine(elect: bool) -> Any:
    def combine(chunk: Chunk, p: Params, facts: dict[str, Any], out: Tensor) -> None:
        _task_sum(chunk, p, facts, out, elect)

    return combine


def survey(pieces: list[tuple[Inputs, Params]]) -> dict[str, Any]:
    """Thresholds over the whole model, for trim: model. Every tensor must have the same density (and gamma)."""
    first = pieces[0][1]
    for inputs, p in pieces:
        for key in ("density", "gamma"):
            if key in p and p[key] != first[key]:
                raise MergeError(
                    f"{inputs.name}: trim: model ranks all tensors together, so {key} must be one value for the whole model; "
                    f"here it is {p[key]}, elsewhere {first[key]}."
                )
    n = sum(inputs.numel for inputs, _ in pieces)
    selects = []
    for i in range(len(first["density"])):
        kept = _kept_range(first, i, n)
        tensors = [inputs for inputs, _ in pieces]
        selects.append(Select("all") if kept is None else _magnitude_select(tensors, i, kept, n, "all"))
    return {"selects": selects}


_WEIGHT = Param("weight", scope="model", about="multiplies the task vector")
_DENSITY = Param("density", float, 1.0, scope="model", low=0.0, about="share of elements that stay; 1 = all")


def _declare(name: str, kind: str, elect: bool, *, normalize: bool, rescale: bool, paper: str, about: str) -> None:
    parameters = [
        _WEIGHT,
        _DENSITY,
        Param("lambda", float, 1.0, about="multiplies the sum of the task vectors"),
        Param("normalize", bool, normalize, about="divide by the weights that took part"),
        Param("rescale", bool, rescale, about="make up for the dropped elements"),
        Param("rescale_rule", str, "l1", choices=("l1", "density"), about="by L1 norm, or by 1/density"),
        Param("int8_mask", bool, False, about="accepted for mergekit's sake; it has no effect"),
    ]
    if kind == "magnitude":
        parameters += [
            Param("trim", str, "tensor", choices=("tensor", "model"), about="rank within a tensor or over the model"),
            Param("magnitude_ties", str, "exact", choices=("exact", "all"), about="at the threshold"),
        ]
    if "breadcrumbs" in name:
        parameters.append(Param("gamma", float, 0.01, scope="model", low=0.0, high=1.0, about="largest share dropped"))
    if kind == "ranked":
        parameters.append(
            Param("epsilon", float, 0.15, scope="model", low=0.0, high=1.0, about="spread of probability")
        )
    if elect:
        parameters.append(Param("zero_sign", str, "positive", choices=("positive", "majority"), about="sign of 0"))
    register(
        Method(
            name,
            _combine(elect),
            _reduce(kind, elect),
            tuple(parameters),
            base="required",
            paper=paper,
            about=about,
            writes=True,
            rows=lambda p: kind == "ranked",
            random=kind in ("random", "ranked"),
            survey=survey if kind == "magnitude" else None,
            whole_model=lambda p: kind == "magnitude" and p["trim"] == "model",
            gpu=lambda p: True,
        )
    )


_declare("task_arithmetic", "", False, normalize=False, rescale=False, paper="https://arxiv.org/abs/2212.04089",
         about="add weighted task vectors to the base")  # fmt: skip
_declare("ties", "magnitude", True, normalize=True, rescale=False, paper="https://arxiv.org/abs/2306.01708",
         about="trim small changes, elect a sign per element, merge those that agree")  # fmt: skip
_declare("dare_ties", "random", True, normalize=False, rescale=True, paper="https://arxiv.org/abs/2311.03099",
         about="drop changes at random and rescale, then elect a sign per element")  # fmt: skip
_declare("dare_linear", "random", False, normalize=False, rescale=True, paper="https://arxiv.org/abs/2311.03099",
         about="drop changes at random and rescale")  # fmt: skip
_declare("breadcrumbs", "magnitude", False, normalize=False, rescale=False, paper="https://arxiv.org/abs/2312.06795",
         about="drop the largest and the smallest changes")  # fmt: skip
_declare("breadcrumbs_ties", "magnitude", True, normalize=False, rescale=False,
         paper="https://arxiv.org/abs/2312.06795", about="the same, with a sign elected per element")  # fmt: skip
_declare("della", "ranked", True, normalize=True, rescale=True, paper="https://arxiv.org/abs/2406.11617",
         about="drop at random, small changes likelier, then elect a sign per element")  # fmt: skip
_declare("della_linear", "ranked", False, normalize=False, rescale=True, paper="https://arxiv.org/abs/2406.11617",
         about="drop at random, small changes likelier")  # fmt: skip
