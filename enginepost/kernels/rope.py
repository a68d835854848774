"""Rotary position embedding, half-split (NeoX) layout.

    y[i]       = x[i] * cos[i] - x[i + R/2] * sin[i]           i < R/2, R rotated dimensions, the rest passes through
    y[i + R/2] = x[i + R/2] * cos[i] + x[i] * sin[i]

Source: Su et al. 2021 (arXiv 2104.09864), eq. 34. The backward is the rotation by the conjugate angle. cos and sin are float32
tables, `[T, R/2]`, made once per batch from `rope_frequencies`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_FLOATS, core, native, plain, to_dlpack


def rope_frequencies(
    dim: int, theta: float, scaling: dict[str, Any] | None = None, *, max_position: int, seq_len: int = 0
) -> tuple[Tensor, float]:
    """Inverse frequencies of every rope type that Hugging Face configs name.

    Args:
        dim: rotated dimensions of a head (head_dim * partial_rotary_factor).
        theta: base wavelength.
        scaling: the config's `rope_scaling` / `rope_parameters` (`rope_type` or `type`, `factor`, ...); None = default.
        max_position: the config's `max_position_embeddings`.
        seq_len: longest sequence at hand; only `dynamic` and `longrope` look at it.

    Returns:
        (inv_freq `[dim/2]` float32, factor to multiply cos and sin with).

    Sources: linear, dynamic (NTK): r/LocalLLaMA posts of kaiokendev and bloc97; yarn: arXiv 2309.00071; longrope: arXiv
    2402.13753; llama3: the Llama 3.1 reference code. Raises ValueError for an unknown type or a missing parameter.

    >>> inv_freq, scaling = rope_frequencies(4, 10000.0, {"rope_type": "linear", "factor": 2.0}, max_position=2048)
    >>> [round(f, 6) for f in inv_freq.tolist()], scaling
    ([0.5, 0.005], 1.0)
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    original = scaling.get("original_max_position_embeddings") or max_position

    def need(key: str) -> Any:
        if scaling.get(key) is None:
            raise ValueError(f"rope type {kind!r} needs the parameter {key!r}; the config gives {sorted(scaling)}")
        return scaling[key]

    def inverse(base: float) -> Tensor:
        return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))

    if kind == "default":
        return inverse(theta), 1.0
    if kind == "linear":
        return inverse(theta) / need("factor"), 1.0
    if kind == "dynamic":
        stretch = need("factor") * max(seq_len, max_position) / max_position - (scaling["factor"] - 1)
        return inverse(theta * stretch ** (dim / (dim - 2))), 1.0
    if kind == "llama3":
        factor, low, high = need("factor"), need("low_freq_factor"), need("high_freq_factor")
        freq = inverse(theta)
        wavelength = 2 * math.pi / freq
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * freq / factor + smooth * freq
        freq_long = torch.where(wavelength > original / low, freq / factor, freq)
        medium = ~(wavelength < original / high) & ~(wavelength > original / low)
        return torch.where(medium, blended, freq_long), 1.0
    if kind == "yarn":
        return _yarn(dim, theta, scaling, float(scaling.get("factor") or max_position / original), original)
    if kind == "longrope":
        factor = scaling.get("factor") or max_position / original
        attention = scaling.get("attention_factor")
        if attention is None:
            attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        per_dim = torch.tensor(need("long_factor" if seq_len > original else "short_factor"), dtype=torch.float32)
        if per_dim.numel() != dim // 2:
            raise ValueError(
                f"longrope factors must have {dim // 2} entries (half the rotated size), got {per_dim.numel()}"
            )
        return inverse(theta) / per_dim, float(attention)
    raise ValueError(f"rope type {kind!r} is not supported; known: default, linear, dynamic, llama3, yarn, longrope")


def _yarn(dim: int, theta: float, scaling: dict[str, Any], factor: float, original: int) -> tuple[Tensor, float]:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def boundary(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    attention = scaling.get("attention_factor")
    if attention is None:
        top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)
    low, high = boundary(scaling.get("beta_fast") or 32), boundary(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return freq / factor * ramp + freq * (1 - ramp), float(attention)


def reference(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    """The rotation in plain PyTorch, at float32 or better."""
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    heads = x.shape[1] if heads is None else heads
    first, second, rest = x[:, :heads].to(wide).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    turned = torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1).to(x.dtype)
    return turned if heads == x.shape[1] else torch.cat([turned, x[:, heads:]], dim=1)


@takes_arrays
def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    """Rotate the leading `heads` heads (default all), copy the others.

    A fused projection [q | k | v] is rotated in one pass with heads = H + Hk and then split.

    Args: x `[T, H, D]` float32 or bfloat16 (on a GPU also float16), heads and dims contiguous, tokens at any stride;
        cos, sin `[T, R/2]` float32, R <= D.
    Returns: `[T, H, D]` contiguous, in x's dtype. Raises ValueError that names the argument at fault.

    Source: Su et al. 2021 (RoFormer, arXiv 2104.09864), eq. 34.

    >>> inv_freq, scaling = rope_frequencies(64, 10000.0, max_position=2048)
    >>> angle = torch.arange(5).unsqueeze(1) * inv_freq
    >>> x = torch.randn(5, 2, 64)
    >>> y = rope(x, angle.cos() * scaling, angle.sin() * scaling)
    >>> torch.equal(y[0], x[0]), torch.allclose(y.norm(dim=-1), x.norm(dim=-1))  # position 0 stays, lengths stay
    (True, True)
    """
    if not native(x, cos, sin, gpu=GPU_FLOATS):
        return reference(x, cos, sin, heads)
    heads = x.shape[1] if heads is None else heads
    if plain(x):
        return _rotate(x, cos, sin, heads, False)
    return torch.ops.enginepost.rope(x, cos, sin, heads, False)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    if x.shape[0] and (x.stride(2) != 1 or x.stride(1) != x.shape[2]):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    core().rope(
        to_dlpack(x.detach()), to_dlpack(cos.contiguous()), to_dlpack(sin.contiguous()), to_dlpack(y), heads, inverse
    )
    return y


@torch.library.custom_op("enginepost::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    return _rotate(x, cos, sin, heads, inverse)


@_rope_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.heads, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _grad(ctx, dy: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    cos, sin = ctx.saved_tensors
    return torch.ops.enginepost.rope(dy, cos, sin, ctx.heads, not ctx.inverse), None, None, None, None


_rope_op.register_autograd(_grad, setup_context=_setup)

make_callable(__name__, rope)
