"""Finding and opening the models of a recipe: a directory, an earlier merge by its name, or a copy in Hugging Face's local cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginepost.checkpoint import Checkpoint, is_quantized
from enginepost.checkpoint.format import parse_json
from enginepost.merge.recipe import ModelRef
from enginepost.merge.registry import MergeError

_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks|layer)\.(\d+)\.")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_QUANTISED = (torch.uint8, torch.int8, torch.uint16, torch.uint32, torch.uint64)


@dataclass
class Model:
    """An opened input.

    ref: as in the recipe. directory: where it was found. config: of its text model where there are several.
    layers: how many it has. prefix: what comes before the layer's number in its tensors' names, such as `model.layers.`.
    """

    ref: ModelRef
    directory: Path
    checkpoint: Checkpoint
    config: dict[str, Any]
    layers: int
    prefix: str

    @property
    def tied(self) -> bool:
        text = text_config(self.config)
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))

    @property
    def vocabulary(self) -> int | None:
        size = text_config(self.config).get("vocab_size")
        return size if isinstance(size, int) else None


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else dict(config)


def locate(ref: ModelRef, recipe_file: str, earlier: Mapping[str, Path]) -> tuple[Path, Path | None]:
    """Directories of a model and of its adapter."""
    return _find(ref.path, ref.revision, recipe_file, earlier), (
        _find(ref.adapter, None, recipe_file, earlier) if ref.adapter else None
    )


def _find(path: str, revision: str | None, recipe_file: str, earlier: Mapping[str, Path]) -> Path:
    if path in earlier:
        return earlier[path]
    places = [Path(path).expanduser(), Path(recipe_file).parent / path]
    for place in places:
        if place.exists() and revision is not None:
            raise MergeError(
                f"{recipe_file}: {path}@{revision}: {place} is a directory here, which has no revisions. Leave @{revision} out."
            )
        if place.exists():
            return place
    cached = _hub_cache(path, revision)
    if cached is not None:
        return cached
    hint = f" If it is a model of the Hugging Face hub, fetch it first: huggingface-cli download {path}." * (
        path.count("/") == 1
    )
    raise MergeError(
        f"{recipe_file}: there is no model {path!r} here (looked for {' and '.join(dict.fromkeys(str(p) for p in places))}).{hint}"
    )


def _hub_cache(path: str, revision: str | None) -> Path | None:
    if path.count("/") != 1:
        return None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser() / f"models--{path.replace('/', '--')}"
    name = revision or "main"
    ref = hub / "refs" / name
    snapshot = hub / "snapshots" / (ref.read_text().strip() if ref.is_file() else name)
    return snapshot if snapshot.is_dir() else None


def open_model(ref: ModelRef, directory: Path) -> Model:
    """Read config and headers; refuse what cannot be merged."""
    checkpoint = Checkpoint(directory)
    home = directory if directory.is_dir() else directory.parent
    path = home / "config.json"
    try:
        config = parse_json(path.read_bytes(), path, "the model configuration")
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror}; a model directory has one.") from None
    if not isinstance(config, dict):
        raise MergeError(f"{path}: expected a JSON object.")
    quantised = config.get("quantization_config")
    odd = [
        name
        for name in checkpoint.names
        if checkpoint.dtype(name) in _QUANTISED or "float8" in str(checkpoint.dtype(name))
    ]
    if quantised or odd:
        kind = (
            quantised.get("quant_method", "unknown")
            if isinstance(quantised, dict)
            else f"{odd[0]} is {checkpoint.dtype(odd[0])}"
        )
        raise MergeError(
            f"{ref}: is quantised ({kind}); merging quantised weights adds up their rounding errors. Merge the original "
            "float16 or bfloat16 models and quantise the result; or, if there are none, pass --dequantize (dequantize=True), for "
            "the 4-bit layout of bitsandbytes."
        )
    counted: dict[str, set[int]] = {}
    for name in checkpoint.names:
        match = _LAYER.match(name)
        if match:
            counted.setdefault(name[: match.start(1)], set()).add(int(match[1]))
    said = next((text_config(config)[key] for key in _LAYER_COUNTS if key in text_config(config)), None)
    fitting = [prefix for prefix, numbers in counted.items() if len(numbers) == said]
    prefix = fitting[0] if fitting else max(counted, key=lambda p: len(counted[p]), default="")
    numbers = counted.get(prefix, set())
    if numbers != set(range(len(numbers))) or (said is not None and said != len(numbers)):
        raise MergeError(
            f"{ref}: config.json says {said} layers, and the checkpoint holds {len(numbers)} under {prefix!r}"
            f"{'' if numbers == set(range(len(numbers))) else ', with gaps'}; the model is incomplete."
        )
    return Model(ref, home, checkpoint, config, len(numbers), prefix)


def in_4_bits(directory: Path) -> bool:
    """Whether a model directory holds weights in bitsandbytes' 4-bit layout."""
    checkpoint = Checkpoint(directory)
    return any(is_quantized(checkpoint, name) for name in checkpoint.names)


def set_layers(config: dict[str, Any], layers: int) -> None:
    """Write the number of layers where the configuration keeps it, and shorten or repeat what is listed per layer."""
    for place in (config, config.get("text_config")):
        if not isinstance(place, dict):
            continue
        for key in _LAYER_COUNTS:
            if key in place:
                place[key] = layers
