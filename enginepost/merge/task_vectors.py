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

from collections.abc import Iterator, Mapping
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
_INFINITE = 0x7F800000  # bits of infinity; those of NaN are above


def _at_places(pieces: list[Inputs], places: Mapping[int, list[int]]) -> dict[int, list[tuple[int, int]]]:
    """(bits, how many are smaller) of the elements at these places, given by model, of the ascending order of magnitudes.

    Counts by the upper halves of the bits say in which window of magnitudes a place lies; one pass then counts that window by all
    bits, and what is below it. In a large tensor the first count is of a sample. Should a place lie outside its window after all,
    everything of that model is counted once more, without sampling. All models are counted in the same passes, which also find out
    whether all differences are finite, and with them the inputs."""
    total = sum(inputs.numel for inputs in pieces)
    found: dict[int, list[tuple[int, int]]] = {}
    finite: set[int] = set()
    for every in (_EVERY, 1) if total >= _SAMPLE_FROM else (1,):
        left = [model for model in places if model not in found]
        if not left:
            break
        tables = {model: np.zeros((2, 1 << kernel.TOP_BITS), dtype=np.int64) for model in left}
        for chunk in (chunk for inputs in pieces for chunk in inputs.chunks()):
            for model in left:
                kernel.magnitude_counts(chunk.models[model], chunk.base, tables[model], every)
        windows = {}
        for model in left:
            upto = np.cumsum(tables[model].sum(0))
            windows[model] = [_window(upto, place, total) for place in places[model]]
        asked = {model: [*windows[model], (_INFINITE, 1)][: kernel.MAX_WINDOWS] for model in left}
        counts = {model: np.zeros(sum(1 + width for _, width in asked[model]), dtype=np.int64) for model in left}
        for chunk in (chunk for inputs in pieces for chunk in inputs.chunks()):
            for model in left:
                kernel.window_counts(chunk.models[model], chunk.base, asked[model], counts[model])
        for model in left:
            if asked[model][-1] == (_INFINITE, 1) and counts[model][-2] == total:
                finite.add(model)
            here = [
                _in_window(place, *given)
                for place, given in zip(places[model], _split(counts[model], windows[model]), strict=True)
            ]
            if None not in here:
                found[model] = [place for place in here if place is not None]
    assert len(found) == len(places), "a full count misses no place"
    for inputs in pieces:
        inputs.finite = len(finite) == len(inputs.models)
    return found


def _split(counts: np.ndarray, windows: list[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
    """(low, counts) of each window."""
    for low, width in windows:
        yield low, counts[: 1 + width]
        counts = counts[1 + width :]


def _in_window(place: int, low: int, counts: np.ndarray) -> tuple[int, int] | None:
    """(bits, how many are smaller) of the element at a place; None where it lies outside the window."""
    smaller = np.cumsum(counts)  # [i]: how many have bits below low + i
    at = int(np.searchsorted(smaller, place, side="right")) - 1
    return (low + at, int(smaller[at])) if 0 <= at < len(counts) - 1 else None


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


def _magnitude_selects(
    pieces: list[Inputs], kept: Mapping[int, tuple[int, int]], n: int, ties: str
) -> dict[int, Select]:
    """The selections of what is `kept`, by model, [first, end) of the ascending order of n magnitudes."""
    selects, places = {}, {}
    for model, (first, end) in kept.items():
        if first >= end:
            selects[model] = Select("none")
        elif first == 0 and end == n:
            selects[model] = Select("all")
        else:
            places[model] = [first] if end >= n else [first, end]
    for model, found in _at_places(pieces, places).items():
        first, end = kept[model]
        bits, smaller = found[0]
        select = Select("magnitude", low=bits, low_skip=first - smaller)
        if end < n:
            bits, smaller = found[1]
            select.high, select.high_keep = bits, end - smaller
        if ties == "all":
            select.low_skip = 0
            select.high_keep = n if select.low == select.high else select.high_keep
        selects[model] = select
    return selects


def _selects(inputs: Inputs, p: Params, kind: str) -> list[Select]:
    selects = []
    trimmed: dict[int, Select] = {}
    if kind == "magnitude" and p["trim"] == "tensor":
        ranges = {i: _kept_range(p, i, inputs.numel) for i in range(len(inputs.models))}
        kept = {i: r for i, r in ranges.items() if r is not None}
        trimmed = _magnitude_selects([inputs], kept, inputs.numel, p["magnitude_ties"])
    for i in range(len(inputs.models)):
        density = p["density"][i]
        if density >= 1 or not kind:
            selects.append(Select("all"))
            continue
        if kind == "magnitude":
            select = trimmed[i] if p["trim"] == "tensor" else replace(inputs.shared["selects"][i])
        elif density <= 0:
            select = Select("none")
        elif kind == "random":
            select = Select("random", density=density, key=inputs.random_key(i))
        else:
            select = Select("ranked", density=density, epsilon=p["epsilon"][i], key=inputs.random_key(i))
        selects.append(select)
    if p["rescale"]:
        _rescale(inputs, p, {i: s for i, s in enumerate(selects) if s.kind not in ("all", "none")})
    return selects


def _rescale(inputs: Inputs, p: Params, selects: dict[int, Select]) -> None:
    """Set the scale of selections (by model) to what makes up for the dropped elements: one pass, for all models together."""
    if p["rescale_rule"] == "density":
        for i, select in selects.items():
            select.scale = 1.0 / p["density"][i]
        return
    if not selects:
        return
    if inputs.numel * len(inputs.models) / 8 <= inputs.spare:
        for select in selects.values():
            select.masks = {}  # made once, for the sums and for the result
    sums = {i: np.zeros(2) for i in selects}
    counting = {i: replace(select) for i, select in selects.items()}
    for chunk in inputs.chunks():
        assert chunk.base is not None
        for i in selects:
            kernel.masked_sums(chunk.models[i], chunk.base, counting[i], chunk.start, chunk.columns, sums[i])
    inputs.finite = len(sums) == len(inputs.models) and all(np.isfinite(s[0]) for s in sums.values())
    for i, select in selects.items():
        before, after = sums[i].tolist()
        select.scale = 1.0 if min(before, after) < 1e-7 else before / after


def _reduce(kind: str, elect: bool) -> Any:
    def reduce(inputs: Inputs, p: Params) -> dict[str, Any]:
        facts: dict[str, Any] = {"selects": _selects(inputs, p, kind), "zero_sign": 1}
        if elect and p["zero_sign"] == "majority":
            signs = 0
            trial = {"selects": [replace(s) for s in facts["selects"]], "zero_sign": 1}
            for chunk in inputs.chunks():
                signs += _task_sum(chunk, p, trial, torch.empty(chunk.numel, device=inputs.device), elect, True)
            facts["zero_sign"] = (signs > 0) - (signs < 0)
        return facts

    return reduce


def _task_sum(chunk: Chunk, p: Params, facts: dict[str, Any], out: Tensor, elect: bool, count: bool) -> int:
    assert chunk.base is not None
    return kernel.task_sum(
        chunk.base, chunk.models, facts["selects"], p["weight"], out, elect=elect, normalize=p["normalize"],
        scale=p["lambda"], zero_sign=facts["zero_sign"], start=chunk.start, columns=chunk.columns, count_signs=count,
    )  # fmt: skip


def _combine(elect: bool) -> Any:
    def combine(chunk: Chunk, p: Params, facts: dict[str, Any], out: Tensor) -> None:
        _task_sum(chunk, p, facts, out, elect, False)

    return combine


def _improbable(p: Params) -> str | None:
    for density, epsilon in zip(p["density"], p["epsilon"], strict=True):
        if 0 < density < 1 and not (0 < density - epsilon and density + epsilon < 1):
            return (
                "della draws with probabilities from density - epsilon to density + epsilon, which must lie between 0 and 1; "
                f"density is {density} and epsilon {epsilon}"
            )
    return None


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
    ranges = {i: _kept_range(first, i, n) for i in range(len(first["density"]))}
    kept = {i: r for i, r in ranges.items() if r is not None}
    selects = _magnitude_selects([inputs for inputs, _ in pieces], kept, n, "all")
    return {"selects": [selects.get(i, Select("all")) for i in ranges]}


_WEIGHT = Param("weight", scope="model", about="multiplies the task vector")
_DENSITY = Param("density", float, 1.0, scope="model", low=0.0, high=1.0, about="share of elements that stay; 1 = all")


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
            refuse=_improbable if kind == "ranked" else lambda p: None,
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
