"""PEFT LoRA adapters on disk: `adapter_config.json` and `adapter_model.safetensors`.

The tensors of the module at path p (as Hugging Face names it, `model.layers.0.self_attn.q_proj`):

    base_model.model.p.lora_A.weight           [r, in]
    base_model.model.p.lora_B.weight           [out, r]
    base_model.model.p.lora_magnitude_vector   [out]      DoRA only; no `.weight`
    base_model.model.p.weight, .bias           a whole tensor that replaces the base's (modules_to_save, bias: all)

and the weight that they mean, with scaling = alpha / r, or alpha / sqrt(r) for rslora (arXiv 2312.03732):

    W' = W + scaling B A                                  LoRA (arXiv 2106.09685)
    W' = m / |W + scaling B A|_row * (W + scaling B A)    DoRA (arXiv 2402.09353)

`rank_pattern` and `alpha_pattern` map regular expressions to r and alpha; PEFT's rule is that the first key k for which
`(.*\\.)?(k)$` matches the path decides (peft/utils/other.py, get_pattern_key).

PEFT has many variants of LoRA. What is not the above is refused by name: applying half of an adapter gives a wrong model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from enginepost.checkpoint.atomic import make_directory, write_json
from enginepost.checkpoint.format import CheckpointError, parse_json
from enginepost.checkpoint.reader import Checkpoint
from enginepost.checkpoint.writer import save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TRAINED_OVER = "enginepost.trained_over"
PREFIX = "base_model.model."

# What PEFT itself writes for a plain LoRA; `write_adapter` completes a configuration with these.
DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
_HANDLED = {
    "alpha_pattern",
    "bias",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
}
_INERT = {  # say how the adapter was trained or made, not what its tensors mean
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights too


class LoraWeights(NamedTuple):
    """The adapter of one linear layer."""

    A: torch.Tensor  # [r, in]
    B: torch.Tensor  # [out, r]
    magnitude: torch.Tensor | None  # [out], DoRA only
    r: int
    alpha: float


@dataclass
class Adapter:
    """An adapter in memory.

    Attributes:
        config: what adapter_config.json says.
        parts: {module path: LoraWeights}, the path as Hugging Face names the module in the base model.
        full: {tensor name: tensor} that replace the base's own (modules_to_save, trained biases); most adapters have none.
    """

    config: dict[str, Any]
    parts: dict[str, LoraWeights]
    full: dict[str, torch.Tensor] = field(default_factory=dict)
    trained_over: str | None = (
        None  # "nf4", "nf4-double", "fp4": 4-bit weights; in the metadata of the file, as PEFT has no key
    )

    def scaling(self, path: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rslora."""
        part = self.parts[path]
        return part.alpha / (math.sqrt(part.r) if self.config.get("use_rslora") else part.r)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors under the names that PEFT gives them."""
        named: dict[str, torch.Tensor] = {}
        for path, part in self.parts.items():
            named[f"{PREFIX}{path}.lora_A.weight"] = part.A
            named[f"{PREFIX}{path}.lora_B.weight"] = part.B
            if part.magnitude is not None:
                named[f"{PREFIX}{path}.lora_magnitude_vector"] = part.magnitude
        for name, tensor in self.full.items():
            named[PREFIX + name] = tensor
        return named


def read_adapter(directory: str | os.PathLike[str], *, full_tensors: bool = False) -> Adapter:
    """Read a PEFT adapter; its tensors are views of the memory-mapped file.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        full_tensors: the caller applies `Adapter.full` too. Otherwise an adapter that has such tensors is refused, so that none is
            forgotten.
    Raises:
        CheckpointError: a missing or damaged file, a kind of adapter or an option that is not supported (by name), tensors that do
            not fit the configuration.
    """
    directory = Path(directory)
    config = _read_config(directory)
    path = directory / WEIGHTS
    if not path.exists():
        if (directory / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{directory}: has adapter_model.bin, a pickle that can run code when read, and no {WEIGHTS}. "
                "Load it with PEFT once and save it again: save_pretrained writes safetensors."
            )
        raise CheckpointError(f"{path}: no such file; an adapter directory holds {CONFIG} and {WEIGHTS}.")
    checkpoint = Checkpoint(path)
    adapter = parse_adapter(config, {name: checkpoint.tensor(name) for name in checkpoint.names}, directory)
    adapter.trained_over = checkpoint.metadata.get(TRAINED_OVER)
    if adapter.full and not full_tensors:
        raise CheckpointError(
            f"{directory}: besides LoRA it replaces whole tensors of the model ({_some(adapter.full)}), which cannot be "
            "applied on the fly. Fuse it first (`enginepost fuse MODEL ADAPTER OUT`) and use the result."
        )
    return adapter


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        text = path.read_bytes()
    except OSError as error:
        inside = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
        hint = f"; these directories in it are adapters: {', '.join(inside)}" if inside else ""
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}{hint}. A PEFT adapter directory was expected."
        ) from None
    config = parse_json(text, path, "the adapter configuration")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object.")
    return config


def parse_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str | os.PathLike[str]
) -> Adapter:
    """An Adapter from a PEFT configuration and tensors under PEFT names, everything checked; `where` is for messages."""
    config = dict(config)
    _check_config(config, where)
    found: dict[str, dict[str, torch.Tensor]] = {}
    full: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        path, kind = _split(key, where)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{where}: {key} is {tensor.dtype}; an adapter is float32, float16 or bfloat16.")
        if kind == "full":
            full[path] = tensor
        else:
            found.setdefault(path, {})[kind] = tensor
    if not found and not full:
        raise CheckpointError(f"{where}: holds no adapter weights.")
    parts = {path: _part(path, kinds, config, where) for path, kinds in found.items()}
    return Adapter(config, parts, full)


def _split(key: str, where: object) -> tuple[str, str]:
    """PEFT's name of a tensor -> (module path, "A" | "B" | "magnitude") or (tensor name, "full")."""
    if not key.startswith(PREFIX):
        raise CheckpointError(f"{where}: tensor {key} does not begin with {PREFIX!r} as PEFT's names do.")
    name = key[len(PREFIX) :]
    lora = re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|magnitude_vector(?:\.weight)?)", name)
    if lora and "lora_" not in lora[1] and "base_layer" not in lora[1]:
        return lora[1], lora[2] or "magnitude"
    name = re.sub(r"\.(base_layer|modules_to_save)\.(?=weight$|bias$)", ".", name)
    if "lora_" in name or "base_layer" in name or not name.endswith((".weight", ".bias")):
        raise CheckpointError(
            f"{where}: tensor {key} is of a kind that is not supported (LoRA of linear layers, DoRA, whole weights "
            "and biases are); merge the adapter with PEFT (merge_and_unload) and use the merged model."
        )
    return name, "full"


def _check_config(config: dict[str, Any], where: object) -> None:
    file = f"{where}: {CONFIG}"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are supported.")
    for key, value in config.items():
        if key == "init_lora_weights":
            if value not in _INITIALISATIONS:
                raise CheckpointError(
                    f"{file}: init_lora_weights is {value!r}, which changes the base weights as well. Save the adapter with PEFT's "
                    "path_initial_model_for_weight_conversion (or merge it there) and use that."
                )
        elif value and key not in _HANDLED and key not in _INERT and not (key in DEFAULTS and value == DEFAULTS[key]):
            raise CheckpointError(
                f"{file}: {key} = {value!r} is not supported, and leaving it out would give another model; merge the adapter with "
                "PEFT (merge_and_unload) and use the merged model."
            )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{file}: bias is {config['bias']!r}; expected none, all or lora_only.")
    r, alpha = config.get("r", DEFAULTS["r"]), config.get("lora_alpha", DEFAULTS["lora_alpha"])
    if not _is_number(r) or int(r) != r or r < 1:
        raise CheckpointError(f"{file}: r is {r!r}; expected a whole number above 0.")
    if not _is_number(alpha):
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r}; expected a number.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            raise CheckpointError(f"{file}: {key} is {patterns!r}; expected an object of numbers.")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{file}: {key}: {pattern!r} is not a regular expression: {error}.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**53  # no nan, no inf


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches a module path, by PEFT's rule."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _part(path: str, kinds: dict[str, torch.Tensor], config: dict[str, Any], where: object) -> LoraWeights:
    at = f"{where}: {path}"
    for kind in ("A", "B"):
        if kind not in kinds:
            raise CheckpointError(f"{at}: lora_{kind} is missing.")
    A, B, magnitude = kinds["A"], kinds["B"], kinds.get("magnitude")
    r = pattern_value(config.get("rank_pattern"), path, config.get("r", DEFAULTS["r"]))
    if int(r) != r or r < 1:
        raise CheckpointError(f"{at}: rank_pattern gives it the rank {r}; expected a whole number above 0.")
    alpha = pattern_value(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULTS["lora_alpha"]))
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
        raise CheckpointError(
            f"{at}: lora_A is {list(A.shape)} and lora_B is {list(B.shape)}; with the r = {r} that {CONFIG} gives this module they "
            f"must be [{r}, in] and [out, {r}]."
        )
    if (magnitude is not None) != bool(config.get("use_dora")):
        state = "has a lora_magnitude_vector" if magnitude is not None else "has no lora_magnitude_vector"
        raise CheckpointError(f"{at}: {state} and {CONFIG} says use_dora = {bool(config.get('use_dora'))}.")
    if magnitude is not None and tuple(magnitude.shape) != (B.shape[0],):
        raise CheckpointError(f"{at}: lora_magnitude_vector is {list(magnitude.shape)}; expected [{B.shape[0]}].")
    return LoraWeights(A, B, magnitude, int(r), alpha)


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter) -> None:
    """Write an adapter so that PEFT, vLLM and others load it; existing files are replaced, each atomically.

    The configuration is completed with PEFT's defaults; `target_modules` becomes the last names of the adapted modules when it is
    absent.

    Raises:
        CheckpointError: the disk is full, or tensors and configuration do not fit, such as an r or alpha of a part that differs from
            what `r`, `lora_alpha` and the patterns say.
    """
    directory = Path(directory)
    config = {**DEFAULTS, **adapter.config}
    config.pop("runtime_config", None)
    if config["target_modules"] is None:
        config["target_modules"] = sorted({path.rpartition(".")[2] for path in adapter.parts})
    config["lora_alpha"] = _whole(config["lora_alpha"])
    config["alpha_pattern"] = {pattern: _whole(alpha) for pattern, alpha in (config["alpha_pattern"] or {}).items()}
    tensors = adapter.tensors()
    checked = parse_adapter(config, tensors, directory)
    for path, part in adapter.parts.items():
        expected = checked.parts[path]
        if (part.r, part.alpha) != (expected.r, expected.alpha):
            raise CheckpointError(
                f"{directory}: {path} has r = {part.r}, alpha = {part.alpha}, and its configuration says r = {expected.r}, "
                f"alpha = {expected.alpha}; put the difference in rank_pattern and alpha_pattern."
            )
    make_directory(directory)
    said = {} if adapter.trained_over is None else {TRAINED_OVER: adapter.trained_over}
    save_tensors(directory / WEIGHTS, tensors, {"format": "pt", **said})
    write_json(directory / CONFIG, config)


def _whole(alpha: Any) -> Any:
    """PEFT's alphas are integers, and some readers insist."""
    return int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha


def _some(names: Mapping[str, object]) -> str:
    first = list(names)[:4]
    return ", ".join(first) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
