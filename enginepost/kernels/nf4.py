"""Weights in 4 bits (NF4, FP4), double quantisation, and blockwise 8-bit numbers, to the bit as bitsandbytes has them.

A tensor is quantised flat (row-major), in blocks of `blocksize` elements:

    absmax_b = max |x| over block b
    code_i   = number of thresholds below x_i * (1 / max(absmax_b, 1e-38))        thresholds: midpoints of the sorted codebook
    x_i     ~= codebook[code_i] * absmax_b                                        in float32, rounded once

A short last block divides by its absmax instead, and stores the clamped one. Two codes share a byte, element 2i in the high
nibble. With double quantisation the scales are numbers of 8 bits themselves, around their mean:

    offset = mean(absmax)        q_b = nearest dynamic code to (absmax_b - offset) / nested_absmax, in blocks of 256
    absmax_b ~= code[q_b] * nested_absmax[b / 256] + offset

The rules are those of bitsandbytes' default backend (bitsandbytes/backends/default/ops.py), which its CUDA kernels share for NF4
and for 8 bits. Two of its kernels differ from it in details: its CPU library looks 8-bit codes up in a table of 65,536 steps, so
that a value close to a midpoint, or to zero, can get a neighbouring code; and CUDA's FP4 thresholds are decimal literals, some an
ulp from the midpoints, and its code of a tiny value carries the value's sign.

Sources: Dettmers et al. 2023 (QLoRA, arXiv 2305.14314); Dettmers 2016 (the dynamic 8-bit code, arXiv 1511.04561).
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from enginepost.kernels.backend import GPU_FLOATS, core, emulating, native, to_dlpack

TYPES = ("nf4", "fp4")
NESTED_BLOCK = 256  # scales that share a nested scale
_BLOCKSIZES = tuple(2**n for n in range(5, 13))

_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # over 12; then the same, negative
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # codes by value


@dataclass
class NF4Weight:
    """A matrix in 4 bits: what `quantize` makes, what `lora_linear` takes for a weight, what a `*-bnb-4bit` checkpoint holds.

    packed: uint8 `[ceil(N / 2)]`; absmax: float32 `[ceil(N / blocksize)]`, or uint8 with nested_absmax float32
    `[ceil(blocks / 256)]`, nested_code float32 `[256]` and offset; shape: of the matrix; dtype: that it had, and is given back in.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    blocksize: int = 64
    quant_type: str = "nf4"
    dtype: torch.dtype = torch.bfloat16
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        _check_format(self.blocksize, self.quant_type)
        size, blocks = self.numel, -(-self.numel // self.blocksize)
        nested = self.absmax.dtype == torch.uint8
        wanted = [("packed", self.packed, torch.uint8, (size + 1) // 2)]
        wanted.append(("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks))
        if nested != (self.nested_absmax is not None) or nested != (self.nested_code is not None):
            raise ValueError("NF4Weight: nested_absmax and nested_code belong to a uint8 absmax, and to no other")
        if self.nested_absmax is not None and self.nested_code is not None:
            wanted.append(("nested_absmax", self.nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK)))
            wanted.append(("nested_code", self.nested_code, torch.float32, 256))
        for name, tensor, dtype, count in wanted:
            if tensor.dtype != dtype or tensor.dim() != 1 or tensor.numel() != count:
                raise ValueError(
                    f"NF4Weight: a weight {list(self.shape)} in blocks of {self.blocksize} takes {name} {dtype} [{count}], got "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """float32 `[ceil(N / blocksize)]`: the scale of every block, the nested ones decoded."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        return dequantize_blockwise(
            self.absmax, self.nested_absmax, self.nested_code, blocksize=NESTED_BLOCK, offset=self.offset
        )

    def float_scales(self) -> Tensor:
        """The tensor of scales that is float32: that of the nested ones where there are."""
        return self.absmax if self.nested_absmax is None else self.nested_absmax

    def arguments(self) -> tuple[object, ...]:
        """The weight as the native kernels take it."""
        optional = [None if t is None else to_dlpack(t) for t in (self.nested_absmax, self.nested_code)]
        return (
            to_dlpack(self.packed), to_dlpack(self.absmax), *optional, self.offset, self.blocksize,
            TYPES.index(self.quant_type),
        )  # fmt: skip


@functools.cache
def codebook(quant_type: str) -> Tensor:
    """float32 `[16]`: the value of each code at scale 1."""
    if quant_type == "nf4":
        return torch.tensor(_NF4)
    return torch.tensor([*_FP4, *(-v for v in _FP4)]).div_(12.0) + 0.0  # + 0: no negative zero


@functools.cache
def dynamic_code(signed: bool = True) -> Tensor:
    """float32 `[256]`: the dynamic 8-bit code, ascending, in [-1, 1] or [0, 1].

    Each power of ten from 1e-6 has twice as many evenly spaced values as the one below it. Its last bits depend on the arithmetic
    it is made with, so the native library holds it as literals; without the library it is made here, as bitsandbytes makes it.
    """
    if _has_native():
        return torch.tensor(core().dynamic_code(signed), dtype=torch.float32)
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (0 if signed else 1)) + 1, dtype=torch.float32)
        means = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist()
        if signed:
            values += (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def _has_native() -> bool:
    return native(gpu=GPU_FLOATS)


def _check_format(blocksize: int, quant_type: str = "nf4") -> None:
    if blocksize not in _BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {', '.join(map(str, _BLOCKSIZES))}, got {blocksize}")
    if quant_type not in TYPES:
        raise ValueError(f"quant_type must be nf4 or fp4, got {quant_type!r}")


def _check_float(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"float32, bfloat16 or float16 can be quantised, got {x.dtype}")


def _flat(x: Tensor) -> Tensor:
    """One dimension, of a dtype that the kernels of its device take (float16 widens without loss)."""
    x = x.detach().reshape(-1)
    return x.float() if x.dtype == torch.float16 and not _on_gpu(x) else x


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda or emulating()


def _scaled(x: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x over the scale of its block, and the scales."""
    x = x.float()
    full = x.numel() // blocksize * blocksize
    absmax = x[:full].view(-1, blocksize).abs().amax(dim=1) if full else x.new_empty(0)
    parts = [(x[:full].view(-1, blocksize) * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).view(-1)]
    if full < x.numel():
        last = x[full:].abs().max().clamp(min=1e-38).view(1)
        absmax = torch.cat([absmax, last])
        parts.append(x[full:] / last)
    return torch.cat(parts), absmax


def reference_quantize(x: Tensor, blocksize: int = 64, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    """(packed, absmax) in plain PyTorch."""
    values = codebook(quant_type).to(x.device)
    order = torch.tensor(_FP4_ORDER, device=x.device) if quant_type == "fp4" else torch.arange(16, device=x.device)
    scaled, absmax = _scaled(_flat(x), blocksize)
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    code = order[torch.bucketize(scaled, (values[order[:-1]] + values[order[1:]]) / 2)].to(torch.uint8)
    return code[::2] << 4 | code[1::2], absmax


def reference_dequantize(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as numbers, in plain PyTorch."""
    code = torch.stack([w.packed >> 4, w.packed & 15], dim=1).view(-1)[: w.numel]
    scale = w.scales().repeat_interleave(w.blocksize)[: w.numel]
    return (codebook(w.quant_type).to(code.device)[code.long()] * scale).to(dtype or w.dtype).view(w.shape)


def quantize(x: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double: bool = False) -> NF4Weight:
    """Quantise to 4 bits.

    Args:
        x: any shape, float32, bfloat16 or float16.
        blocksize: elements that share a scale: a power of two, 32 to 4096.
        quant_type: "nf4" (quantiles of a normal distribution) or "fp4" (a float of 4 bits).
        double: the scales in 8 bits too; 4.13 bits an element instead of 4.5 at the default blocksize.
    Returns:
        An `NF4Weight` of x's shape and dtype.
    Raises:
        ValueError: another dtype, blocksize or quant_type.

    >>> w = quantize(torch.tensor([[0.5, -1.0, 0.1, 0.0]]))
    >>> dequantize(w)
    tensor([[ 0.4407, -1.0000,  0.0796,  0.0000]])
    """
    _check_format(blocksize, quant_type)
    _check_float(x)
    flat = _flat(x)
    if native(flat, gpu=GPU_FLOATS):
        packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=x.device)
        core().nf4_quantize(to_dlpack(flat), to_dlpack(packed), to_dlpack(absmax), blocksize, TYPES.index(quant_type))
    else:
        packed, absmax = reference_quantize(flat, blocksize, quant_type)
    weight = NF4Weight(packed, absmax, tuple(x.shape), blocksize, quant_type, x.dtype)
    return nest(weight) if double else weight


def nest(weight: NF4Weight) -> NF4Weight:
    """The same weight with its scales in 8 bits (double quantisation)."""
    if weight.nested or weight.numel == 0:
        return weight
    offset = weight.absmax.mean()
    code, nested_absmax = quantize_blockwise(weight.absmax - offset, blocksize=NESTED_BLOCK)
    return NF4Weight(weight.packed, code, weight.shape, weight.blocksize, weight.quant_type, weight.dtype,
                     nested_absmax, dynamic_code().to(code.device), offset.item())  # fmt: skip


def dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as numbers: its shape, in `dtype` (float32, bfloat16 or float16; default: the dtype it was quantised from)."""
    dtype = dtype or weight.dtype
    wide = torch.float32 if dtype == torch.float16 and not _on_gpu(weight.packed) else dtype
    if not native(weight.float_scales(), gpu=GPU_FLOATS) or wide not in GPU_FLOATS:
        return reference_dequantize(weight, dtype)
    out = torch.empty(weight.shape, dtype=wide, device=weight.packed.device)
    core().nf4_dequantize(*weight.arguments(), to_dlpack(out.view(-1)))
    return out.to(dtype)


def quantize_blockwise(x: Tensor, *, blocksize: int = 4096, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantise to 8 bits with the dynamic code.

    Args: x of any shape, float32, bfloat16 or float16; blocksize: a power of two, 32 to 4096; signed: the code for [-1, 1], else
        that for [0, 1], where negative numbers become 0.
    Returns: (codes uint8 of x's shape, absmax float32 `[ceil(N / blocksize)]`).

    >>> codes, absmax = quantize_blockwise(torch.tensor([1.0, -0.5, 0.0]))
    >>> dequantize_blockwise(codes, absmax, dynamic_code(), blocksize=4096)
    tensor([ 1.0000, -0.5008,  0.0000])
    """
    _check_format(blocksize)
    _check_float(x)
    flat = _flat(x)
    if native(flat, gpu=GPU_FLOATS):
        q = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
        absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=x.device)
        core().blockwise8_quantize(to_dlpack(flat), to_dlpack(q), to_dlpack(absmax), blocksize, signed)
        return q.view(x.shape), absmax
    code = dynamic_code(signed).to(x.device)
    scaled, absmax = _scaled(flat, blocksize)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8).view(x.shape), absmax


def dequantize_blockwise(
    q: Tensor, absmax: Tensor, code: Tensor, *, blocksize: int, offset: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code[q] * absmax of its block + offset, in q's shape.

    Args: q uint8; absmax float32 `[ceil(N / blocksize)]`; code float32 `[256]`; blocksize: a power of two, 32 to 4096.
    """
    _check_format(blocksize)
    flat = q.reshape(-1)
    if native(absmax, code, gpu=GPU_FLOATS) and dtype in (GPU_FLOATS if _on_gpu(q) else GPU_FLOATS[:2]):
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        core().blockwise8_dequantize(
            to_dlpack(flat), to_dlpack(absmax), to_dlpack(code), to_dlpack(out.view(-1)), blocksize, offset
        )
        return out
    out = code[flat.long()] * absmax.repeat_interleave(blocksize)[: flat.numel()]
    return (out + offset).to(dtype).view(q.shape)


def nf4_mm(
    a: Tensor, weight: NF4Weight, out: Tensor, *, transposed: bool = False, a2: Tensor | None = None,
    b2: Tensor | None = None, accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """`out = a weight^T + a2 b2`, or `a weight + a2 b2` when `transposed`; added to out when `accumulate`. No autograd.

    Args: a `[M, in]` (or `[M, out]`), a2 `[M, r]`, b2 `[r, columns of out]`, out with contiguous rows: float32 or bfloat16 in
        any mix (on a GPU float16 too); weight: a matrix `[out, in]`. On a CPU it is decoded in panels, or element by element below
        16 rows, never as a whole. On a GPU it is rounded to a's dtype: up to 64 rows on its way to the product, else as a whole into
        a buffer that the next call reuses.
    """
    if native(a, out, a2, b2, weight.float_scales(), gpu=GPU_FLOATS):
        core().nf4_matmul(
            to_dlpack(a.detach()), *weight.arguments(), *weight.shape, transposed, None if a2 is None else to_dlpack(a2.detach()),
            None if b2 is None else to_dlpack(b2.detach()), to_dlpack(out), accumulate,
        )  # fmt: skip
        return out
    wide = torch.promote_types(torch.promote_types(a.dtype, out.dtype), torch.float32)
    w = reference_dequantize(weight, wide)
    product = a.to(wide) @ (w if transposed else w.T)
    if a2 is not None and b2 is not None:
        product += a2.to(wide) @ b2.to(wide)
    return out.add_(product) if accumulate else out.copy_(product)


def row_squares(weight: NF4Weight) -> Tensor:
    """float32 `[out]`: the squared length of each row of a matrix, decoded a few rows at a time."""
    rows, columns = weight.shape
    whole = weight.blocksize // math.gcd(weight.blocksize, columns) * 2  # rows that fill blocks, and bytes
    step = max(1, (1 << 20) // max(1, columns * whole)) * whole
    scales = weight.scales()
    out = torch.empty(rows, dtype=torch.float32, device=weight.packed.device)
    for row in range(0, rows, step):
        stop = min(rows, row + step)
        first, last = row * columns, stop * columns
        part = NF4Weight(
            weight.packed[first // 2 : (last + 1) // 2], scales[first // weight.blocksize : -(-last // weight.blocksize)],
            (stop - row, columns), weight.blocksize, weight.quant_type, torch.float32,
        )  # fmt: skip
        out[row:stop] = dequantize(part).square_().sum(1)
    return out
