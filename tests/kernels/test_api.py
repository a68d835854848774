"""The Python API as people quote it: modules that are callable, arrays of other libraries, examples that run."""

import doctest
import importlib
import inspect
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from enginepost import kernels

ROOT = pathlib.Path(__file__).parents[2]


def public_functions(family):
    module = importlib.import_module(f"enginepost.kernels.{family}")
    for name, function in vars(module).items():
        if inspect.isfunction(function) and function.__module__ == module.__spec__.name and not name.startswith("_"):
            yield name, inspect.unwrap(function)


def packed(heads=4, kv_heads=2, dim=32):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((7, h, dim), dtype=np.float32) for h in (heads, kv_heads, kv_heads))
    return q, k, v, np.array([0, 3, 7], np.int32)


@pytest.mark.parametrize(
    "first", ["from enginepost.kernels.attention import attention", "from enginepost import kernels"]
)
def test_attention_is_module_and_function_whatever_came_first(first):
    check = f"""
import torch
{first}
from enginepost import kernels
from enginepost.kernels import attention
import enginepost.kernels.attention as module
q = torch.randn(3, 2, 16)
cu = torch.tensor([0, 3], dtype=torch.int32)
assert attention is module is kernels.attention
out, lse = kernels.attention(q, q, q, cu_seqlens=cu)
assert torch.equal(out, attention.attention(q, q, q, cu)[0])
assert torch.allclose(out, attention.reference(q, q, q, cu)[0], atol=1e-5)
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", check], check=True, env={**os.environ, "PYTHONPATH": path})


def test_every_family_is_its_function_and_its_module():
    several = {"nf4", "merge"}  # no function that could stand for the family
    for family in set(kernels.FAMILIES) - several:
        module = getattr(kernels, family)
        assert callable(module) and callable(module.reference if family != "adamw" else module.reference_step)
        assert next(iter(inspect.signature(module).parameters)) in (
            "q",
            "hidden",
            "student_hidden",
            "x",
            "gate_up",
            "params",
            "a",
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kernels.nothing  # noqa: B018


def test_every_module_of_the_package_is_a_family_or_inside():
    inside = {"__init__", "arrays", "backend", "linear_kl_blocks", "selftest"}
    files = {p.stem for p in pathlib.Path(kernels.__file__).parent.glob("*.py")}
    assert files - inside == set(kernels.FAMILIES)


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_examples_of_the_docstrings(family):
    torch.manual_seed(0)
    runner, found = doctest.DocTestRunner(), 0
    for name, function in public_functions(family):
        for test in doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(function.__globals__)):
            found += len(test.examples)
            runner.run(test)
    assert found > 0 and runner.failures == 0


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_public_functions_have_a_docstring(family):
    for name, function in public_functions(family):
        assert function.__doc__, f"{family}.{name}"


def test_numpy_in_numpy_out():
    q, k, v, cu = packed()
    out, lse = kernels.attention(q, k, v, cu_seqlens=cu)
    exact = kernels.attention.reference(*(torch.from_numpy(x).double() for x in (q, k, v)), torch.from_numpy(cu))
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    np.testing.assert_allclose(out, exact[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(lse, exact[1].numpy(), atol=1e-5)


def test_numpy_views_are_read_where_they_lie():
    q, k, v, cu = packed()
    fused = np.concatenate([q, k, v], axis=1)
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    np.testing.assert_array_equal(kernels.attention(*views, cu)[0], kernels.attention(q, k, v, cu)[0])


def test_numpy_may_be_mixed_with_tensors_and_read_only():
    q, k, v, cu = packed()
    expected = kernels.attention(q, k, v, cu)[0]
    q.flags.writeable = False
    out, _ = kernels.attention(q, torch.from_numpy(k), v, torch.from_numpy(cu))
    np.testing.assert_array_equal(out, expected)


def test_numpy_through_lists_and_parts():
    rng = np.random.default_rng(1)
    x, w, a, b = (rng.standard_normal(s, dtype=np.float32) for s in ((4, 16), (24, 16), (2, 16), (24, 2)))
    y = kernels.lora(x, w, parts=[kernels.LoraPart(A=a, B=b, scaling=0.5)])
    np.testing.assert_allclose(y, x @ w.T + 0.5 * (x @ a.T) @ b.T, atol=1e-4)
    assert kernels.global_norm([np.array([3.0], np.float32), np.array([4.0], np.float32)]) == 5.0


def test_numpy_of_a_paged_cache_and_a_teacher():
    rng = np.random.default_rng(3)
    q, cache = rng.standard_normal((2, 4, 16), dtype=np.float32), rng.standard_normal((3, 8, 2, 16), dtype=np.float32)
    table, used = np.array([[2, 0], [1, 1]], np.int32), np.array([12, 5], np.int32)
    out, lse = kernels.paged_attention(q, cache, cache, table, used)
    expected = kernels.paged_attention(*map(torch.from_numpy, (q, cache, cache, table, used)))
    np.testing.assert_array_equal(out, expected[0].numpy())
    np.testing.assert_array_equal(lse, expected[1].numpy())
    hidden, head = rng.standard_normal((5, 16), dtype=np.float32), rng.standard_normal((30, 16), dtype=np.float32)
    ids, logprobs = np.arange(10).reshape(5, 2), np.full((5, 2), -1.0, np.float32)
    kl = kernels.linear_kl(hidden, head, teacher_topk=(ids, logprobs))
    assert isinstance(kl, np.ndarray) and kl.shape == (5,) and (kl > 0).all()


def test_numpy_in_place():
    def step(make):
        p, g, m, v = (make(np.full(5, x, np.float32)) for x in (1.0, 0.5, 0.0, 0.0))
        assert kernels.adamw([p], [g], [m], [v], lr=0.1, step=1) is None
        return np.asarray(p)

    np.testing.assert_array_equal(step(lambda a: a), step(torch.from_numpy))
    assert step(lambda a: a)[0] != 1.0
    locked = np.ones(5, np.float32)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match=r"adamw_step: params\[0\] would be written to, but a ndarray is read-only"):
        kernels.adamw([locked], [locked], [locked], [locked], lr=0.1, step=1)


def test_float64_and_float16_numpy_take_the_reference():
    x = np.random.default_rng(2).standard_normal((3, 8))
    y = kernels.rms_norm(x, np.ones(8), 1e-6)
    np.testing.assert_allclose(y, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6), rtol=1e-12)
    assert kernels.glu(x.astype(np.float16)).dtype == np.float16


def test_what_dlpack_does_not_carry_is_named():
    q, k, v, cu = packed()
    with pytest.raises(ValueError, match=r"attention: q: ndarray of .*cannot be handed over through DLPack"):
        kernels.attention(np.array(["text"]), k, v, cu)
    with pytest.raises(ValueError, match=r"k must have the head dimension"):
        kernels.attention(q, k[:, :, :16], v[:, :, :16], cu)


def test_an_array_without_a_namespace_gives_tensors():
    class Array:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **options):
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    x = torch.randn(3, 8)
    y = kernels.glu(Array(x))
    assert isinstance(y, torch.Tensor) and torch.equal(y, kernels.glu(x))


def test_gradients_and_compile_through_the_callable_module():
    q = torch.randn(6, 2, 16, requires_grad=True)
    cu = torch.tensor([0, 6], dtype=torch.int32)

    def f(q):
        return kernels.attention(q, q, q, cu_seqlens=cu)[0].sum()

    (eager,) = torch.autograd.grad(f(q), q)
    (compiled,) = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(q), q)
    assert torch.allclose(eager, compiled, atol=1e-5)


def test_jax_in_jax_out():
    jax = pytest.importorskip("jax", reason="JAX is absent: `make link` installs it")
    q, k, v, cu = packed()
    expected = kernels.attention(q, k, v, cu)[0]
    out, _ = kernels.attention(*(jax.numpy.asarray(x) for x in (q, k, v, cu)))
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(np.asarray(out), expected)
    half = jax.numpy.ones((2, 8), jax.numpy.bfloat16)
    assert kernels.glu(half).dtype == jax.numpy.bfloat16
    with pytest.raises(ValueError, match="would be written to"):
        kernels.adamw([half], [half], [half], [half], lr=0.1, step=1)
