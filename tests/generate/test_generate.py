"""Generation: transformers' greedy continuations, cache against full forward, batching, sampling."""

import numpy as np
import pytest
import torch
from golden import build, read, stream

from enginepost.errors import EnginepostError
from enginepost.generate import KVCache, decode, generate
from enginepost.generate.sampling import next_tokens
from enginepost.model import ModelSpec

CASES, _, _ = read()


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation_is_that_of_transformers(name):
    case = CASES[name]
    new = generate(build(case["config"]), [case["ids"]], max_new_tokens=len(case["greedy"]))
    assert new == [case["greedy"]]


# (The keys of these depend on how long the sequence is when they are made, in transformers as here.)
FIXED = [
    name for name in CASES if ModelSpec.from_config(CASES[name]["config"]).ropes[0].kind not in ("dynamic", "longrope")
]


@pytest.mark.parametrize("name", FIXED)
def test_cached_decode_equals_full_forward(name):
    model = build(CASES[name]["config"])
    ids = CASES[name]["ids"]
    cache = KVCache(model, 3, 30)
    logits = []
    with torch.no_grad():
        full = model.logits(model.hidden(*stream(ids)))
        at = 0
        for count in (5, 1, 1, 12, 1, 6):
            cu_seqlens, positions = cache.extend(np.array([0, count, 0]))
            hidden = model.hidden(torch.tensor(ids[at : at + count]), cu_seqlens, positions, cache)
            logits.append(model.logits(hidden))
            at += count
    assert (torch.cat(logits) - full).abs().max() <= 1e-5 * full.abs().max()


def prompts_of(case):
    ids = case["ids"]
    return [ids[:3], ids, ids[5:6], ids[2:20], ids[7:15], ids[1:9], ids[4:24]]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3_longrope_crossing", "llama_dynamic"])
def test_batch_composition_does_not_matter(name, monkeypatch):
    model, prompts = build(CASES[name]["config"]), prompts_of(CASES[name])
    for settings in ({}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}):
        together = generate(model, prompts, max_new_tokens=9, **settings)
        monkeypatch.setattr(decode, "MOST_SLOTS", 2)  # prompts take turns in two slots
        assert generate(model, prompts, max_new_tokens=9, **settings) == together
        monkeypatch.setattr(decode, "STEP_TOKENS", 1)
        assert generate(model, prompts, max_new_tokens=9, **settings) == together
        monkeypatch.undo()
        if not settings:
            assert [generate(model, [p], max_new_tokens=9)[0] for p in prompts] == together


def test_stop_ids_and_length():
    case = CASES["llama"]
    model, greedy = build(case["config"]), case["greedy"]
    stop = greedy[5]
    assert generate(model, [case["ids"]], max_new_tokens=12, stop_ids=[stop]) == [greedy[: greedy.index(stop)]]
    assert generate(model, [case["ids"]], max_new_tokens=3) == [greedy[:3]]
    assert generate(model, [], max_new_tokens=3) == []


def test_seed_decides_the_sample():
    model, prompt = build(CASES["llama"]["config"]), CASES["llama"]["ids"]
    draw = lambda seed: generate(model, [prompt] * 3, max_new_tokens=8, temperature=1.0, seed=seed)  # noqa: E731
    first = draw(0)
    assert first == draw(0) != draw(1)
    assert first[0] != first[1] and first[1] != first[2]


def test_model_is_left_as_it_was():
    model = build(CASES["llama"]["config"]).train()
    model.checkpointing = True
    generate(model, [[1, 2, 3]], max_new_tokens=2)
    assert model.training and model.checkpointing


@pytest.mark.parametrize(
    ("settings", "prompt", "words"),
    [
        ({"temperature": -1}, [1], "temperature must be 0"),
        ({"temperature": float("nan")}, [1], "temperature must be 0"),
        ({"top_p": 0}, [1], "top_p must be in"),
        ({"top_k": -1}, [1], "top_k must be 0"),
        ({"max_new_tokens": 0}, [1], "max_new_tokens must be at least 1"),
        ({}, [], "prompt 1 is empty"),
        ({}, [1] * 65, "65 tokens, more than the 64"),
        ({}, [1, 128], "token id 128 at position 3 .* outside the vocabulary .* 127"),
        ({}, [1, -1], "token id -1"),
    ],
)
def test_errors(settings, prompt, words):
    with pytest.raises(EnginepostError, match=words):
        generate(build(CASES["llama"]["config"]), [[5, 6], prompt], **{"max_new_tokens": 2, **settings})


def test_sampling_follows_the_distribution():
    z = torch.tensor([[2.0, 1.0, 0.5, -1.0, -30.0, 0.9]])
    count = 20000
    u = np.random.default_rng(0).random(count).tolist()
    cases = [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 1.0, 3), (1.0, 0.7, 0), (2.0, 0.6, 4)]
    for temperature, top_p, top_k in cases:
        ids = next_tokens(z.expand(count, -1), u, temperature=temperature, top_p=top_p, top_k=top_k)
        p = torch.softmax(z[0].double() / temperature, 0)
        order = p.argsort(descending=True).tolist()
        kept = order[: top_k or len(order)]
        total, nucleus = sum(p[i] for i in kept), []
        for i in kept:
            if sum(p[j] for j in nucleus) / total < top_p:
                nucleus.append(i)
        wanted = torch.zeros_like(p)
        wanted[nucleus] = p[nucleus] / p[nucleus].sum()
        found = torch.bincount(ids, minlength=6) / count
        assert (found - wanted).abs().max() < 0.015
        assert set(ids.tolist()) <= set(nucleus)


def test_the_extreme_draws_stay_inside():
    z = torch.tensor([[0.0, 5.0, 1.0, -1e30], [float("-inf"), 0.0, 0.0, float("-inf")]])
    for top_p, top_k in ((1.0, 0), (0.999, 0), (1.0, 3)):
        for u in (0.0, (2**32 - 1) / 2**32):
            ids = next_tokens(z, [u, u], temperature=1.0, top_p=top_p, top_k=top_k).tolist()
            assert ids[0] in (0, 1, 2) and ids[1] in (1, 2)
