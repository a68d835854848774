"""`config.json` -> ModelSpec: every number and switch that the one Transformer needs, and nothing else.

A family is a row of `FAMILIES`: where its norms sit, which keys its config may have and what a missing key means. All
families then share one block:

    a = attention(norm(h))     h = h + residual_scale * post_norm(a)
    m = mlp(norm(h))           h = h + residual_scale * post_norm(m)

A key that this file does not know, and a value that asks for maths that is not here, is an error that names it: a model is read
right or not at all. Keys and defaults are those of Hugging Face transformers, its old (`rope_scaling`) and new
(`rope_parameters`) names of the rotary embedding alike.
"""

import dataclasses
import math
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.model.rotary import Rope, read_ropes


class ConfigError(EnginepostError):
    """A model's config.json asks for what is not supported, or lacks what is needed."""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What may differ between the layers: window 0 = unlimited; rope: index into `ModelSpec.ropes`, None = no rotation."""

    window: int
    rope: int | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. `scale` multiplies q.k; `logit_scale` the last hidden state; 0 means no softcap."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: str  # of the gated MLP, as `enginepost.kernels.glu` names them
    eps: float
    norm_offset: float  # Gemma's norms multiply by 1 + weight
    pre_norm: bool  # norms before attention and MLP
    post_norm: bool  # norms after them, before the residual addition
    qk_norm: str  # "": none; "head": over each head; "projection": over the whole of q and of k
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool  # the head is the embedding
    fused_checkpoint: bool  # the checkpoint itself has qkv_proj and gate_up_proj (Phi-3)
    scale: float
    attention_softcap: float
    final_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    max_position: int
    initializer_range: float
    layers: tuple[LayerSpec, ...]
    ropes: tuple[Rope, ...]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelSpec":
        """Read a `config.json`. Raises ConfigError that names the architecture or the key at fault."""
        return _read(config)

    def __hash__(self) -> int:
        # Of a few fields: the planner looks things up by spec thousands of times, and layers are many.
        return hash(
            (self.family, self.vocab_size, self.hidden_size, self.intermediate_size, self.heads, len(self.layers))
        )


@dataclasses.dataclass(frozen=True)
class _Family:
    architecture: str
    keys: str = ""  # config keys of this family beyond _COMMON
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str = ""
    gemma: bool = False  # 1 + w norms, embedding scaled by sqrt(hidden_size)
    fused_checkpoint: bool = False


_BIAS = "attention_bias mlp_bias"
_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
_GEMMA = (
    "query_pre_attn_scalar hidden_activation attn_logit_softcapping final_logit_softcapping attention_bias sliding_window "
    "layer_types"
)
_GEMMA_DEFAULTS = {
    "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
}  # fmt: skip

FAMILIES = {
    "llama": _Family("LlamaForCausalLM", _BIAS, {"max_position_embeddings": 2048}),
    "mistral": _Family("MistralForCausalLM", "sliding_window", {"sliding_window": 4096, "max_position_embeddings": 131072}),
    "qwen2": _Family("Qwen2ForCausalLM", _WINDOWS, {"max_position_embeddings": 32768}),
    "qwen3": _Family("Qwen3ForCausalLM", f"attention_bias {_WINDOWS}", {"head_dim": 128, "max_position_embeddings": 32768},
                     qk_norm="head"),
    "gemma2": _Family("Gemma2ForCausalLM", _GEMMA,
                      {**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
                      post_norm=True, gemma=True),
    "gemma3_text": _Family("Gemma3ForCausalLM", f"{_GEMMA} sliding_window_pattern _sliding_window_pattern rope_local_base_freq",
                           {**_GEMMA_DEFAULTS, "max_position_embeddings": 131072}, post_norm=True, qk_norm="head", gemma=True),
    "phi3": _Family("Phi3ForCausalLM", "sliding_window original_max_position_embeddings",
                    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, fused_checkpoint=True),
    "olmo2": _Family("Olmo2ForCausalLM", "attention_bias", {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
                     pre_norm=False, post_norm=True, qk_norm="projection"),
    "smollm3": _Family("SmolLM3ForCausalLM", f"{_BIAS} {_WINDOWS} no_rope_layers no_rope_layer_interval pretraining_tp",
                       {"tie_word_embeddings": True, "rope_theta": 2e6, "max_position_embeddings": 32768}),
    "granite": _Family("GraniteForCausalLM",
                       f"{_BIAS} embedding_multiplier residual_multiplier attention_multiplier logits_scaling",
                       {"max_position_embeddings": 2048}),
}  # fmt: skip

_COMMON = set(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "initializer_range".split()
)
# Keys that do not touch the maths of a forward pass: provenance, token ids, generation settings, and the dropouts of pre-training
# (a fine-tuning run has its own).
_HARMLESS = set(
    "model_type architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path id2label label2id "
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class "
    "use_cache cache_implementation _attn_implementation _attn_implementation_autoset attn_implementation return_dict "
    "output_attentions output_hidden_states torchscript use_bfloat16 chunk_size_feed_forward problem_type finetuning_task "
    "task_specific_params prefix tf_legacy_loss pruned_heads max_length min_length do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout max_window_layers unsloth_version unsloth_fixed "
    "is_llama_config transformers.js_config model_max_length max_sequence_length _flash_attn_2_enabled".split()
)
# Keys that would change the maths, with the values under which they do not.
_ONLY: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1,), "is_encoder_decoder": (False,), "is_decoder": (False, True), "add_cross_attention": (False,),
    "cross_attention_hidden_size": (), "tie_encoder_decoder": (False,), "use_bidirectional_attention": (False,),
    "rope_interleaved": (False,), "use_mrope": (False,), "lm_head_bias": (False,), "attention_bias": (False,),
    "mlp_bias": (False,), "use_sliding_window": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,),
    "qkv_bias": (), "qk_layernorm": (False,), "use_qk_norm": (False,), "layer_types": (),
}  # fmt: skip
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def _read(config: dict[str, Any]) -> ModelSpec:
    family, name = _family(config)
    _check_keys(config, family, name)

    def get(key: str, default: Any = None) -> Any:
        """The config's value. A missing key means the family's default; null (no window, no softcap) means `default`."""
        value = config[key] if key in config else family.defaults.get(key)
        return default if value is None else value

    def size(key: str, default: int | None = None) -> int:
        value = get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.json: {key!r} must be a positive integer, got {config.get(key)!r}")
        return value

    def number(key: str, default: float) -> float:
        value = get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"config.json: {key!r} must be a number, got {config.get(key)!r}")
        return float(value)

    count, hidden, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim > 256:
        raise ConfigError(f"config.json: head_dim {head_dim} is more than the 256 that the attention kernels take")
    # Gemma reads hidden_activation alone; its old checkpoints carry a hidden_act that was never used.
    activation_key = "hidden_activation" if family.gemma else "hidden_act"
    activation = get(activation_key, "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: {activation_key} {activation!r} is not supported; known: {', '.join(_ACTIVATIONS)}"
        )
    attention_bias = bool(get("attention_bias", False))
    max_position = size("max_position_embeddings")
    windows = _windows(config, get, count, name)
    try:
        ropes, indices = read_ropes(config, name, head_dim, max_position, [w > 0 for w in windows],
                                    float(family.defaults.get("rope_theta", 10000.0)))  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from None
    rotates = _rotates(get, count) if name == "smollm3" else [True] * count
    scale = number("query_pre_attn_scalar", float(head_dim)) ** -0.5
    if name == "granite":
        scale = number("attention_multiplier", 1.0)
    return ModelSpec(
        family=name, vocab_size=size("vocab_size"), hidden_size=hidden, intermediate_size=size("intermediate_size"),
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, activation=_ACTIVATIONS[activation],
        eps=number("rms_norm_eps", 1e-6), norm_offset=1.0 if family.gemma else 0.0, pre_norm=family.pre_norm,
        post_norm=family.post_norm, qk_norm=family.qk_norm, qkv_bias=attention_bias or name == "qwen2",
        output_bias=attention_bias, mlp_bias=bool(get("mlp_bias", False)), tied=bool(get("tie_word_embeddings", False)),
        fused_checkpoint=family.fused_checkpoint, scale=scale, attention_softcap=number("attn_logit_softcapping", 0.0),
        final_softcap=number("final_logit_softcapping", 0.0),
        embedding_scale=math.sqrt(hidden) if family.gemma else number("embedding_multiplier", 1.0),
        residual_scale=number("residual_multiplier", 1.0), logit_scale=1.0 / number("logits_scaling", 1.0),
        max_position=max_position, initializer_range=number("initializer_range", 0.02),
        layers=tuple(LayerSpec(w, i if r else None) for w, i, r in zip(windows, indices, rotates, strict=True)),
        ropes=ropes,
    )  # fmt: skip


def _family(config: dict[str, Any]) -> tuple[_Family, str]:
    name = config.get("model_type")
    if name == "gemma3" or "text_config" in config:
        raise ConfigError(
            f"config.json: model_type {name!r} is a multimodal wrapper; only text models are supported. For Gemma 3, use a "
            "text checkpoint (model_type 'gemma3_text')"
        )
    if name not in FAMILIES:
        raise ConfigError(f"config.json: model_type {name!r} is not supported; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    given = config.get("architectures") or [family.architecture]
    if family.architecture not in given:
        raise ConfigError(
            f"config.json: architectures {given} is not a causal language model of the family {name!r}; "
            f"expected {family.architecture!r}"
        )
    return family, name


def _check_keys(config: dict[str, Any], family: _Family, name: str) -> None:
    said = config.get("quantization_config")
    if said is not None:
        method, four = (said.get("quant_method"), said.get("load_in_4bit")) if isinstance(said, dict) else (None, None)
        if method != "bitsandbytes" or four is not True:
            raise ConfigError(
                f"config.json: quantization_config (quant_method {method!r}, load_in_4bit {four!r}) is not supported; of quantized "
                "checkpoints only the 4-bit ones of bitsandbytes are; use one of those, or the unquantized checkpoint"
            )
    known = _COMMON | set(family.keys.split())
    for key, value in config.items():
        if key in known or key in _HARMLESS or value is None or key == "quantization_config":
            continue
        if key in _ONLY:
            if value not in _ONLY[key]:
                wanted = " or ".join(repr(v) for v in (*_ONLY[key], None))
                raise ConfigError(f"config.json: {key!r} = {value!r} is not supported for {name}; it must be {wanted}")
            continue
        raise ConfigError(
            f"config.json: the key {key!r} = {value!r} is not known for {name}, and it may change the maths. If it does not, "
            "remove it from config.json"
        )


def _windows(config: dict[str, Any], get: Any, count: int, name: str) -> list[int]:
    """The attention window of every layer, 0 where unlimited."""
    window = int(get("sliding_window") or 0)
    if name in ("qwen2", "qwen3", "smollm3") and not get("use_sliding_window", False):
        window = 0
    types = get("layer_types")
    if types is not None:
        bad = [t for t in types if t not in ("full_attention", "sliding_attention")]
        if bad or len(types) != count:
            raise ConfigError(
                f"config.json: layer_types must name 'full_attention' or 'sliding_attention' for each of the {count} layers, "
                + (f"got {bad[0]!r}" if bad else f"got {len(types)} entries")
            )
        slides = [t == "sliding_attention" for t in types]
        if any(slides) and not window:
            raise ConfigError(
                "config.json: layer_types has 'sliding_attention' layers, but sliding_window gives no size"
            )
    elif name in ("qwen2", "qwen3"):
        slides = [i >= int(get("max_window_layers", 28)) for i in range(count)]
    elif name == "gemma2":
        slides = [i % 2 == 0 for i in range(count)]
    elif name == "gemma3_text":
        pattern = int(get("sliding_window_pattern") or get("_sliding_window_pattern") or 6)
        slides = [(i + 1) % pattern != 0 for i in range(count)]
    elif name == "smollm3":
        slides = [not r for r in _rotates(get, count)]
    else:
        slides = [True] * count
    return [window if s else 0 for s in slides]


def _rotates(get: Any, count: int) -> list[bool]:
    """SmolLM3: which layers rotate q and k (`no_rope_layers` has 1 where they do)."""
    given = get("no_rope_layers")
    if given is None:
        interval = int(get("no_rope_layer_interval", 4))
        return [(i + 1) % interval != 0 for i in range(count)]
    if len(given) < count:
        raise ConfigError(f"config.json: no_rope_layers has {len(given)} entries for {count} layers")
    return [bool(r) for r in given[:count]]
