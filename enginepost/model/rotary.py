"""Rotary embedding of a model: which frequencies its config asks for, and the cos/sin tables of a packed stream.

A table is made once per forward pass for every distinct kind of rotation: cos, sin `[T, R/2]` float32, from `positions [T]`.
`dynamic` and `longrope` look at the length of a sequence; in a packed stream each sequence has its own.
"""

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config is read, and a run planned, without torch
    import torch
    from torch import Tensor

_KNOWN = set(
    "rope_theta rope_type type partial_rotary_factor factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "mscale mscale_all_dim truncate short_factor long_factor low_freq_factor high_freq_factor".split()
)
_NEEDS_ORIGINAL = ("llama3", "yarn", "longrope")
_NEEDS = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (), "longrope": ("short_factor", "long_factor"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """One kind of rotation: `dim` rotated dimensions of a head, base `theta`, `scaling` as (key, value) pairs."""

    dim: int
    theta: float
    scaling: tuple[tuple[str, Any], ...]
    max_position: int

    @property
    def kind(self) -> str:
        return str(dict(self.scaling).get("rope_type", "default"))

    @property
    def switches_at(self) -> int | None:
        """The length above which the frequencies are others (longrope: 2 sets); None where they do not depend on it so."""
        return int(dict(self.scaling)["original_max_position_embeddings"]) if self.kind == "longrope" else None

    def frequencies(self, length: int, device: "torch.device | str" = "cpu") -> "tuple[Tensor, float]":
        """(inv_freq `[dim/2]`, factor of cos and sin) for a sequence of `length` tokens."""
        if self.kind == "dynamic":
            length = max(length, self.max_position)
        elif self.kind == "longrope":
            original = self.switches_at or 0
            length = original + 1 if length > original else 0
        else:
            length = 0
        return _frequencies(self, length, str(device))


@functools.lru_cache(maxsize=1024)
def _frequencies(rope: Rope, length: int, device: str) -> "tuple[Tensor, float]":
    from enginepost.kernels.rope import rope_frequencies

    scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in rope.scaling}
    inverse, factor = rope_frequencies(rope.dim, rope.theta, scaling, max_position=rope.max_position, seq_len=length)
    return inverse.to(device), factor


def tables(rope: Rope, positions: "Tensor", cu_seqlens: "Tensor") -> "tuple[Tensor, Tensor]":
    """(cos, sin), each float32 `[T, dim/2]`, of a stream of sequences: positions int64 `[T]`, cu_seqlens int32 `[S+1]`."""
    import torch

    if rope.kind not in ("dynamic", "longrope"):
        return _angles(positions, *rope.frequencies(0, positions.device))
    starts = cu_seqlens.tolist()
    parts = []
    for start, end in itertools.pairwise(starts):
        if end > start:
            own = positions[start:end]
            parts.append(_angles(own, *rope.frequencies(int(own.max()) + 1, own.device)))
    if not parts:
        return _angles(positions, rope.frequencies(0, positions.device)[0], 1.0)
    return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])


def _angles(positions: "Tensor", inverse: "Tensor", factor: float) -> "tuple[Tensor, Tensor]":
    angles = positions.float().unsqueeze(1) * inverse
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos.mul_(factor), sin.mul_(factor))


def read_ropes(
    config: dict[str, Any], family: str, head_dim: int, max_position: int, slides: list[bool], theta: float
) -> tuple[tuple[Rope, ...], list[int]]:
    """The distinct rotations of a config, and which of them each layer uses (slides: is that layer's attention windowed).

    Raises ValueError that names the key at fault.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters must be an object, got {given!r}")
    theta = float(config.get("rope_theta") or theta)
    nested = {k for k in given if k.endswith("_attention")}
    by_type: dict[str, tuple[dict[str, Any], float]]
    if nested:
        if given.keys() - nested or nested - {"full_attention", "sliding_attention"}:
            odd = sorted(given.keys() - {"full_attention", "sliding_attention"})
            raise ValueError(f"rope_parameters per layer type has the unknown entry {odd[0]!r}")
        by_type = {k: (given.get(k) or {}, theta) for k in ("full_attention", "sliding_attention")}
    else:
        by_type = {"full_attention": (given, theta), "sliding_attention": (given, theta)}
    if family == "gemma3_text":  # windowed layers have a base of their own, and are not scaled
        full, sliding = by_type["full_attention"][0], by_type["sliding_attention"][0] if nested else {}
        by_type = {
            "full_attention": (full, float(config.get("rope_theta") or 1e6)),
            "sliding_attention": (sliding, float(config.get("rope_local_base_freq") or 1e4)),
        }
    built = {k: _build(config, family, entry, head_dim, max_position, base) for k, (entry, base) in by_type.items()}
    wanted = [built["sliding_attention" if s else "full_attention"] for s in slides]
    ropes = tuple(dict.fromkeys(wanted))
    return ropes, [ropes.index(w) for w in wanted]


def _build(
    config: dict[str, Any], family: str, entry: dict[str, Any], head_dim: int, max_position: int, theta: float
) -> Rope:
    unknown = {k for k, v in entry.items() if v is not None} - _KNOWN
    if unknown:
        raise ValueError(
            f"the rotary embedding has the unknown parameter {sorted(unknown)[0]!r}; known: {sorted(_KNOWN)}"
        )
    scaling = {k: v for k, v in entry.items() if v is not None}
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    scaling.pop("type", None)
    if family == "phi3" and kind in ("su", "yarn"):  # names of longrope in the first Phi-3 checkpoints
        kind = "longrope"
    theta = float(scaling.pop("rope_theta", theta))
    partial = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ValueError(f"the rotary embedding must turn an even part of head_dim {head_dim}, got {dim} dimensions")
    if kind in _NEEDS_ORIGINAL:
        outside = config.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = (
            outside or scaling.get("original_max_position_embeddings") or (4096 if family == "phi3" else max_position)
        )
    scaling["rope_type"] = kind
    if kind not in _NEEDS:
        raise ValueError(f"rope type {kind!r} is not supported; known: {', '.join(_NEEDS)}")
    for key in _NEEDS[kind]:
        if key not in scaling:
            raise ValueError(f"rope type {kind!r} needs the parameter {key!r}; the config gives {sorted(scaling)}")
        value = scaling[key]
        if key.endswith("_factor") and kind == "longrope" and len(value if isinstance(value, list) else []) != dim // 2:
            raise ValueError(f"longrope {key} must have {dim // 2} entries (half the rotated size), got {value!r:.80}")
    frozen = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in scaling.items()))
    return Rope(dim, theta, frozen, max_position)
