"""A valid call of every function of the C API, with shapes and values drawn at random: (tensors, other arguments, what the workspace
query takes, from the tensors). `fuzz.py` makes and spoils them."""

import ctypes
import functools
import itertools

import numpy as np

DTYPES = {"f32": (2, 32), "bf16": (4, 16), "i32": (0, 32), "i64": (0, 64), "f64": (2, 64), "f16": (2, 16), "u8": (1, 8)}


class Buffer:
    """A plain pointer to `count` numbers, which the function takes for granted but for null."""

    def __init__(self, kind, count):
        self.array = (kind * count)()
        for i in range(min(count, 16)):
            self.array[i] = i + 1


class Array:
    """A tensor that may lie: dtype, shape, strides and data can be set to anything that its buffer can carry."""

    def __init__(self, rng, dtype, shape, values=None):
        self.rng, self.dtype, self.shape, self.values = rng, dtype, list(shape), values
        self.strides = None
        self.share = None
        self.shift = 0
        self.device, self.lanes, self.null_data, self.null_shape = 1, 1, False, False

    def span(self):
        if any(n <= 0 for n in self.shape):
            return 1
        strides = self.strides or self.packed()
        return 1 + sum((n - 1) * abs(s) for n, s in zip(self.shape, strides, strict=True))

    def packed(self):
        strides, step = [], 1
        for n in reversed(self.shape):
            strides.append(step)
            step *= max(n, 1)
        return strides[::-1]

    def nbytes(self):
        return self.span() * DTYPES[self.dtype][1] // 8 + self.shift

    def fill(self, nbytes):
        size = DTYPES[self.dtype][1] // 8
        if self.values is not None:
            kind = {"i32": np.int32, "i64": np.int64, "u8": np.uint8}.get(self.dtype)
            if kind is not None:
                made = np.resize(np.asarray(self.values, np.int64).astype(kind), nbytes // size + 1)
                return made.tobytes()[:nbytes].ljust(nbytes, b"\0")
        made = self.rng.standard_normal(nbytes // 4 + 1).astype(np.float32)
        if self.dtype == "bf16":
            made = (np.repeat(made, 2).view(np.uint32) >> 16).astype(np.uint16)
        return made.tobytes()[:nbytes].ljust(nbytes, b"\0")


def sizes(rng, count, most=9):
    return [int(n) for n in rng.integers(1, most, count)]


def float_dtype(rng):
    return str(rng.choice(["f32", "bf16"]))


def cuts(rng, total, sequences):
    return [0, *sorted(int(x) for x in rng.integers(0, total + 1, sequences - 1)), total]


def attention(rng, backward):
    sequences, kv, group = sizes(rng, 3, 4)
    tokens, keys = sizes(rng, 2, 40)
    heads, dim, dtype = kv * group, int(rng.choice([1, 7, 16, 33, 64, 256])), float_dtype(rng)
    starts, starts_k = cuts(rng, tokens, sequences), cuts(rng, keys, sequences)
    used = [int(rng.integers(0, b - a + 1)) for a, b in itertools.pairwise(starts_k)]
    t = {
        "q": Array(rng, dtype, [tokens, heads, dim]), "k": Array(rng, dtype, [keys, kv, dim]),
        "v": Array(rng, dtype, [keys, kv, dim]), "out": Array(rng, dtype, [tokens, heads, dim]),
        "lse": Array(rng, "f32", [heads, tokens]), "cu_seqlens": Array(rng, "i32", [sequences + 1], starts),
        "cu_seqlens_k": Array(rng, "i32", [sequences + 1], starts_k), "seqused_k": Array(rng, "i32", [sequences], used),
    }  # fmt: skip
    if backward:
        t |= {n: Array(rng, dtype, t[of].shape) for n, of in (("dout", "q"), ("dq", "q"), ("dk", "k"), ("dv", "v"))}
    params = {
        "causal": int(rng.integers(2)),
        "window": int(rng.choice([0, 3])),
        "softcap": float(rng.choice([0, 5])),
        "scale": 0.3,
    }

    def workspace(t):
        q, k = t["q"].shape, t["k"].shape
        n = t["cu_seqlens"].shape[0] if t["cu_seqlens"].shape else 0
        if len(q) != 3 or len(k) != 3:
            return None
        return [n, q[0], q[1], k[1], q[2]] if backward else [n, q[2]]

    return t, {"params": params}, workspace


def linear_logprob_part(rng):
    t, scalars, workspace = linear_logprob(rng, False)
    tokens, width = t["hidden"].shape
    t["state"] = Array(rng, "f32", [4, tokens])
    t["target_rows"] = Array(rng, t["weight"].dtype, [tokens, width])
    first = int(rng.choice([0, 4032]))
    return t, {**scalars, "first": first, "vocab": first + t["weight"].shape[0]}, workspace


def linear_logprob(rng, backward):
    tokens, width, vocab = (int(rng.integers(1, n)) for n in (40, 70, 300))
    dtype, other = float_dtype(rng), float_dtype(rng)
    targets = [int(x) for x in rng.choice([-100, 0, vocab - 1, vocab // 2], tokens)]
    t = {
        "hidden": Array(rng, dtype, [tokens, width]), "weight": Array(rng, other, [vocab, width]),
        "targets": Array(rng, "i64", [tokens], targets), "lse": Array(rng, "f32", [tokens]),
        "entropy": Array(rng, "f32", [tokens]),
    }  # fmt: skip
    if backward:
        t |= {n: Array(rng, "f32", [tokens]) for n in ("dlogprob", "dentropy")}
        t |= {"dhidden": Array(rng, dtype, [tokens, width]), "dweight": Array(rng, other, [vocab, width])}
    else:
        t |= {"logprob": Array(rng, "f32", [tokens]), "direction": Array(rng, "f32", [tokens, width])}
    return (
        t,
        {"softcap": float(rng.choice([0, 20]))},
        lambda t: t["hidden"].shape if len(t["hidden"].shape) == 2 else None,
    )


def matmul(rng):
    m, n, k, k2 = sizes(rng, 4, 60)
    t = {name: Array(rng, float_dtype(rng), shape) for name, shape in
         {"a": [m, k], "b": [k, n], "a2": [m, k2], "b2": [k2, n], "c": [m, n]}.items()}  # fmt: skip

    def workspace(t):
        if any(len(x.shape) != 2 for x in t.values()):
            return None
        return [t["c"].shape[0], t["c"].shape[1], t["b"].shape[0] + t["b2"].shape[0]]

    return t, {"accumulate": int(rng.integers(2))}, workspace


def lora_dropout(rng):
    dtype, shape = float_dtype(rng), sizes(rng, 2, 300)
    t = {"x": Array(rng, dtype, shape), "out": Array(rng, dtype, shape)}
    return t, {"dropout": float(rng.choice([0, 0.1, 0.9])), "seed": int(rng.integers(1 << 62))}, None


def linear_kl(rng, function):
    rows, width, k = sizes(rng, 3, 60)
    first = int(rng.choice([0, 50]))
    t = {"u": Array(rng, "f32", [rows, width])}
    if function == "compare" or rng.integers(2):
        t["teacher"] = Array(rng, "f32", [rows, width])
    else:
        chosen = "dchosen" if function == "gradient" else "chosen"
        ids = [int(i) for i in rng.permutation(width + 20)[:k] - 10 + first]
        t |= {
            "ids": Array(rng, "i64", [rows, min(k, len(ids))], ids),
            chosen: Array(rng, "f32", [rows, min(k, len(ids))]),
        }
    columns = {"scan": {"sums": 5}, "compare": {"norm": 4, "sums": 2}, "gradient": {"state": 5}}[function]
    t |= {name: Array(rng, "f32", [rows, n]) for name, n in columns.items()}
    if function == "gradient":
        t |= {"dkl": Array(rng, "f32", [rows]), "du": Array(rng, float_dtype(rng), [rows, width])}
    params = {
        "kind": int(rng.integers(3)), "beta": 0.4, "temperature": float(rng.choice([1, 2])), "softcap": float(rng.choice([0, 20])),
        "teacher_softcap": 0.0, "first": first,
    }  # fmt: skip
    return t, {"params": params}, None


def norm(rng, names, backward=False):
    rows, width = sizes(rng, 2, 50)
    dtype, weight = float_dtype(rng), "f32"
    t = {n: Array(rng, dtype, [rows, width]) for n in names}
    t |= {"weight": Array(rng, weight, [width]), "rstd": Array(rng, "f32", [rows])}
    if backward:
        t["dweight"] = Array(rng, weight, [width])
    return t, {"eps": 1e-6, "offset": 1.0}, lambda t: t["x"].shape if len(t["x"].shape) == 2 else None


def rope(rng):
    tokens, heads, half = sizes(rng, 3, 20)
    dtype, dim = float_dtype(rng), 2 * half + int(rng.integers(0, 5))
    t = {n: Array(rng, dtype, [tokens, heads, dim]) for n in "xy"} | {
        n: Array(rng, "f32", [tokens, half]) for n in ("cos", "sin")
    }
    return t, {"heads": int(rng.integers(0, heads + 1)), "inverse": 0}, None


def glu(rng, backward):
    rows, width = sizes(rng, 2, 50)
    dtype = float_dtype(rng)
    t = {"gate_up": Array(rng, dtype, [rows, 2 * width])}
    t |= {"dy": Array(rng, dtype, [rows, width]), "dgate_up": Array(rng, dtype, [rows, 2 * width])} if backward else {
        "y": Array(rng, dtype, [rows, width])}  # fmt: skip
    return t, {"activation": int(rng.integers(3))}, None


def adamw(rng):
    size = int(rng.integers(1, 300))
    t = {n: Array(rng, float_dtype(rng), [size]) for n in ("param", "grad")}
    t |= {n: Array(rng, "f32", [size]) for n in ("exp_avg", "exp_avg_sq", "master")}
    params = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 2, "grad_scale": 1.0}
    return t, {"params": params}, None


def adamw8(rng):
    size = int(rng.integers(1, 900))
    t = {n: Array(rng, float_dtype(rng), [size]) for n in ("param", "grad")}
    t |= {n: Array(rng, "u8", [size], rng.integers(0, 256, size)) for n in ("exp_avg", "exp_avg_sq")}
    t |= {n: Array(rng, "f32", [(size + 255) // 256]) for n in ("exp_avg_scale", "exp_avg_sq_scale")}
    t["master"] = Array(rng, "f32", [size])
    return t, adamw(rng)[1], None


def paged_attention(rng):
    sequences, kv, group = sizes(rng, 3, 4)
    page, pages, dim, dtype = *sizes(rng, 2, 8), int(rng.choice([1, 7, 16, 64, 256])), float_dtype(rng)
    most = int(rng.integers(1, 4))
    used = [int(x) for x in rng.integers(0, most * page + 1, sequences)]
    tokens = int(rng.integers(sequences, 20))
    t = {
        "q": Array(rng, dtype, [tokens, kv * group, dim]), "out": Array(rng, dtype, [tokens, kv * group, dim]),
        "k_cache": Array(rng, dtype, [pages, page, kv, dim]), "v_cache": Array(rng, dtype, [pages, page, kv, dim]),
        "cu_seqlens": Array(rng, "i32", [sequences + 1], cuts(rng, tokens, sequences)),
        "block_table": Array(rng, "i32", [sequences, most], [int(x) for x in rng.integers(0, pages, sequences * most)]),
        "seqused_k": Array(rng, "i32", [sequences], used), "lse": Array(rng, "f32", [kv * group, tokens]),
    }  # fmt: skip
    params = {"causal": int(rng.integers(2)), "window": int(rng.choice([0, 3])), "softcap": 0.0, "scale": 0.3}

    def workspace(t):
        n, q = t["seqused_k"].shape, t["q"].shape
        return [n[0], q[2]] if len(n) == 1 and len(q) == 3 else None

    return t, {"params": params}, workspace


def nf4_weight(rng, size):
    """(tensors, struct) of a quantised weight."""
    blocksize = int(rng.choice([32, 64, 4096]))
    blocks = (size + blocksize - 1) // blocksize
    nested = int(rng.integers(2))
    t = {
        "packed": Array(rng, "u8", [(size + 1) // 2], rng.integers(0, 256, size)),
        "absmax": Array(rng, "u8" if nested else "f32", [blocks], rng.integers(0, 256, blocks) if nested else None),
    }
    if nested:
        t |= {"nested_absmax": Array(rng, "f32", [(blocks + 255) // 256]), "nested_code": Array(rng, "f32", [256])}
    tensors = dict.fromkeys(["packed", "absmax", "nested_absmax", "nested_code"])
    return t, tensors | {"offset": 0.1, "blocksize": blocksize, "type": int(rng.integers(2))}


def nf4(rng, what):
    size = int(rng.integers(1, 9000))
    if what == "dequantize":
        t, w = nf4_weight(rng, size)
        return t | {"out": Array(rng, float_dtype(rng), [size])}, {"w": w}, None
    blocksize = int(rng.choice([32, 64, 4096]))
    t = {
        "x": Array(rng, float_dtype(rng), [size]), "packed": Array(rng, "u8", [(size + 1) // 2], [0]),
        "absmax": Array(rng, "f32", [(size + blocksize - 1) // blocksize]),
    }  # fmt: skip
    return t, {"blocksize": blocksize, "type": int(rng.integers(2))}, None


def nf4_matmul(rng):
    m, k2 = sizes(rng, 2, 40)
    n, k = (int(x) for x in rng.choice([1, 3, 32, 64, 96, 128, 129], 2))
    transposed = int(rng.integers(2))
    t, weight = nf4_weight(rng, n * k)
    inner, columns = (n, k) if transposed else (k, n)
    t |= {name: Array(rng, float_dtype(rng), shape) for name, shape in
          {"a": [m, inner], "a2": [m, k2], "b2": [k2, columns], "c": [m, columns]}.items()}  # fmt: skip

    def workspace(t):
        a2, c = t["a2"].shape, t["c"].shape
        return [c[0], n, k, transposed, a2[1]] if len(a2) == 2 and len(c) == 2 else None

    scalars = {"weight": weight, "n": n, "k": k, "transposed": transposed, "accumulate": int(rng.integers(2))}
    return t, scalars, workspace


def blockwise8(rng, quantize):
    size, blocksize = int(rng.integers(1, 9000)), int(rng.choice([32, 256, 4096]))
    t = {
        "x" if quantize else "out": Array(rng, float_dtype(rng), [size]),
        "q": Array(rng, "u8", [size], rng.integers(0, 256, size)),
        "absmax": Array(rng, "f32", [(size + blocksize - 1) // blocksize]),
    }
    if quantize:
        return t, {"blocksize": blocksize, "is_signed": int(rng.integers(2))}, None
    return t | {"code": Array(rng, "f32", [256])}, {"blocksize": blocksize, "offset": 0.5}, None


def select_of(rng, size, tensors, index):
    """A selection; that of kind BITS has its mask among the tensors."""
    kind, name = int(rng.integers(5)), f"mask{index}"
    if kind == 4:
        tensors[name] = Array(rng, "i32", [(size + 31) // 32], rng.integers(-(2**31), 2**31, size))
    low, high = sorted(int(x) for x in rng.integers(0, 2**31, 2))
    return {
        "kind": kind, "low": low, "high": high, "low_skip": 2, "high_keep": 3, "seen_low": 0, "seen_high": 1,
        "key": 12345, "limit": 2**31, "scale": 0.5, "weight": 1.5, "mask": name if kind == 4 else None,
    }  # fmt: skip


def merge(rng, name):
    size, count = int(rng.integers(1, 700)), int(rng.integers(1, 5))
    t = {f"x{i}": Array(rng, float_dtype(rng), [size]) for i in range(count)}
    base = {"base": Array(rng, float_dtype(rng), [size])}
    out = {"out": Array(rng, float_dtype(rng), [size])}

    def work(numbers):
        return lambda t: (size, count, numbers)

    if name == "weighted_sum":
        return t | out, {"weights": Buffer(ctypes.c_double, count), "count": count}, None
    if name == "gram":
        return t | base, {"count": count, "total": Buffer(ctypes.c_double, count * count)}, work(0)
    if name == "task_sum":
        t |= base | out
        selects = [select_of(rng, size, t, i) for i in range(count)]
        params = {"elect": int(rng.integers(2)), "normalize": 1, "zero_sign": 1, "scale": 0.5, "start": 64}
        signs = Buffer(ctypes.c_int64, 1)
        return t, {"selects": selects, "count": count, "params": params, "signs": signs}, work(0)
    if name == "random":
        return {"out": Array(rng, "i32", [size], [0])}, {"key": 7, "start": 65500}, None
    one = {"x": t["x0"]}
    if name == "nonfinite":
        return one, {"count": Buffer(ctypes.c_int64, 1)}, work(0)
    if name == "magnitude_counts":
        return one | base, {"every": int(rng.integers(1, 4)), "counts": Buffer(ctypes.c_int64, 2 * 65536)}, work(65536)
    if name == "window_counts":  # (1, 2) and (3, 4)
        return (
            one | base,
            {"windows": Buffer(ctypes.c_int64, 4), "count": 2, "counts": Buffer(ctypes.c_int64, 8)},
            work(8),
        )
    if name == "masked_sums":
        t = one | base
        scalars = {
            "select": [select_of(rng, size, t, 0)],
            "start": 64,
            "block": 128,
            "total": Buffer(ctypes.c_double, 2),
        }
        return t, scalars, work(2 * ((size + 127) // 128))
    columns = int(rng.choice([n for n in range(1, size + 1) if size % n == 0]))
    t = one | base | {"mask": Array(rng, "i32", [(size + 31) // 32], [0])}
    params = {"columns": columns, "start": 0, "density": 0.5, "epsilon": 0.2, "key": 7}
    return t, {"params": params, "total": Buffer(ctypes.c_double, 2)}, lambda t: (1000,)  # enough for every size drawn


CALLS = {
    "ep_attention_forward": lambda rng: attention(rng, False),
    "ep_attention_backward": lambda rng: attention(rng, True),
    "ep_linear_logprob_forward": lambda rng: linear_logprob(rng, False),
    "ep_linear_logprob_forward_part": linear_logprob_part,
    "ep_linear_logprob_backward": lambda rng: linear_logprob(rng, True),
    "ep_matmul": matmul,
    "ep_rms_norm_forward": lambda rng: norm(rng, ["x", "y"]),
    "ep_add_rms_norm_forward": lambda rng: norm(rng, ["x", "residual", "y", "h"]),
    "ep_rms_norm_backward": lambda rng: norm(rng, ["dy", "dh", "x", "dx"], backward=True),
    "ep_rope": rope,
    "ep_glu_forward": lambda rng: glu(rng, False),
    "ep_glu_backward": lambda rng: glu(rng, True),
    "ep_adamw_step": adamw,
    "ep_lora_dropout": lora_dropout,
    "ep_linear_kl_scan": lambda rng: linear_kl(rng, "scan"),
    "ep_linear_kl_compare": lambda rng: linear_kl(rng, "compare"),
    "ep_linear_kl_gradient": lambda rng: linear_kl(rng, "gradient"),
    "ep_sum_squares": lambda rng: (
        {"x": Array(rng, float_dtype(rng), [int(rng.choice([5, 300, 40000]))])},
        {"result": Buffer(ctypes.c_double, 1)},
        lambda t: t["x"].shape if len(t["x"].shape) == 1 else None,
    ),
    "ep_adamw8_step": adamw8,
    "ep_paged_attention": paged_attention,
    "ep_nf4_quantize": lambda rng: nf4(rng, "quantize"),
    "ep_nf4_dequantize": lambda rng: nf4(rng, "dequantize"),
    "ep_nf4_matmul": nf4_matmul,
    "ep_blockwise8_quantize": lambda rng: blockwise8(rng, True),
    "ep_blockwise8_dequantize": lambda rng: blockwise8(rng, False),
} | {
    f"ep_merge_{name}": functools.partial(merge, name=name)
    for name in (
        "weighted_sum",
        "gram",
        "magnitude_counts",
        "window_counts",
        "masked_sums",
        "rank_mask",
        "task_sum",
        "nonfinite",
        "random",
    )
}
NO_TENSORS = {
    "ep_last_error",
    "ep_cpu_isa",
    "ep_cpu_isas",
    "ep_has_cuda",
    "ep_set_cpu_isa",
    "ep_set_num_threads",
    "ep_num_threads",
    "ep_use_openmp",
    "ep_dynamic_code",
}
# Where the query is named after another function.
WORKSPACE_OF = {
    "ep_paged_attention": "ep_attention_forward",
    "ep_linear_logprob_forward_part": "ep_linear_logprob_forward",
} | {
    f"ep_merge_{name}": "ep_merge"
    for name in ("gram", "magnitude_counts", "window_counts", "masked_sums", "task_sum", "nonfinite")
}
