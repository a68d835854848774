"""AdamW over named parameters against torch's, masters in float32, state in and out."""

from typing import Any

import pytest
import torch
from torch import nn

from enginepost.errors import EnginepostError
from enginepost.train.optimizer import AdamW, NotFinite


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (7, 5), "vector": (11,), "frozen": (3, 3)}
    made = {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}
    made["frozen"].requires_grad_(False)
    return {n: p for n, p in made.items() if p.requires_grad}


def backward(params: dict[str, nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sum((p.float() * torch.randn(p.shape, generator=g)).pow(2).sum() for p in params.values()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_backward", [False, True])
def test_states_on_the_host_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int, in_backward: bool
) -> None:
    """A host that is another memory than the device's: what comes to it is a copy."""
    found = []
    copies = 0

    def copied(t: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return t.clone()

    for host in (False, True):
        params = {**parameters(dtype), "large": nn.Parameter(torch.linspace(-1, 1, 5000).to(dtype))}
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "cpu", copied)
            mine = AdamW(
                params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, bits=bits, in_backward=in_backward, host=host
            )
            for step in range(4):
                mine.zero_grad(lr=1e-2)
                backward(params, step)
                mine.step(lr=1e-2)
            assert copies == (2 * 3 * 4 if host else 0)  # a parameter and its gradient, three parameters, four steps
        found.append({**mine.tensors(), **params})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_matches_torch_and_decays_matrices_only() -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    mine = AdamW(ours, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [{"params": [theirs["matrix"]], "weight_decay": 0.1}, {"params": [theirs["vector"]], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(5):
        for params in (ours, theirs):
            backward(params, step)
        norm = mine.grad_norm()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)), rel=1e-6)
        mine.step(lr=1e-2, grad_scale=min(1.0, 1.0 / norm))
        reference.step()
        mine.zero_grad()
        reference.zero_grad()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_bf16_follows_a_float32_master() -> None:
    """Updates too small for bfloat16 add up in the master and show in the parameter at last."""
    p = nn.Parameter(torch.full((4, 4), 256.0, dtype=torch.bfloat16))
    optimizer = AdamW({"p": p}, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(30):
        (p.float() * 1.0).sum().backward()
        assert p.grad is None
        optimizer.step(lr=0.1)
        optimizer.zero_grad()
    assert optimizer.masters["p"].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters["p"], torch.full((4, 4), 253.0), atol=1e-3, rtol=0)
    assert torch.equal(p, optimizer.masters["p"].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_in(dtype: torch.dtype) -> None:
    a = parameters(dtype)
    first = AdamW(a, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step in range(2):
        backward(a, step)
        first.step(lr=1e-2)
        first.zero_grad()
    saved = {n: t.clone() for n, t in first.tensors().items()}
    assert len(saved) == (4 if dtype == torch.float32 else 6)
    b = {n: nn.Parameter(p.detach().clone()) for n, p in a.items()}
    second = AdamW(b, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    second.load(saved, 2)
    for params, optimizer in ((a, first), (b, second)):
        backward(params, 9)
        optimizer.step(lr=1e-2)
    assert all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(
        EnginepostError, match=r"exp_avg\.matrix: expected torch\.float32 of shape \[7, 5\], found nothing"
    ):
        second.load({n: t for n, t in saved.items() if n != "exp_avg.matrix"}, 2)
    with pytest.raises(EnginepostError, match=r"found torch\.float32 \[5, 7\]"):
        second.load({**saved, "exp_avg.matrix": saved["exp_avg.matrix"].T}, 2)


def large(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """One tensor with enough elements for moments in 8 bits, one without."""
    g = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in (("m", (70, 61)), ("v", (11,)))}


def run(
    params: dict[str, nn.Parameter], steps: range, tensors: dict[str, torch.Tensor] | None = None, **options: Any
) -> AdamW:
    optimizer = AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **options)
    if tensors is not None:
        optimizer.load({n: t.clone() for n, t in tensors.items()}, steps.start)
    for step in steps:
        optimizer.zero_grad(lr=1e-2)
        backward(params, step)
        optimizer.norm = optimizer.grad_norm()  # type: ignore[attr-defined]
        optimizer.step(lr=1e-2)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
def test_update_in_backward_has_the_same_bits(dtype: torch.dtype, bits: int) -> None:
    ours, theirs = large(dtype), large(dtype)
    mine, other = run(ours, range(4), bits=bits, in_backward=True), run(theirs, range(4), bits=bits)
    assert mine.norm == pytest.approx(other.norm, rel=1e-12)  # type: ignore[attr-defined]
    for name, tensor in mine.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name
    for name, p in ours.items():
        assert torch.equal(p, theirs[name]) and p.grad is None


@pytest.mark.parametrize("in_backward", [False, True])
def test_moments_in_8_bits_resume_to_the_bit(in_backward: bool) -> None:
    options = {"bits": 8, "in_backward": in_backward}
    whole, cut, rest = (large(torch.float32) for _ in range(3))
    run(whole, range(6), **options)
    state = run(cut, range(3), **options).tensors()
    assert state["exp_avg.m"].dtype == state["exp_avg_sq.m"].dtype == torch.uint8
    assert state["exp_avg_scale.m"].shape == (17,) and state["exp_avg.v"].dtype == torch.float32
    with torch.no_grad():
        for name, p in rest.items():
            p.copy_(cut[name])
    run(rest, range(3, 6), state, **options)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
    with pytest.raises(EnginepostError, match=r"exp_avg\.m: expected torch\.float32 .*, found torch\.uint8"):
        AdamW(rest, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).load(state, 3)


def test_moments_in_8_bits_stay_near_those_in_32() -> None:
    eight, full = large(torch.float32), large(torch.float32)
    before = large(torch.float32)
    run(eight, range(5), bits=8)
    run(full, range(5))
    moved = (full["m"] - before["m"]).norm()
    assert 0 < (eight["m"] - full["m"]).norm() < 0.1 * moved
    assert torch.equal(eight["v"], full["v"])


def test_a_gradient_that_is_not_finite_stops_an_update_in_backward() -> None:
    params = large(torch.float32)
    optimizer = AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, in_backward=True)
    optimizer.zero_grad(lr=1e-2)
    with pytest.raises(NotFinite, match="the norm of the gradient of m became nan"):
        (params["m"] * float("nan")).sum().backward()
