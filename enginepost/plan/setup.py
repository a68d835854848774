"""A recipe and a config.json -> Setup: everything that decides the memory of a training step."""

import dataclasses
from pathlib import Path
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.model.architectures import architecture
from enginepost.model.layout import read_config
from enginepost.model.spec import ModelSpec
from enginepost.plan.memory import Setup, adapter
from enginepost.plan.methods import adapter_config, beside
from enginepost.recipe import Recipe

ITEMSIZE = {"bf16": 2, "fp32": 4}


def config_of(model: str) -> dict[str, Any]:
    """The config.json of a model directory, or of a public architecture by its name.

    Raises: EnginepostError when `model` is neither.
    """
    path = Path(model)
    if path.exists():
        return read_config(path)
    try:
        return architecture(model)
    except EnginepostError as error:
        names = str(error).partition("; ")[2].partition(" Or give")[0]
        raise EnginepostError(
            f"{model} is not a directory; expected a Hugging Face model directory or the name of a public architecture; {names}"
        ) from None


def setup_of(
    recipe: Recipe,
    config: dict[str, Any],
    *,
    tokens: int | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> Setup:
    """What a recipe's steps hold.

    Args: config: the model's; tokens: of the largest micro-batch, default its most, batch_size bins (a pair's hold two of
        max_length); device: "cpu" or "cuda".
    Raises: ConfigError for an unsupported config, of the model or of one beside it, EnginepostError for an adapter that cannot be
        read, or a target that matches nothing.
    """
    spec = ModelSpec.from_config(config)
    keys: dict[str, Any] = {}
    if recipe.adapter is not None:
        said = adapter_config(recipe.adapter)
        targets = said.get("target_modules") or "all-linear"
        keys["dora"], keys["dropout"] = bool(said.get("use_dora")), bool(said.get("lora_dropout"))
        keys["ranks"], keys["adapter_sizes"] = adapter(
            spec, targets, int(said.get("r", 8)), said.get("rank_pattern") or {}, keys["dora"]
        )
    elif recipe.lora is not None:
        lora = recipe.lora
        keys["dora"], keys["dropout"] = lora.dora, lora.dropout > 0
        keys["ranks"], keys["adapter_sizes"] = adapter(spec, lora.targets, lora.r, lora.rank_pattern, lora.dora)
    alone = Setup(
        spec=spec,
        tokens=recipe.batch_size * recipe.max_length,
        micro_batches=recipe.gradient_accumulation,
        itemsize=ITEMSIZE[recipe.dtype],
        full=recipe.lora is None,
        checkpointing=recipe.checkpointing,
        mlp_chunk=recipe.mlp_chunk,
        quantize=recipe.quantize or stored_in_4_bits(config),
        weights=recipe.weights,
        moment_bits=8 if getattr(recipe, "optimizer", "adamw") == "adamw8bit" else 32,
        states=recipe.optimizer_states,
        in_backward=bool(getattr(recipe, "optimizer_in_backward", False)),
        device=device,
        threads=threads,
        **keys,
    )
    whole = dataclasses.replace(alone, **beside(recipe, alone))
    return whole if tokens is None else dataclasses.replace(whole, tokens=tokens)


def stored_in_4_bits(config: dict[str, Any]) -> str | None:
    """How a checkpoint with this config.json keeps its linear layers, as `quantize` names it; None for 16 bits and more."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return None
    kind = str(said.get("bnb_4bit_quant_type") or "nf4")
    return f"{kind}-double" if said.get("bnb_4bit_use_double_quant") else kind
