"""Roll-outs: several samples of a prompt share its cache, and get what they would have got alone."""

import numpy as np
import pytest
import torch
from golden import build, read, stream

from enginepost.errors import EnginepostError
from enginepost.generate import KVCache, decode, generate, sample
from enginepost.generate.cache import PAGE
from enginepost.model import Transformer

CASES, _, _ = read()


def prompts_of(case):
    ids = case["ids"]
    return [ids[:3], ids, ids[5:6], ids[2:20]]


def drawn(results):
    return [[c.ids for c in group] for group in results]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_longrope_crossing", "llama_dynamic", "qwen3"])
@pytest.mark.parametrize("slots", [64, 5, 3, 1])
def test_samples_are_those_of_prompts_repeated(name, slots, monkeypatch):
    """With room for all, for one group and a bit, for less than a group (the shelf), for one at a time."""
    if name not in CASES:
        pytest.skip("no such golden model")
    model, prompts = build(CASES[name]["config"]), prompts_of(CASES[name])
    keys = [(7, i) for i in range(len(prompts))]
    alone = [
        sample(model, [p], samples=1, max_new_tokens=9, temperature=0.9, top_p=0.9, seed=3, keys=[(*key, i)])[0][0].ids
        for p, key in zip(prompts, keys, strict=True)
        for i in range(4)
    ]
    monkeypatch.setattr(decode, "MOST_SLOTS", slots)
    together = sample(model, prompts, samples=4, max_new_tokens=9, temperature=0.9, top_p=0.9, seed=3, keys=keys)
    assert [ids for group in drawn(together) for ids in group] == alone


def test_a_prompt_is_computed_once(monkeypatch):
    """16 samples over 5 slots: the prompt's tokens go through the model once, everything else is one token a sample and step."""
    model, ids = build(CASES["llama"]["config"]), CASES["llama"]["ids"]
    seen = []
    original = Transformer.hidden
    monkeypatch.setattr(
        Transformer, "hidden", lambda self, ids, *a, **k: (seen.append(len(ids)), original(self, ids, *a, **k))[1]
    )
    monkeypatch.setattr(decode, "MOST_SLOTS", 5)
    results = sample(model, [ids], samples=16, max_new_tokens=6, seed=0)
    assert sum(seen) == len(ids) + 16 * 5 and all(len(c.ids) == 6 for c in results[0])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_log_probabilities_are_those_of_a_full_forward_pass(temperature):
    model, prompts = build(CASES["llama"]["config"]), prompts_of(CASES["llama"])
    for prompt, group in zip(
        prompts, sample(model, prompts, samples=3, max_new_tokens=7, temperature=temperature), strict=True
    ):
        for c in group:
            with torch.no_grad():
                logits = model.logits(model.hidden(*stream([*prompt, *c.ids])))[len(prompt) - 1 : -1]
            wanted = torch.log_softmax(logits.double() / (temperature or 1.0), -1)
            wanted = wanted.gather(1, torch.tensor(c.ids).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(c.logprobs, dtype=torch.float64), wanted, rtol=0, atol=2e-5)


def test_a_stop_id_is_part_of_the_completion_and_generate_leaves_it_out():
    model, ids = build(CASES["llama"]["config"]), CASES["llama"]["ids"]
    greedy = CASES["llama"]["greedy"]
    ((c,),) = sample(model, [ids], samples=1, max_new_tokens=12, temperature=0.0, stop_ids=[greedy[5]])
    assert c.stopped and c.ids == greedy[: greedy.index(greedy[5]) + 1] and len(c.logprobs) == len(c.ids)
    assert generate(model, [ids], max_new_tokens=12, stop_ids=[greedy[5]]) == [c.ids[:-1]]
    ((c,),) = sample(model, [ids], samples=1, max_new_tokens=3, temperature=0.0, stop_ids=[greedy[5]])
    assert not c.stopped and c.ids == greedy[:3]


def test_keys_decide_not_places():
    model, prompts = build(CASES["llama"]["config"]), prompts_of(CASES["llama"])
    keys = [(4, i) for i in range(4)]
    forward = drawn(sample(model, prompts, samples=2, max_new_tokens=5, keys=keys))
    backward = drawn(sample(model, prompts[::-1], samples=2, max_new_tokens=5, keys=keys[::-1]))
    assert forward == backward[::-1]
    assert forward != drawn(sample(model, prompts, samples=2, max_new_tokens=5, keys=[(5, i) for i in range(4)]))
    with pytest.raises(EnginepostError, match="samples must be at least 1"):
        sample(model, prompts, samples=0, max_new_tokens=5)


@pytest.mark.parametrize("filled", [PAGE, PAGE - 5, PAGE + 3, 2])
def test_a_fork_shares_pages_until_it_writes(filled):
    """Two forks of one prompt go their own ways: both give the logits of a full forward pass, and full pages stay shared."""
    model = build(CASES["llama"]["config"])
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, 128, filled).tolist()
    ways = [generator.integers(0, 128, 6).tolist() for _ in range(2)]
    cache = KVCache(model, 3, filled + 6)
    with torch.no_grad():
        cu_seqlens, positions = cache.extend(np.array([filled, 0, 0]))
        model.hidden(torch.tensor(prompt), cu_seqlens, positions, cache)
        cache.fork(0, 2)
        cache.fork(0, 1)
        cache.clear(0)
        for t in range(6):
            cu_seqlens, positions = cache.extend(np.array([0, 1, 1]))
            logits = model.logits(model.hidden(torch.tensor([w[t] for w in ways]), cu_seqlens, positions, cache))
        for row, way in enumerate(ways):
            full = model.logits(model.hidden(*stream([*prompt, *way])))[-1]
            assert (logits[row] - full).abs().max() <= 1e-5 * full.abs().max()
    whole = filled // PAGE
    assert (cache.table[1, :whole] == cache.table[2, :whole]).all()
    assert (cache.holders[cache.table[1, :whole]] == 2).all()
    assert cache.table[1, whole] != cache.table[2, whole]
    cache.clear(1)
    cache.clear(2)
    assert (cache.holders == 0).all() and sorted(cache._free) == list(range(len(cache.holders)))
