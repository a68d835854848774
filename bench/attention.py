"""attention against torch's scaled_dot_product_attention: training steps, ragged packed rows, decoding from a paged cache.

Training counts the products of the lower triangle alone, forward 2 and backward 5 of 2 T (T + 1) / 2 D H FLOP each, for both sides.
Ragged rows count the real tokens' products: the peer works on the padded batch with is_causal, as a right-padded batch allows.
Decoding counts the bytes of K and V once; the peer gathers each sequence's pages, pads and masks, which is what torch can do with a
paged cache, and a second row gives it the gathered keys for nothing.

The peer is given its best: where torch's bfloat16 product is slow (bench/roof.py), its call makes float32 copies and works on them.
Beside that harder peer stand rows of torch's SDPA on bfloat16 as it is, up to NATIVE_TOKENS: it takes minutes beyond.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench import Options, Row, compare, roof
from enginepost.kernels.attention import attention, paged_attention

HEADS, KV_HEADS = 8, 2
LENGTHS = (1024, 2048, 4096)
DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)
ROWS = 32  # of the ragged batch
DECODES = ((1, 2048), (8, 1024), (32, 512))  # sequences, keys of each on average
PAGE = 16
NATIVE_TOKENS = 1024  # the longest sequence that torch's SDPA is given in bfloat16 where that is slow


def starts(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def ragged(rows: int) -> Tensor:
    """Lognormal lengths of mean 200, at most 512."""
    torch.manual_seed(0)
    sigma = 0.7
    return torch.exp(torch.randn(rows) * sigma + torch.tensor(200.0).log() - sigma**2 / 2).round().clamp(1, 512).long()


def step(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], dout: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """`[B, H, L, D]`, `[B, Hk, L, D]`."""
    return sdpa(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    return torch_attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)


def peer_of(dtype: torch.dtype) -> tuple[str, Callable[..., Tensor]]:
    if dtype == torch.bfloat16 and roof.widening_wins():
        return "torch SDPA, float32 inside", widened
    return "torch SDPA", torch_attention


def run(options: Options) -> Iterator[Row]:
    best = max(roof.gemm(torch.float32), roof.gemm(torch.bfloat16))
    for dtype in DTYPES:
        for dim in DIMS:
            for tokens in LENGTHS:
                lengths = torch.tensor([tokens])
                yield training(dtype, lengths, dim, HEADS, best, options, *peer_of(dtype))
                if dtype == torch.bfloat16 and roof.widening_wins() and tokens <= NATIVE_TOKENS:
                    yield training(dtype, lengths, dim, HEADS, best, options, "torch SDPA in bfloat16", torch_attention)
    for dtype in DTYPES:
        yield training(dtype, ragged(ROWS), 64, HEADS, best, options, *peer_of(dtype))
    for dtype in DTYPES:
        for sequences, keys in DECODES:
            yield from decoding(dtype, sequences, keys, options)


def training(
    dtype: torch.dtype, lengths: Tensor, dim: int, heads: int, best: float, options: Options, name: str,
    function: Callable[..., Tensor],
) -> Row:  # fmt: skip
    """Forward and backward; one sequence of the batch is one row of the padded peer."""
    tokens, rows, longest = int(lengths.sum()), len(lengths), int(lengths.max())
    draw = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(tokens, n, dim, generator=draw).to(dtype) for n in (heads, KV_HEADS, KV_HEADS, heads))
    cu = starts(lengths)
    real = torch.arange(longest) < lengths.unsqueeze(1)

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(rows, longest, *x.shape[1:])
        out[real] = x
        return out.transpose(1, 2)

    wide = tuple(padded(x).requires_grad_() for x in (q, k, v))
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    calls = {
        "ours": step(lambda q, k, v: attention(q, k, v, cu)[0], leaves, dout),
        name if rows == 1 else f"{name}, padded": step(function, wide, padded(dout)),
    }
    flop = 7 * dim * heads * float((lengths * (lengths + 1)).sum())
    shape = f"T={tokens}" if rows == 1 else f"{rows} ragged rows, T={tokens}"
    case = f"step, {name_of(dtype)} {shape} H={heads}/{KV_HEADS} D={dim}"
    return compare(case, calls, work=flop, unit="GFLOP/s", options=options, roof=best)


def decoding(dtype: torch.dtype, sequences: int, keys: int, options: Options) -> Iterator[Row]:
    heads, kv_heads, dim = 14, 2, 64
    draw = torch.Generator().manual_seed(2)
    used = (
        torch.randint(keys // 2, keys * 3 // 2, (sequences,), generator=draw).int()
        if sequences > 1
        else torch.tensor([keys]).int()
    )
    blocks = (int(used.max()) + PAGE - 1) // PAGE
    table = torch.randperm(sequences * blocks, generator=draw).int().view(sequences, blocks)
    k, v = (torch.randn(sequences * blocks, PAGE, kv_heads, dim, generator=draw).to(dtype) for _ in range(2))
    q = torch.randn(sequences, heads, dim, generator=draw).to(dtype)
    mask = (torch.arange(blocks * PAGE) < used.unsqueeze(1)).view(sequences, 1, 1, -1) if sequences > 1 else None
    index = table.long()
    name, function = peer_of(dtype)

    def gathered(x: Tensor) -> Tensor:
        return x[index].flatten(1, 2).transpose(1, 2)

    def peer(keys: Tensor, values: Tensor) -> Tensor:
        return function(q.unsqueeze(2), keys, values, mask, causal=False)

    ready = [gathered(x) for x in (k, v)]
    work = 2 * int(used.sum()) * kv_heads * dim * k.element_size()
    case = f"decode, {name_of(dtype)} S={sequences} keys={int(used.sum())} H={heads}/{kv_heads} D={dim}"
    peers = {
        f"gather + {name}": lambda: peer(gathered(k), gathered(v)),
        f"{name}, keys gathered before": lambda: peer(*ready),
    }
    for label, call in peers.items():
        with torch.no_grad():
            yield compare(
                case,
                {"ours": lambda: paged_attention(q, k, v, table, used), label: call},
                work=work,
                unit="GB/s",
                options=options,
                roof=roof.copy(),
                metric="K, V read",
            )
