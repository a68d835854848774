"""Divergence of two next-token distributions straight from hidden states, without ever holding logits `[T, V]`: distillation.

    z = softcap(hidden @ head^T) / temperature        p = softmax of the student's z, q = softmax of the teacher's

    forward   KL(q || p) = sum_v q_v (log q_v - log p_v)           dKL/dz_v = p_v - q_v
    reverse   KL(p || q) = sum_v p_v (log p_v - log q_v)           dKL/dz_v = p_v (log p_v - log q_v - KL)
    js        beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
                                                                   dJS/dz_v = (1 - beta) p_v (log p_v - log m_v - KL(p || m))

    du_v = dz_v (1 - (softcap(u_v) / c)^2) / temperature          dhidden = du head          dhead = du^T hidden

The vocabulary goes by in blocks: a first pass keeps a running log-sum-exp of both sides and, beside it, the running mean that
forward or reverse KL is made of (of the distance of both sides' z, each from its largest, under q or p); js needs both log-sum-exps
first and takes a second pass. The backward pass makes each block's logits again and adds its part of dhidden. Two products a pass
and one for each gradient.

A teacher may also be its k most likely tokens with their log-probabilities. Everything else is then one outcome, "other", on both
sides: its probability is 1 minus the sum for the teacher, the sum over all other tokens for the student. The divergences are those
of the k + 1 outcomes (a lower bound of the full ones), and so are the gradients.

Sources: Hinton et al. 2015 (arXiv 1503.02531); Agarwal et al. 2024 (GKD, arXiv 2306.13649), eq. 1 to 3 for the generalised
Jensen-Shannon divergence: beta is the teacher's weight in m.
"""

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import emulating
from enginepost.kernels.linear_kl_blocks import KINDS, SUMS, Settings, compare, gradient, log_mixture, scan, through
from enginepost.kernels.matmul import mm

BLOCK_ELEMENTS = 1 << 20  # of a block of logits: 4 MB of float32
GPU_BLOCK_ELEMENTS = 1 << 24  # 64 MB, so that a product fills the card
SMALLEST_OTHER = 2.0**-23  # the teacher's probability of "other" is never less, so that reverse KL stays finite


def reference(
    student_hidden: Tensor, student_head: Tensor, *, teacher_hidden: Tensor | None = None, teacher_head: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, kind: str = "forward", beta: float = 0.5,
    temperature: float = 1.0, softcap: float = 0.0, teacher_softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch with full logits, at float32 or better."""
    wide = torch.promote_types(torch.promote_types(student_hidden.dtype, student_head.dtype), torch.float32)

    def log_softmax(hidden: Tensor, head: Tensor, cap: float) -> Tensor:
        u = hidden.to(wide) @ head.to(wide).T
        return torch.log_softmax((cap * torch.tanh(u / cap) if cap > 0 else u) / temperature, dim=-1)

    log_p = log_softmax(student_hidden, student_head, softcap)
    if teacher_topk is not None:
        ids, kept, log_q = _outcomes(*teacher_topk, student_head.shape[0], wide)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter_reduce(1, ids, ~kept, "prod")
        other = torch.logsumexp(log_p.masked_fill(~others, -math.inf), dim=-1, keepdim=True)
        log_p = torch.cat([log_p.gather(1, ids).masked_fill(~kept, -math.inf), other], dim=1)
    else:
        assert teacher_hidden is not None and teacher_head is not None
        log_q = log_softmax(teacher_hidden, teacher_head, teacher_softcap).detach()
    kl = _divergence(log_p, log_q, kind, beta).sum(-1)
    return kl if mask is None else torch.where(mask, kl, torch.zeros_like(kl))


@takes_arrays
def linear_kl(
    student_hidden: Tensor, student_head: Tensor, *, teacher_hidden: Tensor | None = None, teacher_head: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None, kind: str = "forward", beta: float = 0.5,
    temperature: float = 1.0, softcap: float = 0.0, teacher_softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Per-token divergence of a student from a teacher.

    Args:
        student_hidden: `[T, K]`, student_head: `[V, K]`; float32 or bfloat16 each (float64 is computed in float64).
        teacher_hidden, teacher_head: `[T, K']`, `[V, K']`, any width of its own, the student's vocabulary.
        teacher_topk: instead of them, (ids int64 `[T, k]`, log-probs `[T, k]` at the same temperature); ids of a row differ, an
            entry with log-prob -inf is padding. Rows that sum to more than 1 are normalised.
        mask: bool `[T]`, False = skipped: such a row costs nothing and gives 0. Default: all rows.
        kind: "forward" KL(teacher || student), "reverse" KL(student || teacher), "js" with the teacher's weight beta in (0, 1).
        temperature: divides both sides' logits; the result is not multiplied by its square. softcap, teacher_softcap: final-logit
            softcaps, 0 = none.

    Returns: float32 `[T]`, in nats. Gradients flow to student_hidden and student_head, each where it requires one; never to the
        teacher. No buffer grows with T * V.

    Raises: ValueError that names the argument at fault.

    >>> import torch
    >>> from enginepost.kernels.linear_kl import linear_kl
    >>> hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8)
    >>> kl = linear_kl(hidden, head, teacher_hidden=hidden + 0.1, teacher_head=head, kind="js")
    >>> kl.sum().backward()
    >>> kl.shape, hidden.grad.shape
    (torch.Size([5]), torch.Size([5, 8]))
    """
    _check(
        student_hidden, student_head, teacher_hidden, teacher_head, teacher_topk, mask, kind, beta, temperature, softcap,
        teacher_softcap,
    )  # fmt: skip
    if os.environ.get("ENGINEPOST_BACKEND") == "reference":
        return reference(
            student_hidden, student_head, teacher_hidden=teacher_hidden, teacher_head=teacher_head, teacher_topk=teacher_topk,
            mask=mask, kind=kind, beta=beta, temperature=temperature, softcap=softcap, teacher_softcap=teacher_softcap,
        )  # fmt: skip
    ids, logprobs = (None, None) if teacher_topk is None else teacher_topk
    rows = None if mask is None else mask.nonzero().squeeze(1)
    if rows is not None:
        student_hidden = student_hidden[rows]
        teacher_hidden, ids, logprobs = (x if x is None else x[rows] for x in (teacher_hidden, ids, logprobs))
    kl = torch.ops.enginepost.linear_kl(
        student_hidden, student_head, *(x if x is None else x.detach() for x in (teacher_hidden, teacher_head, ids, logprobs)),
        kind, beta, temperature, softcap, teacher_softcap,
    )[0]  # fmt: skip
    return kl if rows is None else kl.new_zeros(mask.shape[0]).index_put((rows,), kl)  # type: ignore[union-attr]


def _check(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None,
    topk: tuple[Tensor, Tensor] | None, mask: Tensor | None, kind: str, beta: float, temperature: float, softcap: float,
    teacher_softcap: float,
) -> None:  # fmt: skip
    def need(good: bool, message: str) -> None:
        if not good:
            raise ValueError(f"linear_kl: {message}")

    def shapes(*tensors: Tensor) -> str:
        return " and ".join(str(list(x.shape)) for x in tensors)

    need(
        hidden.dim() == 2 and head.dim() == 2 and hidden.shape[1] == head.shape[1],
        f"student_hidden [T, K] and student_head [V, K] must share K, got {shapes(hidden, head)}",
    )
    tokens, vocab = hidden.shape[0], head.shape[0]
    if topk is not None:
        need(
            teacher_hidden is None and teacher_head is None,
            "give teacher_topk or teacher_hidden with teacher_head, not both",
        )
        ids, logprobs = topk
        need(
            ids.dtype == torch.int64 and ids.dim() == 2 and ids.shape == logprobs.shape and ids.shape[0] == tokens,
            f"teacher_topk must be int64 ids and log-probs, both [{tokens}, k], got {ids.dtype} {shapes(ids, logprobs)}",
        )
        if not torch.compiler.is_compiling():
            bad = (((ids < 0) | (ids >= vocab)) & (logprobs > -math.inf)).nonzero()
            need(
                not bad.numel(),
                f"teacher_topk ids must be in the vocabulary of {vocab} entries, got {ids[tuple(bad[0])] if bad.numel() else 0} at "
                f"{bad[0].tolist() if bad.numel() else []}",
            )
            need(not (logprobs > 0).any(), "teacher_topk log-probs must not be above 0")
    else:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("linear_kl: a teacher is missing: give teacher_hidden with teacher_head, or teacher_topk")
        need(
            teacher_hidden.dim() == 2 and teacher_head.dim() == 2 and teacher_hidden.shape[1] == teacher_head.shape[1],
            f"teacher_hidden [T, K'] and teacher_head [V, K'] must share K', got {shapes(teacher_hidden, teacher_head)}",
        )
        need(
            teacher_hidden.shape[0] == tokens and teacher_head.shape[0] == vocab,
            f"the teacher must have the student's {tokens} tokens and {vocab} vocabulary entries, got "
            f"{shapes(teacher_hidden, teacher_head)}",
        )
    if mask is not None:
        need(
            mask.dtype == torch.bool and mask.shape == (tokens,),
            f"mask must be bool [{tokens}], got {mask.dtype} {list(mask.shape)}",
        )
    need(vocab >= 1, "student_head has no rows")
    need(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    need(0 < beta < 1, f"beta must be between 0 and 1, got {beta}")
    need(0 < temperature < math.inf, f"temperature must be positive, got {temperature}")
    need(
        softcap >= 0 and teacher_softcap >= 0,
        f"softcaps must be 0 (none) or positive, got {softcap} and {teacher_softcap}",
    )


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """The summands of a divergence. An outcome of probability 0 on the weighting side adds 0."""

    def weighted(log_weight: Tensor, log_other: Tensor) -> Tensor:
        none = log_weight == -math.inf
        return log_weight.exp() * (log_weight - log_other).masked_fill(none, 0.0)

    if kind == "forward":
        return weighted(log_q, log_p)
    if kind == "reverse":
        return weighted(log_p, log_q)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * weighted(log_q, log_m) + (1 - beta) * weighted(log_p, log_m)


def _outcomes(ids: Tensor, logprobs: Tensor, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """ids fit to index with, which of them are not padding, and log q `[T, k + 1]` with "other" last."""
    kept = logprobs > -math.inf
    log_q = logprobs.to(dtype)
    total = log_q.exp().sum(-1, keepdim=True)
    log_q = log_q - total.clamp_min(1.0).log()
    other = (1.0 - total).clamp_min(SMALLEST_OTHER).log()
    other = other.masked_fill(kept.sum(1, keepdim=True) == vocab, -math.inf)  # there is no other
    return ids.masked_fill(~kept, 0), kept, torch.cat([log_q, other], dim=1)


class _Side:
    """The products of one side, block by block, in memory that is used again."""

    def __init__(self, hidden: Tensor, head: Tensor, dtype: torch.dtype | None = None) -> None:
        self.hidden, self.head, self.dtype = hidden, head, dtype or _result_dtype(hidden, head)
        tokens, vocab = hidden.shape[0], head.shape[0]
        elements = GPU_BLOCK_ELEMENTS if hidden.is_cuda else BLOCK_ELEMENTS
        self.step = min(vocab, max(64, elements // max(1, tokens) // 64 * 64))
        self.room = torch.empty(tokens, -(-self.step // 4) * 4, dtype=self.dtype, device=hidden.device)

    def blocks(self) -> Iterator[tuple[int, int]]:
        vocab = self.head.shape[0]
        return ((v0, min(v0 + self.step, vocab)) for v0 in range(0, vocab, self.step))

    def u(self, v0: int, v1: int) -> Tensor:
        """`[T, v1 - v0]`, valid until the next call."""
        return mm(self.hidden, self.head[v0:v1].t(), out=self.room[:, : v1 - v0])


def _teacher(student: _Side, hidden: Tensor | None, head: Tensor | None) -> _Side | None:
    return None if hidden is None or head is None else _Side(hidden, head, student.dtype)


def _forward(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, s: Settings,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl `[T]` and what the backward pass needs beside the inputs, `[T, 5]` or, with top-k, `[T, k + 3]`."""
    student = _Side(hidden, head)
    teacher = _teacher(student, teacher_hidden, teacher_head)
    if teacher is not None:
        return _forward_full(student, teacher, s)
    assert ids is not None and logprobs is not None
    return _forward_topk(student, ids, logprobs, s)


def _result_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)


def _forward_full(student: _Side, teacher: _Side, s: Settings) -> tuple[Tensor, Tensor]:
    sums = student.room.new_empty(len(student.hidden), SUMS)
    for v0, v1 in student.blocks():
        scan(student.u(v0, v1), teacher.u(v0, v1), None, None, sums, v0, s)
    high_p, total_p, high_q, total_q, weighted = sums.split(1, dim=1)
    # Largest and log of the sum apart: their sum would lose the digits that the largest has not.
    norm = torch.cat([high_p, total_p.log(), high_q, total_q.log()], dim=1)
    less = norm[:, 3:] - norm[:, 1:2]
    if s.kind == "forward":
        mean = weighted / total_q
        kl = -(mean + less)
    elif s.kind == "reverse":
        mean = weighted / total_p
        kl = mean + less
    else:
        of_q_and_p = sums.new_empty(len(sums), 2)
        for v0, v1 in student.blocks():
            compare(student.u(v0, v1), teacher.u(v0, v1), norm, of_q_and_p, v0, s)
        mean = of_q_and_p[:, 1:]
        kl = s.beta * of_q_and_p[:, :1] + (1 - s.beta) * mean
    return kl.squeeze(1), torch.cat([norm, mean], dim=1)


def _forward_topk(student: _Side, ids: Tensor, logprobs: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    ids, log_q = _outcomes_in(ids, logprobs, student)
    chosen = torch.full(ids.shape, -math.inf, dtype=student.dtype, device=ids.device)
    sums = student.room.new_empty(len(ids), SUMS)
    for v0, v1 in student.blocks():
        scan(student.u(v0, v1), None, ids, chosen, sums, v0, s)
    high = torch.cat([chosen, sums[:, :1]], dim=1).amax(1, keepdim=True)
    outcomes = torch.cat([chosen - high, sums[:, :1] - high + sums[:, 1:2].log()], dim=1)
    total = torch.logsumexp(outcomes, dim=1, keepdim=True)
    log_p = outcomes - total
    return _divergence(log_p, log_q, s.kind, s.beta).sum(1), torch.cat([log_p, high, total], dim=1)


def _outcomes_in(ids: Tensor, logprobs: Tensor, student: _Side) -> tuple[Tensor, Tensor]:
    """ids with -1 for padding, contiguous, and log q of all outcomes."""
    _, kept, log_q = _outcomes(ids, logprobs, student.head.shape[0], student.dtype)
    return ids.masked_fill(~kept, -1).contiguous(), log_q


def _gradients(
    student: _Side, teacher: _Side | None, ids: Tensor | None, logprobs: Tensor | None, state: Tensor, dkl: Tensor, s: Settings,
    dtype: torch.dtype,
) -> Iterator[tuple[int, int, Tensor]]:  # fmt: skip
    """(v0, v1, du `[T, v1 - v0]` in dtype) of every block of the vocabulary; du is valid until the next."""
    dchosen = None
    if teacher is None:
        assert ids is not None and logprobs is not None
        ids, log_q = _outcomes_in(ids, logprobs, student)
        state, dchosen = _slopes(state, log_q, s)
    else:
        ids = None
    room = student.room if dtype == student.dtype else student.room.new_empty(student.room.shape, dtype=dtype)
    for v0, v1 in student.blocks():
        du = room[:, : v1 - v0]
        theirs = None if teacher is None else teacher.u(v0, v1)
        gradient(student.u(v0, v1), theirs, ids, dchosen, state, dkl, du, v0, s)
        yield v0, v1, du


def _slopes(state: Tensor, log_q: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Of a top-k teacher: state `[T, 3]` of `gradient`, and du of the chosen tokens.

    dz_v = p_v (G_v - sum_w p_w G_w), G = d divergence / d p of the outcome that v belongs to.
    """
    log_p, norm = state[:, :-2], state[:, -2:]
    none = log_p == -math.inf  # padding, or all tokens chosen
    if s.kind == "forward":
        slope = -(log_q - log_p).exp()
    elif s.kind == "reverse":
        slope = log_p - log_q
    else:
        slope = (1 - s.beta) * (log_p - log_mixture(log_p, log_q, s.beta))
    slope = slope.masked_fill(none, 0.0)
    slope -= (log_p.exp() * slope).sum(1, keepdim=True)
    z = (log_p + norm.sum(1, keepdim=True)).masked_fill_(none, 0.0)
    dchosen = through(log_p.exp() * slope, z, s)[:, :-1]
    return torch.cat([norm, slope[:, -1:]], dim=1), dchosen.contiguous()


@torch.library.custom_op("enginepost::linear_kl", mutates_args=())
def _op(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, kind: str, beta: float, temperature: float, softcap: float, teacher_softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    settings = Settings(kind, beta, temperature, softcap, teacher_softcap)
    return _forward(hidden, head, teacher_hidden, teacher_head, ids, logprobs, settings)


@_op.register_fake
def _(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, kind: str, beta: float, temperature: float, softcap: float, teacher_softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = _result_dtype(hidden, head)
    width = 5 if ids is None else ids.shape[1] + 3
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(hidden.shape[0], width, dtype=dtype)


@torch.library.custom_op("enginepost::linear_kl_backward", mutates_args=())
def _backward_op(
    dkl: Tensor, hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, state: Tensor, kind: str, beta: float, temperature: float, softcap: float, teacher_softcap: float,
    hidden_grad: bool, head_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden `[T, K]` and dhead `[V, K]` in the dtypes of hidden and head; no rows where a gradient is not asked."""
    dhidden, dhead = _empty_gradients(hidden, head, hidden_grad, head_grad)
    student = _Side(hidden, head)
    teacher = _teacher(student, teacher_hidden, teacher_head)
    total = torch.zeros(dhidden.shape, dtype=student.dtype, device=hidden.device)
    # On a GPU one product; a float32 one would be made of three.
    narrow = (head.is_cuda or emulating()) and head.dtype == torch.bfloat16
    settings = Settings(kind, beta, temperature, softcap, teacher_softcap)
    dkl, dtype = dkl.to(student.dtype).contiguous(), head.dtype if narrow else student.dtype
    for v0, v1, du in _gradients(student, teacher, ids, logprobs, state, dkl, settings, dtype):
        if hidden_grad:
            mm(du, head[v0:v1], out=total, accumulate=True)
        if head_grad:
            mm(du.t(), hidden, out=dhead[v0:v1])
    return (dhidden.copy_(total) if hidden_grad else dhidden), dhead


def _empty_gradients(hidden: Tensor, head: Tensor, hidden_grad: bool, head_grad: bool) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[0] if hidden_grad else 0, hidden.shape[1]),
        head.new_empty(head.shape[0] if head_grad else 0, head.shape[1]),
    )


@_backward_op.register_fake
def _(
    dkl: Tensor, hidden: Tensor, head: Tensor, teacher_hidden: Tensor | None, teacher_head: Tensor | None, ids: Tensor | None,
    logprobs: Tensor | None, state: Tensor, kind: str, beta: float, temperature: float, softcap: float, teacher_softcap: float,
    hidden_grad: bool, head_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(hidden, head, hidden_grad, head_grad)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.kind, ctx.beta, ctx.temperature, ctx.softcap, ctx.teacher_softcap = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _grad(ctx, dkl: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    hidden_grad, head_grad = ctx.needs_input_grad[:2]
    dhidden, dhead = torch.ops.enginepost.linear_kl_backward(
        dkl,
        *ctx.saved_tensors,
        ctx.kind,
        ctx.beta,
        ctx.temperature,
        ctx.softcap,
        ctx.teacher_softcap,
        hidden_grad,
        head_grad,
    )
    return dhidden if hidden_grad else None, dhead if head_grad else None, *(None,) * 9


_op.register_autograd(_grad, setup_context=_setup)

make_callable(__name__, linear_kl)
