"""Fuse an adapter into its base model, tensor by tensor: what comes out is an ordinary Hugging Face model directory.

    W' = round(W + scaling B A)                                 for LoRA
    W' = round(m / |W + scaling B A|_row (W + scaling B A))     for DoRA

computed in float32 and rounded once, to the dtype of W. Rows are independent in both, so the work goes in blocks of rows, and peak
memory is a few blocks whatever the size of the model: weights come from the memory map and leave for the new file.

An adapter that was trained over 4-bit weights (QLoRA) has two honest bases, and the result says which it is on. The original weights
are closer to the model as it was; their round trip through 4 bits, code * scale in float32, is what the adapter was trained to
correct. A `*-bnb-4bit` model has only the latter. Then one matrix at a time is in memory as float32. The result is 16-bit in every
case: nothing is quantised again.

The result appears whole: it is written in a hidden directory beside it, and renamed at the end.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginepost.checkpoint.adapter import Adapter, read_adapter
from enginepost.checkpoint.atomic import sync_directory, write_bytes, write_json
from enginepost.checkpoint.format import CheckpointError, parse_json
from enginepost.checkpoint.reader import Checkpoint, nearest
from enginepost.checkpoint.side_files import copy_side_files
from enginepost.checkpoint.writer import Writer
from enginepost.kernels.nf4 import dequantize, quantize

BLOCK_BYTES = 8 << 20  # of float32; what is held at once
_TARGETS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, tensor name


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did."""

    tensors: int  # in the model
    fused: int  # that took a low-rank update
    replaced: int  # that the adapter held whole
    nbytes: int
    files: tuple[str, ...]
    base: str = "original"  # or the round trip: "nf4", "nf4-double", "fp4"; of a model that is in 4 bits itself, "4bit"
    trained_over: str | None = (
        None  # what the adapter says it was trained over; None: 16-bit weights, or it does not say
    )


def fuse(
    model_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    base: str | None = None,
    shard_bytes: float | None = None,
    progress: Progress | None = None,
) -> FuseReport:
    """Write base model + adapter as a model of its own.

    Args:
        model_dir: Hugging Face directory of the base model, 16-bit or `*-bnb-4bit`.
        adapter_dir: PEFT LoRA or DoRA adapter.
        out_dir: new or empty directory.
        base: "original" (default), or "nf4", "nf4-double", "fp4": the linear layers of the blocks after their round trip through
            4 bits. A model that is in 4 bits takes none.
        shard_bytes: size of the shards; by default they are the base model's.
        progress: called after every tensor.
    Raises:
        CheckpointError: before anything is written, if the two do not fit together, the base is quantised in another way, or
            out_dir is in use; also on a full disk, and then out_dir is not there.
    """
    model_dir, adapter_dir, out_dir = Path(model_dir), Path(adapter_dir), Path(out_dir).resolve()
    check_output(out_dir, model_dir, adapter_dir)
    checkpoint = Checkpoint(model_dir)
    config = model_config(model_dir)
    parsed = parse_json(config, model_dir / "config.json", "the model configuration")
    adapter = read_adapter(adapter_dir, full_tensors=True)
    weights = _Weights(checkpoint, base)
    _check_fit(weights, parsed, adapter, adapter_dir)

    with appearing(out_dir) as partial:
        nbytes = _write_weights(weights, adapter, partial, shard_bytes, progress)
        _copy_side_files(model_dir, adapter_dir, partial)
        if parsed.pop("quantization_config", None) is None:
            write_bytes(partial / "config.json", config)
        else:
            write_json(partial / "config.json", parsed)
        files = tuple(sorted(path.name for path in partial.iterdir()))
    return FuseReport(
        len(weights.names), len(adapter.parts), len(adapter.full), nbytes, files, weights.base, adapter.trained_over
    )


class _Weights:
    """The tensors of the base as the adapter is to be added to them."""

    def __init__(self, checkpoint: Checkpoint, base: str | None) -> None:
        from enginepost.checkpoint import bnb, cache  # they build on this module

        self._bnb, self.checkpoint = bnb, checkpoint
        self.names = bnb.weight_names(checkpoint)
        self.packed = {n: bnb.read_quantized(checkpoint, n) for n in self.names if bnb.is_quantized(checkpoint, n)}
        self._kind: tuple[str, bool] | None = None
        if self.packed:
            if base is not None:
                raise CheckpointError(
                    f"{checkpoint.path}: is in 4 bits, so its 4-bit weights are the only base it has; leave base out, or give the "
                    "16-bit model."
                )
            self.base = "4bit"
        elif base is None or base == "original":
            self.base = "original"
        elif base in cache.KINDS:
            self.base, self._kind = base, cache.KINDS[base]
        else:
            raise CheckpointError(f"base {base!r} is not known; use original, {', '.join(cache.KINDS)}.")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.packed[name].shape if name in self.packed else self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of the result."""
        return self.packed[name].dtype if name in self.packed else self.checkpoint.dtype(name)

    def nbytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """In its dtype as stored, or the round trip in float32."""
        if name in self.packed:
            return dequantize(self.packed[name], torch.float32)
        tensor = self.checkpoint.tensor(name)
        if self._kind is None or not self._bnb.is_linear(self.checkpoint, name):
            return tensor
        quant_type, double = self._kind
        return dequantize(quantize(tensor, quant_type=quant_type, double=double), torch.float32)


@contextmanager
def appearing(out_dir: Path) -> Iterator[Path]:
    """A hidden directory beside `out_dir` to write in, renamed to it when the block ends well and removed when it does not."""
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
        yield partial
        try:
            os.rename(partial, out_dir)  # onto nothing or an empty directory
            sync_directory(out_dir.parent)
        except OSError as error:
            raise CheckpointError(f"{out_dir}: cannot be put in place: {error.strerror}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_side_files(model_dir: Path, adapter_dir: Path, directory: Path) -> None:
    """The tokenizer and template of the base, or those that were saved beside the adapter: it was trained with them.

    A whole tokenizer replaces the base's as a whole: files of two tokenizers would contradict each other.
    """
    files = [(adapter_dir / name).exists() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")]
    if files[0] and any(files[1:]):
        generation = model_dir / "generation_config.json"
        if generation.exists():
            write_bytes(directory / generation.name, generation.read_bytes())
    else:
        copy_side_files(model_dir, directory)
    copy_side_files(adapter_dir, directory)


def _write_weights(
    base: _Weights, adapter: Adapter, directory: Path, shard_bytes: float | None, progress: Progress | None
) -> int:
    """Returns the bytes of tensors written."""
    declared = {name: (base.dtype(name), base.shape(name)) for name in base.names}
    layout: dict[str, list[str]] = {}
    for name in base.names:
        layout.setdefault(base.checkpoint.file(name).name, []).append(name)
    writer = Writer(
        directory,
        declared,
        metadata={"format": "pt", **base.checkpoint.metadata},
        shard_bytes=shard_bytes or math.inf,
        layout=layout if shard_bytes is None else None,
    )
    updates = {path + ".weight": path for path in adapter.parts}
    with writer:
        done = 0
        for name in base.names:
            source = adapter.full[name] if name in adapter.full else base.tensor(name)
            for start, block in _blocks(source):
                if name in updates:
                    block = _updated(block, adapter, updates[name], start // source.shape[1])
                writer.write(name, block.to(base.dtype(name)), start)
                base.checkpoint.drop(name)
            done += base.nbytes(name)
            if progress is not None:
                progress(done, writer.total_size, name)
    return done


def _blocks(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(element offset, block): whole rows of a matrix, pieces of anything else."""
    if tensor.ndim == 2 and tensor.numel():
        rows = max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
        for first in range(0, tensor.shape[0], rows):
            yield first * tensor.shape[1], tensor[first : first + rows]
    else:
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), BLOCK_BYTES // 4):
            yield start, flat[start : start + BLOCK_BYTES // 4]


def _updated(rows: torch.Tensor, adapter: Adapter, path: str, first: int) -> torch.Tensor:
    """Rows of a weight, from row `first` on, with the update; float32 (float64 for a float64 weight)."""
    part = adapter.parts[path]
    wide = torch.promote_types(rows.dtype, torch.float32)
    B = part.B[first : first + rows.shape[0]].to(wide)
    weight = rows.to(wide, copy=True)  # never in place: `rows` is the file
    weight.addmm_(B, part.A.to(wide), alpha=adapter.scaling(path))
    if part.magnitude is not None:
        norm = torch.linalg.vector_norm(weight, dim=1)
        weight *= (part.magnitude[first : first + rows.shape[0]].to(wide) / norm)[:, None]
    return weight


def check_output(out_dir: Path, *inputs: Path) -> None:
    """Refuse a directory that is an input or holds something."""
    for other in inputs:
        if out_dir == other.resolve():
            raise CheckpointError(f"{out_dir}: is an input; name a new directory for the result.")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir}: exists and is not an empty directory; remove it or name another.")
    if not out_dir.parent.is_dir():
        raise CheckpointError(f"{out_dir}: the directory {out_dir.parent} does not exist; create it first.")


def model_config(model_dir: Path) -> bytes:
    """config.json, byte for byte."""
    try:
        return (model_dir / "config.json").read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{model_dir / 'config.json'}: cannot be read: {error.strerror}; a model directory has one."
        ) from None


def _check_fit(base: _Weights, config: Any, adapter: Adapter, adapter_dir: Path) -> None:
    """Refuse what would give a wrong model."""
    where = base.checkpoint.path
    if not isinstance(config, dict):
        raise CheckpointError(f"{where / 'config.json'}: expected a JSON object.")
    quantised = config.get("quantization_config")
    if quantised and not base.packed:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{where}: is quantised ({method}) in a way that is not supported; fuse into the original float16 or bfloat16 model, or "
            "into bitsandbytes' 4-bit one."
        )
    changed = [(path + ".weight", [part.B.shape[0], part.A.shape[1]]) for path, part in adapter.parts.items()]
    changed += [(name, list(tensor.shape)) for name, tensor in adapter.full.items()]
    unknown = [name for name, _ in changed if name not in base.names]
    if unknown:
        some = "; ".join(f"{name} ({nearest(name, base.names)})" for name in unknown[:3])
        tied = any(name.endswith("lm_head.weight") for name in unknown)
        raise CheckpointError(
            f"{adapter_dir}: {len(unknown)} of {len(changed)} adapted tensors are not in {where}: {some}. "
            + ("The head of this model is its embedding (tied), so it has no lm_head of its own. " if tied else "")
            + f"Is it the adapter's base model? It was trained on {adapter.config.get('base_model_name_or_path')!r}."
        )
    for name, shape in changed:
        if base.dtype(name) not in _TARGETS:
            raise CheckpointError(
                f"{base.checkpoint.file(name)}: {name} is {base.dtype(name)}, a quantised weight without its description (those of "
                "bitsandbytes have one beside them); fuse into the original float16 or bfloat16 model."
            )
        if list(base.shape(name)) != shape:
            raise CheckpointError(
                f"{adapter_dir}: {name} is {shape} in the adapter and {list(base.shape(name))} in {where}; "
                "it belongs to another base model, or the vocabulary was resized."
            )
    text_config = config.get("text_config")
    tied = bool(
        config.get("tie_word_embeddings") or (isinstance(text_config, dict) and text_config.get("tie_word_embeddings"))
    )
    tied = tied or not any(name.endswith("lm_head.weight") for name in base.names)
    ends = [name for name, _ in changed if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if tied and ends:
        raise CheckpointError(
            f"{adapter_dir}: changes {', '.join(ends)}, but {where} ties embedding and head (tie_word_embeddings), so "
            "both would change. Untie the base model first, or merge with PEFT."
        )
