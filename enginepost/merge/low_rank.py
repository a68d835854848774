"""A LoRA from a full fine-tune: what was learned, as an adapter for the base.

For every linear layer of the blocks the difference D = W_tuned - W_base `[out, in]` is replaced by its best approximation of rank r,

    D ~ U_r S_r V_r^T = B A,    B = U_r S_r^(1/2) [out, r],    A = S_r^(1/2) V_r^T [r, in]    (Eckart and Young 1936)

by a randomised SVD (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1): Q spans D (D^T D)^q G of a Gaussian
G with a few columns more than r, and the SVD of the small Q^T D gives the rest. The rank is fixed, or the least that holds a share
of the energy |D|_F^2. Tensors come one at a time; memory is a few times the largest in float32, whatever the size of the models.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from enginepost.checkpoint import Adapter, LoraWeights, write_adapter, write_json
from enginepost.checkpoint.atomic import make_directory
from enginepost.kernels import merge as kernel
from enginepost.merge.models import Model, open_model
from enginepost.merge.recipe import ModelRef
from enginepost.merge.registry import MergeError

REPORT = "extract.json"
_MORE = 10  # columns of the random matrix beyond the rank
_ITERATIONS = 2  # q
_FIRST = 16  # rank tried first when the energy decides

Progress = Callable[[int, int, str], None]  # tensors done, of how many, name of the last


@dataclass
class Module:
    """One adapted layer: its rank, |D - B A|_F / |D|_F, and |D|_F / |W_base|_F."""

    rank: int
    error: float
    change: float


@dataclass
class ExtractReport:
    """modules: {path: Module}. error: |D - B A|_F / |D|_F over all of them together. left_out: {tensor: |D|_F / |W_base|_F} that
    changed and that the adapter does not hold. seconds: wall time."""

    directory: Path
    modules: dict[str, Module] = field(default_factory=dict)
    error: float = 0.0
    left_out: dict[str, float] = field(default_factory=dict)
    unchanged: int = 0
    seconds: float = 0.0

    def text(self) -> str:
        """A few lines for people: the whole, and the modules that are approximated worst."""
        ranks = [module.rank for module in self.modules.values()]
        lines = [
            f"{self.directory}: {len(ranks)} modules, rank {min(ranks)}"
            + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
            + f", relative error {self.error:.3g} of the change, {self.seconds:.1f} s"
        ]
        worst = sorted(self.modules.items(), key=lambda item: -item[1].error)[:5]
        lines += [f"  {path}: rank {m.rank}, error {m.error:.3g}, change {m.change:.3g}" for path, m in worst]
        if self.left_out:
            first = ", ".join(f"{name} ({change:.2g})" for name, change in list(self.left_out.items())[:4])
            lines.append(
                f"not in the adapter though they changed: {len(self.left_out)} tensors, {first}; --whole keeps them as they are"
            )
        return "\n".join(lines)


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    energy: float | None = None,
    max_rank: int = 256,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write a PEFT adapter that turns `base` into about `tuned`.

    Args:
        base, tuned: model directories of one architecture.
        out: adapter directory to make; new or empty.
        rank: of every module; a smaller one where a matrix has no more.
        energy: instead, between 0 and 1: each module gets the least rank that holds this share of |D|_F^2, at most `max_rank`.
        whole: norms, embeddings and a head that changed go into the adapter whole.
        dtype: of A and B. seed: of the random matrices.
    Raises: MergeError for models that do not fit together, NaN, or models that are equal.
    """
    started = time.perf_counter()
    if energy is not None and not 0 < energy < 1:
        raise MergeError(f"energy is {energy}; it is a share of the change, between 0 and 1.")
    if rank < 1 or max_rank < 1:
        raise MergeError(f"rank is {rank} and max_rank {max_rank}; both must be at least 1.")
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out}: exists and is not an empty directory; remove it or name another.")
    before, after = (open_model(ModelRef(os.fspath(path)), Path(path)) for path in (base, tuned))
    names = _matching(before, after)
    report = ExtractReport(out)
    parts: dict[str, LoraWeights] = {}
    full: dict[str, Tensor] = {}
    lost = total = 0.0
    for i, name in enumerate(names):
        w0, w1 = before.checkpoint.tensor(name), after.checkpoint.tensor(name)
        if not w0.dtype.is_floating_point:
            continue
        square, origin = _norms(w0, w1, name, before, after)
        change = (square / origin) ** 0.5 if origin else float("inf")
        if square == 0:
            report.unchanged += 1
        elif is_linear(before, name):
            path = name.removesuffix(".weight")
            a, b, left = _factors(w1.float() - w0.float(), rank, energy, max_rank, dtype, seed + i)
            parts[path] = LoraWeights(a, b, None, a.shape[0], float(a.shape[0]))
            report.modules[path] = Module(a.shape[0], (left / square) ** 0.5, change)
            lost, total = lost + left, total + square
        elif whole and not name.endswith(".bias"):  # PEFT has no name for the bias of a layer that has a LoRA
            full[name] = w1.to(dtype) if w1.dtype != dtype else w1.clone()
        else:
            report.left_out[name] = change
        for checkpoint in (before.checkpoint, after.checkpoint):
            checkpoint.drop(name)
        if progress is not None:
            progress(i + 1, len(names), name)
    if not parts:
        raise MergeError(f"{tuned}: no linear layer differs from {base}; there is nothing to extract.")
    report.error = (lost / total) ** 0.5
    make_directory(out)
    write_adapter(out, Adapter(_config(before, parts, full, base), parts, full))
    report.seconds = time.perf_counter() - started
    write_json(
        out / REPORT,
        {
            "base": os.fspath(base), "tuned": os.fspath(tuned), "rank": rank, "energy": energy, "error": report.error,
            "modules": {p: {"rank": m.rank, "error": m.error, "change": m.change} for p, m in report.modules.items()},
            "left_out": report.left_out,
        },
    )  # fmt: skip
    return report


def is_linear(model: Model, name: str) -> bool:
    """Whether a tensor is the weight of a linear layer of a block."""
    shape = model.checkpoint.shape(name)
    return name.startswith(model.prefix) and name.endswith(".weight") and len(shape) == 2 and min(shape) > 1


def _matching(before: Model, after: Model) -> list[str]:
    ours, theirs = before.config.get("model_type"), after.config.get("model_type")
    if ours != theirs:
        raise MergeError(
            f"{before.ref} is a {ours} model and {after.ref} a {theirs}; an adapter fits one architecture."
        )
    tied = before.tied or after.tied  # a head may be stored beside the embedding it is tied to
    names = []
    for name in dict.fromkeys([*before.checkpoint.names, *after.checkpoint.names]):
        missing = [m.ref for m in (before, after) if name not in m.checkpoint]
        if missing and tied and name.endswith("lm_head.weight"):
            continue
        if missing:
            raise MergeError(f"{missing[0]}: has no tensor {name}; the models are not of one architecture.")
        a, b = before.checkpoint.shape(name), after.checkpoint.shape(name)
        if a != b:
            hint = " Vocabularies of other sizes cannot be put into an adapter." if a[1:] == b[1:] else ""
            raise MergeError(f"{name} is {list(a)} in {before.ref} and {list(b)} in {after.ref}.{hint}")
        names.append(name)
    return names


def _norms(w0: Tensor, w1: Tensor, name: str, before: Model, after: Model) -> tuple[float, float]:
    """|w1 - w0|^2 and |w0|^2, float64, in chunks."""
    square, origin = np.zeros((1, 1)), np.zeros((1, 1))
    flat0, flat1 = w0.reshape(-1), w1.reshape(-1)
    for start in range(0, flat0.numel(), 16 * kernel.BLOCK):
        piece = slice(start, start + 16 * kernel.BLOCK)
        for flat, model in ((flat0, before), (flat1, after)):
            if kernel.nonfinite(flat[piece]):
                raise MergeError(f"{model.ref}: tensor {name} holds NaN or infinite values.")
        kernel.gram([flat1[piece]], flat0[piece], square)
        kernel.gram([flat0[piece]], None, origin)
    return float(square[0, 0]), float(origin[0, 0])


def _factors(
    d: Tensor, rank: int, energy: float | None, max_rank: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, float]:
    """(A `[r, in]`, B `[out, r]`, |D - B A|^2) of d `[out, in]` float32."""
    total = float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
    most = min(max_rank if energy is not None else rank, *d.shape)
    tried = min(most, _FIRST) if energy is not None else most
    while True:
        u, s, vt = svd(d, tried, seed)
        held = torch.cumsum(s.double() ** 2, 0) / total
        if energy is None or tried == most or float(held[-1]) >= energy:
            break
        tried = min(most, 2 * tried)
    r = tried if energy is None else min(tried, int((held < energy).sum()) + 1)
    r = max(1, min(r, int((s > s[0] * 1e-6).sum())))  # directions that hold nothing are left out
    root = s[:r].sqrt()
    b, a = (u[:, :r] * root).to(dtype), (root[:, None] * vt[:r]).to(dtype)
    left = 0.0
    step = max(1, (1 << 22) // d.shape[1])
    for start in range(0, d.shape[0], step):
        rest = d[start : start + step] - b[start : start + step].float() @ a.float()
        left += float(torch.linalg.vector_norm(rest, dtype=torch.float64)) ** 2
    return a.contiguous(), b.contiguous(), left


def svd(d: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of d `[m, n]`: u `[m, rank]`, s `[rank]` descending, vt `[rank, n]`.

    Exact where the matrix is not much larger than the rank, else randomised (see the head of this file)."""
    m, n = d.shape
    width = rank + _MORE
    if 3 * width >= min(m, n):
        u, s, vt = torch.linalg.svd(d, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    gaussian = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=d.dtype)
    q = torch.linalg.qr(d @ gaussian)[0]
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(d.T @ q)[0]
        q = torch.linalg.qr(d @ q)[0]
    u, s, vt = torch.linalg.svd(q.T @ d, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank]


def _config(model: Model, parts: dict[str, LoraWeights], full: dict[str, Tensor], base: str | os.PathLike[str]) -> dict:
    """PEFT's configuration: the rank of most modules, patterns for the others; alpha = r everywhere, so the scaling is 1."""
    common = Counter(part.r for part in parts.values()).most_common(1)[0][0]
    other = {path: part.r for path, part in parts.items() if part.r != common}
    linear = [name.removesuffix(".weight") for name in model.checkpoint.names if is_linear(model, name)]
    suffixes = {path.rpartition(".")[2] for path in parts}
    everywhere = all(path in parts for path in linear if path.rpartition(".")[2] in suffixes)
    return {
        "base_model_name_or_path": os.fspath(base),
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(suffixes if everywhere else parts),
        "modules_to_save": sorted(name.rpartition(".")[0] for name in full) or None,
    }
