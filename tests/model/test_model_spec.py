"""config.json: what each family's keys mean, and every refusal by name."""

import pytest
from golden import read

from enginepost.model import ConfigError, ModelSpec

CASES = read()[0]
LLAMA = CASES["llama"]["config"]


def spec(name: str, **changes) -> ModelSpec:
    return ModelSpec.from_config({**CASES[name]["config"], **changes})


@pytest.mark.parametrize("name", CASES)
def test_old_and_new_spelling_agree(name):
    old, new = (ModelSpec.from_config(CASES[name][key]) for key in ("config", "saved_config"))
    assert old == new


def test_windows():
    windows = lambda s: [layer.window for layer in s.layers]  # noqa: E731
    assert windows(spec("mistral")) == [6, 6]
    assert windows(spec("mistral_full")) == [0, 0]
    assert windows(spec("qwen2")) == [0, 0]
    assert windows(spec("qwen2_windows")) == [0, 5]
    assert windows(spec("gemma2")) == [5, 0, 5, 0]
    assert windows(spec("gemma3")) == [5, 5, 0, 5]
    assert windows(spec("phi3")) == [7, 7]
    assert windows(spec("smollm3_windows")) == [0, 4, 0]
    assert windows(spec("qwen3", use_sliding_window=True, layer_types=["full_attention", "sliding_attention"],
                        sliding_window=9)) == [0, 9]  # fmt: skip


def test_rotation_by_layer():
    assert [layer.rope for layer in spec("smollm3").layers] == [0, None, 0, None]
    gemma = spec("gemma3")
    assert [gemma.ropes[layer.rope].theta for layer in gemma.layers] == [100.0, 100.0, 1e6, 100.0]
    scaled = spec("gemma3_linear")
    assert [scaled.ropes[layer.rope].kind for layer in scaled.layers] == ["default", "linear", "default", "linear"]
    assert spec("phi3_partial").ropes[0].dim == 12
    assert (
        spec("phi3", rope_scaling={**CASES["phi3_longrope"]["config"]["rope_scaling"], "type": "su"}).ropes[0].kind
        == "longrope"
    )


def test_a_missing_key_is_the_family_default():
    bare = {k: v for k, v in CASES["smollm3"]["config"].items() if k not in ("rope_theta", "bos_token_id")}
    assert ModelSpec.from_config(bare).ropes[0].theta == 2e6
    assert ModelSpec.from_config(bare).tied
    assert not spec("llama").tied
    gemma = {
        k: v for k, v in CASES["gemma2"]["config"].items() if "softcapping" not in k and k != "query_pre_attn_scalar"
    }
    found = ModelSpec.from_config(gemma)
    assert (found.attention_softcap, found.final_softcap, found.scale) == (50.0, 30.0, 1 / 16)
    off = ModelSpec.from_config({**gemma, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (off.attention_softcap, off.final_softcap) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: llama, mistral"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "gemma3", "text_config": {}}, "multimodal.*gemma3_text"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*'LlamaForCausalLM'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config .*'bitsandbytes'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; known: silu"),
        ({"pretraining_tp": 2}, "'pretraining_tp' = 2 is not supported for llama; it must be 1"),
        ({"sliding_window": 8}, "'sliding_window' = 8 is not known for llama"),
        ({"num_experts": 8}, "'num_experts' = 8 is not known for llama.*remove it"),
        ({"rope_interleaved": True}, "'rope_interleaved' = True"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' = True"),
        ({"rope_scaling": {"rope_type": "mystery", "factor": 2}}, "rope type 'mystery' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs the parameter 'factor'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "'mrope_section'"),
        ({"rope_parameters": {"full_attention": {}, "chunked_attention": {}}}, "unknown entry 'chunked_attention'"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"head_dim": 7}, "even part of head_dim 7"),
        ({"head_dim": 512}, "head_dim 512 is more than the 256"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": None}, "'hidden_size' must be a positive integer, got None"),
        ({"hidden_size": 48.5}, "'hidden_size' must be a positive integer, got 48.5"),
        ({"vocab_size": -1}, "'vocab_size' must be a positive integer"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' must be a number"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(ConfigError, match=words):
        spec("llama", **changes)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2", {"layer_types": ["full_attention"]}, "each of the 2 layers, got 1 entries"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "got 'linear_attention'"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window gives no size"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4"),
        (
            "phi3_longrope",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "6 entries",
        ),
        ("phi3", {"attention_bias": True}, "'attention_bias' = True is not supported for phi3"),
        ("gemma2", {"hidden_activation": "relu2"}, "hidden_activation 'relu2'"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types'"),
    ],
)
def test_refusals_of_families(name, changes, words):
    with pytest.raises(ConfigError, match=words):
        spec(name, **changes)


def test_harmless_keys_pass():
    spec("llama", torch_dtype="bfloat16", transformers_version="4.40.0", use_cache=True, attention_dropout=0.1,
         pretraining_tp=1, is_llama_config=True, rope_interleaved=False, some_future_key=None, architectures=None)  # fmt: skip


# What config.json of well-known checkpoints holds, beyond the sizes: none of it may be refused.
PUBLISHED = {
    "SmolLM2-135M-Instruct": ("llama", {
        "attention_bias": False, "attention_dropout": 0.0, "is_llama_config": True, "pretraining_tp": 1, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    }),
    "Llama-3.2-1B": ("llama", {
        "eos_token_id": [128001, 128008, 128009], "head_dim": 12, "mlp_bias": False, "rope_theta": 500000.0, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3"}}),
    "Mistral-7B-v0.3": ("mistral", {"sliding_window": None, "head_dim": None, "tie_word_embeddings": False}),
    "Qwen2.5-0.5B": ("qwen2", {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False}),
    "Qwen3-0.6B": ("qwen3", {"attention_bias": False, "max_window_layers": 28, "sliding_window": None, "rope_scaling": None,
                             "use_sliding_window": False}),
    "gemma-2-2b": ("gemma2", {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
                              "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma-3-1b-it": ("gemma3_text", {
        "cache_implementation": "hybrid", "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None,
        "rope_local_base_freq": 10000, "sliding_window_pattern": 6, "use_bidirectional_attention": False}),
    "Phi-3.5-mini-instruct": ("phi3", {
        "auto_map": {"AutoConfig": "x"}, "attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "sliding_window": 262144,
        "original_max_position_embeddings": 4096, "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6,
                                                                   "type": "longrope"}}),
    "Phi-4-mini-instruct": ("phi3", {
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "partial_rotary_factor": 0.75,
        "head_dim": 16, "original_max_position_embeddings": 4096, "tie_word_embeddings": True}),
    "OLMo-2-0425-1B": ("olmo2", {"attention_bias": False, "rope_scaling": None, "rope_theta": 500000}),
    "SmolLM3-3B": ("smollm3", {
        "layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 1], "no_rope_layer_interval": 4, "max_window_layers": 28,
        "pretraining_tp": 2, "sliding_window": None, "use_sliding_window": False}),
    "granite-3.1-2b": ("granite", {"attention_multiplier": 0.015625, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                                   "embedding_multiplier": 12.0, "mlp_bias": False, "attention_bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    family, keys = PUBLISHED[name]
    assert ModelSpec.from_config({**LLAMA, "model_type": family, **keys}).family == family
