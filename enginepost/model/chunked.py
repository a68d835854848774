"""A function of tokens, one by one, computed over a few of them at a time, in the forward and in the backward pass: a block's MLP.

    forward     m[c] = mlp(y[c]) for each chunk c, nothing recorded; y is kept
    backward    mlp(y[c]) once more, recorded; dy[c], and its share of the parameters' gradients, which add up in float32

What the MLP holds inside, three times its inner width a token, exists for one chunk. Values and dy are those of the whole, a row's
own products; the gradients of the parameters are the same sums in another order, so a run keeps the length it began with.

Two autograd functions in a row do this: the first keeps y and does all the work of the backward pass, the second computes m and
keeps nothing. Recomputation under torch.utils.checkpoint ends with the last tensor that is kept, so it does not compute m in vain.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# run(rows, index): of the chunk with that index.
Rows = Callable[[Tensor, int], Tensor]


def chunked(run: Rows, y: Tensor, parameters: Sequence[Tensor], rows: int, enter: Callable[[], None]) -> Tensor:
    """run over all rows of y `[T, H]` -> `[T, H]`, `rows` at a time.

    Args: parameters: leaves that run uses and that want gradients, complete when the backward pass has gone through y; enter:
        called before the backward pass uses run (streamed weights come and go).
    """
    if not torch.is_grad_enabled() or not (y.requires_grad or parameters):
        return _forward(run, y, rows)
    kept: Tensor = _Gradients.apply(y, run, rows, enter, *parameters)
    out: Tensor = _Values.apply(kept, run, rows)
    return out


def _forward(run: Rows, y: Tensor, rows: int) -> Tensor:
    out = torch.empty_like(y)
    with torch.no_grad():
        for index, start in enumerate(range(0, len(y), rows)):
            out[start : start + rows] = run(y[start : start + rows], index)
    return out


class _Gradients(torch.autograd.Function):
    """y unchanged; its incoming gradient is that of run's output, its outgoing one that of y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, run: Rows, rows: int, enter: Callable[[], None], *parameters: Tensor) -> Tensor:
        ctx.run, ctx.rows, ctx.enter, ctx.parameters = run, rows, enter, parameters
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dm,), (y,) = gradients, ctx.saved_tensors
        ctx.enter()
        wants_y = ctx.needs_input_grad[0]
        dy = torch.empty_like(y) if wants_y else None
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for index, start in enumerate(range(0, len(y), ctx.rows)):
            part = slice(start, start + ctx.rows)
            x = y[part].detach().requires_grad_(wants_y)
            with torch.enable_grad():
                m = ctx.run(x, index)
            wanted = [x, *ctx.parameters] if wants_y else list(ctx.parameters)
            found = list(torch.autograd.grad(m, wanted, dm[part], allow_unused=True))
            if dy is not None:
                dy[part] = found.pop(0)
            del m, x, wanted
            for i in reversed(range(len(sums))):
                _add(sums, i, found.pop())
        for i, parameter in enumerate(ctx.parameters):
            total = sums[i]
            sums[i] = None if total is None else total.to(parameter.dtype)
        return dy, None, None, None, *sums


def _add(sums: list[Tensor | None], i: int, gradient: Tensor | None) -> None:
    """None: of an adapter that is switched off."""
    before = sums[i]
    if gradient is not None and before is not None:
        before += gradient
    elif gradient is not None:
        sums[i] = gradient.float() if gradient.dtype == torch.bfloat16 else gradient


class _Values(torch.autograd.Function):
    """run(y). What comes back in the backward pass is handed to `_Gradients` as it is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, run: Rows, rows: int) -> Tensor:
        return _forward(run, y, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        return gradients[0], None, None
