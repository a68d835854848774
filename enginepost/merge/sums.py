"""Methods whose result is a weighted sum of the inputs: linear, the spherical ones, model_stock, passthrough.

Interpolation on a sphere needs only inner products: the result lies in the span of the inputs. One pass over the tensor gives the
Gram matrix G[i, j] = x_i . x_j in float64, the coefficients follow from G by arithmetic on a few numbers, and a second pass forms
sum_i c_i x_i in float32, rounded once. Lengths and angles below always mean those of the whole tensor as one vector, unless a
method says row by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.kernels import merge as kernel
from enginepost.merge.registry import MergeError, Param, method
from enginepost.merge.tensors import Chunk, Inputs

Params = Mapping[str, Any]
_WEIGHT = Param("weight", scope="model", about="share of each model")


def _gram(inputs: Inputs, deltas: bool) -> np.ndarray:
    """float64 `[k, k]` over the models (less the base if `deltas`)."""
    total = np.zeros((len(inputs.models), len(inputs.models)))
    for chunk in inputs.chunks():
        kernel.gram(chunk.models, chunk.base if deltas else None, total)
    inputs.finite = bool(np.isfinite(total).all()) and (deltas or inputs.base is None)
    return total


def _write_sum(chunk: Chunk, p: Params, coefficients: list[float], out: Tensor) -> None:
    """out = sum c_i x_i; with a base its coefficient comes last."""
    tensors = chunk.models if len(coefficients) == len(chunk.models) else [*chunk.models, chunk._base]
    kernel.weighted_sum(tensors, coefficients, out)


def _around_base(coefficients: list[float], inputs: Inputs) -> list[float]:
    """Coefficients of deltas -> of models and base: b + sum c_i (x_i - b)."""
    return coefficients if inputs.base is None else [*coefficients, 1.0 - sum(coefficients)]


def _linear(inputs: Inputs, p: Params) -> list[float]:
    weights = [float(w) for w in p["weight"]]
    if not p["normalize"]:
        return weights
    total = sum(weights)
    return [w / total for w in weights]


def _cancel(key: str) -> Any:
    """Refuses weights that are to be normalised, as `key` says, and cannot be."""

    def refuse(p: Params) -> str | None:
        if not p[key] or sum(p["weight"]) != 0:
            return None
        return f"the weights sum to zero, so they cannot be normalised; set {key}: false"

    return refuse


method(
    "linear",
    reduce=_linear,
    refuse=_cancel("normalize"),
    writes=True,
    gpu=lambda p: True,
    parameters=[
        Param("weight", scope="input", about="share of each model"),
        Param("normalize", bool, True, about="divide by the sum of the weights"),
    ],
    paper="https://arxiv.org/abs/2203.05482",
    about="weighted average",
)(_write_sum)


def _slerp(inputs: Inputs, p: Params) -> list[float]:
    # from the base (t = 0) to the other model (t = 1)
    assert inputs.base is not None
    both = Inputs(inputs.name, [inputs.base, inputs.models[0]], chunk=inputs.chunk, device=inputs.device)
    g = _gram(both, deltas=False)
    inputs.finite = both.finite
    norm = [n if n > 1e-8 else 1.0 for n in (math.sqrt(g[0, 0]), math.sqrt(g[1, 1]))]
    dot = max(-1.0, min(1.0, g[0, 1] / norm[0] / norm[1]))
    t = p["t"]
    if abs(dot) > 0.9995:
        return [t, 1 - t]
    theta = math.acos(dot)
    return [math.sin(t * theta) / math.sin(theta), math.sin((1 - t) * theta) / math.sin(theta)]


method(
    "slerp",
    reduce=_slerp,
    writes=True,
    gpu=lambda p: True,
    base="required",
    models=(1, 1),
    parameters=[Param("t", about="0 = the base, 1 = the other model")],
    paper="https://en.wikipedia.org/wiki/Slerp",
    about="along the great circle between two models; a straight line where they are nearly parallel (|cos| > 0.9995)",
)(_write_sum)


def _fraction(p: Params) -> float:
    total = p["weight"][0] + p["weight"][1]
    return 0.5 if abs(total) < 1e-6 else p["weight"][1] / total


def _nuslerp(inputs: Inputs, p: Params) -> Any:
    if p["nuslerp_flatten"]:
        g = _gram(inputs, deltas=True)
        return _around_base(_arc(g[0, 0], g[1, 1], g[0, 1], _fraction(p), np).tolist(), inputs)
    if not p["nuslerp_row_wise"]:
        return None  # row by row, in the combination
    squares = np.zeros((3, inputs.columns))  # down the columns of [rows, columns], one row after the other
    for chunk in inputs.chunks():
        u, v = (d.double().numpy() for d in chunk.d)
        for i in range(u.shape[0]):
            squares += np.stack([u[i] * u[i], v[i] * v[i], u[i] * v[i]])
    return torch.from_numpy(_arc(squares[0], squares[1], squares[2], _fraction(p), np)).float()


def _arc(uu: Any, vv: Any, uv: Any, t: float, lib: Any) -> Any:
    """The two coefficients `[2, ...]` of slerp from u to v, given their inner products (`lib`: numpy or torch)."""
    uu, vv, uv = (lib.as_tensor(z) if lib is torch else np.asarray(z, dtype=np.float64) for z in (uu, vv, uv))
    norms = lib.clip(lib.sqrt(uu), 1e-7, None) * lib.clip(lib.sqrt(vv), 1e-7, None)
    cos = lib.clip(uv / norms, -1.0, 1.0)
    straight = 1 - cos * cos <= 1e-16
    theta = lib.arccos(lib.where(straight, lib.zeros_like(cos), cos))
    sine = lib.sin(theta)
    first = lib.where(straight, lib.full_like(cos, 1 - t), lib.sin((1 - t) * theta) / sine)
    second = lib.where(straight, lib.full_like(cos, t), lib.sin(t * theta) / sine)
    return lib.stack([first, second])


def _nuslerp_combine(chunk: Chunk, p: Params, facts: Any, out: Tensor) -> None:
    if p["nuslerp_flatten"]:
        return _write_sum(chunk, p, facts, out)
    u, v = chunk.d
    if p["nuslerp_row_wise"]:
        first, second = facts
    else:
        wide = u.double(), v.double()
        products = [(a * b).sum(-1) for a, b in ((wide[0], wide[0]), (wide[1], wide[1]), (wide[0], wide[1]))]
        first, second = _arc(products[0], products[1], products[2], _fraction(p), torch).float()[:, :, None]
    result = first * u + second * v
    out.copy_((result if chunk.base is None else result + chunk.b).view(-1))


method(
    "nuslerp",
    reduce=_nuslerp,
    writes=True,
    gpu=lambda p: p["nuslerp_flatten"],
    base="optional",
    models=(2, 2),
    rows=lambda p: not p["nuslerp_flatten"],
    # dimension 0 against the rest, or the last dimension
    columns=lambda p, shape: math.prod(shape[1:]) if p["nuslerp_row_wise"] else (shape or (1,))[-1],
    parameters=[
        _WEIGHT,
        Param("nuslerp_flatten", bool, True, about="the tensor as one vector"),
        Param("nuslerp_row_wise", bool, False, about="without flatten: along dimension 0 instead of the last"),
    ],
    about="slerp of two models by weights, or of their differences from a base",
)(_nuslerp_combine)


def _multislerp(inputs: Inputs, p: Params) -> list[float]:
    weights = np.array(p["weight"], dtype=np.float64)
    if len(weights) == 1:
        return [1.0] if inputs.base is None else [1.0, 0.0]
    if p["normalize_weights"]:
        weights = weights / weights.sum()
    eps = p["eps"]
    g = _gram(inputs, deltas=True)
    norms = np.sqrt(np.diag(g))
    g = g / np.outer(norms + eps, norms + eps)  # of the unit vectors
    length = math.sqrt(max(0.0, float(weights @ g @ weights)))
    if length < eps:
        if len(weights) == 2:
            return _around_base(weights.tolist(), inputs)
        raise MergeError(
            f"{inputs.name}: multislerp has no answer: the weighted directions of the models cancel (their mean is {length:.1e}). "
            "Use other weights, or another method for this tensor."
        )
    mean = weights / length
    dots = g @ mean
    tangent = weights - (weights @ dots) * mean
    angle = math.sqrt(max(0.0, float(tangent @ g @ tangent))) + eps
    units = math.cos(angle) * mean + math.sin(angle) / angle * tangent
    return _around_base((units * (norms @ weights) / (norms + eps)).tolist(), inputs)


method(
    "multislerp",
    reduce=_multislerp,
    refuse=lambda p: _cancel("normalize_weights")(p) if len(p["weight"]) > 1 else None,
    writes=True,
    gpu=lambda p: True,
    base="optional",
    parameters=[
        _WEIGHT,
        Param("normalize_weights", bool, True, about="divide by the sum of the weights"),
        Param("eps", float, 1e-8, low=0.0, about="added to lengths"),
    ],
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    about="weighted mean on a sphere, in the tangent space at the mean direction",
)(_write_sum)


def _karcher(inputs: Inputs, p: Params) -> list[float]:
    count, tol = len(inputs.models), p["tol"]
    if count == 1:
        return [1.0]
    g = _gram(inputs, deltas=False)
    norms = np.sqrt(np.diag(g))
    valid = norms > tol
    if not valid.any():
        return [0.0] * count
    alpha = valid / valid.sum()
    g = g / np.outer(np.where(valid, norms, 1.0), np.where(valid, norms, 1.0))

    def length(c: np.ndarray) -> float:
        return math.sqrt(max(0.0, float(c @ g @ c)))

    mean = alpha / length(alpha) if length(alpha) >= tol else np.eye(count)[int(np.argmax(valid))]
    for _ in range(p["max_iter"]):
        tangent = np.zeros(count)
        for i in np.flatnonzero(valid):
            dot = max(-1.0, min(1.0, float(g[i] @ mean)))
            theta = math.acos(dot)
            if theta >= tol and math.sin(theta) > 0:
                tangent += alpha[i] * theta / math.sin(theta) * (np.eye(count)[i] - dot * mean)
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / length(mean) if length(mean) > tol else mean
    return (mean * np.mean(norms) / np.where(valid, norms, 1.0)).tolist()


method(
    "karcher",
    reduce=_karcher,
    writes=True,
    gpu=lambda p: True,
    parameters=[
        Param("max_iter", int, 10, low=0, about="iterations at most"),
        Param("tol", float, 1e-5, low=0.0, about="stop when the mean moves less"),
    ],
    paper="https://arxiv.org/abs/2603.04972",
    about="the point on the sphere with the least squared angles to all models",
)(_write_sum)


def _stock(inputs: Inputs, p: Params) -> Any:
    if p["filter_wise"]:
        return None
    g = _gram(inputs, deltas=True)
    norms = np.sqrt(np.diag(g))
    cosines = np.clip(g / np.clip(np.outer(norms, norms), 1e-6, None), -1, 1)
    count = len(norms)
    t = float(_stock_share(np.array(cosines[np.triu_indices(count, 1)].mean()), count, np))
    return [t / count] * count + [1 - t]


def _stock_share(cosine: Any, count: int, lib: Any) -> Any:
    denominator = 1 + (count - 1) * cosine
    singular = lib.abs(denominator) < 1e-6  # opposing updates: keep the base
    share = count * cosine / lib.where(singular, lib.ones_like(cosine), denominator)
    return lib.where(singular, lib.zeros_like(cosine), share)


def _stock_combine(chunk: Chunk, p: Params, facts: Any, out: Tensor) -> None:
    if facts is not None:
        return _write_sum(chunk, p, facts, out)
    deltas = [d.double() for d in chunk.d]
    count = len(deltas)
    norms = [torch.sqrt((d * d).sum(-1)) for d in deltas]
    cosines = [
        torch.clip((deltas[i] * deltas[j]).sum(-1) / torch.clip(norms[i] * norms[j], min=1e-6), -1, 1)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    t = _stock_share(sum(cosines[1:], cosines[0]) / count_pairs(count), count, torch).float()[:, None]
    mean = sum(chunk.x[1:], chunk.x[0]) / count
    out.copy_((t * mean + (1 - t) * chunk.b).view(-1))


def count_pairs(count: int) -> int:
    return count * (count - 1) // 2


method(
    "model_stock",
    reduce=_stock,
    writes=True,
    gpu=lambda p: not p["filter_wise"],
    base="required",
    models=(2, None),
    rows=lambda p: p["filter_wise"],
    parameters=[Param("filter_wise", bool, False, about="an angle for every row instead of one for the tensor")],
    paper="https://arxiv.org/abs/2403.19522",
    about="between base and average, by the angle between the task vectors",
)(_stock_combine)


def _passthrough(inputs: Inputs, p: Params) -> list[float]:
    scale = p["scale"][0]
    return [1.0 if scale is None else scale]


method(
    "passthrough",
    reduce=_passthrough,
    writes=True,
    gpu=lambda p: True,
    models=(1, 1),
    parameters=[Param("scale", float, None, scope="input", about="multiplies the tensor")],
    about="the tensor as it is, for stacking layers with slices",
)(_write_sum)
