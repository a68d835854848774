"""norm, rope, glu and AdamW on a GPU: bytes per second, beside plain PyTorch, Liger and bitsandbytes where they are importable."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from bench.gpu import Case
from enginepost.kernels import adamw, glu, norm, rope


def optional(module: str, name: str) -> Any:
    """A peer's function; None where the peer is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def backward_of(function: Callable[..., Any], inputs: list[torch.Tensor], grads: Any) -> Callable[[], object]:
    """The backward pass alone, of results computed once."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def norm_cases(device: torch.device, small: bool) -> Iterator[Case]:
    tokens, width = (19, 264) if small else (16384, 4096)
    x, residual, dy, dh = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(4))
    weight = torch.randn(width, device=device).bfloat16()
    with torch.no_grad():
        yield Case(
            f"rms_norm forward T {tokens} H {width} bf16",
            {
                "enginepost": lambda: norm.rms_norm(x, weight, 1e-6),
                "torch rms_norm": lambda: F.rms_norm(x, (width,), weight, 1e-6),
            },
            2 * x.nbytes, "GB/s",
        )  # fmt: skip
        yield Case(
            f"add_rms_norm forward T {tokens} H {width} bf16",
            {
                "enginepost": lambda: norm.add_rms_norm(x, residual, weight, 1e-6),
                "torch add, rms_norm": lambda: F.rms_norm(x + residual, (width,), weight, 1e-6),
            },
            4 * x.nbytes, "GB/s",
        )  # fmt: skip
    calls = {
        "enginepost": backward_of(lambda x, w: norm.rms_norm(x, w, 1e-6), [x, weight], dy),
        "torch rms_norm": backward_of(lambda x, w: F.rms_norm(x, (width,), w, 1e-6), [x, weight], dy),
    }
    liger = optional("liger_kernel.transformers.functional", "liger_rms_norm")
    if liger is not None and device.type == "cuda":
        calls["Liger"] = backward_of(lambda x, w: liger(x, w, 1e-6), [x, weight], dy)
    yield Case(f"rms_norm backward T {tokens} H {width} bf16", calls, 3 * x.nbytes, "GB/s")
    frozen = backward_of(lambda x, r: norm.add_rms_norm(x, r, weight, 1e-6), [x, residual], (dy, dh))
    yield Case(
        f"add_rms_norm backward, frozen weight, T {tokens} H {width} bf16", {"enginepost": frozen}, 4 * x.nbytes, "GB/s"
    )


def glu_cases(device: torch.device, small: bool) -> Iterator[Case]:
    tokens, width = (19, 136) if small else (16384, 8192)
    x, dy = (
        torch.randn(tokens, 2 * width, device=device).bfloat16(),
        torch.randn(tokens, width, device=device).bfloat16(),
    )

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    with torch.no_grad():
        calls = {"enginepost": lambda: glu.glu(x, "silu"), "torch silu, mul": lambda: plain(x)}
        yield Case(f"SwiGLU forward T {tokens} I {width} bf16", calls, 3 * dy.nbytes, "GB/s")
    calls = {
        "enginepost": backward_of(lambda x: glu.glu(x, "silu"), [x], dy),
        "torch silu, mul": backward_of(plain, [x], dy),
    }
    yield Case(f"SwiGLU backward T {tokens} I {width} bf16", calls, 5 * dy.nbytes, "GB/s")


def rope_cases(device: torch.device, small: bool) -> Iterator[Case]:
    tokens, heads, dim = (19, 6, 64) if small else (16384, 48, 128)  # q, k and v of a fused projection; 40 heads turn
    x = torch.randn(tokens, heads, dim, device=device).bfloat16()
    angle = torch.rand(tokens, dim // 2, device=device)
    cos, sin, turned = angle.cos(), angle.sin(), heads * 5 // 6
    with torch.no_grad():
        calls = {
            "enginepost": lambda: rope.rope(x, cos, sin, turned),
            "plain PyTorch": lambda: rope.reference(x, cos, sin, turned),
        }
        yield Case(f"rope T {tokens} heads {turned}/{heads} D {dim} bf16", calls, 2 * x.nbytes, "GB/s")


def adamw_cases(device: torch.device, small: bool) -> Iterator[Case]:
    size = 4500 if small else 1 << 27
    options = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    p, g = (torch.randn(size, device=device).bfloat16() for _ in range(2))
    for bits in (32, 8):
        m, v = adamw.zero_moments(p, bits)
        ours = lambda m=m, v=v: adamw.adamw_step([p], [g], [m], [v], step=7, **options)  # noqa: E731
        calls: dict[str, Callable[[], object]] = {"enginepost": ours}
        leaf = torch.nn.Parameter(p.clone())
        leaf.grad = g
        if bits == 32 and device.type == "cuda":
            calls["torch fused (bf16 moments)"] = torch.optim.AdamW([leaf], lr=1e-4, fused=True).step
        peer = optional("bitsandbytes.optim", "AdamW8bit")
        if bits == 8 and peer is not None and device.type == "cuda":
            calls["bitsandbytes AdamW8bit"] = peer([leaf], lr=1e-4).step
        moment_bytes = 4 * size * (4 if bits == 32 else 1 + 4 / 256)
        yield Case(f"AdamW, {bits}-bit moments, {size} bf16 parameters", calls, 3 * p.nbytes + moment_bytes, "GB/s")


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for of in (norm_cases, glu_cases, rope_cases, adamw_cases):
        yield from of(device, small)
