"""What fits on a card and how fast, with weights of public shapes drawn on the spot (bench/gpu/training.py).

    python -m bench.gpu memory

1. Llama 3.1 8B, QLoRA r 32: tokens per second beside the same step with every linear layer as PEFT over bitsandbytes computes it:
   the weight decoded to bf16, a product, the update beside it. Everything else is ours on both sides.
2. Llama 3.1 70B, QLoRA r 8, 2048 tokens a step: weights that stream from host memory under a cap of 12 GB, beside resident ones
   without a cap (fewer layers where the card cannot hold all of them, which the row says).
3. Llama 3.1 8B, QLoRA r 32: the longest single sequence under caps of 8, 12, 16 and 24 GB. The planner says where to begin, a step
   decides: shorter until one runs, longer while there is time. A cap holds torch's allocator to that much less 0.6 GB for the
   driver's context, as `memory` in a recipe does.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import Row
from bench.gpu import all_of
from bench.gpu.training import (
    Block,
    Trainee,
    Used,
    forget_pinned,
    held_to,
    out_of_memory,
    planned,
    random_block,
    setup_of,
    trainee,
)
from enginepost.kernels import nf4
from enginepost.kernels.lora import LoraPart, matrices
from enginepost.model import transformer
from enginepost.model.architectures import architecture
from enginepost.model.spec import ModelSpec
from enginepost.plan.choose import MARGIN, longest_context
from enginepost.plan.machine import Machine, available
from enginepost.plan.memory import PROCESS, Setup, step_peak
from enginepost.plan.speed import flops

# Bytes of a cap, and the context that the figures published for Unsloth lead to there.
CAPS = [(8e9, 2972), (12e9, 21848), (16e9, 40724), (24e9, 78475)]
BIG_CAP, BIG_TOKENS = 12e9, 2048
KIND = "nf4-double"
UNKNOWN = 1e14  # FLOP per second of a card that has not run a step
Fields = dict[str, Any]
LONG: Fields = {"checkpointing": "host", "mlp_chunk": 1024}
WAYS: list[Fields] = [
    {"weights": "resident"},
    {"weights": "host"},
    {"weights": "resident", **LONG},
    {"weights": "host", **LONG},
]
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "vocab_size": 1000, "num_hidden_layers": 3}  # fmt: skip


def run(device: torch.device, small: bool, seconds: float) -> Iterator[Row]:
    end = time.monotonic() + seconds
    config = {**architecture("llama-3.1-8b"), **(SMALL if small else {})}
    block = random_block(ModelSpec.from_config(config), KIND, device)
    rates = [UNKNOWN]  # FLOP per second; the last is the one that was measured
    caps = [(small_cap(config), 1)] if small else CAPS

    def under(i: int) -> Iterator[Row]:
        work = [flops(setup_of(config, b, 32, quantize=KIND, **WAYS[-1]), b) for _, b in caps[i:]]
        share = (end - time.monotonic()) * work[0] / sum(work)
        yield from longest(config, block, device, *caps[i], rates[-1], share, small)

    yield from all_of(
        [
            ("beside dequantise + matmul", beside_dequantising(config, block, device, 128 if small else 4096, rates)),
            ("70B that streams", streaming(device, small)),
            *((f"cap {caps[i][0] / 1e9:.3g} GB", under(i)) for i in range(len(caps))),
        ]
    )


def small_cap(config: dict[str, Any]) -> float:
    """Of the dry run: where some hundred tokens fit."""
    return MARGIN["cuda"] * (planned(setup_of(config, 500, 32, quantize=KIND, **WAYS[-1])) + PROCESS["cuda"])


# 1. Beside dequantise + matmul.


class _Decoded(torch.autograd.Function):
    """x W^T with W decoded for the product and once more for its gradient, as bitsandbytes' MatMul4Bit does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return F.linear(x, _decode(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ _decode(ctx.weight, grads[0].dtype), None


def _decode(weight: Any, dtype: torch.dtype) -> Tensor:
    return nf4.dequantize(weight, dtype)


def peft_linear(
    x: Tensor,
    weight: Any,
    bias: Tensor | None = None,
    parts: Sequence[LoraPart] = (),
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """A linear layer as PEFT computes it under bf16 autocast, matrix by matrix; the results of a fused one are put side by side."""
    found, row = [], 0
    for matrix in matrices(weight):
        y = F.linear(x, matrix) if isinstance(matrix, Tensor) else _Decoded.apply(x, matrix)
        for part in parts:
            if part.start == row:
                y = y + F.linear(F.linear(x, part.A.to(x.dtype)), part.B.to(x.dtype)) * part.scaling
        found.append(y)
        row += y.shape[1]
    out = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    return out if bias is None else out + bias


@contextlib.contextmanager
def linear_layers_by(function: Any) -> Iterator[None]:
    before = transformer.lora_linear
    transformer.lora_linear = function
    try:
        yield
    finally:
        transformer.lora_linear = before


def beside_dequantising(
    config: dict[str, Any], block: Block, device: torch.device, tokens: int, rates: list[float], rounds: int = 4
) -> Iterator[Row]:
    """The FLOP per second of our step go to `rates`."""
    s = setup_of(config, tokens, 32, quantize=KIND)
    ways = {"enginepost": transformer.lora_linear, "dequantise + matmul, PEFT's operations": peft_linear}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with trainee(s, config, device, block) as t:
        for number in range(rounds + 1):
            for name in list(ways) if number % 2 else list(reversed(ways)):
                with linear_layers_by(ways[name]):
                    used = t.step(tokens)
                if number:
                    seconds[name].append(used.seconds)
    a, b = (statistics.median(times) for times in seconds.values())
    peer = list(ways)[1]
    case = f"memory, 8B Llama shape, QLoRA r 32 {KIND}, resident, {tokens} tokens a step"
    rates.append(flops(s, tokens) / a)
    yield Row(case, "speed", "tokens/s", tokens / a, peer, tokens / b, better="higher", milliseconds=1e3 * a)


# 2. Weights that stream.


def streaming(device: torch.device, small: bool) -> Iterator[Row]:
    config = {**architecture("llama-3.1-70b"), **(SMALL if small else {})}
    tokens = 128 if small else BIG_TOKENS
    of = int(config["num_hidden_layers"])
    api = torch.get_device_module(device)
    room = api.mem_get_info(device)[0]

    def setup(layers: int, fields: Fields) -> tuple[Setup, dict[str, Any]]:
        less = {**config, "num_hidden_layers": layers}
        return setup_of(less, tokens, 8, quantize=KIND, **fields), less

    layers = next((n for n in range(of, 0, -1) if MARGIN["cuda"] * planned(setup(n, WAYS[0])[0]) <= room), 0)
    if not layers:
        raise RuntimeError(f"not even one block of the 70B shape fits in {room / 1e9:.1f} GB")
    cap = BIG_CAP if not small else small_cap(config)
    streams = [WAYS[1], {**WAYS[1], "checkpointing": "host"}, {**WAYS[1], "checkpointing": "host", "mlp_chunk": 512}]
    fits = [f for f in streams if MARGIN["cuda"] * (planned(setup(layers, f)[0]) + PROCESS["cuda"]) <= cap]
    block = random_block(setup(layers, WAYS[0])[0].spec, KIND, device)
    found: list[list[Used]] = []
    for fields, most in ((WAYS[0], None), ((fits or streams[-1:])[0], cap)):
        s, less = setup(layers, fields)
        with held_to(most, device) if most else contextlib.nullcontext(), trainee(s, less, device, block) as t:
            t.step(tokens)
            found.append([t.step(tokens) for _ in range(3)])
    resident, capped = (statistics.median(u.seconds for u in steps) for steps in found)
    case = f"memory, 70B Llama shape, {layers} of {of} layers, QLoRA r 8 {KIND}, {tokens} tokens a step, cap {cap / 1e9:.3g} GB"
    case += f", {described(fields)}, one blob for all layers"
    yield Row(case, "speed", "tokens/s", tokens / capped, "resident, no cap", tokens / resident, better="higher")
    yield from used_rows(case, found[1][-1], s, cap)


# 3. The longest context.


def longest(
    config: dict[str, Any],
    block: Block,
    device: torch.device,
    cap: float,
    bar: int,
    rate: float,
    seconds: float,
    small: bool,
) -> Iterator[Row]:
    """rate: FLOP per second to expect; seconds: that this may take."""
    host = available()
    machine = Machine("cap", "cuda", cap, 1.0, 1.0, 1.0, host)
    by_plan = [
        (longest_context(setup_of(config, 1, 32, quantize=KIND, **way), machine), i) for i, way in enumerate(WAYS)
    ]
    most, which = max(by_plan)
    way = WAYS[which]
    case = f"memory, 8B Llama shape, QLoRA r 32 {KIND}, cap {cap / 1e9:.3g} GB, {described(way)}"
    s = setup_of(config, max(1, most), 32, quantize=KIND, **way)
    end = time.monotonic() + seconds

    def lasts(tokens: int) -> float:
        return 1.2 * flops(dataclasses.replace(s, tokens=tokens), tokens) / rate

    tokens = most
    while tokens > bar + 1 and lasts(tokens) > 0.8 * seconds:
        tokens = max(bar + 1, int(0.9 * tokens))
    note = "" if tokens == most else f", plan {most}, no time for more"
    with held_to(cap, device), trainee(dataclasses.replace(s, tokens=tokens), config, device, block) as t:
        t.step(min(256, tokens))
        best: tuple[int, Used] | None = None
        while best is None and tokens > 256:
            used = step_or_none(t, tokens)
            best = None if used is None else (tokens, used)
            tokens = tokens if best else int(0.9 * tokens)
        while best is not None and not note and not small:
            more = int(1.15 * best[0])
            pinned = sum(step_peak(dataclasses.replace(s, tokens=more)).host.values())
            if lasts(more) > end - time.monotonic() or (host is not None and pinned > host):
                break
            used = step_or_none(t, more)
            if used is None:
                break
            best = more, used
    if best is None:
        raise RuntimeError(f"{case}: not even {tokens} tokens ran, where the plan says {most}")
    tokens, used = best
    peer = None if small else "what Unsloth's published figures lead to"
    yield Row(f"{case}{note}", "context", "tokens", tokens, peer, bar, better="higher")
    yield Row(
        f"{case}, {tokens} tokens, the first such step", "speed", "tokens/s", tokens / used.seconds, better="higher"
    )
    yield from used_rows(f"{case}, {tokens} tokens", used, dataclasses.replace(s, tokens=tokens), cap)


def step_or_none(t: Trainee, tokens: int) -> Used | None:
    print(f"  a step of {tokens} tokens", flush=True)
    forget_pinned()
    return out_of_memory(lambda: t.step(tokens))


def used_rows(case: str, used: Used, s: Setup, cap: float) -> Iterator[Row]:
    yield Row(case, "peak memory", "GB", used.allocated / 1e9, "planned", planned(s) / 1e9)
    yield Row(case, "reserved", "GB", used.reserved / 1e9, "cap less context", (cap - PROCESS["cuda"]) / 1e9)


def described(fields: Fields) -> str:
    return ", ".join(f"{key} {value}" for key, value in fields.items())
