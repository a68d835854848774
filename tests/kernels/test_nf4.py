"""4-bit weights: bitsandbytes' bits (golden/make_nf4.py), products against float64, gradients, every size of the last block."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enginepost.kernels import nf4
from enginepost.kernels.backend import _core, core, info, to_dlpack
from enginepost.kernels.lora import LoraPart, lora_linear, reference
from enginepost.kernels.nf4 import NF4Weight, dequantize, dynamic_code, nf4_mm, quantize, quantize_blockwise

native = pytest.mark.skipif(_core is None, reason="the native extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parent.parent / "golden" / "nf4.safetensors")


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setenv("ENGINEPOST_BACKEND", "reference")
    elif _core is None:
        pytest.skip("the native extension is not built")
    return request.param


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_bitsandbytes(kind, blocksize, dtype, backend, golden):
    for size in (1, 67, 3000):
        name = f"{kind}.{blocksize}.{str(dtype)[6:]}.{size}"
        x = golden[f"x.{str(dtype)[6:]}.{size}"]
        assert x.dtype == dtype
        weight = quantize(x, blocksize=blocksize, quant_type=kind)
        assert torch.equal(weight.packed, golden[f"{name}.packed"]), name
        assert torch.equal(weight.absmax, golden[f"{name}.absmax"]), name
        assert torch.equal(dequantize(weight), golden[f"{name}.out"]) and dequantize(weight).dtype == dtype, name
        double = quantize(x, blocksize=blocksize, quant_type=kind, double=True)
        assert double.offset == golden[f"{name}.offset"].item()
        assert torch.equal(double.absmax, golden[f"{name}.nested"]), name
        assert torch.equal(double.nested_absmax, golden[f"{name}.nested_absmax"]), name


def test_published_hashes(backend):
    """A vector whose bytes were published with the format's description, from a run of bitsandbytes' default backend."""
    i = torch.arange(16384)
    x = (((i * 2654435761) % 2**32).double() / 2**31 - 1) * (1 + (i // 64) % 7).double() / 4
    weight = quantize(x.float())
    digest = lambda t: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16]  # noqa: E731
    assert weight.packed[:8].tolist() == [10, 46, 97, 195, 249, 29, 80, 179]
    assert digest(weight.packed) == "daabd2d5be5dfd5b" and digest(weight.absmax) == "cb3fe111159debaa"
    double = nf4.nest(weight)
    assert digest(double.absmax) == "d434a7021985eaaa" and double.offset == pytest.approx(0.9857305288314819, rel=2e-7)
    assert digest(dynamic_code()) == "e732639a65f497b4" and digest(dynamic_code(False)) == "305f002cc11278fb"


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_nearest_of_the_dynamic_code(name, backend, golden):
    """At every midpoint, and one unit in the last place above and below."""
    assert torch.equal(dynamic_code(name == "signed"), golden[f"{name}.code"])
    q, absmax = quantize_blockwise(golden[f"{name}.x"], signed=name == "signed")
    assert torch.equal(q, golden[f"{name}.q"]) and torch.equal(absmax, golden[f"{name}.absmax"])


@native
def test_every_float_finds_its_nearest_code():
    """All magnitudes of 16 leading bits from 1e-9 to 1, and around: the table of cells against a plain search."""
    bits = torch.arange(0x3089, 0x3F81, dtype=torch.int32)
    for signed in (True, False):
        for low in (0, 1, 0x7FFF, 0xFFFF):
            x = ((bits << 16) + low).view(torch.float32)
            x = torch.cat([x[x <= 1], -x[x <= 1], torch.ones(1)])
            x = torch.cat([x, torch.zeros(-len(x) % 4096)])
            x = x.view(-1, 4096)
            x[:, 0] = 1
            code = dynamic_code(signed)
            expected = torch.bucketize(x, (code[:-1] + code[1:]) / 2).to(torch.uint8)
            assert torch.equal(quantize_blockwise(x, signed=signed)[0], expected)


@native
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_native_is_the_reference(blocksize, kind):
    torch.manual_seed(0)
    for size in (0, 1, 2, 31, 33, 64, 4095, 65536 + 4097, 140000):
        for dtype in DTYPES:
            x = torch.randn(size).mul_(torch.rand(size) ** 4).to(dtype)
            weight = quantize(x, blocksize=blocksize, quant_type=kind)
            if size:
                packed, absmax = nf4.reference_quantize(x, blocksize, kind)
                assert torch.equal(weight.packed, packed) and torch.equal(weight.absmax, absmax)
            for out in (*DTYPES, torch.float64):
                for w in (weight, nf4.nest(weight)):
                    assert torch.equal(dequantize(w, out), nf4.reference_dequantize(w, out)), (size, dtype, out)


@native
def test_ties_zeros_and_what_is_not_a_number():
    middle = (nf4.codebook("nf4")[:-1] + nf4.codebook("nf4")[1:]) / 2
    x = torch.cat([middle, torch.tensor([1.0]), torch.zeros(16)])
    assert nf4.reference_dequantize(quantize(x, blocksize=32))[:15].tolist() == nf4.codebook("nf4")[:15].tolist()
    for kind in ("nf4", "fp4"):
        zero = quantize(torch.zeros(100), quant_type=kind)
        assert torch.equal(dequantize(zero), torch.zeros(100)) and zero.absmax[0] == 0
        for bad in (float("nan"), float("inf"), -float("inf"), 1e-44):
            x = torch.randn(96)
            x[5] = bad
            weight, (packed, absmax) = quantize(x, quant_type=kind), nf4.reference_quantize(x, 64, kind)
            assert torch.equal(weight.packed, packed) and torch.equal(weight.absmax.isnan(), absmax.isnan())


@native
def test_same_bits_at_any_thread_count(each_thread_count):
    torch.manual_seed(0)
    x, a = torch.randn(192, 1024), torch.randn(5, 1024)
    weight = quantize(x, double=True)
    y = lambda rows: nf4_mm(a[:1].repeat(rows, 1), weight, torch.empty(rows, 192))  # noqa: E731
    each_thread_count(
        lambda: [quantize(x).packed, quantize(x).absmax, dequantize(weight), *quantize_blockwise(x), y(3), y(40)]
    )
    assert torch.equal(y(9), y(1).repeat(9, 1))  # a row does not depend on the others


SHAPES = [
    (1, 1, 64),
    (33, 192, 128),
    (5, 70, 192),
    (3, 31, 96),
    (7, 9, 33),
    (64, 40, 65),
    (100, 130, 448),
    (15, 64, 64),
    (16, 64, 64),
]


@native
@pytest.mark.parametrize("rows, out, width", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, blocksize, double", [("nf4", 64, True), ("nf4", 32, False), ("fp4", 256, False)])
def test_products(rows, out, width, dtype, kind, blocksize, double, no_worse):
    """Against float64 on the decoded weight, both ways round, with and without the low-rank update, new and added to."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(out, width), blocksize=blocksize, quant_type=kind, double=double)
    dense = nf4.reference_dequantize(weight, torch.float64)
    for transposed in (False, True):
        w = dense if transposed else dense.T
        a = torch.randn(rows, w.shape[0]).to(dtype)
        a2, b2 = torch.randn(rows, 6), torch.randn(w.shape[1], 6).t()
        for update in (None, (a2, b2), (a2, b2.contiguous().bfloat16())):
            x2, y2 = update or (None, None)
            for accumulate in (False, True):
                before = torch.randn(rows, w.shape[1]).to(dtype)
                exact = (
                    a.double() @ w
                    + (x2.double() @ y2.double() if update else 0)
                    + (before.double() if accumulate else 0)
                )
                plain = a @ w.to(dtype)
                if update:
                    plain = plain + (x2 @ y2.float()).to(dtype)
                plain = plain + before if accumulate else plain
                ours = nf4_mm(a, weight, before.clone(), transposed=transposed, a2=x2, b2=y2, accumulate=accumulate)
                # float32 sums of a few hundred terms come in another order than MKL's
                no_worse(f"transposed={transposed} update={update is not None}", ours, plain, exact, floor=1e-6)


@native
def test_products_take_views():
    torch.manual_seed(0)
    weight = quantize(torch.randn(64, 128))
    dense = dequantize(weight, torch.float32)
    wide = torch.randn(20, 300)
    for a in (wide[:, 10:138], wide[::3, :128], torch.randn(128, 20).t()):
        out = torch.full((len(a), 100), 7.0)
        nf4_mm(a, weight, out[:, 20:84])
        torch.testing.assert_close(out[:, 20:84], a @ dense.T, rtol=1e-4, atol=1e-4)
        assert (out[:, :20] == 7).all() and (out[:, 84:] == 7).all()


CASES = {"plain": 0, "one part": 1, "two parts": 2, "dropout": 1, "dora": 1, "dora dropout": 2}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40])
def test_lora_with_a_quantised_weight(case, dtype, rows, backend, no_worse):
    """Output and gradients of x, bias, A, B, magnitude, against the reference in float64 on the same numbers."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(96, 64) / 8, double=True)
    count = CASES[case]
    parts = [(torch.randn(4, 64) / 8, torch.randn(96 // count, 4) / 2, 96 // count * i) for i in range(count)]
    magnitude = torch.rand(96 // count) + 0.5 if "dora" in case else None
    x, bias, dy = torch.randn(rows, 64), torch.randn(96), torch.randn(rows, 96).to(dtype)
    dropout = 0.5 if "dropout" in case else 0.0

    def run(function, wide, w):
        leaves = [x.to(dtype).to(wide or dtype), bias.to(wide or dtype)]
        leaves += [t.to(wide or torch.float32) for a, b, _ in parts for t in (a, b)]
        if magnitude is not None:
            leaves.append(magnitude.to(wide or torch.float32))
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        m = leaves[-1] if magnitude is not None else None
        built = [
            LoraPart(leaves[2 + 2 * i], leaves[3 + 2 * i], 1.5, p[2], m if i == 0 else None)
            for i, p in enumerate(parts)
        ]
        y = function(leaves[0], w, leaves[1], built, dropout=dropout, seed=3)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = run(reference, torch.float64, nf4.reference_dequantize(weight, torch.float64))
    plain = run(reference, None, nf4.reference_dequantize(weight, dtype))
    for name, *values in zip(range(len(exact)), run(lora_linear, None, weight), plain, exact, strict=True):
        # with DoRA and dropout, dx is the sum of two gradients in x's dtype
        no_worse(f"{case} {name}", *values, floor=2**-8 if case == "dora dropout" and dtype == torch.bfloat16 else 2e-7)


@native
def test_lora_op_is_well_formed():
    torch.manual_seed(0)
    weight = quantize(torch.randn(32, 64), double=True)
    x, a, b = (
        torch.randn(5, 64, requires_grad=True),
        torch.randn(2, 64, requires_grad=True),
        torch.randn(32, 2, requires_grad=True),
    )
    tensors = [weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code]
    form = f"4 32 64 64 nf4 {weight.offset!r}"
    torch.library.opcheck(torch.ops.enginepost.lora_linear, (x, tensors, form, None, a, [b], [0], 0.0, 0, False))
    no_parts = (x, tensors, form, None, torch.empty(0, 64), [], [], 0.0, 0, False)
    torch.library.opcheck(torch.ops.enginepost.lora_linear, no_parts)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_tuple_of_matrices_is_the_matrix_of_their_rows(dora, dropout, backend):
    """q|k|v quantised one by one, v left as it was: forward and gradients against float64 on the stacked numbers."""
    torch.manual_seed(0)
    q, k, v = torch.randn(64, 96) / 10, torch.randn(33, 96) / 10, torch.randn(32, 96) / 10
    weight = (quantize(q, double=True), quantize(k, blocksize=32, quant_type="fp4"), v)
    stacked = torch.cat([dequantize(weight[0]), dequantize(weight[1]), v])
    leaves = {
        "x": torch.randn(40, 96), "bias": torch.randn(129), "a0": torch.randn(4, 96), "b0": torch.randn(64, 4),
        "a1": torch.randn(2, 96), "b1": torch.randn(20, 2), "m0": torch.rand(64) + 1, "m1": torch.rand(20) + 1,
    }  # fmt: skip

    def run(dtype, w, function):
        t = {name: tensor.to(dtype).requires_grad_() for name, tensor in leaves.items()}
        parts = [
            LoraPart(t["a0"], t["b0"], 0.5, 0, t["m0"] if dora else None),
            LoraPart(t["a1"], t["b1"], 2.0, 84, t["m1"] if dora else None),  # rows of k and of v
        ]
        y = function(t["x"], w, t["bias"], parts, dropout=dropout, seed=3)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        return [y.detach(), *(g.grad for g in t.values() if g.grad is not None)]

    exact = run(torch.float64, stacked.double(), reference)
    for mine, wanted in zip(run(torch.float32, weight, lora_linear), exact, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        x = leaves["x"].bfloat16()
        one = lora_linear(x, stacked)
        assert (lora_linear(x, weight).float() - one.float()).abs().max() <= 0.01 * one.float().abs().max()


def test_a_tuple_is_checked():
    weight = quantize(torch.randn(32, 64))
    with pytest.raises(ValueError, match="empty tuple"):
        lora_linear(torch.zeros(2, 64), ())
    with pytest.raises(ValueError, match=r"got \[2, 64\] and \[32, 32\]"):
        lora_linear(torch.zeros(2, 64), (weight, torch.zeros(32, 32)))
    with pytest.raises(ValueError, match="must be frozen"):
        lora_linear(torch.zeros(2, 64), (weight, torch.zeros(32, 64, requires_grad=True)))


@native
def test_row_squares():
    torch.manual_seed(0)
    for shape, blocksize in (((300, 33), 64), ((5, 4096), 4096), ((3000, 800), 64)):
        weight = quantize(torch.randn(shape), blocksize=blocksize, double=True)
        expected = dequantize(weight, torch.float64).square().sum(1)
        torch.testing.assert_close(nf4.row_squares(weight).double(), expected, rtol=1e-5, atol=1e-5)


@native
def test_memory_of_a_product_is_a_panel_not_a_weight():
    """A weight of 64 MB in float32 multiplies without ever being there in full."""
    from pathlib import Path

    def status(key):
        line = next(t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(key))
        return int(line.split()[1]) * 1024

    weight = quantize(torch.randn(4096, 4096).bfloat16())
    a, out = torch.randn(32, 4096).bfloat16(), torch.empty(32, 4096, dtype=torch.bfloat16)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for transposed in (False, True):
        nf4_mm(a, weight, out, transposed=transposed)
        nf4_mm(a[:4], weight, out[:4], transposed=transposed)
    assert status("VmHWM") - before < 16e6


Z = torch.zeros
GOOD = dict(packed=Z(32, dtype=torch.uint8), absmax=Z(1), shape=(4, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(packed=Z(33, dtype=torch.uint8)), r"takes packed torch.uint8 \[32\], got torch.uint8 \[33\]"),
        (dict(packed=Z(32)), r"takes packed torch.uint8 \[32\], got torch.float32"),
        (dict(absmax=Z(2)), r"takes absmax torch.float32 \[1\], got torch.float32 \[2\]"),
        (dict(absmax=Z(1, dtype=torch.uint8)), "nested_absmax and nested_code belong to a uint8 absmax"),
        (dict(nested_absmax=Z(1)), "nested_absmax and nested_code belong"),
        (dict(blocksize=48), "blocksize must be one of 32, 64"),
        (dict(quant_type="int4"), "quant_type must be nf4 or fp4"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    NF4Weight(**GOOD)
    with pytest.raises(ValueError, match=message):
        NF4Weight(**(GOOD | change))


def test_bad_input_is_named():
    for bad in (0, 16, 8192, 63):
        with pytest.raises(ValueError, match="blocksize must be one of"):
            quantize(Z(64), blocksize=bad)
        with pytest.raises(ValueError, match="blocksize must be one of"):
            quantize_blockwise(Z(64), blocksize=bad)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 can be quantised"):
        quantize(Z(64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"can be quantised, got torch\.int64"):
        quantize_blockwise(Z(64, dtype=torch.int64))
    weight = NF4Weight(**GOOD)
    with pytest.raises(ValueError, match=r"x must be \[T, in\] and weight \[out, in\], got \[2, 4\] and \[4, 16\]"):
        lora_linear(Z(2, 4), weight)


U8 = torch.uint8


@native
@pytest.mark.parametrize(
    "function, arguments, message",
    [
        ("nf4_quantize", (Z(64), Z(32, dtype=U8), Z(2), 64, 0), "need 32 bytes and 1 scales, got 32 and 2"),
        ("nf4_quantize", (Z(64), Z(32), Z(1), 64, 0), "packed must be uint8"),
        (
            "nf4_quantize",
            (Z(64), Z(32, dtype=U8), Z(1), 65, 0),
            "blocksize must be a power of two from 32 to 4096, got 65",
        ),
        ("nf4_quantize", (Z(64), Z(32, dtype=U8), Z(1), 64, 2), "type must be EP_NF4 or EP_FP4, got 2"),
        (
            "nf4_dequantize",
            (Z(32, dtype=U8), Z(1), None, None, 0.0, 64, 0, Z(66)),
            "66 elements take 33 packed bytes, got 32",
        ),
        (
            "nf4_dequantize",
            (Z(32, dtype=U8), Z(1, dtype=U8), None, None, 0.0, 64, 0, Z(64)),
            "nested_code belong to a uint8",
        ),
        (
            "nf4_matmul",
            (Z(2, 8), Z(32, dtype=U8), Z(1), None, None, 0.0, 64, 0, 4, 16, False, None, None, Z(2, 4), False),
            r"a \(2, 8\) and a weight \(4, 16\) do not make c \(2, 4\)",
        ),
        (
            "nf4_matmul",
            (Z(2, 16), Z(32, dtype=U8), Z(1), None, None, 0.0, 64, 0, 4, 16, False, Z(2, 3), None, Z(2, 4), False),
            "a2 and b2 come together",
        ),
        (
            "nf4_matmul",
            (Z(2, 16), Z(32, dtype=U8), Z(1), None, None, 0.0, 64, 0, 4, 16, False, Z(2, 3), Z(2, 4), Z(2, 4), False),
            "do not make c",
        ),
        (
            "nf4_matmul",
            (Z(2, 16), Z(32, dtype=U8), Z(1), None, None, 0.0, 64, 0, -4, 16, False, None, None, Z(2, 4), False),
            "impossible shape",
        ),
        (
            "blockwise8_quantize",
            (Z(64), Z(63, dtype=U8), Z(1), 64, True),
            "64 elements need as many codes and 1 scales, got 63",
        ),
        ("blockwise8_dequantize", (Z(64, dtype=U8), Z(1), Z(255), Z(64), 64, 0.0), "a code of 256"),
    ],
)
def test_the_native_functions_check_for_themselves(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(core(), function)(*(to_dlpack(a) if isinstance(a, torch.Tensor) else a for a in arguments))


@native
def test_which_instruction_set_ran():
    """These tests are run once per instruction set (test_isa.py); say which one this is, for the log."""
    assert info()["isa"] in info()["isas"]
