"""AdamW over named parameters against torch's, masters in float32, state in and out."""

import pytest
import torch
from torch import nn

from enginepost.errors import EnginepostError
from enginepost.train.optimizer import AdamW


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (7, 5), "vector": (11,), "frozen": (3, 3)}
    made = {n: nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}
    made["frozen"].requires_grad_(False)
    return {n: p for n, p in made.items() if p.requires_grad}


def backward(params: dict[str, nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sum((p.float() * torch.randn(p.shape, generator=g)).pow(2).sum() for p in params.values()).backward()  # type: ignore[union-attr]


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
    with pytest.raises(EnginepostError, match=r"exp_avg\.matrix: expected shape \[7, 5\], found nothing"):
        second.load({n: t for n, t in saved.items() if n != "exp_avg.matrix"}, 2)
    with pytest.raises(EnginepostError, match=r"found \[5, 7\]"):
        second.load({**saved, "exp_avg.matrix": saved["exp_avg.matrix"].T}, 2)
