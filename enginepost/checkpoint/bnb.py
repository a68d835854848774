"""4-bit checkpoints in the layout of bitsandbytes (`*-bnb-4bit`): read without it, and written as it writes them.

For a quantised layer X a file holds

    X.weight                                  uint8 [ceil(N / 2), 1]          two codes a byte (or viewed as another dtype)
    X.weight.absmax                           float32, or uint8 when nested   one scale per block
    X.weight.quant_map                        float32 [16]                    the codebook
    X.weight.nested_absmax, .nested_quant_map float32                         only when nested (double quantisation)
    X.weight.quant_state.bitsandbytes__nf4    uint8                           JSON: type, block sizes, dtype, shape, nested offset

(bitsandbytes/functional.py, `QuantState.as_dict`), and config.json says so under `quantization_config`, as transformers has it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginepost.checkpoint.atomic import write_json
from enginepost.checkpoint.format import CheckpointError, parse_json
from enginepost.checkpoint.fuse import Progress, appearing, check_output, model_config
from enginepost.checkpoint.reader import Checkpoint
from enginepost.checkpoint.side_files import copy_side_files
from enginepost.checkpoint.writer import Writer
from enginepost.kernels.nf4 import (
    NESTED_BLOCK,
    TYPES,
    NF4Weight,
    codebook,
    dynamic_code,
    quantize_blockwise,
)
from enginepost.kernels.nf4 import quantize as quantize_tensor

CHUNK = 1 << 22  # elements quantised at once; a multiple of every block size
_STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in TYPES)
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CONV1D = ("gpt2", "openai-gpt")  # families that store linear weights transposed


def is_quantized(checkpoint: Checkpoint, name: str) -> bool:
    """Whether tensor `name` is the codes of a 4-bit weight."""
    return any(name + state in checkpoint for state in _STATES)


def weight_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors of the model: names without those that only belong to a 4-bit weight."""
    quantized = {name.removesuffix(state) for name in checkpoint.names for state in _STATES if name.endswith(state)}
    return [
        name
        for name in checkpoint.names
        if not any(name.endswith(end) and name.removesuffix(end) in quantized for end in _COMPANIONS)
    ]


def read_quantized(checkpoint: Checkpoint, name: str) -> NF4Weight:
    """One 4-bit weight of a checkpoint; its tensors are views of the mapped file.

    Raises:
        CheckpointError: naming the tensor: it is not quantised, its description is damaged, sizes do not fit together, or it was
            made with a codebook or a nested block size other than those of bitsandbytes.
    """
    kinds = [kind for kind, state in zip(TYPES, _STATES, strict=True) if name + state in checkpoint]
    if len(kinds) != 1:
        found = "two descriptions" if kinds else "no description"
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} has {found} of a 4-bit weight ({', '.join(name + s for s in _STATES)})."
        )
    state = f"{name}.quant_state.bitsandbytes__{kinds[0]}"
    path = checkpoint.file(state)
    where = f"{path}: tensor {state!r}"
    text = checkpoint.tensor(state)
    if text.dtype != torch.uint8:
        raise CheckpointError(f"{where}: expected JSON in uint8, found {text.dtype}.")
    said = parse_json(bytes(text.reshape(-1).tolist()), path, f"tensor {state!r}")
    if not isinstance(said, dict):
        raise CheckpointError(f"{where}: expected a JSON object.")
    shape, dtype = said.get("shape"), _DTYPES.get(str(said.get("dtype")))
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where}: shape must be a list of sizes, found {shape!r}.")
    if said.get("quant_type") != kinds[0] or dtype is None or type(said.get("blocksize")) is not int:
        raise CheckpointError(
            f"{where}: expected quant_type {kinds[0]!r}, a dtype of {', '.join(_DTYPES)} and an integer blocksize, found {said}."
        )
    table = checkpoint.tensor(name + ".quant_map")
    if table.shape != (16,) or not torch.allclose(table.float(), codebook(kinds[0]), rtol=0, atol=1e-6):
        raise CheckpointError(f"{path}: tensor {name + '.quant_map'!r} is not the {kinds[0]} codebook; unsupported.")
    nested: dict[str, Any] = {}
    if name + ".nested_absmax" in checkpoint:
        offset = said.get("nested_offset")
        if said.get("nested_blocksize") != NESTED_BLOCK or not isinstance(offset, int | float):
            raise CheckpointError(
                f"{where}: expected a nested_blocksize of {NESTED_BLOCK} and a number nested_offset, found {said}."
            )
        nested = {
            "nested_absmax": checkpoint.tensor(name + ".nested_absmax"),
            "nested_code": checkpoint.tensor(name + ".nested_quant_map"),
            "offset": float(offset),
        }
    packed = checkpoint.tensor(name).reshape(-1).view(torch.uint8)  # quant_storage may be any dtype
    try:
        return NF4Weight(
            packed, checkpoint.tensor(name + ".absmax"), tuple(shape), said["blocksize"], kinds[0], dtype, **nested
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: tensor {name!r}: {error}; the file is damaged.") from None


def quantized_tensors(weight: NF4Weight) -> dict[str, torch.Tensor]:
    """What bitsandbytes stores for a weight: {"" | ".absmax" | ...: tensor}, keys to append to its name."""
    tensors = {"": weight.packed.view(-1, 1), ".absmax": weight.absmax, ".quant_map": codebook(weight.quant_type)}
    if weight.nested_absmax is not None and weight.nested_code is not None:
        tensors[".nested_absmax"] = weight.nested_absmax
        tensors[".nested_quant_map"] = weight.nested_code
    text = _description(weight.shape, weight.dtype, weight.blocksize, weight.quant_type, weight.nested, weight.offset)
    tensors[f".quant_state.bitsandbytes__{weight.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def _description(
    shape: Sequence[int], dtype: torch.dtype, blocksize: int, quant_type: str, nested: bool, offset: float
) -> bytes:
    said: dict[str, Any] = {
        "quant_type": quant_type,
        "blocksize": blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if nested:
        said |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(said).encode("utf-8")


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did."""

    tensors: int  # in the model
    quantized: int
    nbytes: int  # of tensors, before
    quantized_nbytes: int  # and after
    files: tuple[str, ...]


def quantize(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    quant_type: str = "nf4",
    double: bool = False,
    blocksize: int = 64,
    skip: Sequence[str] = (),
    shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Write a model in 4 bits, as transformers with bitsandbytes would save it.

    The weights of linear layers inside the numbered blocks are quantised; embeddings, the head, norms and biases stay as they are.
    Tensors are read from the memory map and written in pieces, so memory does not grow with the model; double quantisation reads
    the weights twice, since the mean of all scales comes before the first of them.

    Args:
        model_dir: a Hugging Face model directory, not quantised.
        out_dir: new or empty directory; it appears whole, at the end.
        quant_type: "nf4" or "fp4"; double: the scales in 8 bits too; blocksize: elements per scale.
        skip: modules to leave as they are, by the end of their name ("down_proj") or its beginning ("model.layers.0").
        shard_bytes: the most bytes of tensors in a file; progress: called after every tensor.
    Raises:
        CheckpointError: nothing to quantise, a model that is quantised already, a weight with NaN or infinity, a disk that is full.
        ValueError: quant_type or blocksize out of range.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir).resolve()
    check_output(out_dir, model_dir)
    config = parse_json(model_config(model_dir), model_dir / "config.json", "the model configuration")
    base = Checkpoint(model_dir)
    _check_model(base, config)
    chosen = [name for name in base.names if is_linear(base, name) and not _skipped(name, skip)]
    if not chosen:
        raise CheckpointError(f"{model_dir}: has no linear weights inside numbered layers to quantise.")
    offsets: dict[str, float] = {}
    for name in chosen if double else ():
        offsets[name] = torch.cat([w.absmax for _, w in _pieces(base, name, blocksize, quant_type)]).mean().item()
    declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in base.names:
        if name in chosen:
            declared |= _declared(base, name, blocksize, quant_type, offsets.get(name))
        else:
            declared[name] = (base.dtype(name), base.shape(name))
    with appearing(out_dir) as partial:
        with Writer(partial, declared, metadata={"format": "pt", **base.metadata}, shard_bytes=shard_bytes) as writer:
            done = 0
            for name in base.names:
                if name in chosen:
                    _write(writer, base, name, blocksize, quant_type, offsets.get(name))
                else:
                    writer.write(name, base.tensor(name))
                base.drop(name)
                done += base.nbytes(name)
                if progress is not None:
                    progress(done, sum(map(base.nbytes, base.names)), name)
            total = writer.total_size
        copy_side_files(model_dir, partial)
        write_json(
            partial / "config.json", {**config, "quantization_config": _config(config, quant_type, double, skip)}
        )
        files = tuple(sorted(path.name for path in partial.iterdir()))
    return QuantizeReport(len(base), len(chosen), sum(map(base.nbytes, base.names)), total, files)


def dequantize(model_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, shard_bytes: float = 5e9) -> None:
    """Write a 4-bit model as the numbers that its codes stand for, in the dtype that it was quantised from, one tensor at a time.

    Args: model_dir: a `*-bnb-4bit` directory; out_dir: new or empty, it appears whole, at the end.
    Raises: CheckpointError: a model that is not in 4 bits, a damaged tensor, a disk that is full.
    """
    from enginepost.kernels.nf4 import dequantize as dequantize_tensor

    model_dir, out_dir = Path(model_dir), Path(out_dir).resolve()
    check_output(out_dir, model_dir)
    config = parse_json(model_config(model_dir), model_dir / "config.json", "the model configuration")
    source = Checkpoint(model_dir)
    names = weight_names(source)
    if len(names) == len(source.names):
        raise CheckpointError(
            f"{model_dir}: holds no weights in the 4-bit layout of bitsandbytes; there is nothing to dequantise."
        )
    config.pop("quantization_config", None)
    coded = {name: read_quantized(source, name) for name in names if is_quantized(source, name)}  # views of the map
    declared = {
        name: (coded[name].dtype, coded[name].shape) if name in coded else (source.dtype(name), source.shape(name))
        for name in names
    }
    with appearing(out_dir) as partial:
        with Writer(partial, declared, metadata={"format": "pt", **source.metadata}, shard_bytes=shard_bytes) as writer:
            for name in names:
                writer.write(name, dequantize_tensor(coded[name]) if name in coded else source.tensor(name))
                source.drop(name)
        copy_side_files(model_dir, partial)
        write_json(partial / "config.json", config)


def is_linear(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the weight of a linear layer inside the numbered blocks of a model: what transformers quantises.

    transformers goes by the class of the module, and leaves the head and what is tied to it. Here the name has to do: a matrix
    called `weight` under a number (`model.layers.3.`) that is not an embedding, a norm, or the router of experts.
    """
    if not re.search(r"\.\d+\..*\.weight$", name) or len(checkpoint.shape(name)) != 2:
        return False
    return not re.search(r"embed|norm|router|\.gate\.weight$|lm_head", name)


def _skipped(name: str, skip: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    return any(module.endswith(key) or module == key or module.startswith(key + ".") for key in skip)


def _check_model(base: Checkpoint, config: Any) -> None:
    where = base.path / "config.json"
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: expected a JSON object.")
    if config.get("quantization_config") or any(is_quantized(base, name) for name in base.names):
        raise CheckpointError(f"{base.path}: is quantised already; quantise the original float16 or bfloat16 model.")
    if config.get("model_type") in _CONV1D:
        raise CheckpointError(
            f"{where}: model_type {config['model_type']!r} stores its linear weights transposed; unsupported here."
        )
    for name in base.names:
        if is_linear(base, name) and base.dtype(name) not in _DTYPES.values():
            raise CheckpointError(
                f"{base.file(name)}: tensor {name!r} is {base.dtype(name)}; {', '.join(_DTYPES)} can be quantised."
            )


def _pieces(base: Checkpoint, name: str, blocksize: int, quant_type: str) -> Iterator[tuple[int, NF4Weight]]:
    """(element offset, quantised piece) of a weight."""
    flat = base.tensor(name).reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = quantize_tensor(flat[start : start + CHUNK], blocksize=blocksize, quant_type=quant_type)
        if not torch.isfinite(piece.absmax).all():
            raise CheckpointError(f"{base.file(name)}: tensor {name!r} holds NaN or infinity and cannot be quantised.")
        base.drop(name)
        yield start, piece


def _declared(
    base: Checkpoint, name: str, blocksize: int, quant_type: str, offset: float | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    shape = base.shape(name)
    size = math.prod(shape)
    blocks = -(-size // blocksize)
    nested = offset is not None
    text = _description(shape, base.dtype(name), blocksize, quant_type, nested, offset or 0.0)
    declared: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "": (torch.uint8, ((size + 1) // 2, 1)),
        ".absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        ".quant_map": (torch.float32, (16,)),
        f".quant_state.bitsandbytes__{quant_type}": (torch.uint8, (len(text),)),
    }
    if nested:
        declared[".nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        declared[".nested_quant_map"] = (torch.float32, (256,))
    return {name + end: what for end, what in declared.items()}


def _write(writer: Writer, base: Checkpoint, name: str, blocksize: int, quant_type: str, offset: float | None) -> None:
    """Quantise one weight piece by piece."""
    waiting = torch.empty(0)  # scales of an unfinished nested block
    done = 0
    size = math.prod(base.shape(name))
    for start, piece in _pieces(base, name, blocksize, quant_type):
        writer.write(name, piece.packed, start // 2)
        if offset is None:
            writer.write(name + ".absmax", piece.absmax, start // blocksize)
            continue
        waiting = torch.cat([waiting, piece.absmax - offset])
        last = start + CHUNK >= size
        ready = len(waiting) if last else len(waiting) // NESTED_BLOCK * NESTED_BLOCK
        if ready:
            codes, nested_absmax = quantize_blockwise(waiting[:ready], blocksize=NESTED_BLOCK)
            writer.write(name + ".absmax", codes, done)
            writer.write(name + ".nested_absmax", nested_absmax, done // NESTED_BLOCK)
            waiting, done = waiting[ready:], done + ready
    writer.write(name + ".quant_map", codebook(quant_type))
    if offset is not None:
        writer.write(name + ".nested_quant_map", dynamic_code())
    text = _description(
        base.shape(name),
        base.dtype(name),
        blocksize,
        quant_type,
        offset is not None,
        offset if offset is not None else 0.0,
    )
    writer.write(f"{name}.quant_state.bitsandbytes__{quant_type}", torch.tensor(list(text), dtype=torch.uint8))


def _config(config: Mapping[str, Any], quant_type: str, double: bool, skip: Sequence[str]) -> dict[str, Any]:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip) or None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
