"""Which code runs a kernel: the native extension or the plain PyTorch reference.

`ENGINEPOST_BACKEND=reference` forces the reference; `ENGINEPOST_CPU=avx512|avx2|portable` forces an instruction set of the
native kernels (read once, when the extension loads). Tensors the native kernels do not take (float64, other devices) go to the
reference by themselves.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
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


_core = _load()


def core() -> Any:
    """The native extension, its thread count set to torch's."""
    assert _core is not None
    _core.set_num_threads(torch.get_num_threads())
    return _core


def native(*tensors: torch.Tensor | None) -> bool:
    """True when the native kernels take these tensors: on the CPU, all float32 or bfloat16, the extension built and not disabled."""
    if _core is None or os.environ.get("ENGINEPOST_BACKEND") == "reference":
        return False
    return all(t is None or (t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES) for t in tensors)


def plain(*tensors: torch.Tensor | None) -> bool:
    """True when no gradient is asked and nothing is traced, so an op may run without going through torch's dispatcher."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


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
    """What runs here: `{"native": bool, "isa": str, "isas": [str], "threads": int, "openmp": bool, "backend": str}`."""
    forced = os.environ.get("ENGINEPOST_BACKEND", "")
    if _core is None:
        return {"native": False, "isa": "none", "isas": [], "threads": torch.get_num_threads(), "openmp": False,
                "backend": "reference"}  # fmt: skip
    return {"native": True, "isa": _core.isa(), "isas": _core.isas(), "threads": torch.get_num_threads(),
            "openmp": _core.uses_openmp(), "backend": forced or "cpu"}  # fmt: skip
