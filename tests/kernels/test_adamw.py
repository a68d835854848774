"""AdamW: many steps beside torch.optim.AdamW and float64, bfloat16 parameters with masters, the global norm."""

import math

import pytest
import torch

from enginepost.kernels.adamw import adamw_step, global_norm, reference_step
from enginepost.kernels.backend import _core, use_backend, use_isa

native = pytest.mark.skipif(_core is None, reason="the native extension is not built")
SHAPES = [(3, 5), (1,), (0,), (40, 1000), (16385,)]
OPTIONS = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def start(dtype, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(s).to(dtype) for s in SHAPES]


def gradients(step, dtype):
    torch.manual_seed(100 + step)
    return [torch.randn(s).mul_(10.0 ** (step % 3 - 2)).to(dtype) for s in SHAPES]


def trained(step_function, params, grad_dtype, state_dtype, steps=12, grad_scale=1.0, masters=None, to=lambda *t: t):
    params = list(to(*(p.clone() for p in params)))
    m, v = (list(to(*(torch.zeros(s, dtype=state_dtype) for s in SHAPES))) for _ in range(2))
    for step in range(1, steps + 1):
        grads = list(to(*gradients(step, grad_dtype)))
        if state_dtype == torch.float64:
            grads = [g.double() for g in grads]
        more = {} if masters is None else dict(masters=masters)
        step_function(params, grads, m, v, step=step, grad_scale=grad_scale, **OPTIONS, **more)
    return params, m, v


def torch_trained(params, grad_dtype, steps=12, grad_scale=1.0):
    params = [torch.nn.Parameter(p.clone()) for p in params]
    o = OPTIONS
    optimizer = torch.optim.AdamW(
        params, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], weight_decay=o["weight_decay"]
    )
    for step in range(1, steps + 1):
        for p, g in zip(params, gradients(step, grad_dtype), strict=True):
            p.grad = g.to(p.dtype) * grad_scale
        optimizer.step()
    return [p.detach() for p in params]


def test_reference_is_torch_in_float64():
    params = [p.double() for p in start(torch.float32)]
    ours = trained(reference_step, params, torch.float32, torch.float64, grad_scale=0.37)[0]
    for mine, theirs in zip(ours, torch_trained(params, torch.float32, grad_scale=0.37), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters(grad_dtype, backend, no_worse):
    if grad_dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    params = start(torch.float32)
    exact = torch_trained([p.double() for p in params], grad_dtype, grad_scale=0.37)
    plain = torch_trained(params, grad_dtype, grad_scale=0.37)
    ours, m, v = trained(adamw_step, params, grad_dtype, torch.float32, grad_scale=0.37, to=backend.to)
    _, m64, v64 = trained(reference_step, [p.double() for p in params], grad_dtype, torch.float64, grad_scale=0.37)
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        no_worse("parameter", mine, theirs, true)
    for mine, true in zip(m + v, m64 + v64, strict=True):
        torch.testing.assert_close(mine.double().cpu(), true, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_with_float32_masters(dtype, backend):
    """The master follows the float32 run to the bit; the parameter is its rounding."""
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    params = start(dtype)
    masters = list(backend.to(*(p.float() for p in params)))
    ours = trained(adamw_step, params, dtype, torch.float32, masters=masters, to=backend.to)[0]
    expected = trained(adamw_step, [p.float() for p in params], dtype, torch.float32, to=backend.to)[0]
    for mine, master, true in zip(ours, masters, expected, strict=True):
        assert torch.equal(master, true) and mine.dtype == dtype and torch.equal(mine, true.to(dtype))


@native
def test_masters_keep_what_bfloat16_would_lose():
    """Steps of 1e-4 from 1.0 vanish in bfloat16 (spacing 2^-8) without a master, and add up with one."""
    options = dict(OPTIONS, lr=1e-4, weight_decay=0.0)
    ends = []
    for masters in (None, [torch.ones(8)]):
        p, m, v = [torch.ones(8).bfloat16()], [torch.zeros(8)], [torch.zeros(8)]
        for step in range(1, 101):
            adamw_step(p, [torch.ones(8).bfloat16()], m, v, step=step, masters=masters, **options)
        ends.append(p[0][0].item())
    assert ends[0] == 1.0 and ends[1] == pytest.approx(0.99, abs=0.002)


@native
def test_bfloat16_without_masters_is_rounded_once():
    params = start(torch.bfloat16)
    ours = trained(adamw_step, params, torch.bfloat16, torch.float32, steps=1)[0]
    wide = trained(adamw_step, [p.float() for p in params], torch.bfloat16, torch.float32, steps=1)[0]
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(ours, wide, strict=True))


@native
def test_same_bits_at_any_thread_count(each_thread_count):
    params = start(torch.float32)
    norm = lambda: torch.tensor([global_norm(params)], dtype=torch.float64)  # noqa: E731
    each_thread_count(lambda: [*trained(adamw_step, params, torch.float32, torch.float32, 2)[0], norm()])


@native
def test_parameters_that_require_gradients():
    p = torch.nn.Parameter(torch.ones(4))
    adamw_step([p], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], step=1, **OPTIONS)
    assert (p < 1).all() and p.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_global_norm(dtype):
    tensors = [t.to(dtype) for t in start(torch.float32)] + [torch.randn(30, 20).to(dtype).t()[::2]]
    exact = math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
    assert global_norm(tensors) == pytest.approx(exact, rel=1e-6 if dtype != torch.float64 else 1e-12)
    assert global_norm([]) == 0.0
    assert math.isnan(global_norm([torch.tensor([1.0, math.nan]).to(dtype)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_every_backend(backend, dtype):
    """Tails, an address off 16 bytes, several blocks of 16384; CUDA kernels have the bits of the CPU's AVX2."""
    torch.manual_seed(1)
    x = torch.randn(40000).to(dtype)
    tensors = [x[:n] for n in (0, 1, 7, 256, 300, 16384, 40000)] + [x[1:20000]]
    if dtype == torch.float16 and not backend.gpu:
        tensors = [t.float() for t in tensors]
    exact = [t.double().square().sum().sqrt().item() for t in tensors]
    ours = [global_norm([backend.to(t)]) for t in tensors]
    assert ours == pytest.approx(exact, rel=1e-7)
    together = global_norm([backend.to(t) for t in tensors])
    assert together == pytest.approx(math.hypot(*exact), rel=1e-7)
    if backend.gpu and dtype != torch.float16 and _core is not None and "avx2" in _core.isas():
        with use_backend(""), use_isa("avx2"):
            assert ours == [global_norm([t]) for t in tensors] and together == global_norm(tensors)


def test_norm_in_any_order_of_warps(each_schedule):
    x = torch.randn(20000)
    each_schedule(lambda: [torch.tensor([global_norm([x]), global_norm([x[3:]])], dtype=torch.float64)])


@native
def test_large_gradients_do_not_overflow_the_norm():
    assert global_norm([torch.full((300,), 1e15)]) == pytest.approx(1e15 * math.sqrt(300), rel=1e-6)


@native
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(grads=[torch.zeros(5)]), "4 elements, grad 5"),
        (dict(exp_avg=[torch.zeros(4).bfloat16()]), "exp_avg must be float32"),
        (dict(step=0), "step counts from 1"),
        (dict(beta1=1.0), "betas"),
        (dict(masters=[torch.zeros(3)]), "all must be equal"),
        (dict(grads=[]), "shorter"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(params=[torch.zeros(4)], grads=[torch.zeros(4)], exp_avg=[torch.zeros(4)])
    arguments |= dict(exp_avg_sq=[torch.zeros(4)], step=1, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        adamw_step(**(arguments | change))
