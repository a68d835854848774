"""What merging does to a run of elements: sums of tensors, their inner products, and task vectors trimmed, drawn and elected.

A tensor is merged chunk by chunk, so every function here takes 1-D pieces of the inputs and the element offset `start` of the piece.
Pieces begin at multiples of BLOCK (or at a row), and reductions are float64 sums over blocks in order: results do not depend on how
a tensor was cut. On the CPU functions run on the calling thread alone; the caller has its own threads, one tensor each. Tensors on a
GPU go to its kernels, which give the same bits; totals and counts are numpy arrays of the CPU there too.

    weighted_sum    out = sum_i w_i x_i
    gram            G[i, j] += sum (x_i - b)(x_j - b)
    task_sum        out = b + lambda * sum_i w_i s_i m_i (x_i - b)   with masks m_i, optional sign election and normalisation

A mask is a `Select`: by magnitude (TIES, breadcrumbs), at random (DARE) or at random by rank in the row (DELLA). Magnitudes are
compared as the 31 bits of |float32|, which sort as integers do; `low` and `high` are found by counting (`magnitude_counts`).

Random numbers come from a counter: element i of a tensor gets `random_bits(key, i)`, whatever thread or chunk asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.kernels.backend import GPU_FLOATS, core, emulating, native, to_dlpack

BLOCK = 1 << 16  # elements; the grain of reductions and of the random generator
TOP_BITS = 16  # of the 31 bits of a magnitude, by which all are counted; the lower 15 only in a window
LOW_BITS = 15
RANK_SLOTS = 1024  # of the magnitudes of a row, 64 an octave
_SAMPLED = 256  # elements in a run that magnitude_counts looks at
MAX_INPUTS = 64  # of the native kernels
MAX_WINDOWS = 2  # likewise

_M32 = np.uint32(0xFFFFFFFF)


@dataclass
class Select:
    """Which elements of a task vector stay, and what they are multiplied by.

    kind: "all", "none", "magnitude", "random" (each with probability `density`) or "ranked" (probability from density - epsilon to
        density + epsilon by rank of the magnitude in its row, the largest most likely; see `rank_limits`).
    low, low_skip, high, high_keep: for "magnitude": bits strictly between low and high stay; of the elements equal to `low` the
        first `low_skip` go, of those equal to `high` the first `high_keep` stay (both hold when low == high).
    seen: how many elements equal to low and high came in earlier chunks of the tensor; the functions here count on, while it
        matters.
    masks: for "random" and "ranked", a place to keep the masks of chunks between masked_sums and task_sum (packed bits, by the
        chunk's start), or None to make them again in every pass.
    """

    kind: str = "all"
    density: float = 1.0
    epsilon: float = 0.0
    key: int = 0
    low: int = 0
    low_skip: int = 0
    high: int = 0x7FFFFFFF  # above every number
    high_keep: int = 0
    scale: float = 1.0
    seen: tuple[int, int] = (0, 0)
    masks: dict[int, Tensor] | None = None


def random_bits(key: int, start: int, count: int) -> np.ndarray:
    """uint32 `[count]` for elements start .. start + count: a 32-bit finaliser (lowbias32, Wellons 2018) over the low 16 bits of
    the element's index, with 64 bits of key, before and after, from splitmix64 (Steele et al. 2014) of (key, index / 2^16)."""
    index = np.arange(start, start + count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        blocks = np.arange(start >> 16, ((start + count - 1) >> 16) + 1 if count else start >> 16, dtype=np.uint64)
        z = np.uint64(key & (2**64 - 1)) + (blocks + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31)))[((index >> np.uint64(16)) - np.uint64(start >> 16)).astype(np.int64)]
        low = (index & np.uint64(0xFFFF)).astype(np.uint32) * np.uint32(0x9E3779B9)
        return _mix((z & np.uint64(0xFFFFFFFF)).astype(np.uint32) ^ low) + (z >> np.uint64(32)).astype(np.uint32)


def _mix(h: np.ndarray) -> np.ndarray:
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def draw_limit(probability: float) -> int:
    """A draw of random_bits below this limit keeps the element; 2^32 keeps all."""
    return min(1 << 32, max(0, round(probability * 2.0**32)))


def magnitude_bits(x: Tensor, base: Tensor | None) -> Tensor:
    """int32 bits of |x - base| as float32, which order as the magnitudes do."""
    d = x.float() if base is None else x.float() - base.float()
    return d.view(torch.int32) & 0x7FFFFFFF


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """out = sum of weights[i] * tensors[i], in float32 (float64 if an input is), rounded once to out's dtype.

    >>> out = torch.empty(2)
    >>> weighted_sum([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])], [0.5, 0.5], out)
    >>> out
    tensor([2., 4.])
    """
    if _taken(*tensors):
        with _Result(out) as target:
            core().merge_weighted_sum(_capsules(tensors), [float(w) for w in weights], to_dlpack(target))
        return
    wide = _wide(tensors)
    total = tensors[0].to(wide) * weights[0]
    for x, w in zip(tensors[1:], weights[1:], strict=True):
        total += x.to(wide) * w
    out.copy_(total)


def gram(tensors: Sequence[Tensor], base: Tensor | None, total: np.ndarray) -> None:
    """total[i, j] += sum over elements of (x_i - b)(x_j - b); float64 `[k, k]`.

    Call it with chunks that begin at multiples of BLOCK: the sums are over blocks, in order."""
    if _taken(*tensors, base):
        core().merge_gram(_capsules(tensors), _capsule(base), _numbers(total))
        return
    for at in range(0, tensors[0].numel(), BLOCK):
        d = [_delta(x[at : at + BLOCK], None if base is None else base[at : at + BLOCK]) for x in tensors]
        for i in range(len(d)):
            for j in range(i, len(d)):
                value = float(np.sum(d[i] * d[j]))
                total[i, j] += value
                if i != j:
                    total[j, i] += value


def _delta(x: Tensor, base: Tensor | None) -> np.ndarray:
    """float64, of the difference as float32 has it."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    d = x.to(wide) if base is None else x.to(wide) - base.to(wide)
    return d.double().numpy()


def magnitude_counts(x: Tensor, base: Tensor | None, counts: np.ndarray, every: int = 1) -> None:
    """Count magnitudes by the upper 16 of their bits, into the two tables of int64 `counts` `[2, 65536]`, which the caller adds.
    With `every` only one run of 256 elements in so many is looked at."""
    if _taken(x, base):
        core().merge_magnitude_counts(_capsule(x), _capsule(base), every, _numbers(counts))
        return
    bits = magnitude_bits(x, base)
    if every > 1:
        bits = bits[torch.arange(bits.numel()) // _SAMPLED % every == 0]
    counts[0] += np.bincount((bits >> LOW_BITS).numpy(), minlength=counts.shape[1])


def window_counts(x: Tensor, base: Tensor | None, windows: Sequence[tuple[int, int]], counts: np.ndarray) -> None:
    """Count magnitudes by all their bits, in one or two windows (low, width): of the 1 + width int64 that each has in `counts`, one
    after the other, [0] += those below low and [1 + i] += those equal to low + i."""
    if _taken(x, base):
        flat = [int(number) for window in windows for number in window]
        core().merge_window_counts(_capsule(x), _capsule(base), flat, _numbers(counts))
        return
    bits = magnitude_bits(x, base)
    at = 0
    for low, width in windows:
        inside = bits[(bits >= low) & (bits < low + width)] - low
        counts[at] += int((bits < low).sum())
        counts[at + 1 : at + 1 + width] += np.bincount(inside.numpy(), minlength=width)
        at += 1 + width


def masked_sums(x: Tensor, base: Tensor, select: Select, start: int, columns: int, total: np.ndarray) -> None:
    """total += [sum |d|, sum |m d|] in float64, over blocks (rows, for "ranked") in order; advances select.seen."""
    block = columns if select.kind == "ranked" else BLOCK
    if _taken(x, base) and select.kind == "ranked":
        _draw_ranked(x, base, select, start, columns, total)
        return
    if _taken(x, base):
        kept = None  # the GPU draws faster than it reads
        if select.kind == "random" and select.masks is not None and x.device.type == "cpu" and not emulating():
            kept = select.masks[start] = torch.empty((x.numel() + 31) // 32, dtype=torch.int32)
        given = [_described(select, 1.0, kept)]
        [select.seen] = core().merge_masked_sums(_capsule(x), _capsule(base), given, start, block, _numbers(total))
        return
    keep = keep_mask(x, base, select, start, columns).numpy()
    for at in range(0, x.numel(), block):
        d = np.abs(_delta(x[at : at + block], base[at : at + block]))
        total[0] += float(np.sum(d))
        total[1] += float(np.sum(np.where(keep[at : at + block], d, 0.0)))


def keep_mask(x: Tensor, base: Tensor, select: Select, start: int, columns: int) -> Tensor:
    """bool `[n]`: the elements of this chunk that stay. Advances select.seen."""
    n = x.numel()
    if select.kind == "all":
        return torch.ones(n, dtype=torch.bool)
    if select.kind == "none":
        return torch.zeros(n, dtype=torch.bool)
    if select.kind == "random":
        return torch.from_numpy(random_bits(select.key, start, n) < np.uint64(draw_limit(select.density)))
    bits = magnitude_bits(x, base)
    if select.kind == "magnitude":
        keep = (bits > select.low) & (bits < select.high)
        low, high = bits == select.low, bits == select.high
        low_index = torch.cumsum(low, 0) - 1 + select.seen[0]
        high_index = torch.cumsum(high, 0) - 1 + select.seen[1]
        if select.low == select.high:
            keep = low & (low_index >= select.low_skip) & (low_index < select.high_keep)
        else:
            keep |= low & (low_index >= select.low_skip) | high & (high_index < select.high_keep)
        select.seen = (select.seen[0] + int(low.sum()), select.seen[1] + int(high.sum()))
        return keep
    limit = rank_limits(bits.view(-1, columns).numpy(), select.density, select.epsilon).reshape(-1)
    return torch.from_numpy((random_bits(select.key, start, n) >> np.uint32(8)).astype(np.int32) < limit)


def rank_limits(bits: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """int32 `[rows, columns]`: an element of a row stays where the upper 24 bits of its draw are below this limit.

    DELLA (arXiv 2406.11617): probabilities run linearly from density - epsilon to density + epsilon by rank of the magnitude, whose
    bits are given; a row of one has the middle. Magnitudes count as equal when they agree in exponent and 6 bits of the fraction,
    and so do all below 2^-16 of the row's largest; equal ones share the mean of their ranks.
    """
    rows, columns = bits.shape
    slot = bits >> 17
    slot = np.maximum(slot - np.maximum(slot.max(axis=1, keepdims=True) - (RANK_SLOTS - 1), 0), 0)
    least = np.float32((density - epsilon if columns > 1 else density) * 2.0**24 + 0.5)
    step = np.float32(epsilon / (columns - 1) * 2.0**24 if columns > 1 else 0.0)
    limits = np.empty(bits.shape, dtype=np.int32)
    for i in range(rows):
        here = np.bincount(slot[i], minlength=RANK_SLOTS)
        twice = 2 * (np.cumsum(here) - here) + here - 1  # twice the mean rank of a slot
        limits[i] = (least + step * twice.astype(np.float32)).astype(np.int32)[slot[i]]
    return limits


def task_sum(
    base: Tensor, tensors: Sequence[Tensor], selects: Sequence[Select], weights: Sequence[float], out: Tensor, *,
    elect: bool, normalize: bool, scale: float = 1.0, zero_sign: int = 1, start: int = 0, columns: int = 1,
    count_signs: bool = True,
) -> int:  # fmt: skip
    """out = base + scale * (weighted, masked, optionally elected and normalised) sum of task vectors.

    v_i = w_i (s_i m_i d_i). With `elect` (TIES, arXiv 2306.01708) only the v_i that share the sign of their sum take part, a sum of
    exactly zero counting as `zero_sign`; then `normalize` divides by the weights that took part (by 1 where they sum to 0). Without,
    it divides by the sum of all weights. Advances the selects; returns the sum of the elected signs (0 for a zero sum), or
    0 where they are not counted.
    """
    if _taken(base, *tensors) and len(tensors) <= MAX_INPUTS:
        given = []
        for x, select, weight in zip(tensors, selects, weights, strict=True):
            mask = _mask(x, base, select, start, columns)
            given.append(_described(select, weight, mask, "" if mask is None else "ranked"))
        with _Result(out) as target:
            signs, seen = core().merge_task_sum(
                _capsule(base),
                _capsules(tensors),
                given,
                elect,
                normalize,
                zero_sign,
                scale,
                start,
                to_dlpack(target),
                count_signs,
            )
        for select, pair in zip(selects, seen, strict=True):
            select.seen = pair
        return int(signs)
    wide = _wide([base, *tensors])
    b = base.to(wide)
    parts = []
    for x, select, weight in zip(tensors, selects, weights, strict=True):
        d = x.to(wide) - b
        if select.kind != "all":
            d = torch.where(keep_mask(x, base, select, start, columns), d, 0.0)
        parts.append((d * select.scale) * weight)
    signs = 0
    if elect:
        total = sum(parts[1:], parts[0].clone())
        sign = torch.sign(total)
        signs = int(sign.sum()) if count_signs else 0
        majority = torch.where(total == 0, float(zero_sign), sign)
        taken = [torch.sign(v) == majority for v in parts]
        mixed = sum((torch.where(m, v, 0.0) for m, v in zip(taken, parts, strict=True)), torch.zeros_like(b))
        if normalize:
            divisor = sum((m.to(wide) * w for m, w in zip(taken, weights, strict=True)), torch.zeros_like(b))
            mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
    else:
        mixed = sum(parts[1:], parts[0].clone())
        if normalize:
            all_weights = float(sum(weights))
            mixed = mixed / (1.0 if abs(all_weights) < 1e-8 else all_weights)
    out.copy_(b + mixed * scale)
    return signs


def nonfinite(x: Tensor) -> int:
    """How many elements are NaN or infinite."""
    if native(x, gpu=GPU_FLOATS):
        return int(core().merge_nonfinite(to_dlpack(x)))
    return int(x.numel() - torch.isfinite(x).sum())


def _taken(*tensors: Tensor | None) -> bool:
    """Whether the native kernels do it: all on the GPU, or on the CPU float32, bfloat16 and (widened first) float16."""
    if native(*tensors, gpu=GPU_FLOATS):
        return True
    return native(*(None if t is None or t.dtype == torch.float16 else t for t in tensors)) and all(
        t is None or t.device.type == "cpu" for t in tensors
    )


def _widened(x: Tensor) -> bool:
    """Whether the kernels take this tensor as float32: float16 on the CPU."""
    return x.dtype == torch.float16 and x.device.type == "cpu" and not emulating()


def _capsule(x: Tensor | None) -> Any:
    return None if x is None else to_dlpack(x.float() if _widened(x) else x)


def _capsules(tensors: Sequence[Tensor]) -> list[Any]:
    return [_capsule(x) for x in tensors]


def _numbers(array: np.ndarray) -> Any:
    """An array of the CPU that a kernel adds to."""
    return to_dlpack(torch.from_numpy(array))


class _Result:
    """The output that a native kernel writes: `out` itself, or float32 that is rounded to `out` at the end."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        whole = out.dtype in GPU_FLOATS and not _widened(out)
        self.target = out if whole else torch.empty(out.shape, device=out.device)

    def __enter__(self) -> Tensor:
        return self.target

    def __exit__(self, *error: object) -> None:
        if self.target is not self.out:
            self.out.copy_(self.target)


_KINDS = {"all": 0, "none": 1, "magnitude": 2, "random": 3, "ranked": 4}


def _described(s: Select, weight: float, mask: Tensor | None, kind: str = "") -> tuple[Any, ...]:
    """A selection as the bindings take it, of its own or another kind."""
    limit = draw_limit(s.density) if s.kind == "random" else 0
    return (_KINDS[kind or s.kind], s.low, s.high, s.low_skip, s.high_keep, *s.seen, s.key, limit, s.scale, weight,
            None if mask is None else to_dlpack(mask))  # fmt: skip


def _mask(x: Tensor, base: Tensor, select: Select, start: int, columns: int) -> Tensor | None:
    """Packed bits of a ranked selection, or of one that was kept, int32 `[ceil(n / 32)]`."""
    if select.masks is not None and start in select.masks:
        return select.masks[start]
    if select.kind != "ranked":
        return None
    return _draw_ranked(x, base, select, start, columns, None)


def _draw_ranked(x: Tensor, base: Tensor, select: Select, start: int, columns: int, total: np.ndarray | None) -> Tensor:
    """The mask, kept for later passes where `select` has a place for it; total += [sum |d|, sum |m d|]."""
    mask = torch.empty((x.numel() + 31) // 32, dtype=torch.int32, device=x.device)
    core().merge_rank_mask(
        _capsule(x), _capsule(base), columns, select.density, select.epsilon, select.key, start, to_dlpack(mask),
        None if total is None else _numbers(total),
    )  # fmt: skip
    if select.masks is not None:
        select.masks[start] = mask
    return mask


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
