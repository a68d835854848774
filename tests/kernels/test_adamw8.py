"""AdamW with moments in 8 bits: the native step is the reference, codes and all; beside float32; beside bitsandbytes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enginepost.kernels import nf4
from enginepost.kernels.adamw import Moment8, adamw_step, reference_step, zero_moments
from enginepost.kernels.backend import _core, core, info, to_dlpack, use_isa

native = pytest.mark.skipif(_core is None, reason="the native extension is not built")
OPTIONS = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
SIZES = [4096, 4097, 5000, 16384 + 255, 40000]


def start(size, dtype=torch.float32, seed=0, to=lambda t: t):
    torch.manual_seed(seed)
    param = to(torch.randn(size).to(dtype))
    return param, *zero_moments(param, bits=8)


def gradient(step, size, dtype=torch.float32):
    torch.manual_seed(100 + step)
    return (torch.randn(size) * torch.rand(size) ** 4 * 10.0 ** (step % 3 - 2)).to(dtype)


def copied(moment):
    return Moment8(moment.codes.clone(), moment.scale.clone(), moment.signed)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2,
        (torch.float16,) * 2, (torch.float32, torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_native_is_the_reference(size, dtypes, backend):
    """Step by step from the same state. Rounding may differ in the last place, and with it a code at a midpoint, by one."""
    if torch.float16 in dtypes and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    param, m, v = start(size, dtypes[0], to=backend.to)
    for step in range(1, 6):
        theirs, m2, v2 = param.clone(), copied(m), copied(v)
        g = backend.to(gradient(step, size, dtypes[1]))
        adamw_step([param], [g], [m], [v], step=step, grad_scale=0.5, **OPTIONS)
        reference_step([theirs], [g], [m2], [v2], step=step, grad_scale=0.5, **OPTIONS)
        torch.testing.assert_close(param, theirs, rtol={4: 1e-5, 2: 8e-3}[param.element_size()], atol=1e-6)
        for mine, plain in ((m, m2), (v, v2)):
            torch.testing.assert_close(mine.scale, plain.scale, rtol=1e-6, atol=0)
            off = (mine.codes.int() - plain.codes.int()).abs()
            # Small gradients of float16 have few values (they are subnormal), and their moments are often midpoints.
            assert off.max() <= 1 and (off > 0).float().mean() < (3e-2 if dtypes[1] == torch.float16 else 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_those_of_the_moments(size, backend):
    """From zero moments one step gives m = (1 - b1) g and v = (1 - b2) g^2: coded as nf4.quantize_blockwise does, in 256s."""
    param, m, v = start(size, to=backend.to)
    g = backend.to(gradient(3, size))
    adamw_step([param], [g], [m], [v], step=1, **OPTIONS)
    full = size // 256 * 256
    for moment, value in ((m, g * (1 - 0.9)), (v, g * (1 - 0.99) * g)):
        codes, scale = nf4.quantize_blockwise(value, blocksize=256, signed=moment.signed)
        if moment.signed:
            codes = torch.where((value < 0) & (codes == 127), 126, codes)  # keeps its sign
        else:
            codes = torch.where((value > 0) & (codes == 0), 1, codes)  # is not lost
        torch.testing.assert_close(moment.scale, scale, rtol=1e-6, atol=0)
        off = (moment.codes[:full].int() - codes[:full].int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
        assert (moment.float() - value).abs().max() <= 0.02 * value.abs().max()


@native
@pytest.mark.parametrize("isa", info()["isas"])
def test_every_code_survives(isa):
    """A step that hardly moves the moments, from every code: decoding and encoding are each other's inverse."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(17)
    param = torch.zeros(len(codes))
    m, v = zero_moments(param, bits=8)
    for moment in (m, v):
        moment.codes.copy_(codes)
        moment.scale.fill_(3e-3)
    with use_isa(isa):
        adamw_step([param], [param.clone()], [m], [v], step=1, **(OPTIONS | dict(beta1=1 - 1e-5, beta2=1 - 1e-5)))
    for moment in (m, v):
        assert torch.equal(moment.codes, codes)
        torch.testing.assert_close(moment.scale, torch.full((17,), 3e-3 * (1 - 1e-5)), rtol=1e-6, atol=0)


@native
def test_follows_float32():
    """Fifty steps on a bowl end where float32 moments end, about; a state of a quarter of the bytes."""
    torch.manual_seed(0)
    target, ends = torch.randn(8192), []
    for bits in (32, 8):
        param = torch.zeros(8192)
        m, v = zero_moments(param, bits)
        for step in range(1, 51):
            adamw_step([param], [param - target], [m], [v], step=step, **(OPTIONS | dict(lr=0.05, weight_decay=0.0)))
        ends.append(param)
        if bits == 8:
            bytes8 = sum(t.nbytes for e in (m, v) for t in (e.codes, e.scale))
            assert bytes8 == pytest.approx(8192 * 2 * (1 + 4 / 256)) and bytes8 < 8192 * 8 / 3.9
    assert (ends[0] - target).abs().mean() < 0.1 and (ends[1] - ends[0]).abs().mean() < 0.03


@native
def test_beside_bitsandbytes():
    """No further from float32 moments than bitsandbytes' AdamW8bit ends (golden/make_nf4.py), on the same gradients."""
    golden = load_file(Path(__file__).parent.parent / "golden" / "adamw8.safetensors")
    options = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    ends = {}
    for bits in (32, 8):
        param = golden["start"].clone()
        m, v = zero_moments(param, bits)
        for step, g in enumerate(golden["gradients"], 1):
            adamw_step([param], [g], [m], [v], step=step, **options)
            if step == 1 and bits == 8:
                torch.testing.assert_close(param, golden["first"], rtol=1e-5, atol=1e-7)
        ends[bits] = param
    mine = (ends[8] - ends[32]).square().mean().sqrt()
    theirs = (golden["end"] - ends[32]).square().mean().sqrt()
    assert 0 < mine <= 1.05 * theirs


def test_masters_and_bfloat16(backend):
    param, m, v = start(5000, torch.bfloat16, to=backend.to)
    master, wide = [param.float()], param.float()
    m2, v2 = zero_moments(wide, 8)
    for step in range(1, 5):
        g = backend.to(gradient(step, 5000, torch.bfloat16))
        adamw_step([param], [g], [m], [v], step=step, masters=master, **OPTIONS)
        adamw_step([wide], [g], [m2], [v2], step=step, **OPTIONS)
    assert torch.equal(master[0], wide) and torch.equal(param, wide.bfloat16())


def run(size):
    param, m, v = start(size)
    for step in range(1, 4):
        adamw_step([param], [gradient(step, size)], [m], [v], step=step, **OPTIONS)
    return [param, m.codes, m.scale, v.codes, v.scale]


def test_same_bits_in_any_order_of_warps(each_schedule):
    each_schedule(lambda: run(4500))


@native
def test_same_bits_at_any_thread_count(each_thread_count):
    each_thread_count(lambda: run(70000))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite(backend, bad):
    """Their moments become zero and their parameters stay; the rest of the block goes on as if it were not there."""
    param, m, v = start(4100, to=backend.to)
    for step in (1, 2):
        adamw_step([param], [backend.to(gradient(step, 4100))], [m], [v], step=step, **OPTIONS)
    before, other = param.clone(), (param.clone(), copied(m), copied(v))
    g = backend.to(gradient(3, 4100))
    g[[7, 4098]] = bad
    adamw_step([param], [g], [m], [v], step=3, **OPTIONS)
    assert torch.equal(param[[7, 4098]], before[[7, 4098]]) and torch.isfinite(param).all()
    assert (m.float()[[7, 4098]] == 0).all() and (v.float()[[7, 4098]] == 0).all()
    g[[7, 4098]] = 0.0
    adamw_step([other[0]], [g], [other[1]], [other[2]], step=3, **OPTIONS)
    rest = torch.ones(4100, dtype=torch.bool)
    rest[[7, 4098]] = False
    torch.testing.assert_close(param[rest], other[0][rest], rtol=1e-6, atol=1e-7)


def test_small_negative_moments_keep_their_sign(backend):
    param = backend.to(torch.zeros(4096))
    m, v = zero_moments(param, 8)
    g = backend.to(torch.full((4096,), -1e-9))
    g[::256] = 1.0
    g[1::256] = 1e-9
    adamw_step([param], [g], [m], [v], step=1, **OPTIONS)
    value = m.float()
    assert (value[2::256] < 0).all() and (value[1::256] >= 0).all()


@native
def test_zero_gradients_change_nothing_but_the_decay():
    param, m, v = start(4096)
    before = param.clone()
    adamw_step([param], [torch.zeros(4096)], [m], [v], step=1, **OPTIONS)
    torch.testing.assert_close(param, before * (1 - 3e-4), rtol=1e-6, atol=0)
    assert (m.float() == 0).all() and (v.float() == 0).all()


def test_small_tensors_keep_float32():
    m, v = zero_moments(torch.zeros(4095), 8)
    assert isinstance(m, torch.Tensor) and m.dtype == v.dtype == torch.float32 and m.data_ptr() != v.data_ptr()
    m, v = zero_moments(torch.zeros(64, 64), 8)
    assert isinstance(m, Moment8) and m.shape == (64, 64) and m.signed and not v.signed
    with pytest.raises(ValueError, match="8 or 32 bits, got 16"):
        zero_moments(torch.zeros(4), 16)


@pytest.mark.parametrize("step_function", [adamw_step, reference_step])
def test_bad_input_is_named(step_function):
    param, m, v = start(4096)
    with pytest.raises(ValueError, match="exp_avg must be a signed Moment8"):
        step_function([param], [param], [v], [m], step=1, **OPTIONS)
    with pytest.raises(ValueError, match="both be Moment8 or both float32"):
        step_function([param], [param], [m], [torch.zeros(4096)], step=1, **OPTIONS)


U8 = torch.uint8


@native
@pytest.mark.parametrize(
    "change, message",
    [
        ({1: torch.zeros(511)}, "512 elements, grad 511"),
        ({2: torch.zeros(512)}, "exp_avg must be uint8"),
        ({4: torch.zeros(3)}, "512 elements take 2 scales, got 3 and 2"),
        ({6: torch.zeros(3)}, "all must be equal"),
        ({12: 0}, "step counts from 1"),
        ({8: 1.0}, "betas"),
    ],
)
def test_the_native_function_checks_for_itself(change, message):
    u8, f = torch.zeros(512, dtype=U8), torch.zeros(2)
    good = [torch.zeros(512), torch.zeros(512), u8, u8.clone(), f, f.clone(), None, 1e-3, 0.9, 0.99, 1e-8, 0.0, 1, 1.0]
    for at, value in change.items():
        good[at] = value
    with pytest.raises(ValueError, match=message):
        core().adamw8_step(*(to_dlpack(a) if isinstance(a, torch.Tensor) else a for a in good))
