"""Rows of a stream that are read more than once: prompts that several continuations share.

`take` copies rows; its backward pass adds the gradients of the copies, first all first copies, then all second ones, ..., so that
the sum has the same bits at any thread count and on any device. `SharedPrompts` stands where a cache of keys and values would: it
gives attention the keys of each continuation's prompt beside its own.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from enginepost.device import sent
from enginepost.kernels.attention import attention


class Copies:
    """`index` int64 [N], in host memory, into rows of a stream on `device`, and the rounds in which gradients go back: in each, no
    row twice."""

    def __init__(self, index: Tensor, device: torch.device) -> None:
        self.index = sent(index, device)
        order = torch.argsort(index, stable=True)
        rows = index[order]
        starts = torch.searchsorted(rows, rows)  # where the run of equal rows begins
        occurrence = torch.empty_like(index)
        occurrence[order] = torch.arange(len(index)) - starts
        rounds = [(occurrence == n).nonzero().squeeze(1) for n in range(int(occurrence.max()) + 1 if len(index) else 0)]
        # (places among the copies, rows of the stream) of each
        self.rounds = [(sent(chosen, device), sent(index[chosen], device)) for chosen in rounds]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, copies: Copies) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.copies, ctx.rows = copies, x.shape[0]
        return x.index_select(0, copies.index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        total = grad.new_zeros(ctx.rows, *grad.shape[1:])
        for number, (chosen, rows) in enumerate(ctx.copies.rounds):
            if number == 0:
                total.index_copy_(0, rows, grad.index_select(0, chosen))
            else:
                total.index_add_(0, rows, grad.index_select(0, chosen))
        return total, None


def take(x: Tensor, copies: Copies) -> Tensor:
    """x `[T, ...]` -> `[N, ...]`, row copies.index[n] at place n."""
    return _Take.apply(x, copies)


class SharedPrompts:
    """Where `Transformer.hidden` takes a cache: keys and values of the stream, those of shared prompts repeated.

    keys int64 [Tk], in host memory: the row of the stream that each key is of; cu_seqlens_k int32 [S+1], on the device. It keeps
    nothing, so that gradients flow through it and activations may be recomputed.
    """

    keeps = False

    def __init__(self, keys: Tensor, cu_seqlens_k: Tensor) -> None:
        self.copies = Copies(keys, cu_seqlens_k.device)
        self.cu_seqlens_k = cu_seqlens_k

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, window: int, softcap: float, scale: float
    ) -> Tensor:  # fmt: skip
        """q `[T, H, D]` over the keys that `cu_seqlens_k` gives its sequence -> `[T, H, D]`."""
        keys, values = take(k, self.copies), take(v, self.copies)
        return attention(q, keys, values, cu_seqlens, self.cu_seqlens_k, window=window, softcap=softcap, scale=scale)[0]
