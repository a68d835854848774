"""Attention over a packed stream of sequences.

    s_ij = scale * q_i . k_j          softcap c > 0: s = c * tanh(s / c)
    out_i = sum_j exp(s_ij - lse_i) v_j        lse_i = log sum_j exp(s_ij), over the keys that i may see

Sequence b's queries are rows cu_seqlens[b] .. cu_seqlens[b+1], its keys start at row cu_seqlens_k[b]. Query i of Tq sees key j of
Tk when `j <= i + Tk - Tq` (causal) and `j > i + Tk - Tq - window` (window > 0): both are aligned to the bottom right corner.
`paged_attention` is the same for running sequences, whose keys lie in pages of a cache: key j of sequence b is row j % page of page
block_table[b, j // page].
Sources: Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithms 1 and 2; softcap: Gemma 2 report, section 2; pages: Kwon et al.
2023 (PagedAttention, arXiv 2309.06180).
"""

import math

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_HALVES, core, native, plain, to_dlpack


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


@takes_arrays
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None, *, causal: bool = True, window: int = 0, softcap: float = 0.0,
    scale: float | None = None, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed attention with grouped queries.

    Args:
        q: `[T, H, D]`; k, v: `[Tk, Hk, D]`, H a multiple of Hk, D <= 256; float32 or bfloat16 (on a GPU bfloat16 or float16), any
            stride between heads and tokens.
        cu_seqlens: int32 `[S+1]`, where each sequence's queries begin. cu_seqlens_k: the same for keys; default cu_seqlens.
        seqused_k: int32 `[S]`, keys used of each sequence (a cache slot longer than what it holds); default all.
        causal, window, softcap, scale: see the module's formulas; window 0 = unlimited, scale default 1/sqrt(D).
        deterministic: False lets the backward pass on a GPU add up the gradient of q in whatever order its blocks come: a little
            faster, and the last bits differ from run to run.

    Returns:
        (out `[T, H, D]` in q's dtype, lse `[H, T]` float32). A query that sees no key gives out 0 and lse -inf. Gradients flow
        through out alone, and are the same bits at any thread count.

    On a GPU what cu_seqlens and seqused_k hold is not checked: reading it would mean waiting for the GPU.

    Raises: ValueError that names the argument at fault.

    Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691), algorithms 1 and 2.

    Two sequences, of 3 and 2 tokens; the first query of each sees one key, so its result is that key's value:

    >>> q, k, v = (torch.randn(5, heads, 64) for heads in (4, 2, 2))
    >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    >>> out, lse = attention(q, k, v, cu_seqlens)
    >>> out.shape, lse.shape
    (torch.Size([5, 4, 64]), torch.Size([4, 5]))
    >>> torch.allclose(out[3, 0], v[3, 0])
    True

    numpy arrays go in and come out as they are:

    >>> out, lse = attention(q.numpy(), k.numpy(), v.numpy(), cu_seqlens.numpy())
    >>> type(out).__name__, out.shape
    ('ndarray', (5, 4, 64))
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not native(q, k, v, gpu=GPU_HALVES):
        out, lse = reference(
            q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, causal=causal, window=window, softcap=softcap, scale=scale
        )
        return out, lse.detach()
    if plain(q, k, v):
        return _forward(q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, causal, window, softcap, scale)
    return torch.ops.enginepost.attention(
        q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, causal, window, softcap, scale, deterministic
    )  # fmt: skip


@takes_arrays
def attention_qkv(
    qkv: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor, *, causal: bool = True, window: int = 0,
    softcap: float = 0.0, scale: float | None = None, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    """Attention of a fused projection: its slices are read where they lie, and the backward pass writes one fused gradient.

    Args: qkv `[T, H + 2 Hk, D]`, the heads of q, then k, then v; the rest as in `attention`.
    Returns: out `[T, H, D]` in qkv's dtype. Raises ValueError that names the argument at fault.

    >>> qkv = torch.randn(5, 4 + 2 + 2, 64)
    >>> attention_qkv(qkv, 4, 2, torch.tensor([0, 3, 5], dtype=torch.int32)).shape
    torch.Size([5, 4, 64])
    """
    if qkv.dim() != 3 or qkv.shape[1] != heads + 2 * kv_heads:
        raise ValueError(
            f"attention_qkv: qkv must have shape [T, heads + 2 kv_heads, D] = [T, {heads + 2 * kv_heads}, D], "
            f"got {list(qkv.shape)}"
        )
    scale = 1.0 / math.sqrt(qkv.shape[-1]) if scale is None else scale
    if not native(qkv, gpu=GPU_HALVES):
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        return reference(q, k, v, cu_seqlens, causal=causal, window=window, softcap=softcap, scale=scale)[0]
    if plain(qkv):
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        return _forward(q, k, v, cu_seqlens, None, None, causal, window, softcap, scale)[0]
    return torch.ops.enginepost.attention_qkv(
        qkv, heads, kv_heads, cu_seqlens, causal, window, softcap, scale, deterministic
    )[0]


def paged_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor, cu_seqlens: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`paged_attention` in plain PyTorch: the keys of every sequence gathered from their pages, then `reference`."""
    page = k_cache.shape[1]
    lengths = seqused_k.tolist()
    rows = [block_table[b, : -(-n // page)].long() for b, n in enumerate(lengths)]
    k, v = (torch.cat([x[:0].flatten(0, 1), *(x[r].flatten(0, 1)[:n] for r, n in zip(rows, lengths, strict=True))])
            for x in (k_cache, v_cache))  # fmt: skip
    cu_seqlens_k = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = torch.arange(len(lengths) + 1) if cu_seqlens is None else cu_seqlens
    return reference(q, k, v, cu_seqlens, cu_seqlens_k, causal=causal, window=window, softcap=softcap, scale=scale)


@takes_arrays
def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor, cu_seqlens: Tensor | None = None,
    *, causal: bool = True, window: int = 0, softcap: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of running sequences over a paged cache: one query each, or the last few of each (a continuation).

    Args:
        q: `[T, H, D]`; k_cache, v_cache: `[pages, page, Hk, D]`, H a multiple of Hk, D <= 256, any page size; float32 or
            bfloat16 (on a GPU bfloat16 or float16), D contiguous, any other stride. The new tokens' keys and values are in the
            cache already.
        block_table: int32 `[S, max_blocks]`, the page that holds keys i * page to (i + 1) * page of each sequence; entries beyond
            seqused_k are not read. Sequences may share pages.
        seqused_k: int32 `[S]`, keys of each sequence.
        cu_seqlens: int32 `[S+1]`, where each sequence's queries begin; default one query each, T = S.
        causal, window, softcap, scale: see the module's formulas; window 0 = unlimited, scale default 1/sqrt(D).

    Returns:
        (out `[T, H, D]` in q's dtype, lse `[H, T]` float32), the same bits as `attention` on gathered keys, at any thread count.

    Raises: ValueError that names the argument at fault, or says that a gradient was asked: a cache has none.

    >>> import torch
    >>> from enginepost.kernels.attention import paged_attention
    >>> cache = torch.randn(2, 8, 16, 2, 64)  # keys and values: 8 pages of 16 tokens, 2 heads
    >>> table = torch.tensor([[5, 0], [3, 7]], dtype=torch.int32)
    >>> out, lse = paged_attention(torch.randn(2, 4, 64), *cache, table, torch.tensor([20, 9], dtype=torch.int32))
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 64]), torch.Size([4, 2]))
    """
    if not plain(q, k_cache, v_cache) and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError("paged_attention has no gradient: call it under torch.no_grad(), or use attention")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not native(q, k_cache, v_cache, gpu=GPU_HALVES):
        return paged_reference(
            q,
            k_cache,
            v_cache,
            block_table,
            seqused_k,
            cu_seqlens,
            causal=causal,
            window=window,
            softcap=softcap,
            scale=scale,
        )
    call = _paged if plain(q, k_cache, v_cache) else torch.ops.enginepost.paged_attention
    return call(q, k_cache, v_cache, block_table, seqused_k, cu_seqlens, causal, window, softcap, scale)


def _paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor, cu_seqlens: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dim() != 3:
        raise ValueError(f"paged_attention: q must have shape [T, H, D], got {list(q.shape)}")
    out, lse = _empty_results(q)
    core().paged_attention(
        to_dlpack(_rows(q)), to_dlpack(k_cache), to_dlpack(v_cache), _optional(cu_seqlens), to_dlpack(block_table),
        to_dlpack(seqused_k), to_dlpack(out), to_dlpack(lse), causal, window, softcap, scale,
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("enginepost::paged_attention", mutates_args=())
def _paged_op(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor, cu_seqlens: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _paged(q, k_cache, v_cache, block_table, seqused_k, cu_seqlens, causal, window, softcap, scale)


@_paged_op.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqused_k: Tensor, cu_seqlens: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_results(q)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _optional(x: Tensor | None) -> object:
    return None if x is None else to_dlpack(x)


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dim() != 3:
        raise ValueError(f"attention: q must have shape [T, H, D], got {list(q.shape)}")
    out, lse = _empty_results(q)
    core().attention_forward(
        to_dlpack(_rows(q)), to_dlpack(_rows(k)), to_dlpack(_rows(v)), to_dlpack(cu_seqlens), _optional(cu_seqlens_k),
        _optional(seqused_k), to_dlpack(out), to_dlpack(lse), causal, window, softcap, scale,
    )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor,
    causal: bool, window: int, softcap: float, scale: float, deterministic: bool,
) -> None:  # fmt: skip
    core().attention_backward(
        to_dlpack(_rows(dout)), to_dlpack(_rows(q)), to_dlpack(_rows(k)), to_dlpack(_rows(v)), to_dlpack(out),
        to_dlpack(lse), to_dlpack(cu_seqlens), _optional(cu_seqlens_k), _optional(seqused_k), to_dlpack(dq),
        to_dlpack(dk), to_dlpack(dv), causal, window, softcap, scale, **({} if deterministic else {"unordered": True}),
    )  # fmt: skip


@torch.library.custom_op("enginepost::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, causal, window, softcap, scale)


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, seqused_k: Tensor | None,
    causal: bool, window: int, softcap: float, scale: float, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_results(q)


@torch.library.custom_op("enginepost::attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, causal: bool, window: int, softcap: float, scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, seqused_k, dq, dk, dv, causal, window, softcap, scale,
        deterministic,
    )  # fmt: skip
    return dq, dk, dv


@_backward_op.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, seqused_k: Tensor | None, causal: bool, window: int, softcap: float, scale: float,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


@torch.library.custom_op("enginepost::attention_qkv", mutates_args=())
def _qkv_op(
    qkv: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor, causal: bool, window: int, softcap: float,
    scale: float, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    return _forward(q, k, v, cu_seqlens, None, None, causal, window, softcap, scale)


@_qkv_op.register_fake
def _(
    qkv: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor, causal: bool, window: int, softcap: float,
    scale: float, deterministic: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_results(qkv[:, :heads])


@torch.library.custom_op("enginepost::attention_qkv_backward", mutates_args=())
def _qkv_backward_op(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor, causal: bool,
    window: int, softcap: float, scale: float, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
    dq, dk, dv = dqkv.split([heads, kv_heads, kv_heads], dim=1)
    _backward(dout, q, k, v, out, lse, cu_seqlens, None, None, dq, dk, dv, causal, window, softcap, scale,
              deterministic)  # fmt: skip
    return dqkv


@_qkv_backward_op.register_fake
def _(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor, causal: bool,
    window: int, softcap: float, scale: float, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, cu_seqlens_k, seqused_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, seqused_k)
    ctx.mark_non_differentiable(output[1])


def _grad(ctx, dout: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    grads = torch.ops.enginepost.attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None, None, None, None


def _qkv_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, ctx.heads, ctx.kv_heads, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.mark_non_differentiable(output[1])


def _qkv_grad(ctx, dout: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    dqkv = torch.ops.enginepost.attention_qkv_backward(
        dout, qkv, out, lse, ctx.heads, ctx.kv_heads, cu_seqlens, *ctx.options
    )
    return dqkv, None, None, None, None, None, None, None, None


_attention_op.register_autograd(_grad, setup_context=_setup)
_qkv_op.register_autograd(_qkv_grad, setup_context=_qkv_setup)

make_callable(__name__, attention)
