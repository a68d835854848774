"""The planner's peak of a step against torch's own account of every tensor that it allocates and frees."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from enginepost.data.packing import Sequence, collate
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import add_lora, create_model
from enginepost.model.architectures import architecture
from enginepost.plan.memory import step_peak, trained_sizes
from enginepost.plan.setup import setup_of
from enginepost.recipe import load_recipe
from enginepost.train.objectives.sft import sft_loss
from enginepost.train.optimizer import AdamW

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 32,
         "num_key_value_heads": 2, "vocab_size": 600, "sliding_window": None}  # fmt: skip
STANDING = ("weights", "slots", "adapters", "masters", "optimizer", "workspace", "process")


def measured_peak(config: dict[str, Any], keys: Mapping[str, Any], tokens: int) -> tuple[float, float]:
    """(peak of the tensors that a step allocates, the planner's peak of the same items), in bytes."""
    recipe = load_recipe({"model": "m", "data": "d", "gradient_accumulation": 1, "max_length": tokens, **keys})
    model = create_model(config, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.dtype])
    if recipe.lora is not None:
        lora = recipe.lora
        add_lora(
            model, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.targets, use_dora=lora.dora
        )
    model.train()
    model.checkpointing, model.mlp_chunk = recipe.checkpointing, recipe.mlp_chunk
    optimizer = AdamW({n: p for n, p in model.named_parameters() if p.requires_grad}, betas=(0.9, 0.999), eps=1e-8,
                      weight_decay=0.0)  # fmt: skip
    ids = torch.randint(0, config["vocab_size"], (tokens,)).numpy().astype("int32")
    labels = torch.ones(tokens, dtype=torch.bool).numpy()
    labels[0] = False
    batch = collate([Sequence(ids, labels, 0, "row")])

    def step() -> None:
        hidden = model.hidden(batch.ids, batch.cu_seqlens, batch.positions)
        logprob, _, _ = linear_logprob(hidden, model.head_weight, batch.targets, softcap=model.spec.final_softcap,
                                       entropy=True)  # fmt: skip
        sft_loss(logprob, tokens).backward()

    step()
    optimizer.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    alive = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        top = max(top, alive)
    setup = setup_of(recipe, config)
    # What stands (a batch's ids, float32 gradients of bf16 parameters) was there before the measurement.
    peak = step_peak(setup)
    planned = sum(v for k, v in peak.items.items() if k not in STANDING) - 24 * tokens
    if setup.full and setup.itemsize == 2:
        planned -= 4 * sum(trained_sizes(setup))
    return top, planned


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama-3.2-1b", {}),
    "llama without checkpointing": ("llama-3.2-1b", {"checkpointing": False}),
    "llama in float32": ("llama-3.2-1b", {"dtype": "fp32"}),
    "llama, all weights": ("llama-3.1-8b", {"lora": None}),
    "llama, all weights, tied, no checkpointing": ("llama-3.2-1b", {"lora": None, "checkpointing": False}),
    "llama, all weights, float32": ("llama-3.1-8b", {"lora": None, "dtype": "fp32"}),
    "two targets": ("llama-3.2-1b", {"lora": {"r": 64, "targets": ["q_proj", "down_proj"]}, "checkpointing": False}),
    "dora": ("llama-3.2-1b", {"lora": {"dora": True}, "checkpointing": False}),
    "dropout": ("llama-3.2-1b", {"lora": {"dropout": 0.1}}),
    "qwen2": ("qwen2.5-0.5b", {"checkpointing": False}),
    "qwen3": ("qwen3-0.6b", {}),
    "qwen3 without checkpointing": ("qwen3-0.6b", {"checkpointing": False}),
    "gemma2": ("gemma-2-2b", {"checkpointing": False}),
    "gemma2 with checkpointing": ("gemma-2-2b", {}),
    "gemma3": ("gemma-3-1b", {}),
    "olmo2": ("olmo-2-1b", {"checkpointing": False}),
    "phi3": ("phi-3-mini", {}),
    "granite": ("granite-3.1-2b", {"checkpointing": False}),
    "smollm3": ("smollm3-3b", {}),
    "chunked": ("llama-3.2-1b", {"mlp_chunk": 64}),
    "chunked without checkpointing": ("llama-3.2-1b", {"mlp_chunk": 64, "checkpointing": False}),
    "chunked, one kept in bf16": ("llama-3.2-1b", {"mlp_chunk": 100, "checkpointing": "bf16", "dtype": "fp32"}),
    "chunked, all weights": ("llama-3.1-8b", {"mlp_chunk": 64, "lora": None}),
    "chunked, dora and dropout": ("qwen3-0.6b", {"mlp_chunk": 32, "lora": {"dora": True, "dropout": 0.1}}),
    "chunked gemma2": ("gemma-2-2b", {"mlp_chunk": 64}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_planned(case: str) -> None:
    name, keys = CASES[case]
    config = {**architecture(name), **SHAPE}
    if "query_pre_attn_scalar" in config:
        config["sliding_window"] = 64
    measured, planned = measured_peak(config, keys, tokens=256)
    assert planned == pytest.approx(measured, rel=0.08)
