"""4-bit weights beside bitsandbytes (its CPU library) and torch's bfloat16 products: dequantise, quantise, few rows, many rows.

Bandwidths count what has to be read and written once: 4.5 bits and two (or four) bytes an element. "layer" rows count the 4.5 bits
of the weight alone, for both sides alike, so a ratio is one of times. The bare product is ours on bfloat16 (kernels/matmul.py).
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from bench import Options, Row, compare, roof
from enginepost.kernels import nf4
from enginepost.kernels.backend import core, to_dlpack
from enginepost.kernels.matmul import mm

OUT, WIDTH = 4096, 4096
BYTES = OUT * WIDTH * 4.5 / 8


def bitsandbytes() -> ModuleType | None:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        return None


def run(options: Options) -> Iterator[Row]:
    torch.manual_seed(0)
    dense = (torch.randn(OUT, WIDTH) / WIDTH**0.5).bfloat16()
    weight = nf4.quantize(dense)
    peer = bitsandbytes()
    packed, state = peer.functional.quantize_4bit(dense, quant_type="nf4") if peer else (None, None)
    yield from formats(dense, weight, peer, packed, state, options)
    for rows in (1, 4, 15, 512):
        x = torch.randn(rows, WIDTH).bfloat16()
        y = torch.empty(rows, OUT, dtype=torch.bfloat16)
        calls: dict[str, Callable[[], object]] = {"ours": times(x, weight, y)}
        peers = {"torch bf16": lambda x=x: x @ dense.T} if rows < 512 else {}
        peers["bare product"] = lambda x=x, y=y: mm(x, dense.t(), out=y)
        if peer and rows < 512:
            peers["bitsandbytes"] = lambda x=x: peer.matmul_4bit(x, packed.t(), state)
        for name, call in peers.items():
            yield layer(f"layer T={rows} {WIDTH} -> {OUT}, bfloat16", calls | {name: call}, options)
        if rows in (1, 512):
            double = {"ours": times(x, nf4.nest(weight), y), "plain NF4": calls["ours"]}
            yield layer(f"layer T={rows}, double quantisation", double, options)
    dy, dx = torch.randn(512, OUT).bfloat16(), torch.empty(512, WIDTH, dtype=torch.bfloat16)
    back = {"ours": lambda: nf4.nf4_mm(dy, weight, dx, transposed=True), "bare product": lambda: mm(dy, dense, out=dx)}
    yield layer("gradient of the input, T=512", back, options)


def times(x: Tensor, weight: nf4.NF4Weight, y: Tensor) -> Callable[[], object]:
    return lambda: nf4.nf4_mm(x, weight, y)


def layer(case: str, calls: dict[str, Callable[[], object]], options: Options) -> Row:
    return compare(case, calls, work=BYTES, unit="GB/s", options=options, roof=roof.copy(), metric="weights read")


def formats(
    dense: Tensor,
    weight: nf4.NF4Weight,
    peer: ModuleType | None,
    packed: Tensor | None,
    state: object,
    options: Options,
) -> Iterator[Row]:
    """Quantise and dequantise, into buffers that exist (bitsandbytes makes its own)."""
    codes, absmax = torch.empty_like(weight.packed), torch.empty_like(weight.absmax)
    for dtype in (torch.bfloat16, torch.float32):
        x, out = dense.to(dtype), torch.empty(OUT, WIDTH, dtype=dtype)
        work = BYTES + x.nbytes
        theirs = {"bitsandbytes": lambda: peer.functional.dequantize_4bit(packed, state)} if peer else {}
        down: dict[str, Callable[[], object]] = {
            "ours": lambda out=out: core().nf4_dequantize(*weight.arguments(), to_dlpack(out.view(-1)))
        }
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16:
            down |= theirs
        yield compare(f"dequantise to {name}", down, work=work, unit="GB/s", options=options, roof=roof.copy())
        up: dict[str, Callable[[], object]] = {
            "ours": lambda x=x: core().nf4_quantize(
                to_dlpack(x.view(-1)), to_dlpack(codes), to_dlpack(absmax), weight.blocksize, 0
            )
        }
        if peer and dtype == torch.bfloat16:
            up["bitsandbytes"] = lambda x=x: peer.functional.quantize_4bit(x, quant_type="nf4")
        yield compare(f"quantise {name}", up, work=work, unit="GB/s", options=options, roof=roof.copy())
