"""Weights of a Transformer under their Hugging Face names: load, create, save.

`enginepost.model.layout` lists, for every tensor of a checkpoint, the parameter and the rows of it that hold the tensor, so loading
reads straight into its place and saving writes views: neither holds a second copy of the model. Linear layers that are in 4 bits or
streamed are no parameters: `enginepost.model.blob` says how a block of them lies in memory.
"""

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from enginepost.checkpoint import (
    Checkpoint,
    Writer,
    copy_side_files,
    is_quantized,
    read_quantized,
    weight_names,
    write_bytes,
)
from enginepost.checkpoint.cache import quantized_copy
from enginepost.errors import EnginepostError
from enginepost.model.blob import PackedMatrix, blob_layout
from enginepost.model.layout import Entry, backbone_config, layout, read_config, starting_value
from enginepost.model.residency import SLOTS, Residency, StoredTable, place
from enginepost.model.spec import FAMILIES, ModelSpec
from enginepost.model.transformer import Transformer


def load_model(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu",
    adapter: str | Path | None = None, *, quantize: str | None = None, weights: Residency = "resident", slots: int = SLOTS,
    classifier: bool = False,
) -> Transformer:  # fmt: skip
    """Load a Hugging Face model directory, and a PEFT adapter on top of it where one is named.

    Args:
        path: config.json and safetensors, single or sharded.
        dtype: of weights and activations, float32 or bfloat16 (float64 runs the reference kernels).
        quantize: "nf4", "nf4-double" or "fp4": the linear layers of the blocks in 4 bits, frozen. They are quantised tensor by
            tensor, into a copy that is kept on disk (`enginepost.checkpoint.cache`). A `*-bnb-4bit` checkpoint stays in 4 bits.
        weights: where the linear layers of the blocks live, "resident", "host" or "disk" (`enginepost.model.residency`); what is
            not resident cannot train.
        slots: blocks that have room in memory when weights are streamed.
        classifier: the directory holds a classification model; it is read without its head (`enginepost.model.scorer` reads that).

    Returns: a Transformer in evaluation mode.
    Raises: EnginepostError for an unsupported config, a missing, unexpected or misshapen tensor, a file that cannot be read.
    """
    path, device = Path(path), torch.device(device)
    if weights not in get_args(Residency):
        raise EnginepostError(f"weights {weights!r} is not known; use {', '.join(get_args(Residency))}")
    config = read_config(path)
    if classifier:
        config = backbone_config(config)
    try:
        spec = ModelSpec.from_config(config)
    except EnginepostError as error:
        raise type(error)(f"{path}: {error}") from None
    checkpoint = Checkpoint(path if quantize is None else quantized_copy(path, quantize))
    check_names(checkpoint, spec, path, also={"score.weight", "score.bias"} if classifier else set())
    entries = layout(spec)
    streamed = weights == "disk" or (weights == "host" and device.type != "cpu")
    frozen = streamed or any(is_quantized(checkpoint, entry.name) for entry in entries)
    on_disk = weights == "disk" and device.type == "cpu"
    model = Transformer(
        spec, config, dtype, device, linears="meta" if frozen else None, tables="meta" if on_disk else None
    )
    own = dict(model.named_parameters())
    for entry in entries:
        if not is_quantized(checkpoint, entry.name):
            _check_dtype(checkpoint.dtype(entry.name), entry, path)
        if on_disk and entry.parameter in ("embedding", "head"):
            del model._parameters[entry.parameter]
            setattr(model, entry.parameter, StoredTable(checkpoint, entry.name, dtype))
        elif not (frozen and entry.linear):
            _read(checkpoint, entry, own[entry.parameter].detach()[entry.start : entry.stop])
    if frozen:
        layouts = [blob_layout(checkpoint, spec, i, dtype) for i in range(len(spec.layers))]
        model.quantization = next(
            (p.kind for found in layouts for p in found.matrices if isinstance(p, PackedMatrix)), None
        )
        model.stream = place(list(model.blocks), layouts, device, weights if streamed else "resident", slots)
    if adapter is not None:
        from enginepost.model.lora import load_adapter

        load_adapter(model, adapter)
    return model.eval()


def _read(checkpoint: Checkpoint, entry: Entry, out: Tensor) -> None:
    if is_quantized(checkpoint, entry.name):  # the head or the embedding: not among what bitsandbytes packs
        raise EnginepostError(
            f"{checkpoint.file(entry.name)}: tensor {entry.name!r} is in 4 bits; only the linear layers of the blocks can be"
        )
    if out.device.type == "cpu":
        checkpoint.read_into(entry.name, out)
        return
    on_host = torch.empty(out.shape, dtype=out.dtype)
    checkpoint.read_into(entry.name, on_host)
    out.copy_(on_host)


def check_names(checkpoint: Checkpoint, spec: ModelSpec, path: Path, also: AbstractSet[str] = frozenset()) -> None:
    """Raise unless the checkpoint has exactly the tensors of the model, in their shapes; `also`: others that it may have."""
    wanted = {e.name: e.shape for e in layout(spec)}
    # A tied head may be stored beside the embedding; buffers of old exporters hold nothing that the config does not say.
    ignored = ({"lm_head.weight"} if spec.tied else set()) | also
    found = {n for n in weight_names(checkpoint) if n not in ignored and not n.endswith("rotary_emb.inv_freq")}
    missing, unexpected = [n for n in wanted if n not in found], sorted(found - wanted.keys())
    if missing or unexpected:
        raise EnginepostError(
            f"{path}: the tensors are not those of a {spec.family} model with this config.json: "
            + "; ".join(
                f"{word} {_few(names)}" for word, names in (("missing", missing), ("unexpected", unexpected)) if names
            )
            + ". Is config.json that of another model?"
        )
    for name, shape in wanted.items():
        quantized = is_quantized(checkpoint, name)
        has = read_quantized(checkpoint, name).shape if quantized else tuple(checkpoint.shape(name))
        if has != shape:
            raise EnginepostError(
                f"{path}: tensor {name!r} has shape {list(has)}, but config.json asks for {list(shape)}"
            )


def _few(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_dtype(dtype: torch.dtype, entry: Entry, path: Path) -> None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise EnginepostError(
            f"{path}: tensor {entry.name!r} has dtype {str(dtype).removeprefix('torch.')}; expected float32, float16 or "
            "bfloat16, or 4-bit weights in the layout of bitsandbytes"
        )


def create_model(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu"
) -> Transformer:
    """A model with random weights: matrices normal with the config's `initializer_range`, norms one, biases zero.

    The same seed gives the same weights, drawn in float32 in the order of `layout`. Raises ConfigError for an unsupported config.
    """
    spec = ModelSpec.from_config(dict(config))
    model = Transformer(spec, dict(config), dtype, device)
    generator = torch.Generator().manual_seed(seed)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for entry in layout(spec):
            rows = own[entry.parameter][entry.start : entry.stop]
            value = starting_value(entry, spec)
            if value is None:
                rows.copy_(torch.empty(entry.shape).normal_(0.0, spec.initializer_range, generator=generator))
            else:
                rows.fill_(value)
    return model


def save_model(
    model: Transformer, directory: str | Path, source: str | Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Write a Hugging Face model directory that transformers and `load_model` read.

    Args: directory: made if missing; source: the model directory whose tokenizer, template and generation config are copied byte for
        byte; dtype: of the stored weights, default the model's own.
    The config is written as it came, but for the dtype it states. Raises EnginepostError when the model carries an adapter.
    """
    if model.lora_settings is not None:
        raise EnginepostError(
            "save_model writes base weights, but the model carries a LoRA adapter: write the adapter, and fuse it into a copy "
            "of the base with `enginepost fuse`"
        )
    directory = Path(directory)
    dtype = dtype or model.dtype
    config = dict(model.config)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = config.get("architectures") or [FAMILIES[model.spec.family].architecture]
    tensors = model.checkpoint_tensors()
    with Writer(directory, {n: (dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.to(dtype))
        if source is not None:
            copy_side_files(source, directory)
        write_bytes(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
