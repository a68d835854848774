"""`enginepost.load`: logits, log-probabilities and text of a saved model with its tokenizer."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import build, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import enginepost
from enginepost.errors import EnginepostError
from enginepost.generate import generate
from enginepost.model import add_lora, save_adapter, save_model

CASES, PLACES, LOGITS = read()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A golden model with a tokenizer of letters: "a" is 10, "b" is 11, ...; <s> 1, </s> 2."""
    path = tmp_path_factory.mktemp("model")
    save_model(build(CASES["gemma2"]["config"]), path)
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2, "<user>": 3, "<assistant>": 4}
    vocab = {**specials, **{chr(ord("a") + i): 10 + i for i in range(26)}, **{f"w{i}": i for i in range(36, 120)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})
    )
    return path


@pytest.fixture(scope="module")
def model(directory):
    return enginepost.load(directory, dtype="float32")


def test_logits_and_logprobs(model):
    ids = CASES["gemma2"]["ids"]
    wanted = LOGITS["gemma2"]
    logits = model.logits(ids)
    assert logits.dtype == torch.float32 and logits.shape == (len(ids), 128)
    assert (logits[PLACES] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    logprobs = torch.log_softmax(logits[:-1].double(), -1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    assert (model.logprobs(ids) - logprobs).abs().max() < 1e-5
    assert torch.equal(model.logprobs(np.array(ids, dtype=np.int32)), model.logprobs(ids))
    assert (model.logprobs(torch.tensor(ids)) - logprobs).abs().max() < 1e-5


def test_logprobs_of_several(model, monkeypatch):
    ids = CASES["gemma2"]["ids"]
    sequences = [ids[:4], ids, [5], [], ids[3:9]]
    together = model.logprobs(sequences)
    assert [len(t) for t in together] == [3, len(ids) - 1, 0, 0, 5]
    from enginepost.generate import language_model

    monkeypatch.setattr(language_model, "STREAM_TOKENS", 6)
    for alone, packed in zip(model.logprobs(sequences), together, strict=True):
        assert torch.allclose(alone, packed, atol=1e-5)
    assert torch.allclose(model.logprobs(sequences[0]), together[0], atol=1e-5)


def test_text_prompts(model):
    assert model.encode_prompt("abc") == [1, 10, 11, 12]
    assert model.encode_prompt("<s>abc") == [1, 10, 11, 12]
    new = generate(model.model, [[1, 10, 11], [1, 25]], max_new_tokens=6, stop_ids=[2])
    texts = model.generate(["ab", "p"], max_new_tokens=6)
    assert texts == [model.tokenizer.decode([i for i in ids if i < 120], skip_special=True) for ids in new]
    assert model.generate("ab", max_new_tokens=6) == texts[:1]
    assert model.generate([[1, 10, 11]], max_new_tokens=6) == texts[:1]
    assert model.generate("ab", max_new_tokens=6, temperature=1.0, seed=1) == model.generate(
        "ab", max_new_tokens=6, temperature=1.0, seed=1
    )


def test_chat_prompts(model):
    messages = [{"role": "user", "content": "abc"}]
    assert model.chat_prompt(messages) == [3, 10, 11, 12, 2, 4]
    answer = model.generate(messages=messages, max_new_tokens=5)
    assert answer == model.generate([[3, 10, 11, 12, 2, 4]], max_new_tokens=5)
    assert model.generate(messages=[messages, messages], max_new_tokens=5) == answer * 2


def test_adapter(model, directory, tmp_path):
    base = enginepost.load(directory, dtype="float32").model
    add_lora(base, r=2, alpha=4)
    for p in base.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p)
    save_adapter(base, tmp_path)
    adapted = enginepost.load(directory, adapter=tmp_path, dtype="float32")
    assert not torch.allclose(adapted.logits([1, 2, 3]), model.logits([1, 2, 3]), atol=1e-3)
    assert adapted.generate("ab", max_new_tokens=3)


def test_errors(model, directory, tmp_path):
    with pytest.raises(EnginepostError, match="dtype 'int8' is not known"):
        enginepost.load(directory, dtype="int8")
    with pytest.raises(EnginepostError, match="quantize 'int4' is not known; use nf4, nf4-double, fp4"):
        enginepost.load(directory, quantize="int4")
    with pytest.raises(EnginepostError, match="either prompts or messages"):
        model.generate()
    with pytest.raises(EnginepostError, match="one sequence"):
        model.logits([[1, 2]])
    save_model(build(CASES["llama"]["config"]), tmp_path)
    bare = enginepost.load(tmp_path, dtype="float32")
    assert bare.logits([1, 2]).shape == (2, 128)
    with pytest.raises(EnginepostError, match="tokenizer"):
        bare.generate("ab")


def test_no_template(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_templates", {})
    with pytest.raises(EnginepostError, match="no chat template"):
        model.generate(messages=[{"role": "user", "content": "a"}])


def test_import_is_light():
    code = "import time; t = time.perf_counter(); import enginepost, sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_loaded == "False" and float(seconds) < 0.2
    assert {"load", "train", "render"} <= set(dir(enginepost))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = enginepost.nothing
