"""What `linear_kl` makes of a block of logits: natively (csrc/cpu/linear_kl.cpp, csrc/cuda/linear_kl.cu), or in torch for the dtypes
that the native kernels do not take.

    scan       adds a block to the sums of a row: largest z and sum of exp(z - largest) of both sides, what forward and reverse need
    compare    second pass of js: adds a block to the sums of q (log q - log m) and p (log p - log m)
    gradient   du of a block, from the norms of both sides

u `[T, n]` are the products of the student for vocabulary entries first .. first + n, teacher those of the teacher; all is float32
(or float64, in torch), and both may be overwritten. With a top-k teacher there are ids `[T, k]` instead, -1 where there is none.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from enginepost.kernels.backend import GPU_FLOATS, core, native, to_dlpack

KINDS = ("forward", "reverse", "js")
SUMS = 5  # numbers a row: largest and sum of the student, of the teacher, weighted


@dataclass(frozen=True)
class Settings:
    kind: str
    beta: float
    temperature: float
    softcap: float
    teacher_softcap: float

    def numbers(self) -> tuple[int, float, float, float, float]:
        """As the native functions take them."""
        return KINDS.index(self.kind), self.beta, self.temperature, self.softcap, self.teacher_softcap


def _capsule(t: Tensor | None) -> object:
    return None if t is None else to_dlpack(t)


def scan(
    u: Tensor, teacher: Tensor | None, ids: Tensor | None, chosen: Tensor | None, sums: Tensor, first: int, s: Settings
) -> None:
    """Adds a block to sums `[T, 5]`, which the one with first = 0 begins. Where ids is in the block, z goes to chosen `[T, k]` and
    does not count in the sums."""
    if native(u, teacher, chosen, sums, gpu=GPU_FLOATS):
        core().linear_kl_scan(
            to_dlpack(u), *map(_capsule, (teacher, ids, chosen)), to_dlpack(sums), *s.numbers(), first
        )
        return
    z = _z(u, s.softcap, s.temperature)
    if first == 0:
        sums.zero_()[:, 0:3:2] = -math.inf
    if ids is not None and chosen is not None:
        row, column, token = _in_block(ids, first, u.shape[1])
        chosen[row, column] = z[row, token]
        z[row, token] = -math.inf
    p, q = sums[:, 0:2], sums[:, 2:4]
    before, total = p[:, :1] - q[:, :1], (q if s.kind == "forward" else p)[:, 1:].clone()
    by_p, rescale_p = _add(p, z)
    if teacher is None:
        return
    t = _z(teacher, s.teacher_softcap, s.temperature)
    by_q, rescale_q = _add(q, t)
    if s.kind == "js":
        return
    moved = (p[:, :1] - q[:, :1] - before).nan_to_num(0.0)  # NaN in the first block
    weight, rescale = (by_q, rescale_q) if s.kind == "forward" else (by_p, rescale_p)
    apart = z.sub_(p[:, :1]).sub_(t.sub_(q[:, :1]))
    sums[:, 4:] = (sums[:, 4:] - moved * total) * rescale + weight.mul_(apart).sum(1, keepdim=True)


def _add(side: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Adds to (largest, sum) `[T, 2]`; returns exp(z - largest), and the factor for sums made with the largest of before."""
    high = torch.maximum(side[:, :1], z.amax(1, keepdim=True))
    safe = high.masked_fill(high == -math.inf, 0.0)
    rescale, weight = (side[:, :1] - safe).exp(), (z - safe).exp_()
    side[:, 1:] = side[:, 1:] * rescale + weight.sum(1, keepdim=True)
    side[:, :1] = high
    return weight, rescale


def compare(u: Tensor, teacher: Tensor, norm: Tensor, sums: Tensor, first: int, s: Settings) -> None:
    """Adds a block to sums `[T, 2]`: q (log q - log m) and p (log p - log m), with norm `[T, 4]`: largest z and log of the sum."""
    if native(u, teacher, norm, sums, gpu=GPU_FLOATS):
        core().linear_kl_compare(*map(to_dlpack, (u, teacher, norm, sums)), *s.numbers(), first)
        return
    if first == 0:
        sums.zero_()
    log_p = _log(_z(u, s.softcap, s.temperature), norm[:, 0:2])
    log_q = _log(_z(teacher, s.teacher_softcap, s.temperature), norm[:, 2:4])
    log_m = log_mixture(log_p, log_q, s.beta)
    sums[:, 1] += (log_p.exp() * (log_p - log_m)).sum(1)
    sums[:, 0] += log_q.exp().mul_(log_q - log_m).sum(1)


def gradient(
    u: Tensor, teacher: Tensor | None, ids: Tensor | None, dchosen: Tensor | None, state: Tensor, dkl: Tensor, du: Tensor,
    first: int, s: Settings,
) -> None:  # fmt: skip
    """du `[T, n]`, which may be u, = dkl `[T]` times the gradient by u. state `[T, 5]`: the norms of both sides, and the mean that
    the kind compares with. With ids it is `[T, 3]`, the norm and what p of a token that was not chosen is multiplied by, and
    dchosen `[T, k]` is the gradient by u of those that were."""
    if native(u, teacher, dchosen, state, dkl, du, gpu=GPU_FLOATS):
        core().linear_kl_gradient(
            to_dlpack(u), *map(_capsule, (teacher, ids, dchosen)), *map(to_dlpack, (state, dkl, du)), *s.numbers(), first
        )  # fmt: skip
        return
    z = _z(u, s.softcap, s.temperature)
    log_p = _log(z.clone(), state[:, 0:2])
    if teacher is None:
        dz = log_p.exp_().mul_(state[:, 2:])
    else:
        t = _z(teacher, s.teacher_softcap, s.temperature)
        norm, mean = state[:, 2:4], state[:, 4:]
        if s.kind == "forward":
            dz = log_p.exp_().sub_(_log(t, norm).exp_())
        elif s.kind == "reverse":  # without the logs of the sums, which would leave their roundings
            dz = log_p.exp_().mul_((z - state[:, :1]).sub_(t.sub_(norm[:, :1])).sub_(mean))
        else:
            log_m = log_mixture(log_p, _log(t, norm), s.beta)
            dz = log_p.exp().mul_(log_p.sub_(log_m).sub_(mean)).mul_(1 - s.beta)
    dz = through(dz, z, s).mul_(dkl.unsqueeze(1))
    if ids is not None and dchosen is not None:
        row, column, token = _in_block(ids, first, u.shape[1])
        dz[row, token] = dchosen[row, column] * dkl[row]
    du.copy_(dz)


def through(dz: Tensor, z: Tensor, s: Settings) -> Tensor:
    """du of the student's products from dz, which is overwritten."""
    if s.softcap > 0:
        dz.mul_(1 - (z * (s.temperature / s.softcap)).square_())
    return dz.div_(s.temperature) if s.temperature != 1 else dz


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))


def _z(u: Tensor, softcap: float, temperature: float) -> Tensor:
    """In place."""
    if softcap > 0:
        u.div_(softcap).tanh_().mul_(softcap)
    return u.div_(temperature) if temperature != 1 else u


def _log(z: Tensor, norm: Tensor) -> Tensor:
    """log softmax of a block, in place."""
    return z.sub_(norm[:, :1]).sub_(norm[:, 1:])


def _in_block(ids: Tensor, first: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, column) of the ids that are in the block, and where in it."""
    row, column = ((ids >= first) & (ids < first + width)).nonzero(as_tuple=True)
    return row, column, ids[row, column] - first
