"""Every kernel family on small problems against its reference, with each instruction set of this machine; and how fast it is.

A result passes when its error is at most twice that of the same maths in plain PyTorch at the same dtype, both against float64: the
rule of the test suite, here for whoever installs the package on a machine that the test suite has never seen.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from enginepost.kernels import adamw, attention, glu, linear_kl, linear_logprob, lora, matmul, merge, nf4, norm, rope
from enginepost.kernels.backend import core, info, to_dlpack, use_isa

DOES = {
    "attention": "softmax(q k^T) v over packed sequences: causal, GQA, windows, softcap",
    "linear_logprob": "log-probability of targets from hidden states, without the logits",
    "linear_kl": "divergence of a student from a teacher, without the logits",
    "lora": "linear layer with low-rank updates, DoRA",
    "norm": "RMSNorm, with or without the residual add",
    "rope": "rotary position embedding",
    "glu": "SwiGLU and GeGLU",
    "adamw": "AdamW over many tensors, global gradient norm",
    "nf4": "weights in 4 bits (NF4, FP4) and their products, blockwise 8-bit numbers",
    "merge": "weighted sums, task vectors trimmed, drawn and elected, for merging models",
    "matmul": "matrix product, float32 sums, with a low-rank update in the same pass",
}

Results = list[Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """`ours(*inputs)` and `reference(*inputs)` give alike lists of tensors. For the speed table: the work of a call of ours, in FLOP
    or bytes by `unit`, and the peer beside it (default: the reference), which does the same to these inputs."""

    inputs: Results
    ours: Callable[..., Results]
    reference: Callable[..., Results]
    shape: str
    work: float
    unit: str
    peer: Callable[..., Any] | None = None
    peer_name: str = "plain PyTorch"


@dataclass(frozen=True)
class Verdict:
    family: str
    isa: str
    dtype: str
    error: float  # largest, relative to the largest result
    passed: bool


def with_gradients(function: Function, leaves: int) -> Callable[..., Results]:
    """Results of `function` and the gradients of its first `leaves` arguments under a fixed gradient of the first result."""

    def call(*inputs: Tensor) -> Results:
        inputs = tuple(x.detach().requires_grad_() if i < leaves else x for i, x in enumerate(inputs))
        out = function(*inputs)
        results = list(out) if isinstance(out, tuple) else [out]
        dout = _wave(results[0].shape, results[0].dtype).to(results[0].device)
        return [*(x.detach() for x in results), *torch.autograd.grad(results[0], inputs[:leaves], dout)]

    return call


@functools.lru_cache(maxsize=4)
def _wave(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.cos(torch.arange(shape.numel(), dtype=torch.float64)).view(shape).to(torch.bfloat16).to(dtype)


def _attention(dtype: torch.dtype, large: bool) -> Case:
    tokens, heads, kv_heads, dim = (1024, 8, 2, 64) if large else (47, 4, 2, 40)
    q, k, v = (torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    cu = torch.tensor([0, tokens] if large else [0, 19, 19, tokens], dtype=torch.int32)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def paged(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Results:
        """The last sequence once more, its keys in pages that lie in memory backwards: the reference's rows of it."""
        first, page = int(cu[-2]), 5
        table = torch.arange(-(-(tokens - first) // page), dtype=torch.int32, device=q.device).flip(0).unsqueeze(0)
        used, starts = (
            torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([tokens - first], [0, tokens - first])
        )

        def pages(x: Tensor) -> Tensor:
            filled = torch.cat([x[first:], x.new_zeros(table.numel() * page - (tokens - first), *x.shape[1:])])
            return filled.view(-1, page, *x.shape[1:]).flip(0).contiguous()

        return list(attention.paged_attention(q[first:], pages(k), pages(v), table, used, starts))

    def rows(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Results:
        out, lse = attention.reference(q, k, v, cu)
        return [out[cu[-2] :], lse[:, cu[-2] :]]

    whole, exact = with_gradients(attention.attention, 3), with_gradients(attention.reference, 3)
    return Case(
        [q, k, v, cu],
        whole if large else lambda *x: whole(*x) + paged(*x), exact if large else lambda *x: exact(*x) + rows(*x),
        f"forward + backward, causal, T {tokens} H {heads}/{kv_heads} D {dim}", 7 * tokens**2 * heads * dim, "GFLOP/s",
        with_gradients(sdpa, 3), "torch SDPA",
    )  # fmt: skip


def _linear_logprob(dtype: torch.dtype, large: bool) -> Case:
    tokens, width, vocab = (512, 576, 16384) if large else (23, 40, 301)
    hidden, weight = torch.randn(tokens, width).to(dtype), (torch.randn(vocab, width) / math.sqrt(width)).to(dtype)
    targets = torch.randint(vocab, (tokens,))
    targets[:: 5 if not large else tokens] = linear_logprob.SKIPPED

    def logprob(function: Function) -> Function:
        return lambda hidden, weight, targets: function(hidden, weight, targets)[:2]

    return Case(
        [hidden, weight, targets], with_gradients(logprob(linear_logprob.linear_logprob), 1),
        with_gradients(logprob(linear_logprob.reference), 1),
        f"forward + backward, frozen head, T {tokens} K {width} V {vocab}", 4 * tokens * width * vocab, "GFLOP/s",
        peer_name="matmul + log_softmax",
    )  # fmt: skip


def _linear_kl(dtype: torch.dtype, large: bool) -> Case:
    tokens, width, vocab = (256, 576, 8192) if large else (17, 24, 205)
    student, teacher = (torch.randn(tokens, width).to(dtype) for _ in range(2))
    head = (torch.randn(vocab, width) / math.sqrt(width)).to(dtype)

    def forward_kl(function: Function) -> Function:
        return lambda student, teacher, head: function(student, head, teacher_hidden=teacher, teacher_head=head)

    return Case(
        [student, teacher, head], with_gradients(forward_kl(linear_kl.linear_kl), 1),
        with_gradients(forward_kl(linear_kl.reference), 1),
        f"forward KL, forward + backward, T {tokens} K {width} V {vocab}", 10 * tokens * width * vocab, "GFLOP/s",
        peer_name="full logits",
    )  # fmt: skip


def _nf4(dtype: torch.dtype, large: bool) -> Case:
    rows, width, columns = (64, 1024, 1024) if large else (19, 80, 37)
    weight = nf4.quantize(torch.randn(columns, width) / math.sqrt(width), double=True)

    def moved(device: torch.device) -> nf4.NF4Weight:
        parts = ("packed", "absmax", "nested_absmax", "nested_code")
        return dataclasses.replace(weight, **{name: getattr(weight, name).to(device) for name in parts})

    def ours(x: Tensor) -> Results:
        out = torch.empty(x.shape[0], columns, dtype=x.dtype, device=x.device)
        return [nf4.nf4_mm(x, moved(x.device), out)]

    def reference(x: Tensor) -> Results:
        wide = torch.promote_types(x.dtype, torch.float32)
        return [(x.to(wide) @ nf4.reference_dequantize(weight, torch.float32).to(wide).T).to(x.dtype)]

    return Case(
        [torch.randn(rows, width).to(dtype)], ours, reference, f"x W^T, W in NF4, {rows} x {columns} x {width}",
        2 * rows * columns * width, "GFLOP/s", peer_name="dequantise + matmul",
    )  # fmt: skip


def _merge(dtype: torch.dtype, large: bool) -> Case:
    size = 2**22 if large else 1003

    def ours(*inputs: Tensor) -> Results:
        out = torch.empty_like(inputs[0])
        merge.weighted_sum(inputs, [0.5, 0.25, 0.25], out)
        return [out]

    def reference(*inputs: Tensor) -> Results:
        wide = torch.promote_types(inputs[0].dtype, torch.float32)
        return [sum(x.to(wide) * w for x, w in zip(inputs, (0.5, 0.25, 0.25), strict=True)).to(inputs[0].dtype)]  # type: ignore[union-attr]

    inputs = [torch.randn(size).to(dtype) for _ in range(3)]
    return Case(inputs, ours, reference, f"weighted sum of 3 x {size}", 4 * size * inputs[0].element_size(), "GB/s")


def _lora(dtype: torch.dtype, large: bool) -> Case:
    tokens, width, out, rank = (512, 1024, 1024, 16) if large else (21, 48, 70, 4)
    x, weight = torch.randn(tokens, width).to(dtype), (torch.randn(out, width) / math.sqrt(width)).to(dtype)
    a, b = torch.randn(rank, width) / math.sqrt(width), torch.randn(out, rank)

    def layer(function: Function) -> Function:
        return lambda x, a, b, weight: function(x, weight, None, [lora.LoraPart(a, b, 0.5)])

    def peft(x: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return (F.linear(x, weight) + 0.5 * F.linear(F.linear(x.to(a.dtype), a), b)).to(x.dtype)

    return Case(
        [x, a, b, weight], with_gradients(layer(lora.lora_linear), 3), with_gradients(layer(lora.reference), 3),
        f"forward + backward, T {tokens}, {width} -> {out}, r {rank}", 4 * tokens * width * out, "GFLOP/s",
        with_gradients(peft, 3), "PEFT's operations",
    )  # fmt: skip


def _norm(dtype: torch.dtype, large: bool) -> Case:
    rows, width = (2048, 1024) if large else (13, 83)
    x, residual, weight = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), torch.rand(width)

    def added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + x
        return norm.reference(h, weight, 1e-6), h

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(x, residual, weight, 1e-6)

    return Case(
        [x, residual, weight], with_gradients(ours, 3), with_gradients(added, 3),
        f"residual add + norm, forward + backward, {rows} x {width}", 7 * x.numel() * x.element_size(), "GB/s",
    )  # fmt: skip


def _rope(dtype: torch.dtype, large: bool) -> Case:
    tokens, heads, dim = (2048, 12, 64) if large else (19, 3, 40)
    angle = torch.arange(tokens).unsqueeze(1) * rope.rope_frequencies(dim, 10000.0, max_position=tokens)[0]
    x = torch.randn(tokens, heads, dim).to(dtype)
    return Case(
        [x, angle.cos(), angle.sin()], with_gradients(rope.rope, 1), with_gradients(rope.reference, 1),
        f"forward + backward, T {tokens} H {heads} D {dim}", 4 * x.numel() * x.element_size(), "GB/s",
    )  # fmt: skip


def _glu(dtype: torch.dtype, large: bool) -> Case:
    rows, width = (1024, 1536) if large else (11, 37)
    x = torch.randn(rows, 2 * width).to(dtype)
    return Case(
        [x], with_gradients(glu.glu, 1), with_gradients(glu.reference, 1),
        f"SwiGLU, forward + backward, {rows} x {width}", 4 * x.numel() * x.element_size(), "GB/s",
    )  # fmt: skip


def _adamw(dtype: torch.dtype, large: bool) -> Case:
    size = 2**22 if large else 1003
    param, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
    options = {"lr": 1e-3, "weight_decay": 0.1, "step": 3}

    def stepped(function: Function, keep: bool) -> Callable[..., Results]:
        def call(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Results:
            if not keep:
                p, m, v = p.clone(), m.clone(), v.clone()
            function([p], [g], [m], [v], **options)
            return [p, m, v]

        return call

    fused = [torch.ones((), dtype=torch.float32)]

    def torch_fused(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        torch._fused_adamw_([p], [g], [m], [v], [], fused, lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8,
                            amsgrad=False, maximize=False)  # fmt: skip

    same = dtype == torch.float32  # torch's fused step wants states in the dtype of the parameter
    return Case(
        [param, grad, torch.randn(size), torch.rand(size)], stepped(adamw.adamw_step, large),
        stepped(adamw.reference_step, large), f"step, {size} parameters", size * (3 * param.element_size() + 16), "GB/s",
        torch_fused if same else None, "torch fused AdamW" if same else "plain PyTorch",
    )  # fmt: skip


def _matmul(dtype: torch.dtype, large: bool) -> Case:
    rows, columns, depth, rank = (512, 1024, 1024, 0) if large else (35, 50, 67, 3)

    def ours(a: Tensor, b: Tensor, *low: Tensor) -> Results:  # whether or not torch's product is the faster one here
        out = torch.empty(rows, columns, dtype=a.dtype, device=a.device)
        if a.is_cuda and a.dtype == torch.float32:
            a2, b2 = low or (None, None)
            return [matmul.mm(a, b, out, a2, b2)]  # no product of ours
        updates = [to_dlpack(t) for t in low] if low else [None, None]
        core().matmul(to_dlpack(a), to_dlpack(b), *updates, to_dlpack(out), False)
        return [out]

    def reference(*inputs: Tensor) -> Results:
        return [matmul.reference(*inputs)]

    inputs = [torch.randn(rows, depth), torch.randn(columns, depth).t()]
    inputs += [torch.randn(rows, rank), torch.randn(rank, columns)] if rank else []
    return Case(
        [x.to(dtype) for x in inputs], ours, reference, f"{rows} x {columns} x {depth}", 2 * rows * columns * depth,
        "GFLOP/s", lambda a, b, *_: torch.mm(a, b), "torch.mm",
    )  # fmt: skip


CASES = {
    "attention": _attention,
    "linear_logprob": _linear_logprob,
    "linear_kl": _linear_kl,
    "lora": _lora,
    "norm": _norm,
    "rope": _rope,
    "glu": _glu,
    "adamw": _adamw,
    "nf4": _nf4,
    "merge": _merge,
    "matmul": _matmul,
}
DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _error(results: Results, exact: Results) -> list[float]:
    """Largest error of each result, relative to the largest of it (at least 1); infinite where one is not finite."""
    errors = []
    for got, want in zip(results, exact, strict=True):
        if got.shape != want.shape or not torch.isfinite(got).all():
            errors.append(math.inf)
            continue
        errors.append(((got.cpu().double() - want).abs().max() / want.abs().max().clamp(min=1)).item())
    return errors


def check(family: str, dtype: torch.dtype, isa: str, device: torch.device | None = None) -> Verdict:
    """One family with one instruction set, which the caller has chosen (`backend.use_isa`), or on a device, whose name `isa` is."""
    torch.manual_seed(0)
    case = CASES[family](dtype, False)
    exact = case.reference(*(x.double() if x.is_floating_point() else x for x in case.inputs))
    ours = _error(case.ours(*(x if device is None else x.to(device) for x in case.inputs)), exact)
    plain = _error(case.reference(*case.inputs), exact)
    passed = all(mine <= 2 * theirs + 2e-7 for mine, theirs in zip(ours, plain, strict=True))
    return Verdict(family, isa, str(dtype).removeprefix("torch."), max(ours), passed)


def run() -> Iterator[Verdict]:
    """Every family, dtype and instruction set of this machine."""
    for isa in info()["isas"]:
        with use_isa(isa):
            for family in CASES:
                for dtype in DTYPES:
                    yield check(family, dtype, isa)


def run_on(device: torch.device) -> Iterator[Verdict]:
    """Every family and dtype on a GPU, which is torch's current one. The references are computed on the CPU."""
    for family in CASES:
        for dtype in GPU_DTYPES:
            yield check(family, dtype, str(device), device)


def first_failure(device: torch.device) -> str | None:
    """What fails first on a GPU, None when all passes: seconds, where `run_on` names all of it."""
    for family in CASES:
        for dtype in GPU_DTYPES:
            try:
                verdict = check(family, dtype, str(device), device)
            except (RuntimeError, ValueError) as error:
                return f"{family}, {str(dtype).removeprefix('torch.')}: {error}"
            if not verdict.passed:
                return f"{family}, {verdict.dtype}, off by {verdict.error:.2g} of the largest"
    return None


@dataclass(frozen=True)
class Speed:
    family: str
    dtype: str
    shape: str
    milliseconds: float
    rate: float
    unit: str
    peer: str
    peer_milliseconds: float

    @property
    def ratio(self) -> float:
        return self.peer_milliseconds / self.milliseconds


def speeds(rounds: int = 7) -> Iterator[Speed]:
    """Ours and the peer in turn, medians of `rounds`, with the instruction set and the threads in use."""
    for family in CASES:
        for dtype in DTYPES:
            torch.manual_seed(0)
            case = CASES[family](dtype, True)
            calls = [case.ours, case.peer or case.reference]
            samples: list[list[float]] = [[], []]
            for _ in range(rounds + 1):  # the first does not count
                for call, seconds in zip(calls, samples, strict=True):
                    start = time.perf_counter()
                    call(*case.inputs)
                    seconds.append(time.perf_counter() - start)
            ours, peer = (statistics.median(seconds[1:]) for seconds in samples)
            yield Speed(
                family, str(dtype).removeprefix("torch."), case.shape, 1e3 * ours, case.work / ours / 1e9, case.unit,
                case.peer_name, 1e3 * peer,
            )  # fmt: skip
