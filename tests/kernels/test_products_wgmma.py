"""Matrix products for sm_90a (TMA, wgmma), in the emulator: layouts, edges, parts, slices, and the families that use them."""

import itertools

import pytest
import test_gpu_products as products
import torch
from test_gpu_products import BF16, F32, FP16, MIXES, laid_out, native_mm

from enginepost.kernels import linear_logprob as logprob_module
from enginepost.kernels import nf4
from enginepost.kernels.linear_logprob import linear_logprob
from enginepost.kernels.lora import LoraPart, lora_linear
from enginepost.kernels.lora import reference as lora_reference
from enginepost.kernels.matmul import reference as product_reference
from enginepost.kernels.nf4 import nf4_mm, quantize

MULTIPROCESSORS = 1  # so every product fills the card


@pytest.fixture
def nan_workspaces():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def used_wgmma(module):
    counts = module.statistics()
    return counts["wgmma"] > 0 and counts["mma"] == 0


# rows, columns, depth, second depth: edges of tiles (128, 256), panels (64), steps (64) and chunks (8)
@pytest.mark.parametrize("shape", [(128, 256, 64, 0), (136, 264, 200, 16), (72, 520, 8, 0), (200, 136, 72, 8)], ids=str)
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m))
def test_matmul(shape, mix, hopper, no_worse):
    rows, columns, depth, depth2 = shape
    torch.manual_seed(0)
    for i, (turn_a, turn_b) in enumerate([(False, False), (False, True), (True, False)]):
        hopper.set_schedule(["forward", "reverse", "shuffled"][i], i)
        a, b = laid_out(rows, depth, mix[0], turn_a, pad=8 * i), laid_out(depth, columns, mix[1], turn_b, pad=8)
        a2 = laid_out(rows, depth2, F32, turn_b) if depth2 else None
        b2 = laid_out(depth2, columns, F32, turn_a) if depth2 else None
        start, accumulate = torch.randn(rows, columns).to(mix[2]), i == 1
        exact = a.double() @ b.double() + (start.double() if accumulate else 0)
        plain = product_reference(a.float(), b.float(), a2, b2)
        if a2 is not None and b2 is not None:
            exact = exact + a2.double() @ b2.double()
        plain = (plain + start.float() if accumulate else plain).to(mix[2])
        ours = native_mm(a, b, start.clone(), a2, b2, accumulate)
        no_worse(f"{turn_a} {turn_b}", ours, plain, exact, floor=2e-6)
        assert used_wgmma(hopper)


def test_matmul_that_tma_cannot_read(hopper, no_worse):
    """Rows that do not begin at multiples of 16 bytes, and the layout that nobody asks for, go to the other kernel."""
    torch.manual_seed(0)
    for turn_a, turn_b, pad in ((False, True, 1), (True, True, 0)):
        a, b = laid_out(136, 72, BF16, turn_a, pad=pad), laid_out(72, 136, BF16, turn_b)
        no_worse(
            "product",
            native_mm(a, b, torch.empty(136, 136)),
            a.float() @ b.float(),
            a.double() @ b.double(),
            floor=2e-6,
        )
        counts = hopper.statistics()
        assert counts["wgmma"] == 0 and counts["mma"] > 0


def test_slices(hopper, no_worse):
    """Six tiles on six multiprocessors, a long depth: two slices, added in order."""
    hopper.set_card(90, 6)
    torch.manual_seed(0)
    a, b = torch.randn(200, 640).to(BF16), torch.randn(640, 300 + 4).to(BF16)[:, :300]
    assert hopper.matmul_tile(200, 300, 640, 6) == (True, 2)
    no_worse(
        "product", native_mm(a, b, torch.empty(200, 300)), a.float() @ b.float(), a.double() @ b.double(), floor=2e-6
    )
    assert used_wgmma(hopper)


def test_every_schedule(hopper, each_schedule):
    torch.manual_seed(2)
    a, b = torch.randn(264, 328).to(BF16), torch.randn(520, 328).to(BF16)
    turned = torch.randn(328, 264).to(BF16).t(), torch.randn(328, 136).to(BF16)
    each_schedule(lambda: [native_mm(a, b.t(), torch.empty(264, 520)), native_mm(*turned, torch.empty(264, 136))])
    assert used_wgmma(hopper)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(37, 56, 601), (140, 24, 400), (3, 264, 505), (300, 72, 700)], ids=str)
@pytest.mark.parametrize(
    "frozen, entropy, softcap", [(True, False, 0.0), (True, True, 3.0), (False, False, 3.0), (False, True, 0.0)]
)
def test_linear_logprob(shape, dtype, frozen, entropy, softcap, hopper, nan_workspaces, no_worse):
    arguments = products.problem(*shape, dtype)
    options = dict(frozen=frozen, entropy=entropy, softcap=softcap)
    exact = products.results(logprob_module.reference, *arguments, dtype=torch.float64, **options)
    plain = products.results(products.plain_logprob, *arguments, **options)
    fine = products.results(logprob_module.reference, *arguments, **options)
    ours = products.results(linear_logprob, *arguments, **options)
    assert hopper.statistics()["wgmma"] > 0
    for name, mine in ours.items():
        peer = plain if name in ("dhidden", "dweight") else fine
        no_worse(name, mine, peer[name], exact[name], floor=4e-7)


def test_linear_logprob_in_every_schedule(hopper, each_schedule):
    arguments = products.problem(90, 40, 330, BF16)
    for frozen in (True, False):
        options = dict(frozen=frozen, entropy=not frozen, softcap=0.0)
        each_schedule(lambda options=options: list(products.results(linear_logprob, *arguments, **options).values()))
    assert hopper.statistics()["wgmma"] > 0


def test_lora_linear(hopper, no_worse):
    torch.manual_seed(3)
    x, weight = torch.randn(150, 136).to(BF16), (torch.randn(264, 136) / 12).to(BF16)
    down, up, dy = torch.randn(8, 136) / 12, torch.randn(264, 8) / 3, torch.randn(150, 264).to(BF16)

    def gradients(function, *tensors):
        x, weight, down, up, dy = tensors
        leaves = [t.detach().clone().requires_grad_() for t in (x, down, up)]
        y = function(leaves[0], weight, None, (LoraPart(leaves[1], leaves[2], 2.0, 0, None),))
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    tensors = (x, weight, down, up, dy)
    ours = gradients(lora_linear, *tensors)
    assert hopper.statistics()["wgmma"] > 0
    plain, exact = gradients(lora_reference, *tensors), gradients(lora_reference, *(t.double() for t in tensors))
    for name, mine, theirs, true in zip(("y", "dx", "dA", "dB"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true, floor=2e-6)


def test_4_bits(hopper, no_worse):
    torch.manual_seed(4)
    weight = quantize(torch.randn(200, 192))
    dense = nf4.reference_dequantize(weight, torch.float64)
    a, a2, b2 = torch.randn(150, 192).to(BF16), torch.randn(150, 8), torch.randn(200, 8).t()
    ours = nf4_mm(a, weight, torch.empty(150, 200).to(BF16), a2=a2, b2=b2)
    plain = (a.float() @ dense.T.to(BF16).float() + a2 @ b2).to(BF16)
    no_worse("product", ours, plain, a.double() @ dense.T + a2.double() @ b2.double(), floor=1e-6)
    assert hopper.statistics()["wgmma"] > 0


def test_tile_columns_fill_the_card(emulated_module):
    columns = emulated_module.wgmma_columns
    assert columns(4096, 4096, 1, 132) == 256 and columns(2048, 2304, 1, 132) == 256
    assert columns(2048, 1024, 1, 132) == 128
    for m, n, slices in itertools.product((64, 512, 4096), (64, 1000, 8192), (1, 2)):
        wide = -(-m // 128) * -(-n // 256) * slices
        assert columns(m, n, slices, 132) == (256 if wide >= 132 else 128)
