"""Random calls of the C API: `python tests/kernels/fuzz.py --rounds 200 --seed 1`. Every call must end in a status, never a crash.

Each round takes a valid call of a function and spoils it in up to three places: a null, another dtype, rank, size or stride, data
shared with another argument or misaligned, an index out of range, a parameter of any value, no workspace. Buffers are exactly as
large as their shape and strides say, so that AddressSanitizer sees one element too many. The functions and their arguments are read
from the headers: one that has no valid call here is an error.

Needs numpy alone. The library is that of the installed package, or ENGINEPOST_FUZZ_LIBRARY.
"""

import argparse
import ctypes
import functools
import itertools
import os
import pathlib
import re
import sys

import numpy as np

HEADERS = pathlib.Path(__file__).parents[2] / "csrc" / "include" / "enginepost"


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


DTYPES = {"f32": (2, 32), "bf16": (4, 16), "i32": (0, 32), "i64": (0, 64), "f64": (2, 64), "f16": (2, 16), "u8": (1, 8)}
SCALARS = {
    "double": ctypes.c_double, "float": ctypes.c_float, "int": ctypes.c_int, "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
}  # fmt: skip


def declarations():
    """({function: [(type, name)]}, {struct: ctypes class}) of the headers."""
    text = "\n".join(p.read_text() for p in sorted(HEADERS.glob("*.h")) if p.name != "dlpack.h")
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    structs = {}
    for body, name in re.findall(r"typedef struct\s*\w*\s*\{(.*?)\}\s*(ep_\w+);", text, re.S):
        fields = []
        for declaration in body.split(";")[:-1]:
            kind, names = declaration.replace("const ", "").split(None, 1)
            fields += [(n.strip(" *"), ctypes.c_void_p if "*" in n else SCALARS[kind]) for n in names.split(",")]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    functions = {}
    for kind, name, arguments in re.findall(r"EP_EXPORT\s+(.*?)(ep_\w+)\((.*?)\);", text, re.S):
        split = [] if arguments.strip() == "void" else [" ".join(a.split()) for a in arguments.split(",")]
        functions[name] = (kind.strip(), [(a.rsplit(" ", 1)[0] if "*" not in a else a[: a.rindex("*") + 1],
                                           re.search(r"\w+$", a).group()) for a in split])  # fmt: skip
    return functions, structs


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


def tensor_of(array, memory):
    count = len(array.shape)
    shape = (ctypes.c_int64 * max(count, 1))(*array.shape)
    strides = None if array.strides is None else (ctypes.c_int64 * max(count, 1))(*array.strides)
    memory += [shape, strides]
    code, bits = DTYPES[array.dtype]
    at = ctypes.addressof(array.buffer) + array.base
    return DLTensor(
        None if array.null_data else at, array.device, 0, count, code, bits, array.lanes,
        None if array.null_shape else ctypes.addressof(shape), None if strides is None else ctypes.addressof(strides), array.shift,
    )  # fmt: skip


def allocate(arrays):
    """Every array gets a buffer of its own from malloc, exactly as long as it says, but for those that share another's."""
    for array in arrays:
        if array.share is None:
            others = [a.nbytes() for a in arrays if a.share is array]
            nbytes = max([array.nbytes(), *others])
            if nbytes > 1 << 26:
                return False
            array.buffer = (ctypes.c_char * nbytes)()  # beyond a few hundred bytes ctypes asks malloc
            ctypes.memmove(array.buffer, array.fill(nbytes), nbytes)
    for array in arrays:
        if array.share is not None:
            array.buffer = array.share.buffer
        # with a negative stride the first element is the last in memory
        strides = array.strides or array.packed()
        back = sum((n - 1) * -s for n, s in zip(array.shape, strides, strict=True) if s < 0 < n)
        array.base = back * (DTYPES[array.dtype][1] // 8)
    return True


# ---- valid calls: {function: (tensors, other arguments, arguments of the workspace query)} -----------------------------------


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
    if name == "weighted_sum":
        return t | out, {"weights": Buffer(ctypes.c_double, count), "count": count}, None
    if name == "gram":
        return t | base, {"count": count, "total": Buffer(ctypes.c_double, count * count)}, None
    if name == "task_sum":
        t |= base | out
        selects = [select_of(rng, size, t, i) for i in range(count)]
        params = {"elect": int(rng.integers(2)), "normalize": 1, "zero_sign": 1, "scale": 0.5, "start": 64}
        signs = Buffer(ctypes.c_int64, 1)
        return t, {"selects": selects, "count": count, "params": params, "signs": signs}, None
    if name == "random":
        return {"out": Array(rng, "i32", [size], [0])}, {"key": 7, "start": 65500}, None
    one = {"x": t["x0"]}
    if name == "nonfinite":
        return one, {"count": Buffer(ctypes.c_int64, 1)}, None
    if name == "magnitude_counts":
        return one | base, {"every": int(rng.integers(1, 4)), "counts": Buffer(ctypes.c_int64, 2 * 65536)}, None
    if name == "window_counts":  # (1, 2) and (3, 4)
        return one | base, {"windows": Buffer(ctypes.c_int64, 4), "count": 2, "counts": Buffer(ctypes.c_int64, 8)}, None
    if name == "masked_sums":
        t = one | base
        scalars = {
            "select": [select_of(rng, size, t, 0)],
            "start": 64,
            "block": 128,
            "total": Buffer(ctypes.c_double, 2),
        }
        return t, scalars, None
    columns = int(rng.choice([n for n in range(1, size + 1) if size % n == 0]))
    t = one | base | {"mask": Array(rng, "i32", [(size + 31) // 32], [0])}
    params = {"columns": columns, "start": 0, "density": 0.5, "epsilon": 0.2, "key": 7}
    return t, {"params": params, "total": Buffer(ctypes.c_double, 2)}, lambda t: (1000,)  # enough for every size drawn


CALLS = {
    "ep_attention_forward": lambda rng: attention(rng, False),
    "ep_attention_backward": lambda rng: attention(rng, True),
    "ep_linear_logprob_forward": lambda rng: linear_logprob(rng, False),
    "ep_linear_logprob_backward": lambda rng: linear_logprob(rng, True),
    "ep_matmul": matmul,
    "ep_rms_norm_forward": lambda rng: norm(rng, ["x", "y"]),
    "ep_add_rms_norm_forward": lambda rng: norm(rng, ["x", "residual", "y", "h"]),
    "ep_rms_norm_backward": lambda rng: norm(rng, ["dy", "dh", "x", "dx"], backward=True),
    "ep_rope": rope,
    "ep_glu_forward": lambda rng: glu(rng, False),
    "ep_glu_backward": lambda rng: glu(rng, True),
    "ep_adamw_step": adamw,
    "ep_sum_squares": lambda rng: (
        {"x": Array(rng, float_dtype(rng), [int(rng.integers(1, 300))])},
        {"result": Buffer(ctypes.c_double, 1)},
        None,
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
WORKSPACE_OF = {"ep_paged_attention": "ep_attention_forward"}  # where the query is named after another function

# ---- what goes wrong ---------------------------------------------------------------------------------------------------------

WILD_FLOATS = [0.0, -1.0, 1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
WILD_INTS = [0, -1, 1, 2, 7, 255, 2**31 - 1, -(2**31)]
WILD_SIZES = [0, 1, 2, 3, 257, -1, 2**31, 2**62, -(2**63)]


def spoil(rng, tensors, scalars, nulls):
    name = str(rng.choice(sorted(tensors)))
    array = tensors[name]
    axis = int(rng.integers(len(array.shape))) if array.shape else 0
    kind = int(rng.integers(14))
    if kind == 0:
        nulls.add(name)
    elif kind == 1:
        array.dtype = str(rng.choice(sorted(DTYPES)))
    elif kind == 2 and array.shape:
        array.shape[axis] = int(rng.choice([0, 1, 2, 3, 17, array.shape[axis] + 1, max(array.shape[axis] - 1, 0)]))
    elif kind == 3 and array.shape:
        array.shape[axis] = WILD_SIZES[rng.integers(len(WILD_SIZES))]
        array.null_data = array.null_data or abs(array.shape[axis]) > 1000
    elif kind == 4:
        array.shape = list(array.shape[:-1]) if rng.integers(2) else [*array.shape, 1]
        array.strides = None
    elif kind in (5, 6) and array.shape:
        strides = array.packed()
        strides[axis] = int(rng.choice([0, 1, 2, strides[axis] + 3, 2 * strides[axis], -1]))
        array.strides = strides
    elif kind == 7:
        array.shift = int(rng.choice([1, 2, 4, 8]))
    elif kind in (8, 9):
        other = tensors[str(rng.choice(sorted(tensors)))]
        if other is not array and other.share is None and not any(t.share is array for t in tensors.values()):
            array.share = other
    elif kind == 10 and array.values is not None:
        array.values = [int(x) for x in rng.choice([-101, -100, -1, 0, 1, 5, 1000, 2**31 - 1], len(array.values))]
    elif kind == 11:
        array.device, array.lanes = [(2, 1), (1, 2), (1, 0), (99, 1)][rng.integers(4)]
    elif kind == 12:
        setattr(array, str(rng.choice(["null_data", "null_shape"])), True)
    elif kind == 13 and scalars:
        key, place = str(rng.choice(sorted(scalars))), scalars
        if isinstance(place[key], list):  # an array of structs
            place, key = place[key], int(rng.integers(len(place[key])))
        if isinstance(place[key], dict):
            place, key = (
                place[key],
                str(rng.choice(sorted(k for k, v in place[key].items() if isinstance(v, (int, float))))),
            )
        if isinstance(place[key], Buffer):
            nulls.add(key)
        elif key == "count":  # of an array of pointers, whose length nobody can check
            place[key] = int(rng.choice([-1, 0, 1, 65, -(2**31)])) if rng.integers(4) else place[key]
        else:
            wild = WILD_FLOATS if isinstance(place[key], float) else WILD_INTS + WILD_SIZES
            place[key] = wild[rng.integers(len(wild))]


def kind_of(structure, field):
    return next(kind for name, kind in structure._fields_ if name == field)


def call(library, functions, function, structs, rng, spoils):
    """The status of one call of `function`, spoilt in `spoils` places; None when it was not worth making."""
    arguments = functions[function][1]
    tensors, scalars, workspace_of = CALLS[function](rng)
    nulls = set()
    for _ in range(spoils):
        spoil(rng, tensors, scalars, nulls)
    if not allocate(list(tensors.values())):
        return None
    memory, values = [], []
    pointers = {}  # of the tensors that are not null
    for name, array in tensors.items():
        structure = tensor_of(array, memory)
        memory.append(structure)
        if name not in nulls:
            pointers[name] = ctypes.addressof(structure)

    def filled(kind, fields):
        numbers = {n: v for n, v in fields.items() if isinstance(v, (int, float))}
        wanted = {n: v or n for n, v in fields.items() if n not in numbers}
        numbers = {n: ctypes.c_int64(v).value if kind_of(kind, n) is not ctypes.c_double and isinstance(v, int) else v
                   for n, v in numbers.items()}  # fmt: skip
        return kind(**numbers, **{n: pointers.get(of) for n, of in wanted.items()})

    for kind, name in arguments:
        if kind == "const DLTensor *const *":
            row = [pointers.get(f"x{i}") for i in range(sum(re.fullmatch(r"x\d+", n) is not None for n in tensors))]
            memory.append((ctypes.c_void_p * len(row))(*row))
            values.append(ctypes.c_void_p(ctypes.addressof(memory[-1])))
        elif kind == "const DLTensor *":
            values.append(ctypes.c_void_p(pointers.get(name)))
        elif kind == "ep_merge_select *":
            memory.append((structs["ep_merge_select"] * len(scalars[name]))(
                *[filled(structs["ep_merge_select"], fields) for fields in scalars[name]]
            ))  # fmt: skip
            values.append(None if name in nulls else ctypes.byref(memory[-1]))
        elif isinstance(scalars.get(name), Buffer):
            memory.append(scalars[name])
            values.append(None if name in nulls else ctypes.byref(scalars[name].array))
        elif name == "workspace":
            wanted = workspace_of(tensors)
            query = getattr(library, f"{WORKSPACE_OF.get(function, function)}_workspace_bytes")
            possible = wanted is not None and all(0 <= n < 1 << 20 for n in wanted)  # else nobody has such tensors
            nbytes = query(*wanted) if possible else 0
            assert 0 <= nbytes < 1 << 28, (function, wanted, nbytes)
            block = (ctypes.c_char * (nbytes + 64))()
            at = (ctypes.addressof(block) + 63) // 64 * 64
            memory.append(block)
            broken = (
                int(rng.integers(20)) if spoils else 2
            )  # sometimes missing or off its alignment, which must be refused
            values.append(ctypes.c_void_p(None if broken == 0 else at + 4 if broken == 1 and nbytes else at))
        elif name == "stream":
            values.append(None)
        elif kind in structs:
            values.append(filled(structs[kind], scalars[name]))
        else:
            values.append(SCALARS[kind](scalars[name]))
    query = f"{function}_workspace_bytes_for"  # takes some of the same arguments, however bad
    if query in functions:
        by_name = {name: value for (_, name), value in zip(arguments, values, strict=True)}
        assert getattr(library, query)(*[by_name[name] for _, name in functions[query][1]]) >= 0
    status = getattr(library, function)(*values)
    if status not in (0, 1, 2, 3):
        raise AssertionError(f"{function} returned {status}")
    if status and function.removeprefix("ep_") not in library.ep_last_error().decode():
        raise AssertionError(f"{function} failed with the message {library.ep_last_error()!r}")
    return status


def library_path():
    path = os.environ.get("ENGINEPOST_FUZZ_LIBRARY")
    if path:
        return path
    import enginepost._core  # noqa: F401 (loads it)

    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if line.rstrip().endswith("/libenginepost.so"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="calls of each function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one function")
    options = parser.parse_args()
    library = ctypes.CDLL(library_path())
    library.ep_last_error.restype = ctypes.c_char_p
    functions, structs = declarations()
    queries = {f for f in functions if f.endswith("_workspace_bytes")}
    for query in queries:
        getattr(library, query).restype = ctypes.c_int64
        getattr(library, query).argtypes = [ctypes.c_int64] * len(functions[query][1])
    for query in (f for f in functions if f.endswith("_workspace_bytes_for")):
        getattr(library, query).restype = ctypes.c_int64
        queries.add(query)
    missing = set(functions) - queries - NO_TENSORS - set(CALLS)
    if missing:
        sys.exit(f"no valid call is known of {', '.join(sorted(missing))}: add it to CALLS in {__file__}")
    for function in [options.only] if options.only else sorted(CALLS):
        counts = {0: 0, 1: 0, 2: 0, 3: 0}
        for i in range(options.rounds):
            if sys.stderr.isatty() or i % 50 == 0:  # the last line of a crash
                print(f"\r{function} seed {options.seed} round {i}", end="", file=sys.stderr, flush=True)
            rng = np.random.default_rng([options.seed, i])
            status = call(library, functions, function, structs, rng, 0 if i < 5 else int(rng.integers(1, 4)))
            if status is not None:
                counts[status] += 1
            if i < 5 and status != 0:
                sys.exit(f"\n{function}: the valid call {i} was refused: {library.ep_last_error().decode()}")
        print(f"\r{function}: {counts[0]} done, {counts[1]} refused, {counts[2] + counts[3]} unsupported" + 20 * " ")


if __name__ == "__main__":
    main()
