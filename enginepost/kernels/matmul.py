"""Matrix product: `out = a b (+ a2 b2) (+ out)`, float32 accumulation.

    mm(x, W.T)                        y = x W^T
    mm(x, W.T, a2=S, b2=B.T)          y = x W^T + S B^T, a low-rank update in the same pass over y

Which product is faster was measured, one thread. Intel Xeon with AVX-512, 1600 x 3072 x 576: torch's float32 product (MKL) runs at
130 to 155 GFLOP/s, ours at 110 to 135, torch's bfloat16 product (oneDNN) at 75. AMD Zen 3 with AVX2, 2048 x 1536 x 576: MKL 94, ours
92, oneDNN's bfloat16 10; and one row, bound by the reading of b: ours reads 24 GB/s of bfloat16, torch 10. So bfloat16 goes to
csrc/cpu/matmul.cpp, which widens while it packs, and float32 to torch. A CPU that multiplies bfloat16 at twice the rate of float32
(AMX tiles, AMD's dot product) keeps torch's product, and so does any CPU for which we have only portable code.

On a GPU ours (csrc/cuda/gemm.cuh) runs what torch has no single call for: two products into one result, and products of a 16-bit
matrix with a float32 one, whose numbers it multiplies as sums of 16-bit parts. The rest is torch's.
"""

import functools
import platform

import torch
from torch import Tensor

from enginepost.kernels.arrays import make_callable
from enginepost.kernels.backend import GPU_FLOATS, core, emulating, info, native, to_dlpack


@functools.cache
def widening_wins() -> bool:
    """True when float32 FMA on widened bfloat16 beats this CPU's own bfloat16 product."""
    if info()["isa"] not in ("avx2", "avx512", "avx512bf16"):
        return False
    try:
        with open("/proc/cpuinfo") as file:
            head = file.read(8192)
    except OSError:
        return platform.machine().lower() in ("x86_64", "amd64")
    return "amx_bf16" not in head and not ("AuthenticAMD" in head and "avx512_bf16" in head)


def reference(a: Tensor, b: Tensor, a2: Tensor | None = None, b2: Tensor | None = None) -> Tensor:
    """a b + a2 b2 in plain PyTorch, at float32 or better, rounded once to a's dtype."""
    wide = torch.promote_types(a.dtype, torch.float32)
    out = a.to(wide) @ b.to(wide)
    if a2 is not None and b2 is not None:
        out += a2.to(wide) @ b2.to(wide)
    return out.to(a.dtype)


def _ours(a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, out: Tensor, mixed: bool) -> bool:
    if not (mixed or a.dtype in (torch.bfloat16, torch.float16)) or not native(a, b, a2, b2, out, gpu=GPU_FLOATS):
        return False
    if a.is_cuda:
        return (mixed or a2 is not None) and not a.dtype == b.dtype == torch.float32
    return emulating() or widening_wins()


def mm(
    a: Tensor, b: Tensor, out: Tensor | None = None, a2: Tensor | None = None, b2: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:  # fmt: skip
    """`out = a b + a2 b2`, or added to out when `accumulate`. No autograd: for the insides of other ops.

    Args: a `[M, K]`, b `[K, N]`, a2 `[M, K2]`, b2 `[K2, N]`, each contiguous along one dimension (transposed views are free),
        float32 or bfloat16 (on a GPU float16 too) in any mix; out `[M, N]` with contiguous rows, of such a dtype; default: new, in
        a's dtype.
    Returns: out. Rounded once where the native product runs; a float32 sum of two rounded products where torch's does.
    Raises: ValueError or RuntimeError that names the shapes that do not fit.

    >>> a, b, low, rank = torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 1), torch.ones(1, 4)
    >>> mm(a, b, a2=low, b2=rank)[0].tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    if out is None:
        assert not accumulate, "accumulate needs out"
        out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    mixed = any(t is not None and t.dtype != a.dtype for t in (b, a2, b2, out))
    if _ours(a, b, a2, b2, out, mixed):
        core().matmul(
            to_dlpack(a.detach()), to_dlpack(b.detach()), None if a2 is None else to_dlpack(a2.detach()),
            None if b2 is None else to_dlpack(b2.detach()), to_dlpack(out), accumulate,
        )  # fmt: skip
        return out
    if mixed:
        wide = torch.promote_types(torch.promote_types(a.dtype, out.dtype), torch.float32)
        product = a.to(wide) @ b.to(wide)
        if a2 is not None and b2 is not None:
            product += a2.to(wide) @ b2.to(wide)
        return out.add_(product) if accumulate else out.copy_(product)
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
    if a2 is not None and b2 is not None:
        out.addmm_(a2, b2)
    return out


make_callable(__name__, mm)
