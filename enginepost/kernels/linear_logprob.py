"""Log-probability of a target token straight from hidden states, without ever holding the logits `[T, V]`.

    u = hidden @ weight^T        softcap c > 0: z = c * tanh(u / c), else z = u
    lse_t = log sum_v exp(z_tv)      logprob_t = z_t,y(t) - lse_t      entropy_t = lse_t - sum_v p_tv z_tv

Backward, with z' = dz / du = 1 - (z / c)^2. When the head is frozen, the forward pass gives beside each log-probability

    direction_t = d logprob_t / d hidden_t = z'_t,y W[y] - sum_v p_tv z'_tv W[v]

(a running softmax over the vocabulary, as flash attention has it over keys), so that any loss costs two matrix products in all and
its backward pass is one scalar per row: dhidden_t = dlogprob_t * direction_t. A head that is trained, or a gradient of the entropy,
makes the logits again block by block:

    g_tv = z'_tv (dlogprob_t (delta_v,y(t) - p_tv) - dentropy_t p_tv (log p_tv + entropy_t))
    dhidden = g W        dweight = g^T hidden

Sources: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009).
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_HALVES, core, emulating, native, plain, to_dlpack

SKIPPED = -100


class Table(Protocol):
    """A frozen head `[V, K]` that is not in memory as a whole: in a file, say."""

    shape: torch.Size
    dtype: torch.dtype

    def rows(self, ids: Tensor) -> Tensor:
        """ids int64 `[T]` -> `[T, K]`."""

    def parts(self, rows: int) -> Iterator[Tensor]:
        """`rows` rows after the other, fewer in the last part. A part may be overwritten when the next is asked for."""

    def whole(self) -> Tensor:
        """All of it."""


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, softcap: float = 0.0, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain PyTorch with full logits, at float32 or better."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    kept = targets != SKIPPED
    rows = kept.nonzero().squeeze(1)
    logits = hidden[rows].to(wide) @ weight.to(wide).T
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits, dim=-1)
    lse = torch.logsumexp(logits, dim=-1).detach()
    logprob = log_p.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
    spread = -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(lse)
    zero = torch.zeros(targets.shape[0], dtype=wide, device=hidden.device)
    return zero.index_put((rows,), logprob), zero.index_put((rows,), lse), zero.index_put((rows,), spread)


@takes_arrays
def linear_logprob(
    hidden: Tensor, weight: Tensor | Table, targets: Tensor, *, softcap: float = 0.0, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token log-probability, log-sum-exp and entropy.

    Args:
        hidden: `[T, K]`, weight: `[V, K]`; float32 or bfloat16 each, rows at any stride. Float64 goes to the reference, and so does
            on a GPU whatever is not both bfloat16 or both float16.
            A weight in CPU memory may be a `Table`, which is frozen: parts of it are in memory, one after the other, and results are
            the same bits. Only a loss that sends a gradient through the entropy asks for the whole.
        targets: int64 `[T]`, each in `[0, V)` or -100 = skipped: such a row is left out of the matrix products.
        softcap: final-logit softcap, 0 = none. entropy: whether to compute it.

    Returns:
        (logprob `[T]`, lse `[T]`, entropy `[T]`), float32; zero at skipped rows, entropy zero unless asked. Gradients flow through
        logprob, and through entropy when asked, to hidden and to weight, each where it requires one. A row's results and gradient do
        not depend on the other rows or on the thread count, to the last bit; dweight is summed in float32 over rows in their order.

    Raises: ValueError that names the argument at fault, and the position and value of a target outside the vocabulary. A GPU is not
        waited for to look at targets: there such a row's results and gradients are NaN, and gradients of two calls are the same bits
        only for the same number of rows.

    Sources: Dao et al. 2022 (FlashAttention, arXiv 2205.14135); Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009).

    >>> hidden, head = torch.randn(3, 8, requires_grad=True), torch.randn(100, 8)
    >>> logprob, lse, _ = linear_logprob(hidden, head, torch.tensor([7, -100, 99]))
    >>> torch.allclose(logprob[0], torch.log_softmax(hidden @ head.T, dim=-1)[0, 7], atol=1e-5)
    True
    >>> (-logprob.sum()).backward()
    >>> hidden.grad[1].abs().sum().item()  # the skipped row
    0.0
    """
    if not isinstance(weight, Tensor):
        if tuple(weight.shape)[1:] == hidden.shape[1:] and native(hidden, hidden.new_empty(0, dtype=weight.dtype)):
            return _OverParts.apply(hidden, weight, targets, softcap, entropy, hidden.requires_grad)
        weight = weight.whole()
    _check(hidden, weight, targets, softcap)
    if not _native(hidden, weight):
        return reference(hidden, weight, targets, softcap=softcap, entropy=entropy)
    if plain(hidden, weight):
        return _forward(hidden, weight, targets, softcap, entropy, False)[:3]
    # With a frozen head the entropy is most often a figure to look at, so the direction is made even when it is asked for; only a
    # loss that sends a gradient through it pays for the logits a second time.
    direction = hidden.requires_grad and not weight.requires_grad
    return torch.ops.enginepost.linear_logprob(hidden, weight, targets, softcap, entropy, direction)[:3]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprob: hidden [T, K] and weight [V, K] must share K, got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.dtype != torch.int64 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_logprob: targets must be int64 [{hidden.shape[0]}], got {targets.dtype} {list(targets.shape)}"
        )
    if not softcap >= 0:
        raise ValueError(f"linear_logprob: softcap must be 0 (none) or positive, got {softcap}")
    if torch.compiler.is_compiling() or _native(hidden, weight):  # the kernel looks at the targets itself
        return
    bad = ((targets != SKIPPED) & ((targets < 0) | (targets >= weight.shape[0]))).nonzero().flatten()
    if bad.numel():
        at = int(bad[0])
        raise ValueError(
            f"linear_logprob: targets[{at}] = {int(targets[at])} is not in the vocabulary of {weight.shape[0]} entries, "
            f"nor {SKIPPED} (skipped)"
        )


def _native(hidden: Tensor, weight: Tensor) -> bool:
    on_gpu = hidden.is_cuda or emulating()
    return native(hidden, weight, gpu=GPU_HALVES) and not (on_gpu and hidden.dtype != weight.dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_results(hidden: Tensor, direction: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = hidden.shape
    wide = hidden.new_empty(tokens if direction else 0, width, dtype=torch.float32)
    logprob, lse, entropy = (hidden.new_zeros(tokens, dtype=torch.float32) for _ in range(3))
    return logprob, lse, entropy, wide


def _forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, entropy: bool, direction: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _empty_results(hidden, direction)
    logprob, lse, spread, toward = results
    core().linear_logprob_forward(
        to_dlpack(_rows(hidden.detach())), to_dlpack(_rows(weight.detach())), to_dlpack(targets.contiguous()),
        to_dlpack(logprob), to_dlpack(lse), to_dlpack(spread) if entropy else None,
        to_dlpack(toward) if direction else None, softcap,
    )  # fmt: skip
    return results


PARTS = 2  # blocks of LINEAR_LOGPROB_PART entries that are in memory at a time: enough work for a few threads


class _OverParts(torch.autograd.Function):
    """linear_logprob with a head that comes part by part."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, table: Table, targets: Tensor, softcap: float, entropy: bool, direction: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob, lse, spread, toward = _empty_results(hidden, direction)
        state = torch.empty(4, hidden.shape[0], dtype=torch.float32)
        named = table.rows(targets.clamp(0, table.shape[0] - 1)) if direction else None
        arguments = [to_dlpack(_rows(hidden.detach())), None, to_dlpack(targets.contiguous())]
        first = 0
        for part in table.parts(PARTS * core().LINEAR_LOGPROB_PART):
            arguments[1] = to_dlpack(part)
            core().linear_logprob_forward_part(
                *arguments, None if named is None else to_dlpack(named), to_dlpack(state), to_dlpack(logprob), to_dlpack(lse),
                to_dlpack(spread) if entropy else None, to_dlpack(toward) if direction else None, softcap, first, table.shape[0],
            )  # fmt: skip
            first += len(part)
        ctx.table, ctx.softcap, ctx.entropy = table, softcap, entropy
        ctx.save_for_backward(hidden, targets, lse, spread, toward)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logprob, lse, spread

    @staticmethod
    def backward(ctx, dlogprob: Tensor | None, _: Tensor, dentropy: Tensor | None) -> tuple:  # type: ignore[no-untyped-def]
        hidden, targets, lse, spread, toward = ctx.saved_tensors
        if not ctx.entropy or dentropy is None:
            dhidden = None if dlogprob is None else (toward * dlogprob.unsqueeze(1)).to(hidden.dtype)
        else:
            dlogprob = torch.zeros_like(lse) if dlogprob is None else dlogprob
            dhidden, _ = torch.ops.enginepost.linear_logprob_backward(
                dlogprob, dentropy, hidden, ctx.table.whole(), targets, lse, spread, ctx.softcap, True, False
            )
        return dhidden, None, None, None, None, None


@torch.library.custom_op("enginepost::linear_logprob", mutates_args=())
def _op(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, entropy: bool, direction: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(hidden, weight, targets, softcap, entropy, direction)


@_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, entropy: bool, direction: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_results(hidden, direction)


@torch.library.custom_op("enginepost::linear_logprob_backward", mutates_args=())
def _backward_op(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    entropy: Tensor, softcap: float, hidden_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dhidden `[T, K]` and dweight `[V, K]` in the dtypes of hidden and weight; no rows where a gradient is not asked."""
    dhidden, dweight = _empty_gradients(hidden, weight, hidden_grad, weight_grad)
    core().linear_logprob_backward(
        to_dlpack(dlogprob.contiguous()), None if dentropy is None else to_dlpack(dentropy.contiguous()),
        to_dlpack(_rows(hidden.detach())), to_dlpack(_rows(weight.detach())), to_dlpack(targets.contiguous()),
        to_dlpack(lse), None if dentropy is None else to_dlpack(entropy), to_dlpack(dhidden) if hidden_grad else None,
        to_dlpack(dweight) if weight_grad else None, softcap,
    )  # fmt: skip
    return dhidden, dweight


def _empty_gradients(hidden: Tensor, weight: Tensor, hidden_grad: bool, weight_grad: bool) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[0] if hidden_grad else 0, hidden.shape[1]),
        weight.new_empty(weight.shape[0] if weight_grad else 0, weight.shape[1]),
    )


@_backward_op.register_fake
def _(
    dlogprob: Tensor, dentropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor,
    entropy: Tensor, softcap: float, hidden_grad: bool, weight_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(hidden, weight, hidden_grad, weight_grad)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, targets, ctx.softcap, ctx.entropy, ctx.direction = inputs
    _, lse, spread, direction = output
    ctx.hidden_dtype = hidden.dtype
    ctx.save_for_backward(hidden, weight, targets, lse, spread, direction)
    ctx.mark_non_differentiable(lse, direction)
    ctx.set_materialize_grads(False)  # so that an entropy that no loss uses can be told from one that does


def _grad(ctx, dlogprob: Tensor | None, _: Tensor, dentropy: Tensor | None, __: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    hidden, weight, targets, lse, spread, direction = ctx.saved_tensors
    hidden_grad, weight_grad = ctx.needs_input_grad[:2]
    dentropy = dentropy if ctx.entropy else None
    if dlogprob is None and dentropy is None:
        return (None,) * 6
    if ctx.direction and not weight_grad and dentropy is None:
        return (direction * dlogprob.unsqueeze(1)).to(ctx.hidden_dtype), None, None, None, None, None  # type: ignore[union-attr]
    dlogprob = torch.zeros_like(lse) if dlogprob is None else dlogprob
    dhidden, dweight = torch.ops.enginepost.linear_logprob_backward(
        dlogprob, dentropy, hidden, weight, targets, lse, spread, ctx.softcap, hidden_grad, weight_grad
    )
    return dhidden if hidden_grad else None, dweight if weight_grad else None, None, None, None, None


_op.register_autograd(_grad, setup_context=_setup)

make_callable(__name__, linear_logprob)
