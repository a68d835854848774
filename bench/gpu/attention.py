"""attention on a GPU: training passes, ragged packed rows, decoding from a paged cache, beside torch's SDPA (flash and cuDNN).

FLOP: 4 D H per pair of a query and a key that it sees, forward, 2.5 times that backward; causal counts the triangle alone, for both
sides. A ragged batch counts the real tokens' pairs: the peer works on the padded batch with is_causal, as right-padded rows allow.
Decoding counts the bytes of K and V once; the peer gathers the pages, pads and masks, or is given the gathered keys for nothing.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.gpu import Case
from enginepost.kernels.attention import attention, paged_attention

PEERS = {"torch SDPA flash": SDPBackend.FLASH_ATTENTION, "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
PAGE = 16
WGMMA = True


def starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def peers(device: torch.device, leaves: tuple[Tensor, ...], causal: bool) -> dict[str, Callable[[], Tensor]]:
    """What of PEERS runs on this card for q, k, v `[B, H, L, D]`; on the CPU plain SDPA."""
    gqa = leaves[0].shape[1] != leaves[1].shape[1]
    if device.type != "cuda":
        return {"torch SDPA": lambda: sdpa(*leaves, is_causal=causal, enable_gqa=gqa)}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, which in PEERS.items():

        def call(which: SDPBackend = which) -> Tensor:
            with sdpa_kernel(which):
                return sdpa(*leaves, is_causal=causal, enable_gqa=gqa)

        try:
            call()
        except RuntimeError:
            continue
        found[name] = call
    return found


def backward_of(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], dout: Tensor) -> Callable[[], object]:
    """The backward pass alone, of a result computed once."""
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def without_gradient(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def training(
    device: torch.device, lengths: Tensor, dim: int, heads: int, kv_heads: int, causal: bool, label: str
) -> Iterator[Case]:
    """Forward, and backward alone. One sequence of the batch is one row of the peers' padded batch."""
    tokens, rows, longest = int(lengths.sum()), len(lengths), int(lengths.max())
    torch.manual_seed(1)
    q, k, v, dout = (torch.randn(tokens, n, dim, device=device).bfloat16() for n in (heads, kv_heads, kv_heads, heads))
    real = (torch.arange(longest) < lengths.unsqueeze(1)).to(device)

    def padded(x: Tensor) -> Tensor:
        if len(set(lengths.tolist())) == 1:
            return x.view(rows, longest, *x.shape[1:]).transpose(1, 2)
        out = x.new_zeros(rows, longest, *x.shape[1:])
        out[real] = x
        return out.transpose(1, 2)

    cu = starts(lengths).to(device)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    wide = tuple(padded(x.detach()).requires_grad_() for x in (q, k, v))
    wide_dout = padded(dout)
    pairs = float((lengths * (lengths + 1) // 2).sum() if causal else (lengths * lengths).sum())
    flop = 4 * dim * heads * pairs
    forward: dict[str, Callable[[], Tensor]] = {
        "enginepost": lambda: attention(*leaves, cu, causal=causal)[0],
        **peers(device, wide, causal),
    }
    shape = f"{label} H {heads}/{kv_heads} D {dim} {'causal' if causal else 'both ways'} bf16"
    yield Case(f"forward, {shape}", {n: without_gradient(f) for n, f in forward.items()}, flop, "TFLOP/s")
    backward = {
        name: backward_of(call, leaves, dout) if name == "enginepost" else backward_of(call, wide, wide_dout)
        for name, call in forward.items()
    }
    yield Case(f"backward, {shape}", backward, 2.5 * flop, "TFLOP/s")
    any_order = backward_of(lambda: attention(*leaves, cu, causal=causal, deterministic=False)[0], leaves, dout)
    against = {name: call for name, call in backward.items() if name != "enginepost"}
    yield Case(f"backward in any order, {shape}", {"enginepost": any_order, **against}, 2.5 * flop, "TFLOP/s")


def decoding(device: torch.device, used: Tensor, heads: int, kv_heads: int, dim: int) -> Iterator[Case]:
    sequences, blocks = len(used), -(-int(used.max()) // PAGE)
    torch.manual_seed(2)
    table = torch.randperm(sequences * blocks).int().view(sequences, blocks).to(device)
    k, v = (torch.randn(sequences * blocks, PAGE, kv_heads, dim, device=device).bfloat16() for _ in range(2))
    q = torch.randn(sequences, heads, dim, device=device).bfloat16()
    used = used.int().to(device)
    mask = (torch.arange(blocks * PAGE, device=device) < used.unsqueeze(1)).view(sequences, 1, 1, -1)
    index = table.long()

    def gathered(x: Tensor) -> Tensor:
        return x[index].flatten(1, 2).transpose(1, 2)

    def peer(keys: Tensor, values: Tensor) -> Tensor:
        return sdpa(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=heads != kv_heads)

    ready = gathered(k), gathered(v)
    calls: dict[str, Callable[[], object]] = {
        "enginepost": lambda: paged_attention(q, k, v, table, used),
        "gather + torch SDPA": lambda: peer(gathered(k), gathered(v)),
        "torch SDPA, keys gathered before": lambda: peer(*ready),
    }
    total = int(used.sum())
    yield Case(
        f"decode, {sequences} sequences, {total} keys, H {heads}/{kv_heads} D {dim} bf16",
        {name: without_gradient(call) for name, call in calls.items()},
        2 * total * kv_heads * dim * k.element_size(),
        "GB/s",
    )


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    if small:
        for dim in (64, 128, 256):
            yield from training(device, torch.tensor([70, 33]), dim, 4, 2, True, "two rows, T 103")
        yield from decoding(device, torch.tensor([300, 40]), 4, 2, 64)
        return
    for dim, heads in ((64, 32), (128, 16)):  # 16384 tokens of hidden 2048, as the field plots it
        for tokens in (2048, 4096, 8192, 16384):
            lengths = torch.full((16384 // tokens,), tokens)
            for causal in (True, False):
                yield from training(device, lengths, dim, heads, heads, causal, f"{len(lengths)} x {tokens}")
    yield from training(device, torch.full((4,), 4096), 128, 32, 8, True, "4 x 4096")
    yield from training(device, torch.full((4,), 4096), 256, 8, 4, True, "4 x 4096")
    torch.manual_seed(0)  # lognormal lengths of mean 800, at most 2048
    lengths = torch.exp(torch.randn(48) * 0.7 + math.log(800) - 0.245).round().clamp(1, 2048).long()
    yield from training(device, lengths, 128, 32, 8, True, f"48 ragged rows, T {int(lengths.sum())}")
    for sequences, keys in ((1, 8192), (16, 2048), (64, 1024)):
        used = torch.randint(keys // 2, keys * 3 // 2, (sequences,)) if sequences > 1 else torch.tensor([keys])
        yield from decoding(device, used, 32, 8, 128)
