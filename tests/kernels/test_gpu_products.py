"""Matrix products on the GPU (emulated, or on one): matmul, linear_logprob, lora, 4 bits, linear_kl, against float64.

The measure of the other test modules is plain PyTorch's error. Where a product's 16-bit operands are made on the way (the gradient
of the logits), plain PyTorch rounds them too when it runs in that dtype, so there the peer runs in 16 bits.
"""

import itertools

import pytest
import test_linear_kl
import test_lora
import torch
from torch import Tensor

from enginepost.kernels import linear_logprob as logprob_module
from enginepost.kernels import nf4
from enginepost.kernels.backend import core, to_dlpack
from enginepost.kernels.linear_kl import linear_kl
from enginepost.kernels.linear_kl import reference as kl_reference
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.kernels.lora import lora_linear
from enginepost.kernels.lora import reference as lora_reference
from enginepost.kernels.matmul import reference as product_reference
from enginepost.kernels.nf4 import nf4_mm, quantize

gpu = pytest.mark.parametrize("backend", ["emulated", "cuda"], indirect=True)
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32


def native_mm(a, b, out, a2=None, b2=None, accumulate=False) -> Tensor:
    core().matmul(*(None if t is None else to_dlpack(t) for t in (a, b, a2, b2, out)), accumulate)
    return out


def laid_out(rows, columns, dtype, turned, pad=0):
    """A matrix whose rows (columns, when turned) are contiguous, `pad` elements apart."""
    if turned:
        return torch.randn(columns, rows + pad).to(dtype)[:, :rows].t()
    return torch.randn(rows, columns + pad).to(dtype)[:, :columns]


# rows, columns, depth, second depth: edges of tiles (64, 128), steps (32) and chunks (8), few rows, a depth cut into slices
SHAPES = [(1, 1, 1, 0), (16, 70, 64, 4), (9, 40, 72, 0), (64, 64, 64, 16), (130, 70, 100, 16), (5, 7, 0, 3), (17, 40, 1100, 0),
          (200, 150, 72, 5), (0, 5, 4, 0)]  # fmt: skip
MIXES = [
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (BF16, BF16, F32),
    (BF16, F32, F32),
    (F32, FP16, FP16),
    (F32, F32, F32),
]


@gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_matmul(shape, mix, backend, no_worse):
    rows, columns, depth, depth2 = shape
    torch.manual_seed(0)
    for i, (turn_a, turn_b) in enumerate(itertools.product([False, True], repeat=2)):
        accumulate = i % 2 == 1
        a, b = laid_out(rows, depth, mix[0], turn_a, pad=i), laid_out(depth, columns, mix[1], turn_b, pad=8 * (i // 2))
        a2 = laid_out(rows, depth2, F32, turn_b) if depth2 else None
        b2 = laid_out(depth2, columns, F32, turn_a) if depth2 else None
        start = torch.randn(rows, columns).to(mix[2])
        exact = a.double() @ b.double() + (start.double() if accumulate else 0)
        plain = product_reference(a.float(), b.float(), a2, b2)
        if a2 is not None and b2 is not None:
            exact = exact + a2.double() @ b2.double()
        plain = (plain + start.float() if accumulate else plain).to(mix[2])
        ours = native_mm(*backend.to(a, b, start.clone(), a2, b2), accumulate)
        # up to six products of parts are summed in one run of float32
        no_worse(f"{turn_a} {turn_b}", ours, plain, exact, floor=2e-6)


@gpu
def test_matmul_leaves_the_rest_alone(backend):
    torch.manual_seed(1)
    a, b = torch.randn(70, 48).to(BF16), torch.randn(90, 48).to(BF16)
    for first in (8, 9):  # aligned to 16 bytes and not
        wide = backend.to(torch.full((70, 120), 7.0).to(BF16))
        a_, b_ = backend.to(a, b)
        native_mm(a_, b_.t(), wide[:, first : first + 90])
        torch.testing.assert_close(wide[:, first : first + 90].cpu(), (a.float() @ b.float().T).to(BF16))
        assert (wide[:, :first] == 7).all() and (wide[:, first + 90 :] == 7).all()


def test_matmul_in_every_schedule(each_schedule, emulated_module):
    """One tile, many tiles, slices, few rows: the same bits whichever warp comes first, and no bank is asked twice at a time."""
    torch.manual_seed(2)
    products = [(40, 50, 200), (150, 200, 64), (70, 60, 900), (12, 70, 160)]
    operands = [(torch.randn(m, k).to(BF16), torch.randn(n, k).to(BF16)) for m, n, k in products]
    turned = [(torch.randn(k, m).to(BF16).t(), torch.randn(k, n).to(BF16)) for m, n, k in products]
    emulated_module.statistics()
    each_schedule(
        lambda: (
            [native_mm(a, b.t(), torch.empty(len(a), len(b))) for a, b in operands]
            + [native_mm(a, b, torch.empty(a.shape[0], b.shape[1])) for a, b in turned]
        )
    )
    counted = emulated_module.statistics()
    assert counted["mma"] > 0 and counted["ldmatrix_conflicts"] == 0


def test_tile_choice(emulated_module):
    """A card is filled: large tiles where there are enough, else the depth is cut into slices; never a slice without work."""
    choose = emulated_module.matmul_tile
    assert choose(4096, 4096, 4096, 108) == (True, 1)
    assert choose(16, 4096, 4096, 108)[1] > 1
    for processors in (1, 46, 108, 132):
        for m, n, k in itertools.product((1, 16, 64, 100, 512, 8192), (16, 576, 4096), (16, 576, 4096, 131072)):
            large, slices = choose(m, n, k, processors)
            tile = 128 if large else 64
            blocks = -(-m // tile) * -(-n // tile)
            assert 1 <= slices <= 16 and (slices == 1 or slices * blocks <= 3 * processors)
            assert slices == 1 or -(-k // 32) // slices >= 8


# ---- linear_logprob


def plain_logprob(hidden, weight, targets, *, softcap, entropy):
    """What plain PyTorch does in 16 bits: logits of that dtype, the rest in float32."""
    logits = (hidden @ weight.T).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits, dim=-1)
    kept = targets != -100
    logprob = log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    spread = -(log_p.exp() * log_p).sum(-1)
    zero = torch.zeros(())
    return (
        torch.where(kept, logprob, zero),
        torch.where(kept, logits.logsumexp(1).detach(), zero),
        torch.where(kept, spread, zero) if entropy else torch.zeros(len(targets)),
    )


def problem(tokens, width, vocab, dtype, skip=3):
    torch.manual_seed(tokens + width + vocab)
    hidden, weight = (2 * torch.randn(tokens, width)).to(dtype), (torch.randn(vocab, width) / width**0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,))
    targets[1::skip] = -100
    return hidden, weight, targets, torch.randn(tokens) / 100, torch.randn(tokens) / 100


def results(function, hidden, weight, targets, weigh, other, *, frozen, entropy, softcap, dtype=None):
    hidden = hidden.detach().to(dtype or hidden.dtype).requires_grad_()
    weight = weight.detach().to(dtype or weight.dtype).requires_grad_(not frozen)
    logprob, lse, spread = function(hidden, weight, targets, softcap=softcap, entropy=entropy)
    loss = (logprob * weigh.to(logprob.dtype)).sum() + (spread * other.to(spread.dtype)).sum() * entropy
    loss.backward()
    named = dict(logprob=logprob, lse=lse, entropy=spread, dhidden=hidden.grad)
    if not frozen:
        named["dweight"] = weight.grad
    return {name: t.detach().cpu() for name, t in named.items()}


@gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (37, 59, 601), (140, 24, 400), (3, 260, 505)], ids=str)
@pytest.mark.parametrize(
    "frozen, entropy, softcap", [(True, False, 0.0), (True, True, 3.0), (False, False, 3.0), (False, True, 0.0)]
)
def test_linear_logprob(shape, dtype, frozen, entropy, softcap, backend, no_worse):
    arguments = problem(*shape, dtype)
    options = dict(frozen=frozen, entropy=entropy, softcap=softcap)
    exact = results(logprob_module.reference, *arguments, dtype=torch.float64, **options)
    plain = results(plain_logprob, *arguments, **options)
    fine = results(logprob_module.reference, *arguments, **options)
    ours = results(linear_logprob, *backend.to(*arguments), **options)
    for name, mine in ours.items():
        peer = plain if name in ("dhidden", "dweight") else fine  # no 16-bit logits: results are float32's
        no_worse(name, mine, peer[name], exact[name], floor=4e-7)


@gpu
def test_linear_logprob_by_row(backend):
    """Log-probabilities do not depend on the company; skipped rows are not read; an impossible target is not a number."""
    hidden, weight, targets, *_ = problem(150, 40, 300, BF16, skip=7)
    with torch.no_grad():
        all_rows = linear_logprob(*backend.to(hidden, weight, targets), entropy=True)
        order = torch.tensor([7, 140, 4, 123, 1])
        few = linear_logprob(*backend.to(hidden[order], weight, targets[order]), entropy=True)
        for one, many in zip(few, all_rows, strict=True):
            assert torch.equal(one.cpu(), many.cpu()[order])
        poisoned = torch.where((targets == -100).unsqueeze(1), torch.full_like(hidden, float("nan")), hidden)
        again = linear_logprob(*backend.to(poisoned, weight, targets), entropy=True)
        assert all(torch.equal(a, b) for a, b in zip(again, all_rows, strict=True))
        hidden[3, 2] = float("nan")
        assert linear_logprob(*backend.to(hidden, weight, targets))[0].isnan().nonzero().flatten().tolist() == [3]
    hidden = problem(9, 40, 300, BF16)[0]
    bad = torch.tensor([0, 300, 5, -1, -100, 2, 3, 4, 299])
    for frozen in (True, False):
        leaf, head = backend.to(hidden).requires_grad_(), backend.to(weight).requires_grad_(not frozen)
        logprob = linear_logprob(leaf, head, backend.to(bad))[0]
        logprob.sum().backward()
        assert logprob.isnan().tolist() == [False, True, False, True] + 5 * [False]
        assert leaf.grad is not None and leaf.grad.isnan().all(1).tolist() == logprob.isnan().tolist()


def test_linear_logprob_in_every_schedule(each_schedule):
    arguments = problem(60, 40, 330, BF16)
    for frozen in (True, False):
        options = dict(frozen=frozen, entropy=not frozen, softcap=0.0)
        each_schedule(lambda options=options: list(results(linear_logprob, *arguments, **options).values()))


@gpu
@pytest.mark.parametrize("frozen", [True, False])
def test_linear_logprob_without_rows(frozen, backend):
    for tokens in (0, 20):
        hidden, weight = backend.to(torch.randn(tokens, 16).to(BF16), torch.randn(30, 16).to(BF16))
        hidden.requires_grad_()
        weight.requires_grad_(not frozen)
        values = linear_logprob(hidden, weight, backend.to(torch.full((tokens,), -100)), entropy=True)
        assert all(v.shape == (tokens,) and not v.any() for v in values)
        (values[0].sum() + values[2].sum()).backward()
        assert hidden.grad is not None and not hidden.grad.any()
        assert frozen or (weight.grad is not None and not weight.grad.any())


# ---- lora


@gpu
@pytest.mark.parametrize("case", test_lora.CASES)
@pytest.mark.parametrize(
    "dtypes", [(BF16, F32), (BF16, BF16), (FP16, F32)], ids=lambda d: "-".join(str(x)[6:] for x in d)
)
def test_lora_linear(case, dtypes, backend, no_worse):
    x, weight, bias, pieces, dy = test_lora.inputs(case, *dtypes)
    exact = test_lora.with_gradients(lora_reference, case, *test_lora.widened(x, weight, bias, pieces, dy))
    plain = test_lora.with_gradients(test_lora.peft_style, case, x, weight, bias, pieces, dy)
    moved = [tuple(backend.to(*p)) for p in pieces]
    ours = test_lora.with_gradients(lora_linear, case, *backend.to(x, weight, bias), moved, backend.to(dy))
    for i, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        no_worse(f"result {i}", mine, theirs, true, floor=1e-6)


# ---- 4 bits


@gpu
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind, blocksize", [("nf4", 64), ("nf4", 32), ("fp4", 256), ("nf4", 4096)])
def test_formats_have_the_bits_of_the_reference(kind, blocksize, dtype, backend):
    torch.manual_seed(0)
    for size in (1, 31, 64, 67, 257, 4097, 9001):
        x = torch.randn(size).mul_(torch.rand(size) ** 4).to(dtype)
        if size == 4097:
            x[5], x[70] = float("nan"), float("inf")
        weight = quantize(backend.to(x), blocksize=blocksize, quant_type=kind, double=size > 1)
        packed, absmax = nf4.reference_quantize(x, blocksize, kind)
        assert torch.equal(weight.packed.cpu(), packed), size
        if size < 4097:
            for out in (F32, BF16, FP16):
                expected = nf4.reference_dequantize(nf4.NF4Weight(packed, absmax, (size,), blocksize, kind, dtype), out)
                plain = quantize(backend.to(x), blocksize=blocksize, quant_type=kind)
                assert torch.equal(plain.absmax.cpu(), absmax) and torch.equal(
                    nf4.dequantize(plain, out).cpu(), expected
                )
            assert torch.equal(nf4.dequantize(weight).cpu(), nf4.reference_dequantize(weight).cpu())


@gpu
@pytest.mark.parametrize("signed", [True, False])
def test_blockwise8_finds_the_nearest(signed, backend):
    code = nf4.dynamic_code(signed)
    middle = (code[:-1] + code[1:]) / 2
    x = torch.cat([middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1), torch.ones(1)])
    x = torch.cat([x, torch.zeros(-len(x) % 1024)]).view(-1, 1024)
    x[:, 0] = 1
    q, absmax = nf4.quantize_blockwise(backend.to(x), blocksize=1024, signed=signed)
    assert torch.equal(q.cpu(), torch.bucketize(x, middle).to(torch.uint8)) and (absmax == 1).all()
    back = nf4.dequantize_blockwise(q, absmax, backend.to(code), blocksize=1024, offset=0.25)
    assert torch.equal(back.cpu(), code[q.cpu().long()] + 0.25)


@gpu
@pytest.mark.parametrize(
    "rows, out, width", [(1, 40, 64), (3, 70, 192), (16, 33, 96), (40, 64, 160), (70, 40, 64), (5, 9, 33)]
)
@pytest.mark.parametrize("dtype", [BF16, FP16, F32], ids=lambda d: str(d)[6:])
def test_products_with_4_bits(rows, out, width, dtype, backend, no_worse):
    torch.manual_seed(0)
    weight = quantize(backend.to(torch.randn(out, width)), double=True)
    dense = nf4.reference_dequantize(weight, torch.float64).cpu()
    for transposed, update, accumulate in itertools.product((False, True), repeat=3):
        w = dense if transposed else dense.T
        a, before = torch.randn(rows, w.shape[0]).to(dtype), torch.randn(rows, w.shape[1]).to(dtype)
        a2, b2 = (torch.randn(rows, 6), torch.randn(w.shape[1], 6).t()) if update else (None, None)
        exact = a.double() @ w + (before.double() if accumulate else 0)
        plain = a.float() @ w.to(dtype).float() + (before.float() if accumulate else 0)
        if a2 is not None and b2 is not None:
            exact, plain = exact + a2.double() @ b2.double(), plain + a2 @ b2
        a_, before_, a2_, b2_ = backend.to(a, before, a2, b2)
        ours = nf4_mm(a_, weight, before_, transposed=transposed, a2=a2_, b2=b2_, accumulate=accumulate)
        no_worse(f"transposed={transposed} update={update}", ours, plain.to(dtype), exact, floor=1e-6)


def test_4_bits_in_every_schedule(each_schedule):
    torch.manual_seed(0)
    x, a = torch.randn(96, 320), torch.randn(20, 320).to(BF16)

    def call():
        weight = quantize(x, double=True)
        few = [nf4_mm(rows, weight, torch.empty(len(rows), 96)) for rows in (a[:1], a, a.repeat(4, 1))]
        return [weight.packed, weight.absmax, nf4.dequantize(weight), *nf4.quantize_blockwise(x), *few]

    each_schedule(call)


# ---- linear_kl


@gpu
@pytest.mark.parametrize("kind", test_linear_kl.KINDS, ids=str)
@pytest.mark.parametrize("k", [None, 9])
def test_linear_kl_on_a_gpu(kind, k, backend):
    hidden, head, teacher = test_linear_kl.inputs(BF16)
    arguments = {**test_linear_kl.teacher_of(teacher, k, {}), **kind}
    weight = torch.tensor([1.0, -2.0, 0.0, 0.3, 5.0])
    exact = test_linear_kl.with_gradients(
        kl_reference, hidden.double(), head.double(), weight, **test_linear_kl.double(arguments)
    )
    moved = {n: tuple(backend.to(*v)) if isinstance(v, tuple) else backend.to(v) if torch.is_tensor(v) else v
             for n, v in arguments.items()}  # fmt: skip
    ours = test_linear_kl.with_gradients(linear_kl, *backend.to(hidden, head, weight), **moved)
    for name, mine, true in zip(("kl", "dhidden", "dhead"), ours, exact, strict=True):
        tolerance = 2e-5 if name == "kl" else 2**-7
        scale = true.abs().max().item()
        assert (mine.cpu().double() - true).abs().max().item() <= tolerance * max(1.0, scale), name
