"""A linear layer with low-rank updates: y = x W^T + b + sum over parts of s (x A^T) B^T, in one pass over y.

A fused projection (q|k|v, gate|up) has one part per original matrix; part p adds to columns start .. start + n of y. With all A's
stacked to A* [R, in], their scalings inside, and the B's on the diagonal blocks of B* [out, R]:

    S = x A*^T        y = x W^T + S B*^T + b
    dS_p = dy_p B_p   dB_p = dy_p^T S_p   dA* = dS^T x   dx = dy W + dS A*   dW = dy^T x   db = sum dy

Kept for the backward: x, S (R numbers a token) and the parameters. Products are float32 inside, whatever the dtypes, so float32
A and B train beside bfloat16 activations without a copy of either. Dropout masks the x of the update alone; the mask is a hash of
(seed, token, feature), made again in the backward.

DoRA, with magnitude m: those columns of x W^T + S B*^T are multiplied by m / |W + s B A|_row, the norm a constant for the gradient.
The norm needs no [n, in] buffer: |W + s B A|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B).

A frozen W may be an `NF4Weight` (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): both products with it then decode it panel by panel
as they multiply (csrc/cpu/matmul.cpp), and its numbers, code * scale in float32, are not rounded to x's dtype on the way. A fused
projection whose matrices were quantised one by one is a tuple of them, rows below rows; one of them may be a plain matrix.

Sources: Hu et al. 2021 (LoRA, arXiv 2106.09685), eq. 3; Liu et al. 2024 (DoRA, arXiv 2402.09353), eq. 5 and section 4.3.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from enginepost.kernels.arrays import make_callable, takes_arrays
from enginepost.kernels.backend import GPU_FLOATS, core, eager, native, plain, to_dlpack
from enginepost.kernels.matmul import mm
from enginepost.kernels.nf4 import NF4Weight, nf4_mm, reference_dequantize, row_squares

Matrix = Tensor | NF4Weight
Weight = Matrix | tuple[Matrix, ...]  # a tuple: frozen matrices with the same columns, rows below rows


@dataclass
class LoraPart:
    """One low-rank update. A `[r, in]`, B `[n, r]`: float32 or the layer's dtype; it adds scaling * (x A^T) B^T to columns
    start .. start + n of the layer. magnitude `[n]` makes it DoRA."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    start: int = 0
    magnitude: Tensor | None = None

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.B.shape[0])


def reference(
    x: Tensor, weight: Weight, bias: Tensor | None = None, parts: Sequence[LoraPart] = (), *, dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """The same in plain PyTorch, at float32 or better, part by part; for DoRA the adapted weight is built."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xw = x.to(wide)
    w = torch.cat([reference_dequantize(m, wide) if isinstance(m, NF4Weight) else m.to(wide) for m in matrices(weight)])
    masked = (
        torch.where(keep_mask(x.shape[0], x.shape[1], dropout, seed, x.device), xw / (1 - dropout), 0.0)
        if dropout
        else xw
    )
    base = xw @ w.T
    columns = list(base.split(1, dim=1)) if base.numel() else []
    for p in parts:
        a, b = p.A.to(wide), p.B.to(wide)
        update = p.scaling * (masked @ a.T @ b.T)
        if p.magnitude is not None:
            adapted = (w[p.columns] + p.scaling * (b @ a)).detach()
            gain = p.magnitude.to(wide) / adapted.norm(dim=1)
            update = (gain - 1) * (masked @ w[p.columns].T) + gain * update
        for j in range(update.shape[1] if columns else 0):
            columns[p.start + j] = columns[p.start + j] + update[:, j : j + 1]
    y = torch.cat(columns, dim=1) if columns else base
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@takes_arrays
def lora_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, parts: Sequence[LoraPart] = (), *, dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """Linear layer with low-rank updates.

    Args:
        x: `[T, in]`, float32, bfloat16 (or float64).
        weight: `[out, in]`, frozen or trained, or a frozen `NF4Weight`, or a tuple of frozen ones that lie one below the other;
        bias: `[out]` or None.
        parts: updates of disjoint column ranges, see `LoraPart`; none for a plain linear layer.
        dropout: share of the update's inputs set to zero (training only: pass 0 otherwise).
        seed: of the mask. The same seed gives the same mask, so pass another for every layer and step.

    Returns: `[T, out]` in x's dtype. Gradients flow to x and to whichever of weight, bias, A, B, magnitude ask for
    them, each in its own dtype. Raises ValueError that names the argument at fault.

    Sources: Hu et al. 2021 (LoRA, arXiv 2106.09685), eq. 3; Liu et al. 2024 (DoRA, arXiv 2402.09353), eq. 5.

    >>> x, weight = torch.randn(4, 32), torch.randn(48, 32)
    >>> part = LoraPart(A=torch.randn(8, 32), B=torch.randn(48, 8), scaling=0.5)
    >>> y = lora_linear(x, weight, parts=[part])
    >>> torch.allclose(y, x @ weight.T + 0.5 * (x @ part.A.T) @ part.B.T, atol=1e-4)
    True
    """
    _check(x, weight, bias, parts, dropout)
    if os.environ.get("ENGINEPOST_BACKEND") == "reference":
        return reference(x, weight, bias, parts, dropout=dropout, seed=seed)
    if any(p.magnitude is not None for p in parts):
        return _dora(x, weight, bias, parts, dropout, seed)
    return _linear(x, weight, bias, parts, dropout, seed)


def matrices(weight: Weight) -> tuple[Matrix, ...]:
    """The matrices of a weight, from its first row to its last."""
    return weight if isinstance(weight, tuple) else (weight,)


def weight_shape(weight: Weight) -> tuple[int, int]:
    """(out, in) of a weight, whatever it is made of."""
    found = matrices(weight)
    return sum(m.shape[0] for m in found), found[0].shape[1]


def keep_mask(rows: int, width: int, dropout: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """bool `[rows, width]`, true with probability 1 - dropout; each element depends on (seed, row, column) alone, on any device."""
    key = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (2**64 - 1)
    low, high = key & 0xFFFFFFFF, key >> 32
    lines = _mix(torch.arange(rows, dtype=torch.int64, device=device) * 0x9E3779B1 + low).unsqueeze(1)
    bits = _mix(lines + (torch.arange(width, dtype=torch.int64, device=device) * 0x85EBCA77 + high).unsqueeze(0))
    return bits >= int(dropout * 2**31)


def _mix(x: Tensor) -> Tensor:
    """A 31-bit hash of every element (the finalizer of MurmurHash3, with the multiplications cut to 31 bits)."""
    x = x.to(torch.int32)  # wraps
    x = (x ^ ((x >> 16) & 0xFFFF)) * -0x7A143595
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return (x ^ ((x >> 16) & 0xFFFF)) & 0x7FFFFFFF


def _check(x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[LoraPart], dropout: float) -> None:
    if not matrices(weight):
        raise ValueError("lora_linear: weight is an empty tuple; expected at least one matrix")
    for m in matrices(weight):
        if x.dim() != 2 or len(m.shape) != 2 or x.shape[1] != m.shape[1]:
            raise ValueError(
                f"lora_linear: x must be [T, in] and weight [out, in], got {list(x.shape)} and {list(m.shape)}"
            )
        if isinstance(weight, tuple) and isinstance(m, Tensor) and m.requires_grad:
            raise ValueError("lora_linear: a weight given as a tuple of matrices must be frozen")
    out = weight_shape(weight)[0]
    if bias is not None and list(bias.shape) != [out]:
        raise ValueError(f"lora_linear: bias must be [{out}], got {list(bias.shape)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout must be in [0, 1), got {dropout}")
    taken = 0
    for i, p in enumerate(sorted(parts, key=lambda p: p.start)):
        n = p.B.shape[0]
        if p.A.dim() != 2 or p.B.dim() != 2 or p.A.shape[1] != x.shape[1] or p.B.shape[1] != p.A.shape[0]:
            raise ValueError(
                f"lora_linear: part {i} must have A [r, {x.shape[1]}] and B [n, r], got {list(p.A.shape)} and {list(p.B.shape)}"
            )
        if p.start < taken or p.start + n > out:
            raise ValueError(
                f"lora_linear: part {i} covers columns {p.start} to {p.start + n}, but only {taken} to {out} are "
                f"free; parts may not overlap"
            )
        if p.magnitude is not None and list(p.magnitude.shape) != [n]:
            raise ValueError(
                f"lora_linear: part {i} must have a magnitude of shape [{n}], got {list(p.magnitude.shape)}"
            )
        taken = p.start + n


def _linear(
    x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[LoraPart], dropout: float, seed: int,
    unrounded: bool = False,
) -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    if parts:
        stacked = torch.cat([p.A.to(wide) * p.scaling for p in parts])
    else:
        stacked, dropout = torch.empty(0, x.shape[1], dtype=wide, device=x.device), 0.0
    b, starts = [p.B for p in parts], [p.start for p in parts]
    tensors, form = _taken_apart(weight)
    if plain(x, *tensors, bias, stacked, *b):
        return _forward(x, weight, bias, stacked, b, starts, dropout, seed, unrounded)[0]
    if eager():
        y: Tensor = _Eager.apply(x, bias, stacked, form, starts, dropout, seed, unrounded, len(tensors), *tensors, *b)
        return y
    return torch.ops.enginepost.lora_linear(x, tensors, form, bias, stacked, b, starts, dropout, seed, unrounded)[0]


def _taken_apart(weight: Weight) -> tuple[list[Tensor], str]:
    """The weight as arguments of a torch op: its tensors, and what else there is to it ("" for one plain matrix)."""
    if isinstance(weight, Tensor):
        return [weight], ""
    tensors: list[Tensor] = []
    forms = []
    for m in matrices(weight):
        if isinstance(m, Tensor):
            tensors.append(m)
            forms.append("plain")
        else:
            nested = [t for t in (m.nested_absmax, m.nested_code) if t is not None]
            tensors += [m.packed, m.absmax, *nested]
            forms.append(f"{2 + len(nested)} {m.shape[0]} {m.shape[1]} {m.blocksize} {m.quant_type} {m.offset!r}")
    return tensors, ";".join(forms)


def _put_together(tensors: Sequence[Tensor], form: str) -> Weight:
    if not form:
        return tensors[0]
    found: list[Matrix] = []
    at = 0
    for said in form.split(";"):
        if said == "plain":
            found.append(tensors[at])
            at += 1
            continue
        count, rows, columns, blocksize, kind, offset = said.split()
        packed, absmax, *nested = tensors[at : at + int(count)]
        code = (nested[0], nested[1], float(offset)) if nested else (None, None, 0.0)
        found.append(NF4Weight(packed, absmax, (int(rows), int(columns)), int(blocksize), kind, torch.float32, *code))
        at += int(count)
    return tuple(found)


def _times(
    a: Tensor, weight: Weight, out: Tensor, transposed: bool, a2: Tensor | None = None, b2: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """out = a W^T + a2 b2, or a W + a2 b2 when transposed; added to out when accumulate."""
    found = matrices(weight)
    if len(found) == 1:
        return _product(a, found[0], out, transposed, a2, b2, accumulate)
    # Transposed, the matrices add up: in float32, rounded once.
    total = out if not transposed or out.dtype == a.dtype == torch.float32 else None
    if total is None:
        total = out.float() if accumulate else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    row = 0
    for i, m in enumerate(found):
        rows = slice(row, row + m.shape[0])
        if transposed:
            _product(a[:, rows], m, total, True, a2 if i == 0 else None, b2 if i == 0 else None, accumulate or i > 0)
        else:
            _product(a, m, total[:, rows], False, a2, None if b2 is None else b2[:, rows], accumulate)
        row = rows.stop
    return out if total is out else out.copy_(total)


def _product(
    a: Tensor, m: Matrix, out: Tensor, transposed: bool, a2: Tensor | None, b2: Tensor | None, accumulate: bool
) -> Tensor:
    if isinstance(m, NF4Weight):
        return nf4_mm(a, m, out, transposed=transposed, a2=a2, b2=b2, accumulate=accumulate)
    return mm(a, m if transposed else m.t(), out=out, a2=a2, b2=b2, accumulate=accumulate)


def _dora(
    x: Tensor, weight: Weight, bias: Tensor | None, parts: Sequence[LoraPart], dropout: float, seed: int
) -> Tensor:
    """y = gain * (x' W^T + S B*^T) + (x - x') W^T + b with x' the masked x, after PEFT: without dropout x' = x.

    Products stay in float32 until the gain has been applied, and so does the gradient until it meets S: a gradient of A or B must
    not carry the rounding of dy * gain to bfloat16.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    gains, end = [], 0
    for p in sorted(parts, key=lambda p: p.start):
        gains.append(torch.ones(p.start - end, dtype=wide, device=x.device))
        if p.magnitude is None:
            gains.append(torch.ones(p.B.shape[0], dtype=wide, device=x.device))
        else:
            gains.append(p.magnitude.to(wide) / row_norm(weight, p))
        end = p.start + p.B.shape[0]
    gain = torch.cat([*gains, torch.ones(weight_shape(weight)[0] - end, dtype=wide, device=x.device)])
    masked = torch.ops.enginepost.lora_dropout(x, dropout, seed) if dropout else x
    y = _linear(masked, weight, None, parts, 0.0, seed, unrounded=True) * gain
    if dropout:
        y = y + _linear(x - masked, weight, None, (), 0.0, seed)
    return (y if bias is None else y + bias).to(x.dtype)


@torch.no_grad()
def row_norm(weight: Weight, part: LoraPart) -> Tensor:
    """|W + scaling B A| of each row that the part covers, `[n]` in float32 (float64 for float64)."""
    if isinstance(weight, Tensor):
        wide = torch.promote_types(weight.dtype, torch.float32)
        w, a, b = weight[part.columns], part.A.to(wide), part.B.to(wide)
        wa = mm(w, a.T, out=torch.empty(b.shape, dtype=wide, device=w.device))
        square = torch.linalg.vector_norm(w, dim=1, dtype=wide).square_()
    else:
        wide = torch.promote_types(part.A.dtype, torch.float32)
        a, b = part.A.to(wide), part.B.to(wide)
        covered = _covering(weight, part)
        rows = slice(part.start - covered[1], part.start - covered[1] + len(b))
        height = weight_shape(covered[0])[0]
        wa = _times(a, covered[0], torch.empty(len(a), height, dtype=wide, device=a.device), False).t()[rows]
        square = torch.cat([_row_squares(m).to(wide) for m in covered[0]])[rows]
    square += 2 * part.scaling * (wa * b).sum(1)
    square += part.scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    return square.clamp_(min=0).sqrt_()


def _covering(weight: Weight, part: LoraPart) -> tuple[tuple[Matrix, ...], int]:
    """The matrices that hold the rows of a part, and the row at which the first of them begins."""
    found: list[Matrix] = []
    row = first = 0
    for m in matrices(weight):
        if row + m.shape[0] > part.columns.start and row < part.columns.stop:
            first = first if found else row
            found.append(m)
        row += m.shape[0]
    return tuple(found), first


def _row_squares(m: Matrix) -> Tensor:
    if isinstance(m, NF4Weight):
        return row_squares(m)
    return torch.linalg.vector_norm(m, dim=1, dtype=torch.promote_types(m.dtype, torch.float32)).square_()


def _dropped(x: Tensor, dropout: float, seed: int, out: Tensor | None = None) -> Tensor:
    """x / (1 - dropout) where `keep_mask` keeps, else 0, in x's dtype; into out, which may be x."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if native(x, gpu=GPU_FLOATS):
        core().lora_dropout(to_dlpack(_lines(x.detach())), to_dlpack(out), dropout, seed & (2**64 - 1))
        return out
    mask = keep_mask(x.shape[0], x.shape[1], dropout, seed, x.device)
    return out.copy_(torch.where(mask, x * (1 / (1 - dropout)), 0.0))


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def _forward(
    x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Sequence[Tensor], starts: Sequence[int],
    dropout: float, seed: int, unrounded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y `[T, out]`, in float32 when `unrounded`, S `[T, R]`)."""
    x, rows, out = _lines(x), x.shape[0], weight_shape(weight)[0]
    s = torch.empty(rows, a.shape[0], dtype=a.dtype, device=x.device)
    y = torch.empty(rows, out, dtype=a.dtype if unrounded else x.dtype, device=x.device)
    if bias is not None:
        y.copy_(bias)
    if a.shape[0] == 0:
        return _times(x, weight, y, False, accumulate=bias is not None), s
    mm(_dropped(x, dropout, seed) if dropout else x, a.t(), out=s)
    if len(b) == 1 and b[0].shape[0] == out:
        block = b[0]
    else:
        block = torch.zeros(out, a.shape[0], dtype=b[0].dtype, device=x.device)
        at = 0
        for part, start in zip(b, starts, strict=True):
            block[start : start + part.shape[0], at : at + part.shape[1]] = part
            at += part.shape[1]
    return _times(x, weight, y, False, s, block.t(), accumulate=bias is not None), s


def _backward(
    dy: Tensor, x: Tensor, weight: Weight, s: Tensor, a: Tensor, b: Sequence[Tensor], starts: Sequence[int],
    dropout: float, seed: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, A*, then each B; an empty tensor where `needs` (of x, weight, bias, A*, any B) says no."""
    x, dy = _lines(x), _lines(dy)
    wide = a.dtype
    dx, dweight, dbias, da = (x.new_empty(0) for _ in range(4))  # apart: outputs of an op may not alias
    db = []
    ds = torch.empty_like(s)
    at = 0
    for part, start in zip(b, starts, strict=True):
        here, rank = dy[:, start : start + part.shape[0]], part.shape[1]
        if needs[0] or needs[3]:
            ds[:, at : at + rank] = mm(here, part, out=torch.empty(len(dy), rank, dtype=wide, device=x.device))
        db.append(mm(here.t(), s[:, at : at + rank], out=torch.empty_like(part)) if needs[4] else x.new_empty(0))
        at += rank
    if needs[0]:
        dx = torch.empty_like(x)
        if len(b) == 0:
            _times(dy, weight, dx, True)
        elif dropout == 0:
            _times(dy, weight, dx, True, ds, a)
        elif isinstance(weight, Tensor):
            mm(dy, weight, out=dx)
            update = mm(ds, a)
            dx += _dropped(update, dropout, seed, out=update).to(dx.dtype)
            del update
        else:
            update = mm(ds, a)
            dx.copy_(_times(dy, weight, _dropped(update, dropout, seed, out=update), True, accumulate=True))
            del update
    if needs[1]:
        assert isinstance(weight, Tensor)
        dweight = mm(dy.t(), x, out=torch.empty_like(weight))
    if needs[2]:
        dbias = dy.sum(0, dtype=wide)
    if needs[3]:
        masked = _dropped(x, dropout, seed) if dropout else x
        # [in, R] rather than its transpose: the long side is the one that threads share
        da = mm(masked.t(), ds, out=torch.empty(x.shape[1], a.shape[0], dtype=wide, device=x.device)).t().contiguous()
    return [dx, dweight, dbias, da, *db]


class _Eager(torch.autograd.Function):
    """The op below without torch's dispatcher, which spends on its lists of tensors as long as a small product takes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, form: str, starts: Sequence[int], dropout: float, seed: int,
        unrounded: bool, tensors: int, *rest: Tensor,
    ) -> Tensor:  # fmt: skip
        weight, b = rest[:tensors], rest[tensors:]
        y, s = _forward(x, _put_together(weight, form), bias, a, b, starts, dropout, seed, unrounded)
        ctx.settings, ctx.bias_dtype = (form, starts, dropout, seed, tensors), None if bias is None else bias.dtype
        ctx.save_for_backward(x, s, a, *rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, a, *rest = ctx.saved_tensors
        form, starts, dropout, seed, tensors = ctx.settings
        wants_x, wants_bias, wants_a = ctx.needs_input_grad[:3]
        wants_weight, wants_b = ctx.needs_input_grad[9], ctx.needs_input_grad[9 + tensors :]
        dx, dweight, dbias, da, *db = _backward(
            dy, x, _put_together(rest[:tensors], form), s, a, rest[tensors:], starts, dropout, seed,
            [wants_x, wants_weight, wants_bias, wants_a, any(wants_b)],
        )  # fmt: skip
        return (
            dx if wants_x else None, dbias.to(ctx.bias_dtype) if wants_bias else None, da if wants_a else None, *(None,) * 6,
            dweight if wants_weight else None, *(None,) * (tensors - 1),
            *(g if want else None for g, want in zip(db, wants_b, strict=True)),
        )  # fmt: skip


@torch.library.custom_op("enginepost::lora_dropout", mutates_args=())
def _dropout_op(x: Tensor, dropout: float, seed: int) -> Tensor:
    return _dropped(x, dropout, seed)


@_dropout_op.register_fake
def _(x: Tensor, dropout: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def _dropout_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dropout, ctx.seed = inputs[1:]


def _dropout_grad(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.enginepost.lora_dropout(dy, ctx.dropout, ctx.seed), None, None


_dropout_op.register_autograd(_dropout_grad, setup_context=_dropout_setup)


@torch.library.custom_op("enginepost::lora_linear", mutates_args=())
def _linear_op(
    x: Tensor, weight: list[Tensor], form: str, bias: Tensor | None, a: Tensor, b: list[Tensor], starts: list[int],
    dropout: float, seed: int, unrounded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(x, _put_together(weight, form), bias, a, b, starts, dropout, seed, unrounded)


@_linear_op.register_fake
def _(
    x: Tensor, weight: list[Tensor], form: str, bias: Tensor | None, a: Tensor, b: list[Tensor], starts: list[int],
    dropout: float, seed: int, unrounded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = weight_shape(_put_together(weight, form))[0]
    return (a if unrounded else x).new_empty(x.shape[0], out), a.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("enginepost::lora_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor, x: Tensor, weight: list[Tensor], form: str, s: Tensor, a: Tensor, b: list[Tensor], starts: list[int],
    dropout: float, seed: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    return _backward(dy, x, _put_together(weight, form), s, a, b, starts, dropout, seed, needs)


@_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, weight: list[Tensor], form: str, s: Tensor, a: Tensor, b: list[Tensor], starts: list[int],
    dropout: float, seed: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    shape = weight_shape(_put_together(weight, form))
    shapes = [(x, x.shape), (weight[0], shape), (a, shape[:1]), (a, a.shape), *((p, p.shape) for p in b)]
    wanted = [*needs[:4], *[needs[4]] * len(b)]
    return [
        like.new_empty(shape) if want else x.new_empty(0) for (like, shape), want in zip(shapes, wanted, strict=True)
    ]


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, ctx.form, bias, a, b, ctx.starts, ctx.dropout, ctx.seed, _ = inputs
    ctx.tensors = len(weight)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, output[1], a, *weight, *b)
    ctx.mark_non_differentiable(output[1])


def _grad(ctx, dy: Tensor, _: Tensor) -> tuple:  # type: ignore[no-untyped-def]
    x, s, a, *rest = ctx.saved_tensors
    weight, b = rest[: ctx.tensors], rest[ctx.tensors :]
    wants_x, wants_weight, _, wants_bias, wants_a, wants_b, *_ = ctx.needs_input_grad
    needs = [wants_x, wants_weight[0], wants_bias, wants_a, any(wants_b)]
    grads = torch.ops.enginepost.lora_linear_backward(
        dy, x, weight, ctx.form, s, a, b, ctx.starts, ctx.dropout, ctx.seed, needs
    )
    dx, dweight, dbias, da, *db = grads
    return (
        dx if needs[0] else None,
        [dweight if needs[1] else None, *[None] * (ctx.tensors - 1)],
        None,
        dbias.to(ctx.bias_dtype) if needs[2] else None,
        da if needs[3] else None,
        [g if want else None for g, want in zip(db, wants_b, strict=True)],
        None if ctx.starts else [],  # torch takes an empty list of ints for one of tensors
        None,
        None,
        None,
    )


_linear_op.register_autograd(_grad, setup_context=_setup)

make_callable(__name__, lora_linear)
