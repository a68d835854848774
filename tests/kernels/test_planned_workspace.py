"""What the planner says that CUDA kernels take while they run, beside what their own queries say. Nothing is allocated or computed:
the queries look at shapes."""

import ctypes
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from enginepost.model.architectures import architecture
from enginepost.model.spec import ModelSpec
from enginepost.plan import workspace
from enginepost.plan.memory import Setup, adapter

FLOAT, BFLOAT, UINT = 2, 4, 1  # DLDataTypeCode


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


class NF4(ctypes.Structure):
    _fields_ = [
        ("packed", ctypes.POINTER(DLTensor)), ("absmax", ctypes.POINTER(DLTensor)),
        ("nested_absmax", ctypes.POINTER(DLTensor)), ("nested_code", ctypes.POINTER(DLTensor)),
        ("offset", ctypes.c_double), ("blocksize", ctypes.c_int64), ("type", ctypes.c_int),
    ]  # fmt: skip


Pointer = Any
kept: list[Any] = []  # arrays that tensors point to


def tensor(*shape: int, code: int = BFLOAT, bits: int = 16, transposed: bool = False) -> Pointer:
    """A tensor that is nowhere; transposed: shape as given, its columns contiguous."""
    array = ctypes.c_int64 * len(shape)
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    if transposed:
        strides = [1, shape[0]]
    numbers = array(*shape), array(*strides)
    made = DLTensor(1 << 20, 1, 0, len(shape), code, bits, 1, *numbers, 0)
    kept.extend([*numbers, made])
    return ctypes.pointer(made)


def wide(*shape: int, transposed: bool = False) -> Pointer:
    return tensor(*shape, code=FLOAT, bits=32, transposed=transposed)


@pytest.fixture
def query(emulated_module: ModuleType) -> Callable[..., int]:
    library: Any = ctypes.CDLL(str(emulated_module.__file__))
    emulated_module.set_card(80, 108)

    def ask(name: str, *arguments: Any) -> int:
        function = library[f"ep_{name}"]
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    return ask


def setup(name: str, tokens: int, rank: int | None, **keys: Any) -> Setup:
    spec = ModelSpec.from_config(architecture(name))
    ranks, sizes = ({}, ()) if rank is None else adapter(spec, "all-linear", rank, {}, False)
    return Setup(spec=spec, tokens=tokens, full=rank is None, ranks=ranks, adapter_sizes=sizes, device="cuda", **keys)


SHAPES = [("llama-3.1-8b", 4096), ("llama-3.1-8b", 30_000), ("llama-3.1-70b", 2048), ("gemma-2-2b", 1000)]


@pytest.mark.parametrize(("name", "tokens"), SHAPES)
def test_attention(query: Callable[..., int], name: str, tokens: int) -> None:
    s = setup(name, tokens, 16)
    spec = s.spec
    asked = query(
        "attention_backward_gpu_workspace_bytes",
        *map(ctypes.c_int64, (1, tokens, spec.heads, spec.kv_heads, spec.head_dim)),
    )
    assert workspace.attention_backward(s) == pytest.approx(asked, rel=0.03, abs=1e6)


@pytest.mark.parametrize(("name", "tokens"), SHAPES)
@pytest.mark.parametrize("rank", [16, None], ids=["frozen", "trained"])
def test_head(query: Callable[..., int], name: str, tokens: int, rank: int | None) -> None:
    s = setup(name, tokens, rank)
    hidden, weight = tensor(tokens, s.spec.hidden_size), tensor(s.spec.vocab_size, s.spec.hidden_size)
    asked = query(
        "linear_logprob_forward_workspace_bytes_for", hidden, weight, wide(tokens, s.spec.hidden_size) if rank else None
    )
    if rank is None:
        asked = max(asked, query("linear_logprob_backward_workspace_bytes_for", hidden, weight, hidden, weight))
    assert workspace.head(s) == pytest.approx(asked, rel=0.05, abs=20e6)


@pytest.mark.parametrize(("name", "tokens"), SHAPES)
def test_products_over_4_bits(query: Callable[..., int], name: str, tokens: int) -> None:
    s = setup(name, tokens, 32, quantize="nf4")
    shapes = {"o": (s.spec.hidden_size, s.spec.heads * s.spec.head_dim), "gate_up": (s.spec.intermediate_size, s.spec.hidden_size),
              "down": (s.spec.hidden_size, s.spec.intermediate_size)}  # fmt: skip
    for layer, (rows, columns) in shapes.items():
        rank = sum(r for r, _ in s.ranks[layer])
        size = rows * columns
        weight = NF4(tensor(size // 2, code=UINT, bits=8), wide(size // 64), None, None, 0.0, 64, 0)
        n, k = ctypes.c_int64(rows), ctypes.c_int64(columns)
        low = wide(tokens, rank)
        forward = query("nf4_matmul_workspace_bytes_for", tensor(tokens, columns), weight, n, k, 0, low,
                        wide(rank, rows, transposed=True), tensor(tokens, rows))  # fmt: skip
        assert workspace.product(s, layer, backward=False) == pytest.approx(forward, rel=0.05, abs=20e6), layer
        out = wide(tokens, columns) if layer == "gate_up" else tensor(tokens, columns)
        backward = query(
            "nf4_matmul_workspace_bytes_for", tensor(tokens, rows), weight, n, k, 1, low, wide(rank, columns), out
        )
        assert workspace.product(s, layer, backward=True) == pytest.approx(backward, rel=0.05, abs=20e6), layer
