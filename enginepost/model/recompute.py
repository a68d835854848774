"""Activation checkpointing that keeps the input of a block elsewhere than where it is.

    forward    y = block(x), nothing recorded; x is kept
    backward   y' = block(x) once more, recorded; then its gradients: those of its parameters accumulate, that of x goes on

Kept in pinned host memory ("host": copied on a stream of its own, for a GPU; on a CPU x is in host memory already; no test has run
it on a GPU), or rounded to bfloat16 ("bf16": a float32 model keeps half as much, and its gradients are those of the rounded inputs).
torch.utils.checkpoint, which serves where x may stay as it is, has no say in how it keeps it; it stops recomputing at the last
tensor that is needed, and so takes two or three x less while a block is at work.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kept = Literal["host", "bf16"]


def recompute(run: Callable[[Tensor], Tensor], x: Tensor, trains: bool, keep: Kept) -> Tensor:
    """run(x), whose activations are made again when gradients are asked for.

    Args: run: must compute the same when it is called again; x: float `[T, H]`; trains: whether run uses parameters that want
        gradients (those are accumulated in their `.grad`). Returns: a tensor of x's shape.
    """
    anchor = torch.empty(0, requires_grad=True) if trains and not x.requires_grad else None
    y: Tensor = _Recompute.apply(x, anchor, run, keep)
    return y


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, run: Callable[[Tensor], Tensor], keep: Kept) -> Tensor:
        ctx.run, ctx.device, ctx.dtype, ctx.copied = run, x.device, x.dtype, None
        if keep == "host" and x.device.type != "cpu":
            kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            copies = _copies(x.device)
            copies.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(copies):
                kept.copy_(x, non_blocking=True)
                ctx.copied = torch.cuda.Event()
                ctx.copied.record(copies)
            x.record_stream(copies)  # its memory is not given away before the copy is done
            ctx.save_for_backward(kept)
        else:
            ctx.save_for_backward(x.bfloat16() if keep == "bf16" else x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        if ctx.copied is not None:
            torch.cuda.current_stream(ctx.device).wait_event(ctx.copied)
        x = kept.detach().to(ctx.device, ctx.dtype, non_blocking=True).requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward((y,), gradients)
        return x.grad, None, None, None


_STREAMS: dict[torch.device, Any] = {}


def _copies(device: torch.device) -> Any:
    """The stream of copies to the host, one a device."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
