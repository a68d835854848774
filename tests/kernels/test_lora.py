"""LoRA linear: against the plain formula in float64, gradcheck, PEFT's own numbers, bits, dropout, bad input."""

import json
import math
import pathlib

import pytest
import torch
from safetensors import safe_open

from enginepost.kernels import lora
from enginepost.kernels.backend import _core, core, to_dlpack
from enginepost.kernels.lora import LoraPart, keep_mask, lora_linear, reference, row_norm

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lora.safetensors"

# name: tokens, in, out, bias, parts (r, n, scaling, start, dora), dropout
CASES = {
    "one part": (40, 24, 50, False, [(4, 50, 2.0, 0, False)], 0.0),
    "fused with a gap": (37, 24, 64, True, [(4, 32, 2.0, 0, False), (3, 16, 0.5, 48, False)], 0.0),
    "three parts": (130, 59, 96, True, [(16, 64, 1.0, 0, False), (16, 16, 1.0, 64, False), (16, 16, 1.0, 80, False)], 0.0),
    "parts out of order": (20, 24, 40, False, [(2, 20, 1.0, 20, False), (2, 20, 3.0, 0, False)], 0.0),
    "no parts": (33, 24, 50, True, [], 0.0),
    "no parts, no bias": (33, 24, 50, False, [], 0.0),
    "one token": (1, 24, 50, True, [(4, 30, 2.0, 10, False)], 0.0),
    "few tokens": (7, 24, 50, True, [(4, 50, 2.0, 0, False)], 0.0),
    "no tokens": (0, 24, 50, True, [(4, 50, 2.0, 0, False)], 0.0),
    "rank 1": (40, 17, 19, False, [(1, 19, 2.0, 0, False)], 0.0),
    "dropout": (60, 24, 50, True, [(4, 30, 2.0, 0, False), (4, 20, 1.0, 30, False)], 0.3),
    "dora": (40, 24, 50, True, [(4, 50, 2.0, 0, True)], 0.0),
    "dora beside lora and nothing": (40, 24, 60, True, [(4, 20, 2.0, 0, True), (4, 20, 2.0, 30, False)], 0.0),
    "dora, dropout": (60, 24, 50, True, [(4, 30, 2.0, 0, True), (4, 20, 1.0, 30, False)], 0.4),
    "dora, one token": (1, 24, 50, False, [(4, 50, 2.0, 0, True)], 0.0),
}  # fmt: skip


def inputs(case, dtype, part_dtype=None):
    """(x, weight, bias or None, [(A, B, magnitude or None)], dy)"""
    tokens, width, out, has_bias, parts, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, to=dtype, size=1.0):
        return (size * torch.randn(*shape, generator=generator)).to(to)

    part_dtype = part_dtype or dtype
    pieces = []
    for r, n, _, _, dora in parts:
        magnitude = (1 + torch.rand(n, generator=generator)).to(part_dtype) if dora else None
        pieces.append((draw(r, width, to=part_dtype), draw(n, r, to=part_dtype, size=0.5), magnitude))
    return draw(tokens, width), draw(out, width), draw(out) if has_bias else None, pieces, draw(tokens, out)


def with_gradients(function, case, x, weight, bias, pieces, dy, frozen=False):
    """y and the gradient of everything; with frozen weights (and bias) only those of x and the parts."""
    leaf = lambda t: None if t is None else t.detach().clone().requires_grad_()  # noqa: E731
    *_, specs, dropout = CASES[case]
    x, pieces = leaf(x), [tuple(leaf(t) for t in p) for p in pieces]
    if not frozen:
        weight, bias = leaf(weight), leaf(bias)
    parts = [LoraPart(a, b, s, start, m) for (a, b, m), (_, _, s, start, _) in zip(pieces, specs, strict=True)]
    y = function(x, weight, bias, parts, dropout=dropout, seed=11)
    leaves = [t for t in (x, weight, bias, *(t for p in pieces for t in p)) if t is not None and t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]


def widened(x, weight, bias, pieces, dy):
    wide = lambda t: None if t is None else t.double()  # noqa: E731
    return wide(x), wide(weight), wide(bias), [tuple(wide(t) for t in p) for p in pieces], wide(dy)


def peft_style(x, weight, bias, parts, *, dropout, seed):
    """What PEFT computes, operation by operation, each in the dtype it would have there: base in x's, update in A's."""
    base = torch.nn.functional.linear(x, weight, bias)
    masked = torch.where(keep_mask(*x.shape, dropout, seed), x / (1 - dropout), 0.0) if dropout else x
    pieces = list(base.split(1, dim=1))
    for p in parts:
        update = masked.to(p.A.dtype) @ p.A.T @ p.B.T * p.scaling
        if p.magnitude is not None:
            adapted = weight[p.columns] + p.scaling * (p.B @ p.A)
            gain = p.magnitude / adapted.norm(dim=1).detach()
            update = (gain - 1) * (masked @ weight[p.columns].T) + gain * update
        for j in range(update.shape[1]):
            pieces[p.start + j] = (pieces[p.start + j] + update[:, j : j + 1]).to(x.dtype)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")], ids="-".join
)
@pytest.mark.parametrize("frozen", [True, False])
def test_against_float64(case, dtypes, frozen, no_worse):
    if frozen and not CASES[case][4]:
        pytest.skip("a frozen layer without parts has the gradient of x alone, which the trained one covers")
    arguments = inputs(case, *(getattr(torch, d) for d in dtypes))
    exact = with_gradients(reference, case, *widened(*arguments), frozen=frozen)
    plain = with_gradients(peft_style, case, *arguments, frozen=frozen)
    ours = with_gradients(lora_linear, case, *arguments, frozen=frozen)
    assert len(ours) == len(exact)
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        no_worse(f"result {i}", mine, theirs, true, floor=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("three parts", "no tokens")])
def test_gradcheck(case):
    *_, specs, dropout = CASES[case]
    x, weight, bias, pieces, _ = widened(*inputs(case, torch.float32))
    x = x[:5]
    scales = [(s, start) for _, _, s, start, _ in specs]
    flat = [t.requires_grad_() for t in (x, weight, bias, *(t for p in pieces for t in p)) if t is not None]
    if any(m is not None for _, _, m in pieces):
        # The norm is a constant for the gradient, so finite differences may not move what it is made of.
        frozen = [
            row_norm(weight, LoraPart(a, b, s, start)) for (a, b, _), (s, start) in zip(pieces, scales, strict=True)
        ]
        norms = iter([])
        original, lora.row_norm = lora.row_norm, lambda *_: next(norms)
    else:
        original = None

    def call(*flat):
        nonlocal norms
        rest = iter(flat)
        x, weight = next(rest), next(rest)
        bias_ = None if bias is None else next(rest)
        parts = [
            LoraPart(next(rest), next(rest), s, start, None if m is None else next(rest))
            for (_, _, m), (s, start) in zip(pieces, scales, strict=True)
        ]
        if original is not None:
            norms = iter([n for n, (_, _, m) in zip(frozen, pieces, strict=True) if m is not None])
        return lora_linear(x, weight, bias_, parts, dropout=dropout, seed=3)

    norms = iter([])
    try:
        assert torch.autograd.gradcheck(call, flat, fast_mode=True)
    finally:
        if original is not None:
            lora.row_norm = original


@pytest.mark.parametrize("function", [lora_linear, reference])
@pytest.mark.parametrize("name", ["lora", "rslora", "dora", "lora, dropout", "dora, dropout"])
def test_peft_gives_the_same_numbers(name, function, monkeypatch):
    with safe_open(GOLDEN, "pt") as file:
        prefix = name + "."
        case = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        scaling, dropout = json.loads(file.metadata()["scaling and dropout"])[name]
    monkeypatch.setattr(lora, "keep_mask", lambda *_: case["mask"].bool())  # PEFT's own, which no kernel of ours makes
    monkeypatch.setattr(lora, "native", lambda *_, **__: False)
    x, a, b = (case[k].clone().requires_grad_() for k in ("x", "A", "B"))
    magnitude = case["magnitude"].clone().requires_grad_() if "magnitude" in case else None
    part = LoraPart(a, b, scaling, 0, magnitude)
    y = function(x, case["weight"], case.get("bias"), [part], dropout=dropout, seed=1)
    y.backward(case["dy"])
    results = {"y": y, "dx": x.grad, "dA": a.grad, "dB": b.grad}
    if magnitude is not None:
        results["dmagnitude"] = magnitude.grad
    for key, mine in results.items():
        torch.testing.assert_close(mine, case[key], rtol=2e-5, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_row_norm():
    torch.manual_seed(1)
    weight, a, b = torch.randn(40, 30), torch.randn(4, 30), torch.randn(20, 4)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float64, 1e-12)):
        w, part = weight.to(dtype), LoraPart(a, b, 1.5, 10)
        exact = (w[10:30].double() + 1.5 * b.double() @ a.double()).norm(dim=1)
        torch.testing.assert_close(row_norm(w, part).double(), exact, rtol=tolerance, atol=0)


def test_fresh_adapter_changes_nothing():
    """B = 0 and, for DoRA, m = |W|: the layer is the plain one."""
    x, weight = torch.randn(20, 24), torch.randn(30, 24)
    for magnitude in (None, weight.norm(dim=1)):
        part = LoraPart(torch.randn(4, 24), torch.zeros(30, 4), 2.0, 0, magnitude)
        torch.testing.assert_close(lora_linear(x, weight, None, [part]), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["fused with a gap", "dropout", "dora", "few tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(case, dtype):
    x, weight, bias, pieces, dy = inputs(case, dtype, torch.float32)
    tight = with_gradients(lora_linear, case, x, weight, bias, pieces, dy)
    spaced = torch.zeros(x.shape[0], 2 * x.shape[1], dtype=dtype)
    spaced[:, ::2] = x
    loose = lambda x, *rest, **more: lora_linear(  # noqa: E731
        torch.stack([x, x], dim=2).flatten(1)[:, ::2], *rest, **more
    )
    for mine, true in zip(
        with_gradients(loose, case, x, weight, bias, pieces, dy.t().contiguous().t()), tight, strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    parts = [LoraPart(a, b, 1.0, s[3], m) for (a, b, m), s in zip(pieces, CASES[case][4], strict=True)]
    assert torch.equal(lora_linear(spaced[:, ::2], weight, bias, parts), lora_linear(x, weight, bias, parts))


@pytest.mark.parametrize("case", ["three parts", "dropout", "dora, dropout", "no parts", "few tokens"])
def test_same_bits_at_any_thread_count(case, each_thread_count):
    arguments = inputs(case, torch.bfloat16, torch.float32)
    each_thread_count(lambda: with_gradients(lora_linear, case, *arguments))


def test_without_gradients_the_bits_are_the_same():
    x, weight, bias, pieces, _ = inputs("fused with a gap", torch.bfloat16, torch.float32)
    parts = [LoraPart(a, b, s[2], s[3]) for (a, b, _), s in zip(pieces, CASES["fused with a gap"][4], strict=True)]
    with torch.no_grad():
        silent = lora_linear(x, weight, bias, parts)
    assert torch.equal(silent, lora_linear(x.requires_grad_(), weight, bias, parts))


def test_only_what_asks_gets_a_gradient():
    x, weight = torch.randn(20, 8), torch.randn(12, 8)
    first = LoraPart(torch.randn(2, 8), torch.randn(6, 2).requires_grad_(), 1.0, 0)
    second = LoraPart(torch.randn(2, 8).requires_grad_(), torch.randn(6, 2), 1.0, 6)
    lora_linear(x, weight, None, [first, second]).sum().backward()
    assert first.B.grad is not None and second.A.grad is not None
    assert x.grad is weight.grad is first.A.grad is second.B.grad is None
    expected = torch.ones(20, 6).T @ (x @ first.A.T)
    torch.testing.assert_close(first.B.grad, expected)


def test_backward_keeps_no_second_input():
    """Saved for the backward: x, the parameters, and R numbers a token."""
    saved = []
    x = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(128, 32).bfloat16()
    part = LoraPart(torch.randn(4, 32).requires_grad_(), torch.randn(128, 4).requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, None, [part])
    own = {t.data_ptr() for t in (x, weight, part.A, part.B)}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert sum(t.numel() * t.element_size() for t in extra) <= 64 * 4 * 4 + 4 * 32 * 4


def test_dropout_mask():
    mask = keep_mask(500, 400, 0.3, seed=7)
    assert mask.shape == (500, 400) and mask.dtype == torch.bool
    assert mask.float().mean().item() == pytest.approx(0.7, abs=0.005)  # 4.9 standard deviations
    assert mask.float().mean(0).std().item() == pytest.approx((0.21 / 500) ** 0.5, rel=0.15)
    assert mask.float().mean(1).std().item() == pytest.approx((0.21 / 400) ** 0.5, rel=0.15)
    assert torch.equal(mask, keep_mask(500, 400, 0.3, seed=7))
    assert torch.equal(mask[:100], keep_mask(100, 400, 0.3, seed=7))
    for other in (8, 7 + 2**32, 2**63, 0):
        assert (mask == keep_mask(500, 400, 0.3, seed=other)).float().mean().item() == pytest.approx(0.58, abs=0.01)
    for shift in ((1, 0), (0, 1), (1, 1)):  # neighbours are independent
        rolled = mask.roll(shift, (0, 1))
        assert (mask == rolled).float().mean().item() == pytest.approx(0.58, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout, seed", [(0.1, 3), (0.5, 2**63 + 5), (0.0, 0), (0.99, 12345678901234567890)])
def test_dropout_of_every_backend_is_the_same_to_the_bit(backend, dtype, dropout, seed):
    if dtype == torch.float16 and not backend.gpu:
        dtype = torch.float64
    torch.manual_seed(0)
    whole = torch.randn(20, 304).to(dtype)
    whole[3] = math.inf  # dropped: 0 all the same
    for x in (whole, whole[:, :8], whole[2:, 1:300], whole[:, :33].contiguous(), whole[:0], whole.t()):
        expected = torch.where(keep_mask(*x.shape, dropout, seed), x * (1 / (1 - dropout)), 0.0)
        assert torch.equal(lora._dropped(backend.to(x), dropout, seed).cpu(), expected)
        own = backend.to(x.contiguous().clone())
        assert lora._dropped(own, dropout, seed, out=own) is own and torch.equal(own.cpu(), expected)


def test_dropout_in_any_order_of_warps(each_schedule):
    x = torch.randn(9, 304)
    each_schedule(lambda: [lora._dropped(x, 0.3, 5), lora._dropped(x[:, 1:], 0.3, 5)])


def test_dropout_op():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.enginepost.lora_dropout, (x, 0.4, 9))
    assert torch.autograd.gradcheck(lambda x: torch.ops.enginepost.lora_dropout(x, 0.4, 9), (x,))


@pytest.mark.skipif(_core is None, reason="the native extension is not built")
def test_dropout_refuses_what_it_cannot_do():
    x = torch.zeros(3, 4)
    for other, dropout, message in (
        (torch.zeros(3, 5), 0.1, r"\(3, 4\) and out \(3, 5\) must be alike"),
        (torch.zeros(3, 4).bfloat16(), 0.1, "one dtype"),
        (torch.zeros(3, 4), 1.0, r"dropout must be in \[0, 1\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            core().lora_dropout(to_dlpack(x), to_dlpack(other), dropout, 1)


def test_dropout_keeps_the_mean():
    x, weight = torch.ones(4000, 16), torch.zeros(2, 16)
    part = LoraPart(torch.ones(1, 16), torch.ones(2, 1))
    y = lora_linear(x, weight, None, [part], dropout=0.25, seed=2)
    assert y.mean().item() == pytest.approx(16.0, abs=0.2) and y.std() > 1


@pytest.mark.skipif(_core is None, reason="the native extension is not built")
@pytest.mark.parametrize("case", ["fused with a gap", "no parts", "dropout"])
def test_opcheck(case):
    x, weight, bias, pieces, dy = inputs(case, torch.float32)
    *_, specs, dropout = CASES[case]
    stacked = torch.cat([p[0] for p in pieces]) if pieces else torch.empty(0, x.shape[1])
    b, starts = [p[1] for p in pieces], [s[3] for s in specs]
    for t in (x, weight, bias, stacked, *b):
        t.requires_grad_()
    torch.library.opcheck(
        torch.ops.enginepost.lora_linear, (x, [weight], "", bias, stacked, b, starts, dropout, 5, False)
    )
    x, weight, bias, stacked, *b = (t.detach() for t in (x, weight, bias, stacked, *b))
    _, s = torch.ops.enginepost.lora_linear(x, [weight], "", bias, stacked, b, starts, dropout, 5, True)
    needs = [True, False, True, bool(b), bool(b)]
    backward = torch.ops.enginepost.lora_linear_backward
    torch.library.opcheck(backward, (dy, x, [weight], "", s, stacked, b, starts, dropout, 5, needs))


def test_reference_backend(monkeypatch):
    monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    x, weight, bias, pieces, _ = inputs("dora", torch.float32)
    parts = [LoraPart(a, b, 2.0, 0, m) for a, b, m in pieces]
    assert torch.equal(lora_linear(x, weight, bias, parts), reference(x, weight, bias, parts))


Z = torch.zeros


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=Z(3, 2, 8)), r"x must be \[T, in\]"),
        (dict(x=Z(3, 7)), r"got \[3, 7\] and \[12, 8\]"),
        (dict(bias=Z(11)), r"bias must be \[12\], got \[11\]"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(parts=[LoraPart(Z(2, 7), Z(12, 2))]), r"part 0 must have A \[r, 8\]"),
        (dict(parts=[LoraPart(Z(2, 8), Z(12, 3))]), r"part 0 must have A \[r, 8\] and B \[n, r\]"),
        (dict(parts=[LoraPart(Z(2, 8), Z(13, 2))]), "part 0 covers columns 0 to 13"),
        (dict(parts=[LoraPart(Z(2, 8), Z(4, 2)), LoraPart(Z(2, 8), Z(4, 2), 1.0, 3)]), "parts may not overlap"),
        (dict(parts=[LoraPart(Z(2, 8), Z(4, 2), 1.0, -1)]), "part 0 covers columns -1"),
        (dict(parts=[LoraPart(Z(2, 8), Z(4, 2), 1.0, 0, Z(5))]), r"magnitude of shape \[4\], got \[5\]"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(x=Z(3, 8), weight=Z(12, 8), bias=None, parts=()) | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)
