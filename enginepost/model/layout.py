"""What a model is made of, read from its config.json alone: every tensor of a checkpoint, and every linear layer by name.

The model keeps q|k|v and gate|up as one matrix each; a checkpoint has them apart (Phi-3 does not). `layout` lists, for every
tensor of a checkpoint, the parameter and the rows of it that hold the tensor. Nothing here needs torch.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.model.spec import FAMILIES, ModelSpec

ALIGNMENT = 64  # bytes, of every piece of a blob


@dataclasses.dataclass(frozen=True)
class Entry:
    """Checkpoint tensor `name` is rows start .. stop of `parameter`. linear: it is the weight of a linear layer."""

    name: str
    parameter: str
    start: int
    stop: int
    columns: int | None  # None: a vector
    linear: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.stop - self.start
        return (rows,) if self.columns is None else (rows, self.columns)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layout(spec: ModelSpec) -> list[Entry]:
    """Every tensor of a checkpoint of this model, in the order in which transformers writes them."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    entries = [Entry("model.embed_tokens.weight", "embedding", 0, spec.vocab_size, hidden, False)]

    def linear(name: str, ours: str, inputs: int, bias: bool, parts: dict[str, int]) -> None:
        start = 0
        for part, rows in parts.items():
            entries.append(Entry(f"{name}{part}.weight", f"{ours}.weight", start, start + rows, inputs, True))
            if bias:
                entries.append(Entry(f"{name}{part}.bias", f"{ours}.bias", start, start + rows, None, False))
            start += rows

    def vector(name: str, ours: str, size: int) -> None:
        entries.append(Entry(f"{name}.weight", ours, 0, size, None, False))

    for i in range(len(spec.layers)):
        theirs, ours = f"model.layers.{i}.", f"blocks.{i}."
        fused = spec.fused_checkpoint
        qkv = {"qkv_proj": q + 2 * kv} if fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        linear(f"{theirs}self_attn.", f"{ours}qkv", hidden, spec.qkv_bias, qkv)
        linear(f"{theirs}self_attn.", f"{ours}o", q, spec.output_bias, {"o_proj": hidden})
        if spec.qk_norm:
            whole = spec.qk_norm == "projection"
            vector(f"{theirs}self_attn.q_norm", f"{ours}q_norm", q if whole else spec.head_dim)
            vector(f"{theirs}self_attn.k_norm", f"{ours}k_norm", kv if whole else spec.head_dim)
        gate_up = {"gate_up_proj": 2 * inner} if fused else {"gate_proj": inner, "up_proj": inner}
        linear(f"{theirs}mlp.", f"{ours}gate_up", hidden, spec.mlp_bias, gate_up)
        linear(f"{theirs}mlp.", f"{ours}down", inner, spec.mlp_bias, {"down_proj": hidden})
        if spec.pre_norm:
            # "post_attention_layernorm" follows attention where norms follow; elsewhere it precedes the MLP.
            before_mlp = "pre_feedforward_layernorm" if spec.post_norm else "post_attention_layernorm"
            vector(f"{theirs}input_layernorm", f"{ours}attention_norm", hidden)
            vector(f"{theirs}{before_mlp}", f"{ours}mlp_norm", hidden)
        if spec.post_norm:
            vector(f"{theirs}post_attention_layernorm", f"{ours}attention_post_norm", hidden)
            vector(f"{theirs}post_feedforward_layernorm", f"{ours}mlp_post_norm", hidden)
    vector("model.norm", "norm", hidden)
    if not spec.tied:
        entries.append(Entry("lm_head.weight", "head", 0, spec.vocab_size, hidden, False))
    return entries


def block_bytes(
    spec: ModelSpec, index: int, *, quantize: str | None = None, itemsize: int = 2, blocksize: int = 64
) -> int:
    """Bytes of the blob of a block's linear layers (`enginepost.model.blob`): what it takes in memory, and in a slot.

    quantize: None (then itemsize is that of the dtype), "nf4", "fp4" or "nf4-double".
    """
    sizes: dict[str, list[int]] = {}  # elements of the matrices of each fused layer
    for entry in layout(spec):
        if entry.linear and entry.parameter.startswith(f"blocks.{index}."):
            sizes.setdefault(entry.parameter, []).append((entry.stop - entry.start) * (entry.columns or 0))
    total = 0
    for elements in sizes.values():
        if quantize is None:
            total += _aligned(sum(elements) * itemsize)
            continue
        for size in elements:
            scales = -(-size // blocksize)
            pieces = [-(-size // 2), 4 * scales]
            if quantize == "nf4-double":
                pieces[1:] = [scales, 4 * -(-scales // 256), 4 * 256]
            total += sum(map(_aligned, pieces))
    return total


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def starting_value(entry: Entry, spec: ModelSpec) -> float | None:
    """What a vector holds before training (norms multiply by one, biases add nothing); None for a matrix, which is drawn."""
    if entry.columns is not None:
        return None
    return 0.0 if entry.name.endswith(".bias") else 1.0 - spec.norm_offset


def read_config(where: str | Path) -> dict[str, Any]:
    """The `config.json` of a model directory, or by its own path. Raises EnginepostError that names the file."""
    path = Path(where)
    if not path.is_file():
        path = path / "config.json"
    if not path.is_file():
        kind = "is not a directory" if not Path(where).is_dir() else "has no config.json"
        raise EnginepostError(f"{where} {kind}; expected a Hugging Face model directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise EnginepostError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise EnginepostError(f"{path}: expected an object, got {type(config).__name__}")
    return config


def backbone_config(config: dict[str, Any]) -> dict[str, Any]:
    """A classification model's config as that of its backbone: a causal model whose head is the embedding, so that it has none."""
    family = FAMILIES.get(str(config.get("model_type")))
    causal = None if family is None else family.architecture
    return {k: v for k, v in config.items() if k != "num_labels"} | {
        "tie_word_embeddings": True, "architectures": [causal]
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A linear layer by its Hugging Face module path, and where its rows are: of `linear`'s weight, start .. stop."""

    path: str
    linear: str
    start: int
    stop: int
    inputs: int

    @property
    def suffix(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def block(self) -> int:
        return int(self.linear.split(".")[1])


def linear_modules(spec: ModelSpec) -> list[Target]:
    """Every linear layer of the blocks, in the order of the layers (PEFT's "all-linear": the head is not among them)."""
    return [
        Target(e.name.removesuffix(".weight"), e.parameter.removesuffix(".weight"), e.start, e.stop, e.columns or 0)
        for e in layout(spec)
        if e.linear
    ]


def match_targets(spec: ModelSpec, wanted: str | Sequence[str]) -> list[Target]:
    """The linear modules that `target_modules` names, as PEFT matches them. Raises EnginepostError where a name matches nothing."""
    modules = linear_modules(spec)
    known = sorted({m.suffix for m in modules})
    if wanted == "all-linear":
        return modules
    if isinstance(wanted, str):
        try:
            found = [m for m in modules if re.fullmatch(wanted, m.path)]
        except re.error as error:
            raise EnginepostError(f"target_modules {wanted!r} is not a valid regular expression: {error}") from None
        if not found:
            raise EnginepostError(
                f"target_modules {wanted!r} matches no module; it must match a whole path such as {modules[0].path!r}"
            )
        return found
    for name in wanted:
        if not any(_ends(m.path, name) for m in modules):
            raise EnginepostError(
                f"target_modules: {name!r} is no linear layer of a {spec.family} model; its linear layers: {', '.join(known)}"
            )
    return [m for m in modules if any(_ends(m.path, name) for name in wanted)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
