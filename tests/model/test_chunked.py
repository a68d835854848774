"""The MLP in chunks of tokens: the numbers of the whole, sums in another order; the same bits wherever weights and inputs are."""

import pathlib
from typing import Any

import pytest
import torch
from golden import build, read, stream

from enginepost.model import add_lora, load_model, save_model
from enginepost.model.chunked import chunked
from enginepost.recipe import changed_keys, load_recipe

CASES = read()[0]
IDS = [5, 1, 2, 9, 4, 77, 3, 8, 8, 2, 61, 40, 33]


def one_pass(model: Any, chunk: int | None, checkpointing: bool | str = False) -> dict[str, torch.Tensor]:
    """Hidden states and gradients of a training pass."""
    model.mlp_chunk, model.checkpointing, model.dropout_seed = chunk, checkpointing, 3
    model.train().zero_grad()
    hidden = model.hidden(*stream(IDS, IDS[:6]))
    hidden.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **found}


def adapted(model: Any, **keys: Any) -> Any:
    torch.manual_seed(1)
    add_lora(model, r=3, alpha=8, **keys)
    for name, p in model.named_parameters():
        if "lora" in name and p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("checkpointing", [False, True, "host"])
@pytest.mark.parametrize("case", ["llama", "llama_biases", "gemma2"])
@pytest.mark.parametrize("kind", ["all weights", "lora", "dora", "down_proj alone"])
def test_the_same_numbers_as_the_whole(kind: str, case: str, checkpointing: bool | str) -> None:
    model = build(CASES[case]["config"]).double()
    if kind != "all weights":
        adapted(model, use_dora=kind == "dora", target_modules=["down_proj"] if "alone" in kind else "all-linear")
        model.double()
    whole = one_pass(model, None)
    for chunk in (1, 4, 18, 19, 500):
        parts = one_pass(model, chunk, checkpointing)
        assert parts.keys() == whole.keys()
        for name, value in parts.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_same_bits_wherever_weights_and_inputs_are(tmp_path: pathlib.Path) -> None:
    """Dropout included, which has a mask of its own for each chunk."""
    save_model(build(CASES["llama"]["config"]), tmp_path / "model")
    found = []
    for weights, checkpointing in [
        ("resident", False),
        ("resident", True),
        ("disk", False),
        ("disk", True),
        ("disk", "host"),
    ]:
        model = adapted(load_model(tmp_path / "model", quantize=None, weights=weights), dropout=0.3)  # type: ignore[arg-type]
        found.append(one_pass(model, 4, checkpointing))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_every_chunk_has_a_mask_of_its_own() -> None:
    model = adapted(build(CASES["llama"]["config"]), dropout=0.5, target_modules=["down_proj"]).train()
    same = torch.randn(1, CASES["llama"]["config"]["hidden_size"]).expand(8, -1)
    first, second = (model.blocks[0]._mlp(same, chunk, 0) for chunk in (0, 1))
    assert not torch.equal(first, second)


def test_recomputation_does_not_make_the_output_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go through the MLP: once forward, once to be differentiated, as with checkpointing alone."""
    model = adapted(build(CASES["llama"]["config"]))
    rows = 0
    original = type(model.blocks[0])._mlp

    def counted(self: Any, y: torch.Tensor, chunk: int, seed: int) -> torch.Tensor:
        nonlocal rows
        rows += len(y)
        return original(self, y, chunk, seed)

    monkeypatch.setattr(type(model.blocks[0]), "_mlp", counted)
    one_pass(model, 4, checkpointing=True)
    assert rows == 2 * len(model.blocks) * 19


def test_bfloat16_gradients_add_up_in_float32() -> None:
    """4096 chunks whose share is 1/2 ulp of the sum each would be lost in bfloat16."""
    weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    y = torch.ones(4096, 1, dtype=torch.bfloat16)
    chunked(lambda x, i: x * weight, y, [weight], 1, lambda: None).sum().backward()
    assert weight.grad is not None and weight.grad.item() == 4096.0


def test_a_resumed_run_keeps_the_length() -> None:
    before, after = (load_recipe({"model": "m", "data": "d", "mlp_chunk": n}) for n in (512, 1024))
    assert changed_keys(before, after) == ["mlp_chunk"]
