"""LoRA on a Transformer: which matrices get an update, and the adapter under PEFT's names.

A module is what Hugging Face calls a linear layer ("model.layers.0.self_attn.q_proj"): rows start .. stop of one of our
fused weights. Its update is A `[r, in]`, B `[n, r]` in float32, and a magnitude `[n]` under DoRA. Target names, and the keys of rank
and alpha patterns, match as they do in PEFT. A is drawn as nn.Linear draws (uniform, bound 1/sqrt(in)), B is zero.
Sources: Hu et al. 2021 (arXiv 2106.09685); rank-stabilized scaling alpha / sqrt(r): Kalajdzievski 2023 (arXiv 2312.03732).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from enginepost.checkpoint import Adapter, LoraWeights, read_adapter, write_adapter
from enginepost.checkpoint.adapter import pattern_value
from enginepost.errors import EnginepostError
from enginepost.kernels.lora import LoraPart, row_norm
from enginepost.model.layout import Target, linear_modules, match_targets
from enginepost.model.transformer import Linear, Transformer


class Update(nn.Module):
    """The parameters of one module's update."""

    def __init__(self, r: int, alpha: float, scaling: float, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.r, self.alpha, self.scaling = r, alpha, scaling
        self.A = nn.Parameter(torch.empty(r, inputs, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(outputs, r, dtype=torch.float32, device=device))
        self.magnitude: nn.Parameter | None = None


@dataclasses.dataclass
class LoraSettings:
    """How a model's adapter was made: what `adapter_config.json` states."""

    r: int
    alpha: float
    dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def add_lora(
    model: Transformer, *, r: int, alpha: float, dropout: float = 0.0, target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False, use_dora: bool = False, rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Freeze the model and give the targeted modules a trainable update.

    Args:
        r, alpha: rank and scale; an update is scaled by alpha / r, or alpha / sqrt(r) with use_rslora.
        dropout: of the update's input, while training.
        target_modules: "all-linear", a regular expression for the whole module path, or a list of names or path endings.
        use_dora: train the magnitudes of the rows as well (Liu et al. 2024, arXiv 2402.09353).
        rank_pattern, alpha_pattern: {pattern: value} for modules whose path ends with a match.
        seed: the same seed draws the same A.

    Raises: EnginepostError for a target that matches nothing, or a model that has an adapter already.
    """
    targets = match_targets(model.spec, target_modules)
    settings = LoraSettings(
        r, alpha, dropout, target_modules if isinstance(target_modules, str) else list(target_modules), use_rslora,
        use_dora, dict(rank_pattern or {}), dict(alpha_pattern or {}),
    )  # fmt: skip
    shapes = {}
    for target in targets:
        rank = int(pattern_value(settings.rank_pattern, target.path, r))
        shapes[target.path] = (rank, float(pattern_value(settings.alpha_pattern, target.path, alpha)))
    attach(model, targets, shapes, settings)
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        update = _update(model, target)
        bound = 1.0 / math.sqrt(target.inputs)
        with torch.no_grad():
            update.A.copy_(torch.empty(update.A.shape).uniform_(-bound, bound, generator=generator))
        if update.magnitude is not None:
            _start_magnitude(model, target, update)


def attach(
    model: Transformer, targets: Sequence[Target], shapes: Mapping[str, tuple[int, float]], settings: LoraSettings
) -> None:
    """Freeze the model and add updates of the given (rank, alpha); A is uninitialized, B zero."""
    if model.lora_settings is not None:
        raise EnginepostError("the model has a LoRA adapter already; load the base model anew to add another")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lora_settings = settings
    for target in targets:
        rank, alpha = shapes[target.path]
        if rank < 1:
            raise EnginepostError(f"LoRA rank of {target.path} must be at least 1, got {rank}")
        linear = _linear(model, target)
        scaling = alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank
        update = Update(rank, alpha, scaling, target.inputs, target.stop - target.start, model.norm.device)
        if settings.use_dora:
            update.magnitude = nn.Parameter(torch.empty(target.stop - target.start, device=model.norm.device))
        linear.lora[target.suffix] = update
        linear.dropout, linear.has_magnitude = settings.dropout, settings.use_dora
        part = LoraPart(update.A, update.B, scaling, target.start, update.magnitude)
        linear.parts = (*linear.parts, part)


def _linear(model: Transformer, target: Target) -> Linear:
    linear = model.get_submodule(target.linear)
    assert isinstance(linear, Linear)
    return linear


def _update(model: Transformer, target: Target) -> Update:
    update = _linear(model, target).lora[target.suffix]
    assert isinstance(update, Update)
    return update


@torch.no_grad()
def _start_magnitude(model: Transformer, target: Target, update: Update) -> None:
    """DoRA begins as the base model: the magnitude is the norm of each adapted row, which B = 0 makes the base's."""
    part = LoraPart(update.A, update.B, update.scaling, target.start)
    model.enter(target.block)
    update.magnitude.copy_(row_norm(_linear(model, target).weight, part))  # type: ignore[union-attr]


def updates(model: Transformer) -> dict[str, Update]:
    """Module path -> update, of those that have one, in the order of the layers."""
    return {
        t.path: _update(model, t) for t in linear_modules(model.spec) if t.suffix in _linear(model, t).lora
    }  # fmt: skip


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """The adapter under PEFT's names ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ...): the parameters."""
    tensors: dict[str, Tensor] = {}
    for path, update in updates(model).items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = update.A
        tensors[f"{prefix}.lora_B.weight"] = update.B
        if update.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = update.magnitude
    return tensors


@contextlib.contextmanager
def adapter_off(model: Transformer) -> Iterator[None]:
    """Inside, the model computes what its base computes."""
    kept = {m: m.parts for m in model.modules() if isinstance(m, Linear) and m.parts}
    for linear in kept:
        linear.parts = ()
    try:
        yield
    finally:
        for linear, parts in kept.items():
            linear.parts = parts


def load_adapter(model: Transformer, directory: str | Path, *, full_tensors: bool = False) -> dict[str, Tensor]:
    """Put a PEFT LoRA adapter on top of a base model; the base is frozen, the adapter trains.

    full_tensors: the caller applies the whole tensors that the adapter brings (a score head), which are returned by name.
    Raises: EnginepostError for a damaged adapter, or one whose modules or shapes are not those of the model.
    """
    adapter = read_adapter(directory, full_tensors=full_tensors)
    modules = {m.path: m for m in linear_modules(model.spec)}
    for path, part in adapter.parts.items():
        if path not in modules:
            raise EnginepostError(
                f"{directory}: adapts {path!r}, and the {model.spec.family} model with {len(model.spec.layers)} layers has no such "
                "linear layer in its blocks; is it an adapter of another model?"
            )
        wanted = (modules[path].stop - modules[path].start, modules[path].inputs)
        if (part.B.shape[0], part.A.shape[1]) != wanted:
            raise EnginepostError(
                f"{directory}: {path} has lora_B {list(part.B.shape)} and lora_A {list(part.A.shape)}, but the model's weight is "
                f"{list(wanted)}; is it an adapter of another model?"
            )
    config = adapter.config
    settings = LoraSettings(
        int(config.get("r", 8)), float(config.get("lora_alpha", 8)), float(config.get("lora_dropout") or 0.0),
        config.get("target_modules") or sorted({m.rpartition(".")[2] for m in adapter.parts}),
        bool(config.get("use_rslora")), bool(config.get("use_dora")), dict(config.get("rank_pattern") or {}),
        dict(config.get("alpha_pattern") or {}),
    )  # fmt: skip
    targets = [modules[path] for path in modules if path in adapter.parts]
    attach(model, targets, {path: (part.r, float(part.alpha)) for path, part in adapter.parts.items()}, settings)
    with torch.no_grad():
        for target in targets:
            update, part = _update(model, target), adapter.parts[target.path]
            update.A.copy_(part.A)
            update.B.copy_(part.B)
            if update.magnitude is not None and part.magnitude is not None:
                update.magnitude.copy_(part.magnitude)
    return adapter.full


def save_adapter(
    model: Transformer, directory: str | Path, base_model: str | Path | None = None, *,
    full: Mapping[str, Tensor] | None = None, task_type: str = "CAUSAL_LM",
) -> None:  # fmt: skip
    """Write the adapter as PEFT does: adapter_config.json and adapter_model.safetensors.

    base_model: what adapter_config.json names as its base; full: whole tensors that go with it (a score head).
    Raises EnginepostError when the model has no adapter.
    """
    settings = model.lora_settings
    if settings is None:
        raise EnginepostError("the model has no LoRA adapter to save")
    found = updates(model)
    targets = settings.target_modules
    if targets == "all-linear":  # spelled out, as PEFT does
        targets = sorted({path.rpartition(".")[2] for path in found})
    config = {
        "base_model_name_or_path": None if base_model is None else str(base_model), "r": settings.r,
        "lora_alpha": _whole(settings.alpha), "lora_dropout": settings.dropout, "target_modules": targets,
        "use_rslora": settings.use_rslora, "use_dora": settings.use_dora, "rank_pattern": settings.rank_pattern,
        "alpha_pattern": {k: _whole(v) for k, v in settings.alpha_pattern.items()}, "task_type": task_type,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in full or {}}) or None,
    }  # fmt: skip
    parts = {
        path: LoraWeights(
            u.A.detach(), u.B.detach(), None if u.magnitude is None else u.magnitude.detach(), u.r, _whole(u.alpha)
        )
        for path, u in found.items()
    }  # fmt: skip
    write_adapter(directory, Adapter(config, parts, dict(full or {}), trained_over=model.quantization))


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x
