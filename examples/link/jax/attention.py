"""Packed attention inside JAX programs, jit and grad included: enginepost's kernels as XLA custom calls, no torch in the process.

    python attention.py build/attention_ffi.so          # CMakeLists.txt says how to build it

runs a check against the same maths in jax.numpy.
"""

import ctypes
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np


def register(library: str) -> None:
    """Make the custom calls of attention_ffi.so known to XLA's CPU backend."""
    handlers = ctypes.CDLL(library)
    for name in ("attention_forward", "attention_backward"):
        jax.ffi.register_ffi_target(f"enginepost_{name}", jax.ffi.pycapsule(getattr(handlers, name)), platform="cpu")


def _options(q: jax.Array, causal: bool, window: int) -> dict:
    return {
        "causal": np.bool_(causal),
        "window": np.int64(window),
        "softcap": np.float64(0),
        "scale": np.float64(1 / math.sqrt(q.shape[-1])),
    }


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array, causal: bool = True, window: int = 0
) -> jax.Array:
    """q [T, H, D], k and v [T, Hk, D], float32 or bfloat16; cu_seqlens int32 [S + 1] -> out [T, H, D]."""
    return _forward(q, k, v, cu_seqlens, causal, window)[0]


def _forward(q, k, v, cu_seqlens, causal, window):
    lse = jax.ShapeDtypeStruct((q.shape[1], q.shape[0]), jnp.float32)
    call = jax.ffi.ffi_call("enginepost_attention_forward", (_shape(q), lse))
    out, lse = call(q, k, v, cu_seqlens, **_options(q, causal, window))
    return out, (q, k, v, cu_seqlens, out, lse)


def _backward(causal, window, kept, dout):
    q, k, v, cu_seqlens, out, lse = kept
    call = jax.ffi.ffi_call("enginepost_attention_backward", (_shape(q), _shape(k), _shape(v)))
    return *call(dout, q, k, v, out, lse, cu_seqlens, **_options(q, causal, window)), None


attention.defvjp(_forward, _backward)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
    """The same in jax.numpy, with the [T, T] matrix and a mask."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    position = jnp.arange(q.shape[0])
    sequence = jnp.searchsorted(cu_seqlens, position, side="right")
    seen = (sequence[:, None] == sequence[None]) & (position[:, None] >= position[None])
    scores = jnp.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    return jnp.einsum("hij,jhd->ihd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def main() -> None:
    register(sys.argv[1])
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (50, heads, 32)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    cu_seqlens = jnp.array([0, 18, 50], jnp.int32)

    def loss(function):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: (function(q, k, v, cu_seqlens) ** 2).sum(), argnums=(0, 1, 2))
        )

    (value, grads), (expected, expected_grads) = loss(attention)(q, k, v), loss(plain)(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    worst = max(float(jnp.abs(a - b).max()) for a, b in zip(grads, expected_grads, strict=True))
    assert worst < 1e-4, worst
    try:
        jax.block_until_ready(attention(q, k, v, jnp.array([0, 49], jnp.int32)))
    except Exception as error:
        assert "cu_seqlens must end with the number of rows of q" in str(error), error
    else:
        raise AssertionError("wrong cu_seqlens were taken")
    assert "torch" not in sys.modules
    print(f"jax {jax.__version__}: loss {value:.4f}, largest difference of a gradient {worst:.1e}")


if __name__ == "__main__":
    main()
