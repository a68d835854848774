"""Golden merges of whole models: pico Llamas, mergekit 0.1.5's result for several recipes, tensors and configuration.

Run in an environment with mergekit (bench/peers-merge.txt):
    python tests/golden/make_merge_models.py
Writes merge_models/: the inputs (with tokenizers of different vocabularies), recipes.json, and the results in results.safetensors.
"""

import json
import pathlib
import shutil
import tempfile

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent / "merge_models"
WORDS = ["<unk>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a"]
RECIPES = {
    "ties": """
models:
  - model: base
  - model: a
    parameters: {density: [0.5, 0.9], weight: [{filter: mlp, value: 0.6}, {value: 0.3}]}
  - model: b
    parameters: {density: 0.5, weight: 0.4}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "slerp": """
slices:
  - sources:
      - {model: base, layer_range: [0, 3]}
      - {model: a, layer_range: [0, 3]}
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "linear": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
merge_method: linear
dtype: float32
""",
    "stack": """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}}]
merge_method: passthrough
dtype: float32
""",
    "task": """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: 0.3}}
      - {model: b, layer_range: [1, 3]}
    parameters: {weight: [0.2, 0.8]}
merge_method: task_arithmetic
base_model: base
dtype: float32
parameters: {lambda: 0.9, weight: 1.0}
""",
    "union": """
models:
  - {model: wide, parameters: {weight: 0.4}}
  - {model: other, parameters: {weight: 0.6}}
merge_method: task_arithmetic
base_model: base
tokenizer_source: union
dtype: float32
""",
    "tokens": """
models:
  - {model: wide, parameters: {weight: 0.4}}
  - {model: other, parameters: {weight: 0.6}}
merge_method: linear
base_model: base
parameters: {weight: 0.5}
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    <new>: {source: {kind: model_token, model: wide, token: fox}}
    fox: {source: wide, force: true}
    dog: {source: {kind: zero}, force: true}
dtype: float32
""",
}


def tokenizer(words: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    made = {
        "base": (WORDS, ["<end>"]), "a": (WORDS, ["<end>"]), "b": (WORDS, ["<end>"]),
        "wide": ([*WORDS[:9], "cat", "tree"], ["<start>", "<end>"]), "other": ([*WORDS[::-1][:6], "<unk>", "cat"], ["<end>"]),
    }  # fmt: skip
    for i, (name, (words, special)) in enumerate(made.items()):
        tok = tokenizer(words, special)
        config = LlamaConfig(
            vocab_size=len(tok), hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, max_position_embeddings=64,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
                if i:
                    p.add_(0.3 * torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator))
        model.save_pretrained(HERE / name)
        tok.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
    results, facts = {}, {}
    for name, text in RECIPES.items():
        local = yaml.safe_load(text)
        with tempfile.TemporaryDirectory() as out:
            located = json.loads(
                json.dumps(local),
                object_hook=lambda d: {k: place(v) if k in ("model", "base_model") else v for k, v in d.items()},
            )
            for setting in (located.get("tokenizer") or {}).get("tokens", {}).values():
                setting["source"] = place(setting.get("source"))
            run_merge(MergeConfiguration.model_validate(located), out, MergeOptions(copy_tokenizer=True, quiet=True))
            for tensor, value in load_file(pathlib.Path(out) / "model.safetensors").items():
                results[f"{name}/{tensor}"] = value
            config = json.loads((pathlib.Path(out) / "config.json").read_text())
            vocabulary = PreTrainedTokenizerFast.from_pretrained(out).get_vocab()
        facts[name] = {
            "recipe": text.lstrip(), "vocab_size": config["vocab_size"], "layers": config["num_hidden_layers"], "tokens": vocabulary,
        }  # fmt: skip
    save_file(results, HERE / "results.safetensors")
    (HERE / "recipes.json").write_text(json.dumps(facts, indent=1) + "\n")


def place(value: object) -> object:
    return str(HERE / value) if isinstance(value, str) and (HERE / value).is_dir() else value


if __name__ == "__main__":
    main()
