"""Gradients: packed as one by one, and recomputed blocks give the same bits."""

import pytest
import torch
from golden import build, read, stream

from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.model import add_lora

CASES = read()[0]
FAMILIES = [
    "llama",
    "llama_biases",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3_partial",
    "olmo2",
    "smollm3",
    "granite",
]


def sequences_of(name):
    ids = CASES[name]["ids"]
    return [ids[:19], ids[3:4], ids[2:26], ids[8:15]]


def gradients(model, *packs):
    model.zero_grad()
    for sequences in packs:
        ids, cu_seqlens, positions = stream(*sequences)
        targets = torch.cat([torch.tensor([*s[1:], -100]) for s in sequences])
        hidden = model.hidden(ids, cu_seqlens, positions)
        logprob = linear_logprob(hidden, model.head_weight, targets, softcap=model.spec.final_softcap)[0]
        (-logprob.sum() / 60).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_are_those_of_one_by_one(name):
    model = build(CASES[name]["config"])
    sequences = sequences_of(name)
    packed, alone = gradients(model, sequences), gradients(model, *[[s] for s in sequences])
    assert packed.keys() == alone.keys() == dict(model.named_parameters()).keys()
    for key in packed:
        assert (packed[key] - alone[key]).abs().max() <= 1e-6 * 5 * alone[key].abs().max(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_against_float64(name):
    model = build(CASES[name]["config"])
    exact = gradients(build(CASES[name]["config"], torch.float64), sequences_of(name))
    for key, found in gradients(model, sequences_of(name)).items():
        assert (found - exact[key]).abs().max() <= 1e-4 * exact[key].abs().max(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, {}, {"dropout": 0.3}, {"use_dora": True}])
def test_checkpointing_gives_the_same_bits(dtype, lora):
    for name in ("llama", "gemma3"):
        model = build(CASES[name]["config"], dtype).train()
        if lora is not None:
            add_lora(model, r=4, alpha=8, **lora)
            for p in model.parameters():
                if p.requires_grad and not p.any():
                    torch.nn.init.normal_(p, std=0.1)
        model.dropout_seed = 7
        kept = gradients(model, sequences_of(name))
        model.checkpointing = True
        recomputed = gradients(model, sequences_of(name))
        assert kept.keys() == recomputed.keys() and kept
        for key in kept:
            assert torch.equal(kept[key], recomputed[key]), (name, key)


def test_dropout_follows_its_seed_and_mode():
    model = build(CASES["llama"]["config"])
    add_lora(model, r=4, alpha=8, dropout=0.5)
    for p in model.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p)
    ids = sequences_of("llama")
    hidden = lambda seed: (setattr(model, "dropout_seed", seed), model.hidden(*stream(*ids)).detach())[1]  # noqa: E731
    assert torch.equal(hidden(1), hidden(2))  # evaluation drops nothing
    model.train()
    assert torch.equal(hidden(1), hidden(1)) and not torch.equal(hidden(1), hidden(2))


@pytest.mark.parametrize("keep", ["host", "bf16"])
def test_where_the_inputs_of_blocks_are_kept(keep):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(CASES["llama"]["config"], dtype).train()
        exact = gradients(model, sequences_of("llama"))
        model.checkpointing = keep
        found = gradients(model, sequences_of("llama"))
        same = all(torch.equal(found[key], exact[key]) for key in exact)
        assert same == (keep == "host" or dtype == torch.bfloat16)
        for key in exact:  # rounding the inputs of blocks moves gradients by about its own size
            assert (found[key] - exact[key]).abs().max() <= 0.03 * exact[key].abs().max(), key
