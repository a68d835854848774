"""Scratch that kernels ask for, from sizes alone.

On a CPU a thread keeps one buffer, which grows to the largest that was asked for (csrc/bindings.cpp), so it stands. On a GPU
each call takes its own from torch's allocator and gives it back, so it counts while the call runs; these follow csrc/cuda:

    attention, backward     4 T q (float32 sums of dq) + 4 T heads                            attention.h, carve
    product over 4 bits     2 n k of the matrix at hand, decoded                              nf4_matmul.cu
    low-rank update         float32 S, B or dS as two or three 16-bit parts: up to 6 T R      matmul.cu, ready
    head                    a chunk of logits in 16 bits, 2^28 bytes at most, and its sums    linear_logprob_forward.cu
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from enginepost.plan.memory import Setup

CUBLAS = 32 << 20  # bytes: torch's workspace for cuBLAS, :4096:8 of deterministic runs
_LOGITS, _SPANS, _MOST_ROWS = 1 << 28, 1 << 26, 8192  # linear_logprob_forward.cu
_TILE, _SPAN = 128, 64  # LogitTile of linear_logprob.cuh


def standing(s: "Setup") -> float:
    """Bytes that are there from the first step to the last."""
    if s.device != "cpu":
        return float(CUBLAS)
    spec, tokens = s.spec, s.tokens
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    head = _rounded(tokens, 32) * (spec.hidden_size + 16) * (3 if s.full else 1)
    attention = tokens * q
    rows = min(tokens, s.mlp_chunk or tokens)  # of the MLP's products
    products = (
        (tokens, spec.hidden_size),
        (tokens, q + 2 * kv),
        (tokens, q),
        (rows, 2 * spec.intermediate_size),
        (rows, spec.intermediate_size),
    )
    packed = max(min(32e6 / 4, n * k) for n, k in products) + s.threads * (3 << 17) / 4
    return 4.0 * max(head + s.threads * 1e5, attention + s.threads * 2e5, packed)


def attention_backward(s: "Setup") -> float:
    """Bytes while attention's gradients are made on a GPU."""
    return 0.0 if s.device == "cpu" else 4.0 * s.tokens * s.spec.heads * (s.spec.head_dim + 1)


def product(s: "Setup", name: str, backward: bool) -> float:
    """Bytes while a linear layer is at work on a GPU, forward or backward; its products come one after the other."""
    if s.device == "cpu" or s.itemsize == 4:
        return 0.0
    # Of the largest matrix of a fused layer.
    inner = s.spec.heads * s.spec.head_dim if name in ("qkv", "o") else s.spec.intermediate_size
    rows, columns = (inner, s.spec.hidden_size) if name in ("qkv", "gate_up") else (s.spec.hidden_size, inner)
    decoded = 2.0 * rows * columns if s.quantize else 0.0
    rank = sum(r for r, _ in s.ranks.get(name, ()))
    # Three parts where the result is float32 (as dx of a layer whose matrices add up is), else two; B or A* beside them.
    parts = 3 if backward else 2
    return decoded + 2.0 * parts * rank * (s.tokens + (columns if backward else rows))


def head(s: "Setup") -> float:
    """Bytes while the log-probabilities are made on a GPU, or with a trained head while its gradients are."""
    if s.device == "cpu" or s.itemsize == 4:
        return 0.0
    spec, tokens = s.spec, s.tokens
    padded = _rounded(spec.vocab_size, _TILE)
    spans = padded // _SPAN
    direction = not s.full
    most = _LOGITS // (2 * padded) if direction else _SPANS // (spans * 12)
    rows = min(max(min(most, _MOST_ROWS) // _TILE * _TILE, _TILE), _rounded(tokens, _TILE))
    forward = rows * (2.0 * spec.hidden_size + 12 * spans) + 4 * tokens
    if direction:
        return forward + rows * (8.0 * spans + 2 * padded + 4 * spec.hidden_size)
    entries = _LOGITS // (2 * _rounded(tokens + 1, _TILE)) // _TILE * _TILE
    block = min(max(entries, _TILE), padded)
    return max(forward, tokens * (6.0 * spec.hidden_size + 24 + 2 * block))


def _rounded(x: int, to: int) -> int:
    return -(-x // to) * to
