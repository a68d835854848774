"""Merging LoRA adapters of one base with one another, in the ways of PEFT's `add_weighted_adapter`, from disk to disk.

Adapter i has A_i `[r_i, in]`, B_i `[out, r_i]`, scaling s_i and a weight w_i; D_i = s_i B_i A_i is what it adds to a weight.

    linear        A = sum sign(w_i) |w_i s_i|^(1/2) A_i,  B = sum |w_i s_i|^(1/2) B_i      equal ranks; B A has mixed terms B_i A_j
    cat           A = [w_1 s_1 A_1; w_2 s_2 A_2; ...],    B = [B_1 B_2 ...]                 exactly sum w_i D_i, rank sum r_i
    svd           the best A, B of a given rank for sum w_i D_i, from the factors alone
    ties          like linear, A and B each merged by TIES (arXiv 2306.01708)
    dare_*        like linear or ties, elements kept with probability `density` and divided by it (arXiv 2311.03099)
    *_svd         the same on the D_i themselves, and then the best factors of a given rank

TIES is PEFT's here: the sign is elected before the weights come in, and the divisor is the number of adapters that agree.
Random masks come from a counter, keyed by seed, module and adapter. The result has alpha = rank, so its scaling is 1.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enginepost.checkpoint import Adapter, LoraWeights, read_adapter, write_adapter
from enginepost.checkpoint.atomic import make_directory
from enginepost.kernels import merge as kernel
from enginepost.merge.low_rank import svd
from enginepost.merge.registry import MergeError, suggest
from enginepost.merge.tensors import Inputs

COMBINATIONS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
)


@dataclass
class AdapterMergeReport:
    """directory; method; ranks {module path: rank}; error: |sum w_i D_i - B A|_F / |sum w_i D_i|_F over all modules: how far the
    result is from adding the adapters up; notes."""

    directory: Path
    method: str
    ranks: dict[str, int]
    error: float
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return f"{self.directory}: {self.method}, {len(self.ranks)} modules, rank {shown}, {self.error:.3g} from the weighted sum"


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    sign: str = "total",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterMergeReport:
    """Merge PEFT adapters into a new one.

    Args:
        adapters: adapter directories, of one base model; their ranks and modules may differ.
        out: directory to make; new or empty.
        method: one of COMBINATIONS. weights: one an adapter, default 1 each.
        density: share of elements kept (ties, dare). sign: elected by "total" value or by "frequency" (ties).
        rank: of the result of an svd; default the highest of the adapters.
    Raises: MergeError, CheckpointError: adapters that cannot be merged this way; nothing is written then.
    """
    out = Path(os.path.abspath(out))
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    _check(adapters, out, method, weights, density, sign, rank)
    read = [read_adapter(path) for path in adapters]
    notes = _compare(read, adapters)
    parts: dict[str, LoraWeights] = {}
    lost = total = 0.0
    wanted = rank or max(part.r for adapter in read for part in adapter.parts.values())
    for path in dict.fromkeys(path for adapter in read for path in adapter.parts):
        holders = [(i, adapter) for i, adapter in enumerate(read) if path in adapter.parts]
        scaled = [weights[i] * adapter.scaling(path) for i, adapter in holders]
        a = [adapter.parts[path].A.float() for _, adapter in holders]
        b = [adapter.parts[path].B.float() for _, adapter in holders]
        _same_shape(path, a, b, [adapters[i] for i, _ in holders])
        keys = [str(i) for i, _ in holders]
        if method == "cat":
            new_a, new_b = torch.cat([s * x for s, x in zip(scaled, a, strict=True)]), torch.cat(b, dim=1)
        elif method == "svd":
            new_a, new_b = _best_of_sum(a, b, scaled, wanted)
        elif method.endswith("_svd"):
            deltas = [adapter.scaling(path) * y @ x for (_, adapter), x, y in zip(holders, a, b, strict=True)]
            merged = _combine(
                method, deltas, [weights[i] for i, _ in holders], density, sign, f"{path}.delta", keys, seed
            )
            new_a, new_b = _factors(*svd(merged, min(wanted, *merged.shape), seed))
        else:
            if len({part.shape[0] for part in a}) > 1:
                ranks = ", ".join(f"{part.shape[0]} in {adapters[i]}" for (i, _), part in zip(holders, a, strict=True))
                raise MergeError(
                    f"{path}: the ranks differ ({ranks}), and {method} adds the factors themselves. Use svd, cat"
                    f"{'' if method == 'linear' else f' or {method}_svd'}, which take any ranks."
                )
            root = [math.sqrt(abs(s)) for s in scaled]
            signed = [math.copysign(r, s) for r, s in zip(root, scaled, strict=True)]
            new_a = _combine(method, a, signed, density, sign, f"{path}.lora_A", keys, seed)
            new_b = _combine(method, b, root, density, sign, f"{path}.lora_B", keys, seed)
        new_a, new_b = new_a.to(dtype).contiguous(), new_b.to(dtype).contiguous()
        parts[path] = LoraWeights(new_a, new_b, None, new_a.shape[0], float(new_a.shape[0]))
        added = sum((s * y @ x for s, x, y in zip(scaled[1:], a[1:], b[1:], strict=True)), scaled[0] * b[0] @ a[0])
        total += float(added.double().square().sum())
        lost += float((added.double() - new_b.double() @ new_a.double()).square().sum())
    make_directory(out)
    write_adapter(out, Adapter(_config(read[0].config, parts), parts))
    error = math.sqrt(lost / total) if total else 0.0
    return AdapterMergeReport(out, method, {path: part.r for path, part in parts.items()}, error, notes)


def _combine(
    method: str, tensors: list[Tensor], weights: list[float], density: float, sign: str, name: str, keys: list[str], seed: int
) -> Tensor:  # fmt: skip
    """Tensors of one shape merged by linear, ties or dare_*, as PEFT's utils/merge_utils.py does."""
    inputs = Inputs(name, tensors, seed=seed, keys=keys)
    if method.startswith("dare"):
        tensors = [_drop(t, density, inputs.random_key(i)) for i, t in enumerate(tensors)]
    elif method.startswith("ties"):
        tensors = [_trim(t, density) for t in tensors]
    stacked = torch.stack(tensors)
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype).view(-1, 1, 1)
    if "ties" not in method:
        return weighted.sum(0)
    score = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    agree = stacked.sign() == torch.where(score >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trim(t: Tensor, density: float) -> Tensor:
    if density >= 1:
        return t
    kept = torch.zeros(t.numel(), dtype=t.dtype)
    kept[torch.topk(t.abs().reshape(-1), int(density * t.numel())).indices] = 1
    return t * kept.view(t.shape)


def _drop(t: Tensor, density: float, key: int) -> Tensor:
    return t if density >= 1 else t * keep_mask(t, density, key) / density


def keep_mask(t: Tensor, density: float, key: int) -> Tensor:
    """bool, of the tensor's shape: each element stays with probability `density`."""
    return torch.from_numpy(kernel.random_bits(key, 0, t.numel()) < kernel.draw_limit(density)).view(t.shape)


def _best_of_sum(a: list[Tensor], b: list[Tensor], scaled: list[float], rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of sum s_i B_i A_i: the product of the two R of their QR is small and has its singular values."""
    q_b, r_b = torch.linalg.qr(torch.cat(b, dim=1).double())
    q_a, r_a = torch.linalg.qr(torch.cat([s * x for s, x in zip(scaled, a, strict=True)]).double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _factors(q_b @ u[:, :rank], s[:rank], vt[:rank] @ q_a.T)


def _factors(u: Tensor, s: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    root = s.clamp(min=0).sqrt()
    return root[:, None] * vt, u * root


def _check(
    adapters: Sequence[Any],
    out: Path,
    method: str,
    weights: Sequence[float],
    density: float,
    sign: str,
    rank: int | None,
) -> None:
    if method not in COMBINATIONS:
        raise MergeError(f"there is no way {method!r} to merge adapters; {suggest(method, COMBINATIONS)}.")
    if len(adapters) < 2:
        raise MergeError(f"merging needs at least two adapters, and {len(adapters)} came.")
    if len(weights) != len(adapters):
        raise MergeError(f"{len(weights)} weights came for {len(adapters)} adapters; give one for each.")
    if not all(math.isfinite(w) for w in weights):
        raise MergeError(f"the weights must be finite, and they are {list(weights)}.")
    if not 0 < density <= 1:
        raise MergeError(f"density is {density}; it is the share of elements that stay, above 0 and at most 1.")
    if sign not in ("total", "frequency"):
        raise MergeError(f"sign is {sign!r}; it can be total or frequency.")
    if rank is not None and ("svd" not in method or rank < 1):
        raise MergeError(f"rank is {rank}; only svd and *_svd choose a rank, of at least 1.")
    if density < 1 and method in ("linear", "cat", "svd"):
        raise MergeError(f"{method} drops nothing, so density does not apply; use ties or dare_linear.")
    if any(Path(path).resolve() == out.resolve() for path in adapters):
        raise MergeError(f"{out}: is one of the adapters; name a new directory.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out}: exists and is not an empty directory; remove it or name another.")


def _compare(read: list[Adapter], adapters: Sequence[Any]) -> list[str]:
    notes = []
    for path, adapter in zip(adapters, read, strict=True):
        if any(part.magnitude is not None for part in adapter.parts.values()):
            raise MergeError(
                f"{path}: is a DoRA adapter, whose change is no product of two factors. Fuse it into its base, then merge the "
                "models, or extract a LoRA from the fused model."
            )
        for module, part in adapter.parts.items():
            if kernel.nonfinite(part.A.reshape(-1)) or kernel.nonfinite(part.B.reshape(-1)):
                raise MergeError(f"{path}: {module} holds NaN or infinite values.")
    bases = {str(adapter.config.get("base_model_name_or_path")) for adapter in read} - {"None"}
    if len(bases) > 1:
        notes.append(f"the adapters name different base models: {', '.join(sorted(bases))}.")
    return notes


def _same_shape(path: str, a: list[Tensor], b: list[Tensor], where: list[Any]) -> None:
    for x, y, w in zip(a, b, where, strict=True):
        if (y.shape[0], x.shape[1]) != (b[0].shape[0], a[0].shape[1]):
            raise MergeError(
                f"{path} is [{y.shape[0]}, {x.shape[1]}] in {w} and [{b[0].shape[0]}, {a[0].shape[1]}] in {where[0]}: the "
                "adapters are of different base models."
            )


def _config(first: dict[str, Any], parts: dict[str, LoraWeights]) -> dict[str, Any]:
    common = Counter(part.r for part in parts.values()).most_common(1)[0][0]
    other = {path: part.r for path, part in parts.items() if part.r != common}
    kept = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
    return {
        **{key: first[key] for key in kept if key in first},
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(parts),
    }
