"""Rotary embedding: frequencies against transformers' numbers, the rotation and its backward against float64."""

import json
import pathlib

import pytest
import torch

from enginepost.kernels.backend import _core
from enginepost.kernels.rope import reference, rope, rope_frequencies

native = pytest.mark.skipif(_core is None, reason="the native extension is not built")
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "rope.json").read_text())
SHAPES = [(7, 3, 64, 64), (5, 2, 80, 20), (33, 1, 59, 58), (4, 2, 6, 2), (9, 4, 128, 128), (1, 1, 2, 2), (0, 2, 16, 16)]


def tables(tokens, rotated, dtype=torch.float32):
    angle = torch.randn(tokens, rotated // 2, dtype=torch.float64) * 10
    return angle.cos().to(dtype), angle.sin().to(dtype)


def with_gradient(function, x, cos, sin, dy, heads):
    x = x.clone().requires_grad_()
    y = function(x, cos, sin, heads)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_against_float64(shape, heads, dtype, backend, no_worse):
    if dtype == torch.float16 and not backend.gpu:
        pytest.skip("float16 runs on GPUs only")
    torch.manual_seed(0)
    tokens, count, dim, rotated = shape
    x, dy = (torch.randn(tokens, count, dim).to(dtype) for _ in range(2))
    cos, sin = tables(tokens, rotated)
    exact = with_gradient(reference, x.double(), cos.double(), sin.double(), dy.double(), heads)
    plain = with_gradient(reference, x, cos, sin, dy, heads)
    ours = [t.cpu() for t in with_gradient(rope, *backend.to(x, cos, sin, dy), heads)]
    for name, mine, theirs, true in zip(("y", "dx"), ours, plain, exact, strict=True):
        no_worse(name, mine, theirs, true)
    if heads == 1:
        assert torch.equal(ours[0][:, 1:], x[:, 1:]) and torch.equal(ours[1][:, 1:], dy[:, 1:])
    assert torch.equal(ours[0][..., rotated:], x[..., rotated:])


def test_reference_against_complex_numbers():
    """The rotation is multiplication by e^(i angle) of the pairs (i, i + R/2)."""
    torch.manual_seed(1)
    x, angle = torch.randn(6, 2, 10, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    expected = torch.cat([turned.real, turned.imag, x[..., 8:]], dim=-1)
    torch.testing.assert_close(reference(x, angle.cos(), angle.sin()), expected)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, angle.cos(), angle.sin()), x)


@native
def test_scores_depend_on_distance_alone():
    inv_freq, _ = rope_frequencies(64, 10000.0, max_position=2048)
    q, k = torch.randn(1, 1, 64), torch.randn(1, 1, 64)

    def score(i, j):
        a, b = (rope(x, (p * inv_freq).cos()[None], (p * inv_freq).sin()[None]) for x, p in ((q, i), (k, j)))
        return (a * b).sum().item()

    assert score(105, 100) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(105, 100) != pytest.approx(score(25, 23), abs=1e-4)


@pytest.mark.parametrize("row", GOLDEN, ids=lambda r: f"{r['name']} {r['seq_len']}")
def test_frequencies_are_those_of_transformers(row):
    inv_freq, attention = rope_frequencies(
        row["dim"], row["theta"], row["scaling"], max_position=row["max_position"], seq_len=row["seq_len"]
    )
    assert inv_freq.dtype == torch.float32
    torch.testing.assert_close(inv_freq, torch.tensor(row["inv_freq"]), rtol=1e-6, atol=0)
    assert attention == pytest.approx(row["attention_scaling"], rel=1e-12)


def test_default_frequencies():
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 10000.0}):
        inv_freq, attention = rope_frequencies(8, 10000.0, scaling, max_position=2048)
        torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001]))
        assert attention == 1.0


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "spiral"}, "'spiral' is not supported; known: default, linear"),
        ({"type": "linear"}, "'linear' needs the parameter 'factor'"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "longrope", "long_factor": [1.0] * 8}, "short_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0] * 8}, "must have 8 entries"),
    ],
)
def test_bad_scaling_is_named(scaling, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(16, 10000.0, scaling, max_position=2048)


def test_same_bits_in_any_order_of_warps(each_schedule):
    x, (cos, sin) = torch.randn(9, 3, 24), tables(9, 16)
    each_schedule(lambda: with_gradient(rope, x, cos, sin, x, 2))


def test_slices_of_a_fused_projection(backend):
    torch.manual_seed(2)
    wide, cos, sin = backend.to(torch.randn(11, 9, 16), *tables(11, 16))
    for x in (wide[:, 2:6], wide[:, ::2], wide.transpose(1, 2).contiguous().transpose(1, 2)):
        dy = torch.randn(x.shape, device=x.device).transpose(0, 1).contiguous().transpose(0, 1)
        ours = with_gradient(rope, x, cos, sin, dy, None)
        tight = with_gradient(rope, x.contiguous(), cos, sin, dy.contiguous(), None)
        assert all(torch.equal(a, b) for a, b in zip(ours, tight, strict=True))


@native
def test_same_bits_at_any_thread_count(each_thread_count):
    x, (cos, sin) = torch.randn(501, 5, 64).bfloat16(), tables(501, 64)
    each_thread_count(lambda: [rope(x, cos, sin)])


@native
def test_opcheck():
    cos, sin = tables(5, 6)
    x = torch.randn(5, 3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.enginepost.rope, (x, cos, sin, 2, False))


@native
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cos=torch.zeros(4, 8)), "cos"),
        (dict(cos=torch.zeros(5, 9), sin=torch.zeros(5, 9)), "cos"),
        (dict(sin=torch.zeros(5, 7)), "sin"),
        (dict(heads=4), "heads"),
        (dict(cos=torch.zeros(5, 8).bfloat16()), "cos must be float32"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(x=torch.zeros(5, 3, 16), cos=torch.zeros(5, 8), sin=torch.zeros(5, 8)) | change
    with pytest.raises(ValueError, match=message):
        rope(**arguments)
