"""Public architectures by name, and models of their shape with random weights: to try, test and measure without a download.

`architectures.json` holds the config.json facts of the common families (sizes, rotary settings; no weights, no tokenizer).
`init_model` streams random weights to disk, a piece of a tensor at a time, so its memory does not depend on the model.
"""

import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.model.layout import layout, starting_value
from enginepost.model.spec import FAMILIES, ModelSpec

PIECE = 1 << 20  # elements drawn at once; a multiple of 16, so that pieces draw the numbers of the whole


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = (importlib.resources.files("enginepost.model") / "architectures.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def names() -> list[str]:
    """Names that `architecture` knows, by family and size."""
    return list(_table())


def architecture(name: str) -> dict[str, Any]:
    """The config.json of a public architecture such as "llama-3.1-8b".

    Raises: EnginepostError that lists near names, or all.
    """
    table = _table()
    key = name.lower().rpartition("/")[2]
    if key in table:
        return dict(table[key])
    near = difflib.get_close_matches(key, table, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(table)}."
    raise EnginepostError(
        f"no architecture is called {name!r}; {hint} Or give the config.json of a model with --config"
    )


def init_model(
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    shard_bytes: float = 5e9,
) -> int:
    """Write a Hugging Face model directory with random weights; returns its number of parameters.

    The weights are those of `create_model` with this seed, rounded to dtype: matrices normal with the config's
    `initializer_range`, norms one, biases zero.

    Args: directory: new or empty; config: of a supported family; dtype: "bfloat16", "float16" or "float32"; tokenizer: a model
        directory whose tokenizer files are copied; shard_bytes: most bytes in a weights file.
    Raises: EnginepostError for an unsupported config, a directory in use, a tokenizer with more tokens than the model;
        CheckpointError when the disk has no room.
    """
    spec = ModelSpec.from_config(dict(config))
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise EnginepostError(f"{directory}: the model goes to a new or empty directory, and this is not one")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise EnginepostError(f"dtype {dtype!r} is not one of bfloat16, float16, float32")
    import torch

    from enginepost.checkpoint import Writer, copy_side_files, write_bytes

    if tokenizer is not None:
        from enginepost.data import Tokenizer

        size = Tokenizer.load(str(tokenizer)).vocab_size
        if size > spec.vocab_size:
            raise EnginepostError(
                f"{tokenizer}: the tokenizer has {size} tokens and the model {spec.vocab_size}; set vocab_size={size}, or take "
                "another tokenizer"
            )
    kind = getattr(torch, dtype)
    entries = layout(spec)
    generator = torch.Generator().manual_seed(seed)
    piece = torch.empty(PIECE)
    with Writer(directory, {e.name: (kind, e.shape) for e in entries}, shard_bytes=shard_bytes) as writer:
        for entry in entries:
            value, count = starting_value(entry, spec), entry.size
            for start in range(0, count, PIECE):
                part = piece[: min(PIECE, count - start)]
                if value is None:
                    part.normal_(0.0, spec.initializer_range, generator=generator)
                else:
                    part.fill_(value)
                writer.write(entry.name, part.to(kind), start)
        if tokenizer is not None:
            copy_side_files(tokenizer, directory)
        written = dict(config)
        written["dtype" if "dtype" in written else "torch_dtype"] = dtype
        written["architectures"] = written.get("architectures") or [FAMILIES[spec.family].architecture]
        write_bytes(directory / "config.json", (json.dumps(written, indent=2) + "\n").encode())
    return sum(e.size for e in entries)
