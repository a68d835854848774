"""Activation checkpointing that keeps the input of a block elsewhere than where it is.

    forward    y = block(x), nothing recorded; x is kept
    backward   y' = block(x) once more, recorded; then its gradients: those of its parameters accumulate, that of x goes on

Kept in pinned host memory ("host": copied on a stream of its own, for a GPU; on a CPU x is in host memory already), or rounded to
bfloat16 ("bf16": a float32 model keeps half as much, and its gradients are those of the rounded inputs). The copies to the host
run behind the forward pass; in the backward pass the input of the block before the one at work is on its way back, so that two
block inputs are on the device at a time. torch.utils.checkpoint, which serves where x may stay as it is, has no say in how it
keeps it; it stops recomputing at the last tensor that is needed, and so takes two or three x less while a block is at work.
"""

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from enginepost.model.pinned import pieces

Kept = Literal["host", "bf16"]


def recompute(run: Callable[[Tensor], Tensor], x: Tensor, trains: bool, keep: Kept) -> Tensor:
    """run(x), whose activations are made again when gradients are asked for.

    Args: run: must compute the same when it is called again; x: float `[T, H]`; trains: whether run uses parameters that want
        gradients (those are accumulated in their `.grad`). Returns: a tensor of x's shape.
    """
    anchor = torch.empty(0, device=x.device, requires_grad=True) if trains and not x.requires_grad else None
    y: Tensor = _Recompute.apply(x, anchor, run, keep)
    return y


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, run: Callable[[Tensor], Tensor], keep: Kept) -> Tensor:
        ctx.run, ctx.dtype, ctx.away = run, x.dtype, None
        if keep == "host" and x.device.type != "cpu":
            ctx.away = _Away(x)
        else:
            ctx.save_for_backward(x.bfloat16() if keep == "bf16" else x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        kept = ctx.saved_tensors[0].detach() if ctx.away is None else ctx.away.back()
        x = kept.to(ctx.dtype).requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward((y,), gradients)
        return x.grad, None, None, None


class _Away:
    """A tensor in pinned host memory on its way from the device, and later back. The one that went before it comes back after it."""

    def __init__(self, x: Tensor) -> None:
        self._device, self._dtype, self._api = x.device, x.dtype, torch.get_device_module(x.device)
        self._shape, self._host = x.shape, [torch.empty(n, dtype=x.dtype, pin_memory=True) for n in pieces(x.numel())]
        self._here: Tensor | None = None
        self._arrived: Any = None
        copies = self._copies()
        copies.wait_stream(self._api.current_stream(self._device))
        with self._api.stream(copies):
            for there, here in zip(self._host, self._parts(x), strict=True):
                there.copy_(here, non_blocking=True)
        x.record_stream(copies)  # its memory is not given away before the copy is done
        self._before = _LAST.get(self._device)
        _LAST[self._device] = weakref.ref(self)

    def back(self) -> Tensor:
        """The tensor on the device, for the current stream; the one before it is on its way. Once."""
        self._fetch()
        before = None if self._before is None else self._before()
        if before is not None:
            before._fetch()
        assert self._here is not None
        here, self._here = self._here, None
        current = self._api.current_stream(self._device)
        current.wait_event(self._arrived)
        here.record_stream(current)
        return here

    def _fetch(self) -> None:
        if self._here is not None or self._arrived is not None:
            return
        copies = self._copies()  # behind the copy that brought it away
        with self._api.stream(copies):
            self._here = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            for here, there in zip(self._parts(self._here), self._host, strict=True):
                here.copy_(there, non_blocking=True)
            self._arrived = self._api.Event()
            self._arrived.record(copies)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.view(-1).split([len(buffer) for buffer in self._host])

    def _copies(self) -> Any:
        if self._device not in _STREAMS:
            _STREAMS[self._device] = self._api.Stream(self._device)
        return _STREAMS[self._device]


_STREAMS: dict[torch.device, Any] = {}  # of these copies, one a device
_LAST: dict[torch.device, "weakref.ref[_Away]"] = {}  # the tensor that went away last
