"""Public architectures by name, and models with random weights in their shape."""

import json
import math
import pathlib
import subprocess
import sys

import pytest
import torch

from enginepost.checkpoint import Checkpoint
from enginepost.errors import EnginepostError
from enginepost.model import ModelSpec, create_model, load_model
from enginepost.model.architectures import architecture, init_model, names
from enginepost.model.layout import layout

# Parameters as the model cards on the hub state them (a tied head counted once).
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800, "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320, "tinyllama-1.1b": 1_100_048_384, "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "mistral-small-24b": 23_572_403_200, "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952, "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200, "olmo-2-1b": 1_484_916_736, "olmo-2-7b": 7_298_617_344, "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936, "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624, "granite-3.1-2b": 2_533_531_648, "granite-3.1-8b": 8_170_848_256,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "vocab_size": 500}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_every_architecture_has_the_parameters_of_its_model_card(name: str) -> None:
    spec = ModelSpec.from_config(architecture(name))
    assert sum(math.prod(e.shape) for e in layout(spec)) == PARAMETERS[name]


def test_names_come_with_or_without_their_owner_and_wrong_ones_get_a_hint() -> None:
    assert architecture("meta-llama/Llama-3.1-8B") == architecture("llama-3.1-8b")
    with pytest.raises(EnginepostError, match=r"did you mean .*llama-3\.1-8b"):
        architecture("llama-3.3-8b")
    with pytest.raises(EnginepostError, match=r"known: llama-3\.2-1b, .*--config"):
        architecture("gpt-9")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "gemma-2-2b", "phi-3-mini"])
def test_the_weights_are_those_of_create_model(name: str, dtype: str, tmp_path: pathlib.Path) -> None:
    config = {
        **architecture(name),
        **SMALL,
        "vocab_size": 70_003,
    }  # an embedding of more than a piece, and not a multiple of 16
    count = init_model(tmp_path / "m", config, dtype=dtype, seed=3, shard_bytes=4e6)
    written = load_model(tmp_path / "m", dtype=getattr(torch, dtype))
    wanted = create_model(config, dtype=getattr(torch, dtype), seed=3).state_dict()
    assert count == sum(t.numel() for t in wanted.values())
    for key, tensor in written.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == dtype
    assert Checkpoint(tmp_path / "m").dtype("model.norm.weight") == getattr(torch, dtype)


def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, tiny_tokenizer_dir: pathlib.Path) -> None:
    config = {**architecture("smollm2-135m"), **SMALL}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(EnginepostError, match="new or empty directory"):
        init_model(tmp_path / "full", config)
    with pytest.raises(EnginepostError, match="dtype 'int8' is not one of"):
        init_model(tmp_path / "m", config, dtype="int8")
    with pytest.raises(EnginepostError, match=r"the tokenizer has \d+ tokens and the model 100; set vocab_size=\d+"):
        init_model(tmp_path / "m", {**config, "vocab_size": 100}, tokenizer=tiny_tokenizer_dir)
    assert not (tmp_path / "m").exists()
    init_model(tmp_path / "m", config, tokenizer=tiny_tokenizer_dir)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (tiny_tokenizer_dir / "tokenizer.json").read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path: pathlib.Path) -> None:
    code = """
import sys, torch
from enginepost.model.architectures import architecture, init_model
import enginepost.checkpoint
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
init_model(sys.argv[1], {**architecture("smollm2-135m"), "vocab_size": 200_000}, shard_bytes=5e7)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60_000, "KB above what was there before, for 440 MB of weights"
