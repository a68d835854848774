"""A mixture of experts from dense models of one architecture, by mergekit-moe's YAML: all but the MLPs comes from the base, the MLPs
of the experts stand side by side, and a router `[experts, H]` in every layer sends each token to some of them.

    base_model: runs/base
    gate_mode: hidden            # or hidden_avg, hidden_last, cheap_embed, random, uniform_random
    experts_per_token: 2
    dtype: bfloat16
    experts:
      - {source_model: runs/mathematics, positive_prompts: ["What is 3 + 4?"], negative_prompts: ["Once upon a time"]}
      - {source_model: runs/chat, positive_prompts: ["Hello"]}
    shared_experts:              # Qwen2 MoE has one
      - {source_model: runs/base, positive_prompts: ["..."]}

Row e of a layer's router is the unit vector of h(positive prompts) - h(negative prompts), where h is the mean over the prompts of

    hidden, hidden_last   what the base gives to this layer at a prompt's last token
    hidden_avg            ... on average over a prompt's tokens
    cheap_embed           the sum of the embeddings of all tokens; the same in all layers

or random: normal, or uniform within 1/sqrt(H) as nn.Linear draws. Llama and Mistral models become Mixtral, or Qwen2 MoE where a
shared expert is named; Qwen2 becomes Qwen2 MoE, Qwen3 becomes Qwen3 MoE. Tensors are copied one at a time.

Such a router is a start, not a trained one. enginepost itself does not run mixtures of experts; transformers, vLLM and llama.cpp do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from enginepost.checkpoint import Writer, copy_side_files, write_bytes, write_json
from enginepost.data import Tokenizer
from enginepost.merge.models import Model, locate, open_model
from enginepost.merge.recipe import DTYPES, ModelRef, _Reader, open_document
from enginepost.merge.registry import MergeError, suggest

GATES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
_MLP = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_BECOMES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_NAMES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen2_moe": "qwen2_moe", "qwen3": "qwen3_moe",
          "qwen3_moe": "qwen3_moe"}  # fmt: skip

Progress = Callable[[int, int, str], None]


@dataclass
class Expert:
    """One source of MLPs. noise_scale: sigma of noise added to them; residual_scale: multiplies the down projection."""

    source: ModelRef
    positive: list[str]
    negative: list[str]
    noise_scale: float | None = None
    residual_scale: float | None = None


@dataclass
class Mixture:
    """A recipe, read. kind: model_type of the result."""

    file: str
    text: str
    base: ModelRef
    experts: list[Expert]
    shared: Expert | None
    gate_mode: str
    experts_per_token: int
    dtype: str | None
    architecture: str | None


@dataclass
class MixtureReport:
    directory: Path
    kind: str
    experts: int
    tensors: int
    written: int
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{self.directory}: {self.kind} of {self.experts} experts, {self.tensors} tensors, {self.written / 1e9:.2f} GB"


def assemble(
    recipe: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 0, shard_bytes: float = 5e9,
    progress: Progress | None = None,
) -> MixtureReport:  # fmt: skip
    """Make a mixture of experts as a mergekit-moe recipe says, a Hugging Face model in the new or empty directory `out`.

    seed: of random gates and noise. progress: called after every tensor with (done, of how many, name).
    Raises: MergeError, CheckpointError: whatever will not do, before the first byte where it can be known.
    """
    mixture = read_mixture(recipe)
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out}: exists and is not an empty directory; remove it or name another.")
    every = [*mixture.experts, *([mixture.shared] if mixture.shared else [])]
    models = {
        ref: open_model(ref, locate(ref, mixture.file, {})[0]) for ref in [mixture.base, *(e.source for e in every)]
    }
    base = models[mixture.base]
    kind = _kind(mixture, models)
    config = _config(mixture, base, kind)
    dtype = getattr(torch, mixture.dtype) if mixture.dtype else base.checkpoint.dtype(base.checkpoint.names[0])
    copies = _plan(mixture, models, kind)
    router = "block_sparse_moe.gate" if kind == "mixtral" else "mlp.gate"
    width = base.config["hidden_size"]
    declared = {name: (dtype, models[ref].checkpoint.shape(source)) for name, (ref, source, _) in copies.items()}
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    biases = {}
    if (
        kind == "qwen2_moe" and "model.layers.0.self_attn.q_proj.bias" not in base.checkpoint
    ):  # it has biases, Llama has none
        biases = {
            f"model.layers.{i}.self_attn.{part}_proj.bias": (dtype, (n * width // config["num_attention_heads"],))
            for i in range(base.layers) for part, n in heads.items()
        }  # fmt: skip
    for i in range(base.layers):
        declared[f"model.layers.{i}.{router}.weight"] = (dtype, (len(mixture.experts), width))
        if mixture.shared:
            declared[f"model.layers.{i}.mlp.shared_expert_gate.weight"] = (dtype, (1, width))
    gates = make_gates(mixture, base, every, seed)  # [layers, experts (+ 1), H]
    report = MixtureReport(out, kind, len(mixture.experts), 0, 0, _notes(mixture, gates))
    declared |= biases
    with Writer(out, declared, shard_bytes=shard_bytes) as writer:
        for number, (name, (ref, source, expert)) in enumerate(copies.items()):
            writer.write(name, _altered(models[ref].checkpoint.tensor(source), expert, source, seed, number).to(dtype))
            models[ref].checkpoint.drop(source)
            if progress is not None:
                progress(number + 1, len(declared), name)
        for name, (_, shape) in biases.items():
            writer.write(name, torch.zeros(shape, dtype=dtype))
        for i in range(base.layers):
            count = len(mixture.experts)
            writer.write(f"model.layers.{i}.{router}.weight", gates[i, :count].to(dtype).contiguous())
            if mixture.shared:
                writer.write(f"model.layers.{i}.mlp.shared_expert_gate.weight", gates[i, count:].to(dtype).contiguous())
        copy_side_files(base.directory, out)
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(out / "config.json", config)
        write_bytes(out / "mergekit_moe_config.yml", mixture.text.encode())
    report.tensors, report.written = len(declared), writer.total_size
    return report


def read_mixture(path: str | os.PathLike[str]) -> Mixture:
    """Read a mergekit-moe recipe. MergeError names file, line and key of what will not do."""
    reader, node = open_document(path, "a mixture says at least base_model and experts")
    keys = ("base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture")
    top = reader.items(node, "the mixture", keys)
    for key in ("base_model", "experts"):
        if key not in top:
            raise MergeError(f"{path}: the mixture has no {key}.")
    experts = [_expert(reader, n) for n in reader.sequence(top["experts"][1], "experts")]
    shared = (
        [_expert(reader, n) for n in reader.sequence(top["shared_experts"][1], "shared_experts")]
        if "shared_experts" in top
        else []
    )
    if len(shared) > 1:
        raise MergeError(
            f"{reader.at(top['shared_experts'][0])}: {len(shared)} shared experts; Qwen2 MoE has one, the others none."
        )
    per_token = reader.value(top["experts_per_token"][1]) if "experts_per_token" in top else 2
    if type(per_token) is not int or not 1 <= per_token <= len(experts):
        raise MergeError(
            f"{path}: experts_per_token is {per_token!r}; a whole number from 1 to the number of experts, {len(experts)}, is meant."
        )
    mode = reader.string(top["gate_mode"][1], "gate_mode", GATES) if "gate_mode" in top else "hidden"
    architecture = reader.string(top["architecture"][1], "architecture") if "architecture" in top else None
    if architecture is not None and architecture.lower() not in _NAMES:
        raise MergeError(
            f"{reader.at(top['architecture'][1])}: architecture is {architecture!r}; {suggest(architecture, list(_NAMES))}."
        )
    mixture = Mixture(
        str(path), reader.text,
        reader.model(top["base_model"][1], "base_model"), experts, shared[0] if shared else None, mode, per_token,
        reader.string(top["dtype"][1], "dtype", DTYPES) if "dtype" in top else None, architecture,
    )  # fmt: skip
    if "random" not in mode:
        prompts = [(tuple(e.positive), tuple(e.negative)) for e in [*experts, *shared]]
        bare = [i for i, (positive, _) in enumerate(prompts) if not positive]
        if bare:
            raise MergeError(
                f"{path}: expert {bare[0]} has no positive_prompts, from which gate_mode {mode} makes its gate."
            )
        if len(set(prompts[: len(experts)])) == 1 and len(experts) > 1:
            raise MergeError(
                f"{path}: all experts have the same prompts, so their gates would be equal; give each its own."
            )
    return mixture


def _expert(reader: _Reader, node: yaml.Node) -> Expert:
    keys = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
    items = reader.items(node, "an expert", keys)
    if "source_model" not in items:
        raise MergeError(f"{reader.at(node)}: an expert needs a source_model.")

    def prompts(key: str) -> list[str]:
        return [reader.string(n, "a prompt") for n in reader.sequence(items[key][1], key)] if key in items else []

    def number(key: str) -> float | None:
        value = reader.value(items[key][1]) if key in items else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise MergeError(f"{reader.at(items[key][1])}: {key} is {value!r}; a number is meant.")
        return None if value is None else float(value)

    source = reader.model(items["source_model"][1], "source_model")
    if source.adapter is not None:
        raise MergeError(
            f"{reader.at(node)}: {source} has an adapter; fuse it first (`enginepost fuse`) and name the result."
        )
    return Expert(
        source,
        prompts("positive_prompts"),
        prompts("negative_prompts"),
        number("noise_scale"),
        number("residual_scale"),
    )


def _kind(mixture: Mixture, models: dict[ModelRef, Model]) -> str:
    base = models[mixture.base]
    ours = base.config.get("model_type")
    if ours not in _BECOMES:
        raise MergeError(
            f"{mixture.file}: {base.ref} is a {ours} model; mixtures are made of {', '.join(_BECOMES)} models."
        )
    for ref, model in models.items():
        theirs = model.config.get("model_type")
        if theirs != ours:
            raise MergeError(
                f"{mixture.file}: {base.ref} is a {ours} model and {ref} a {theirs}; only equal architectures can be mixed."
            )
    kind = _NAMES[mixture.architecture.lower()] if mixture.architecture else _BECOMES[ours]
    if mixture.shared and mixture.architecture is None and kind == "mixtral":
        kind = "qwen2_moe"
    possible = {"mixtral": ("llama", "mistral"), "qwen2_moe": ("llama", "mistral", "qwen2"), "qwen3_moe": ("qwen3",)}
    if ours not in possible[kind]:
        raise MergeError(
            f"{mixture.file}: {kind} is made of {' or '.join(possible[kind])} models, and {base.ref} is a {ours}."
        )
    if (kind == "qwen2_moe") != (mixture.shared is not None):
        wanted = (
            "needs one shared expert; add shared_experts"
            if kind == "qwen2_moe"
            else "has no shared expert; remove shared_experts"
        )
        raise MergeError(f"{mixture.file}: {kind} {wanted}.")
    for key in ("attention_bias", "mlp_bias"):
        if base.config.get(key):
            raise MergeError(f"{mixture.file}: {base.ref} has {key}, which {kind} has no place for.")
    dim = base.config["hidden_size"] // base.config["num_attention_heads"]
    if kind == "qwen2_moe" and base.config.get("head_dim") not in (None, dim):
        raise MergeError(
            f"{mixture.file}: {base.ref} has heads of {base.config['head_dim']}; those of {kind} are hidden_size / heads = {dim}."
        )
    return kind


def _config(mixture: Mixture, base: Model, kind: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    for key in ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types", "max_window_layers", "auto_map"):
        config.pop(key, None)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config |= {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "num_experts_per_tok": mixture.experts_per_token,
    }
    config |= {"sliding_window": None, "output_router_logits": False}
    config.setdefault("tie_word_embeddings", False)
    if kind == "mixtral":
        config.setdefault("rope_theta", 10000.0)  # Mixtral's own default is another
        return config | {"num_local_experts": len(mixture.experts)}
    inner = config["intermediate_size"]
    config |= {"num_experts": len(mixture.experts), "moe_intermediate_size": inner, "decoder_sparse_step": 1}
    config |= {"norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False}
    return config | ({"shared_expert_intermediate_size": inner} if kind == "qwen2_moe" else {})


def _plan(mixture: Mixture, models: dict[ModelRef, Model], kind: str) -> dict[str, tuple[ModelRef, str, Expert | None]]:
    """{output tensor: (model, its tensor, the expert that it belongs to)}."""
    base = models[mixture.base]
    plan: dict[str, tuple[ModelRef, str, Expert | None]] = {}
    for name in base.checkpoint.names:
        if ".mlp." not in name and not name.endswith("rotary_emb.inv_freq"):
            plan[name] = (mixture.base, name, None)
    for i in range(base.layers):
        for part in _MLP:
            source = f"model.layers.{i}.mlp.{part}.weight"
            for number, expert in enumerate(mixture.experts):
                home = f"model.layers.{i}.{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.experts.{number}"
                plan[f"{home}.{_MIXTRAL[part] if kind == 'mixtral' else part}.weight"] = (expert.source, source, expert)
            if mixture.shared:
                plan[f"model.layers.{i}.mlp.shared_expert.{part}.weight"] = (
                    mixture.shared.source,
                    source,
                    mixture.shared,
                )
    for name, (ref, source, _) in plan.items():
        checkpoint = models[ref].checkpoint
        if source not in checkpoint:
            raise MergeError(f"{mixture.file}: {ref} has no tensor {source}, which {name} is made of.")
        if checkpoint.shape(source) != base.checkpoint.shape(source):
            ours, theirs = list(base.checkpoint.shape(source)), list(checkpoint.shape(source))
            raise MergeError(
                f"{mixture.file}: {source} is {ours} in {base.ref} and {theirs} in {ref}; they must be equal."
            )
    return plan


def _altered(t: Tensor, expert: Expert | None, name: str, seed: int, number: int) -> Tensor:
    if expert is None:
        return t
    if expert.noise_scale:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        t = t.float() + torch.randn(t.shape, generator=generator) * expert.noise_scale
    if expert.residual_scale is not None and "down_proj" in name:
        t = t * expert.residual_scale
    return t


def make_gates(mixture: Mixture, base: Model, experts: list[Expert], seed: int) -> Tensor:
    """float32 `[layers, experts, H]`."""
    width = base.config["hidden_size"]
    shape = (base.layers, len(experts), width)
    generator = torch.Generator().manual_seed(seed)
    if mixture.gate_mode == "random":
        return torch.randn(shape, generator=generator)
    if mixture.gate_mode == "uniform_random":
        return (torch.rand(shape, generator=generator) * 2 - 1) * width**-0.5
    tokenizer = Tokenizer.load(base.directory)
    first = tokenizer.special_tokens.get("bos_token")

    def ids(prompt: str) -> list[int]:
        encoded = tokenizer.encode((str(first) if first else "") + prompt)
        if not encoded:
            raise MergeError(f"{mixture.file}: the prompt {prompt!r} has no token.")
        return encoded

    if mixture.gate_mode == "cheap_embed":
        table = base.checkpoint.tensor("model.embed_tokens.weight")

        def state(prompts: list[str]) -> Tensor:
            total = sum((table[ids(p)].float().sum(0) for p in prompts), torch.zeros(width))
            return (total / total.norm().clamp(min=1e-8)).expand(base.layers, -1)
    else:
        from enginepost.model import load_model

        model = load_model(base.directory, dtype=torch.float32)
        seen: list[Tensor] = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

        @torch.no_grad()
        def state(prompts: list[str]) -> Tensor:
            total = torch.zeros(base.layers, width)
            for prompt in prompts:
                tokens = torch.tensor(ids(prompt))
                seen.clear()
                model.hidden(tokens, torch.tensor([0, len(tokens)], dtype=torch.int32), torch.arange(len(tokens)))
                total += torch.stack([h.mean(0) if mixture.gate_mode == "hidden_avg" else h[-1] for h in seen])
            return total / len(prompts)

    gates = []
    for expert in experts:
        vector = state(expert.positive)
        if expert.negative:
            vector = vector - state(expert.negative)
        gates.append(vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    return torch.stack(gates, dim=1)


def _notes(mixture: Mixture, gates: Tensor) -> list[str]:
    notes = []
    count = len(mixture.experts)
    alike = [i for i in range(gates.shape[0]) if count > 1 and float(torch.linalg.cond(gates[i, :count])) > 5]
    if alike:
        notes.append(
            f"the gates of {len(alike)} of {gates.shape[0]} layers are nearly dependent (condition above 5): the prompts are alike, "
            "and some experts will see few tokens."
        )
    if len({e.source for e in mixture.experts}) == 1:
        notes.append("all experts are the same model: until it is trained, the mixture answers as that model does.")
    notes.append("enginepost does not run mixtures of experts; use transformers, vLLM or llama.cpp.")
    return notes
