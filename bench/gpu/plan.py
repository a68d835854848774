"""The planner's peak of a step beside what torch's allocator saw, on a GPU: within TOLERANCE on every recipe, or this raises.

    python -m bench.gpu plan

Widths are those of public models, layers few, so that each takes a second or two; a recipe's first step warms up and the second
is measured, when moments and gradients exist. `reserved` is what the allocator held for it, which is what a card must have: the
planner's own margin for that is `enginepost.plan.choose.MARGIN`.
"""

from collections.abc import Iterator
from typing import Any

import torch

from bench import Row
from bench.gpu import all_of
from bench.gpu.training import planned, setup_of, trainee
from enginepost.model.architectures import architecture
from enginepost.plan.choose import MARGIN
from enginepost.plan.memory import step_peak

TOLERANCE = 0.10
LAYERS = 6
RANK = 16
Fields = dict[str, Any]
# (architecture, tokens, rank or None for all weights, fields of the planner's Setup)
RECIPES: list[tuple[str, int, int | None, Fields]] = [
    ("llama-3.1-8b", 4096, RANK, {"quantize": "nf4-double"}),
    ("llama-3.1-8b", 16384, RANK, {"quantize": "nf4-double"}),
    ("llama-3.1-8b", 4096, RANK, {"quantize": "nf4", "checkpointing": False}),
    ("llama-3.1-8b", 16384, RANK, {"quantize": "nf4-double", "weights": "host"}),
    ("llama-3.1-8b", 16384, RANK, {"quantize": "nf4-double", "weights": "host", "checkpointing": "host"}),
    ("llama-3.1-8b", 32768, RANK, {"quantize": "nf4", "checkpointing": "host", "mlp_chunk": 1024}),
    ("llama-3.1-8b", 4096, 128, {"quantize": "nf4-double", "micro_batches": 2}),
    ("llama-3.1-8b", 4096, RANK, {}),
    ("llama-3.1-8b", 4096, RANK, {"checkpointing": False}),
    ("llama-3.1-8b", 4096, None, {}),
    ("llama-3.2-1b", 4096, None, {"moment_bits": 8, "in_backward": True}),
    ("llama-3.2-1b", 8192, None, {"mlp_chunk": 1024}),
    ("qwen3-0.6b", 8192, RANK, {"checkpointing": False}),
    ("gemma-2-2b", 8192, RANK, {"quantize": "nf4"}),
    ("llama-3.1-8b", 4096, RANK, {"quantize": "nf4", "dora": True}),
    ("llama-3.1-70b", 2048, 8, {"quantize": "nf4-double", "weights": "host"}),
]  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
         "vocab_size": 1000, "sliding_window": None}  # fmt: skip


def run(device: torch.device, small: bool, seconds: float) -> Iterator[Row]:
    yield from all_of((str(recipe), compared(*recipe, device, small)) for recipe in RECIPES)


def compared(
    name: str, tokens: int, rank: int | None, fields: Fields, device: torch.device, small: bool
) -> Iterator[Row]:
    """The rows of a recipe; RuntimeError where the plan is off."""
    layers = 3 if small else LAYERS
    config = {**architecture(name), "num_hidden_layers": layers, **(SMALL if small else {})}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    if small:
        tokens, rank = max(128, tokens // 128), None if rank is None else 8
        fields = {**fields, **({"mlp_chunk": 64} if "mlp_chunk" in fields else {})}
    s = setup_of(config, tokens, rank, **fields)
    said = planned(s)
    if small:  # a pretended device does not see what kernels ask for
        said -= step_peak(s).items.get("workspace", 0.0)
    room = torch.get_device_module(device).mem_get_info(device)[0]
    if MARGIN["cuda"] * said > room:
        print(f"left out: {name}, {fields}: {said / 1e9:.1f} GB by plan, and {room / 1e9:.1f} GB are free")
        return
    with trainee(s, config, device) as t:
        t.step(tokens)
        used = t.step(tokens)
    what = f"plan, {name} {layers} layers, {tokens} tokens, {'all weights' if rank is None else f'r {rank}'}"
    case = ", ".join([what, *(f"{key} {value}" for key, value in fields.items())])
    yield Row(case, "peak memory", "GB", used.allocated / 1e9, "planned", said / 1e9)
    yield Row(case, "reserved", "GB", used.reserved / 1e9)
    if abs(said / used.allocated - 1) > TOLERANCE:
        raise RuntimeError(f"{case}: the plan is {said / used.allocated - 1:+.1%} off")
