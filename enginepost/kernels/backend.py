"""Which code runs a kernel: the native extension, on the CPU or on a GPU as the tensors are, or the plain PyTorch reference.

`ENGINEPOST_BACKEND=reference` forces the reference; `ENGINEPOST_CPU=avx512|avx2|portable` forces an instruction set of the
native kernels (read once, when the extension loads). Tensors the native kernels do not take (float64, other devices) go to the
reference by themselves. `ENGINEPOST_BACKEND=emulated` is for tests: tensors in CPU memory go to the CUDA kernels in the emulator
(docs/kernels/emulator.md), which `load_emulated` has loaded.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
# What a family says that its CUDA kernels take: the memory-bound ones everything, the matrix products 16 bits.
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GPU_HALVES = (torch.bfloat16, torch.float16)
to_dlpack = torch._C._to_dlpack  # the bare C function: 0.4 us, where Tensor.__dlpack__ costs several


def _load() -> ModuleType | None:
    try:
        from enginepost import _core
    except ImportError:
        return None
    # One thread pool per process: two OpenMP pools that spin for work fight over the cores, so ours borrows torch's.
    runtime = _loaded_openmp()
    if runtime is not None:
        entry = getattr(ctypes.CDLL(runtime), "GOMP_parallel", None)
        if entry is not None:
            _core.use_openmp(ctypes.cast(entry, ctypes.c_void_p).value)
    return _core


def _loaded_openmp() -> str | None:
    """Path of the OpenMP runtime that torch has loaded into this process; None where it cannot be told."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "omp" in line and ".so" in line}
    except OSError:
        return None
    names = sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp")))
    return next((p for p in names if "torch" in p), names[0] if names else None)


def _workspace(size: int, device: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")


_core = _load()
_cuda = bool(getattr(_core, "cuda", False))
if _core is not None and _cuda:
    _core.set_allocator(_workspace)
_emulated: ModuleType | None = None


def load_emulated(path: str | os.PathLike[str]) -> ModuleType:
    """Loads the emulated CUDA kernels, the module `_emulated` of a build with ENGINEPOST_EMULATED=ON, for `use_backend`."""
    global _emulated
    if _emulated is None:
        spec = importlib.util.spec_from_file_location("_emulated", path)
        assert spec is not None and spec.loader is not None
        _emulated = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_emulated)
    return _emulated


def core() -> Any:
    """The native extension, its thread count set to torch's and its stream to torch's current one."""
    if _emulated is not None and os.environ.get("ENGINEPOST_BACKEND") == "emulated":
        return _emulated
    assert _core is not None
    _core.set_num_threads(torch.get_num_threads())
    if _cuda and torch.cuda.is_initialized():
        _core.set_stream(torch.cuda.current_stream().cuda_stream)
    return _core


def emulating() -> bool:
    """True where tensors in CPU memory go to the emulated CUDA kernels."""
    return os.environ.get("ENGINEPOST_BACKEND") == "emulated"


def native(*tensors: torch.Tensor | None, gpu: tuple[torch.dtype, ...] = ()) -> bool:
    """True when the native kernels take these tensors: the extension built and not disabled, all of them on the CPU and float32 or
    bfloat16, or all on the current CUDA device and of the dtypes `gpu` that the family takes there (default: it has no kernels)."""
    backend = os.environ.get("ENGINEPOST_BACKEND")
    if backend == "reference":
        return False
    if backend == "emulated":
        return bool(gpu) and all(t is None or (t.device.type == "cpu" and t.dtype in gpu) for t in tensors)
    if _core is None:
        return False
    if _cuda and gpu and any(t is not None and t.is_cuda for t in tensors):
        here = torch.cuda.current_device()
        return all(t is None or (t.is_cuda and t.device.index == here and t.dtype in gpu) for t in tensors)
    return all(t is None or (t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES) for t in tensors)


def plain(*tensors: torch.Tensor | None) -> bool:
    """True when no gradient is asked and nothing is traced, so an op may run without going through torch's dispatcher."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def eager() -> bool:
    """True when nothing but autograd looks on: no compiler, mode or transform that wants to see an op rather than what it does."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run with ENGINEPOST_BACKEND = "reference", "emulated" or "" (by device), for the whole process: to test and to compare."""
    if name not in ("", "reference", "emulated"):
        raise ValueError(f"{name!r} is not a backend that can be forced: reference, emulated or '' (by device)")
    if name == "emulated" and _emulated is None:
        raise ValueError("the emulated kernels are not loaded: load_emulated(path of the built module) first")
    before = os.environ.get("ENGINEPOST_BACKEND")
    os.environ["ENGINEPOST_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["ENGINEPOST_BACKEND"]
        else:
            os.environ["ENGINEPOST_BACKEND"] = before


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another of `info()["isas"]`, for the whole process: to test and to compare. ValueError where this CPU lacks it."""
    from enginepost.kernels.matmul import widening_wins

    core().set_isa(name)
    widening_wins.cache_clear()
    try:
        yield
    finally:
        core().set_isa(None)
        widening_wins.cache_clear()


def info() -> dict[str, Any]:
    """What runs here: `{"native", "openmp", "cuda": bool, "isa", "backend": str, "isas": [str], "threads": int}`."""
    forced = os.environ.get("ENGINEPOST_BACKEND", "")
    if _core is None:
        return {"native": False, "isa": "none", "isas": [], "threads": torch.get_num_threads(), "openmp": False,
                "cuda": False, "backend": "reference"}  # fmt: skip
    return {"native": True, "isa": _core.isa(), "isas": _core.isas(), "threads": torch.get_num_threads(),
            "openmp": _core.uses_openmp(), "cuda": _cuda, "backend": forced or "cpu"}  # fmt: skip
