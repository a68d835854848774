"""Attention over a packed stream of sequences.

    s_ij = scale * q_i . k_j          softcap c > 0: s = c * tanh(s / c)
    out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij), over the keys that i may see

Sequence b's queries are rows cu_seqlens[b] .. cu_seqlens[b+1], its keys start at row cu_seqlens_k[b]. Query i of Tq sees key j of
Tk when `j <= i + Tk - Tq` (causal) and `j > i + Tk - Tq - window` (window > 0): both are aligned to the bottom right corner.
Sources: Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithms 1 and 2; softcap: Gemma 2 report, section 2.
"""

import math

import torch
from torch import Tensor

from enginepost.kernels.backend import native


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None, *, causal: bool = True, window: int = 0, softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in plain PyTorch, one sequence at a time, at float32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    starts_q = cu_seqlens.tolist()
    starts_k = starts_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0, dtype=wide)]
    for b in range(len(starts_q) - 1):
        length_q = starts_q[b + 1] - starts_q[b]
        length_k = starts_k[b + 1] - starts_k[b] if seqused_k is None else int(seqused_k[b])
        qb = q[starts_q[b] : starts_q[b + 1]].to(wide).transpose(0, 1)
        kb = k[starts_k[b] : starts_k[b] + length_k].to(wide).transpose(0, 1).repeat_interleave(group, dim=0)
        vb = v[starts_k[b] : starts_k[b] + length_k].to(wide).transpose(0, 1).repeat_interleave(group, dim=0)
        scores = scale * (qb @ kb.transpose(1, 2))
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(length_q, device=q.device).unsqueeze(1) + (length_k - length_q)
        j = torch.arange(length_k, device=q.device).unsqueeze(0)
        hidden = torch.zeros(length_q, length_k, dtype=torch.bool, device=q.device)
        if causal:
            hidden |= j > i
        if window > 0:
            hidden |= j <= i - window
        scores = scores.masked_fill(hidden, -math.inf)
        lse = torch.logsumexp(scores, dim=-1)
        seen = ~hidden.all(dim=-1)
        weights = torch.exp(scores - torch.where(seen, lse, torch.zeros_like(lse)).unsqueeze(-1))
        outs.append((weights @ vb).transpose(0, 1).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None, *, causal: bool = True, window: int = 0, softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed attention with grouped queries.

    Args:
        q: `[T, H, D]`; k, v: `[Tk, Hk, D]`, H a multiple of Hk, D <= 256; float32 or bfloat16.
        cu_seqlens: int32 `[S+1]`, where each sequence's queries begin. cu_seqlens_k: the same for keys; default cu_seqlens.
        seqused_k: int32 `[S]`, keys used of each sequence (a cache slot longer than what it holds); default all.
        causal, window, softcap, scale: see the module's formulas; window 0 = unlimited, scale default 1/sqrt(D).

    Returns:
        (out `[T, H, D]` in q's dtype, lse `[H, T]` float32). A query that sees no key gives out 0 and lse -inf.
    """
    native(q, k, v)
    return reference(
        q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, causal=causal, window=window, softcap=softcap, scale=scale
    )
