"""The device of a run: which one it is, and how data comes to it.

A run has one device, and everything in it follows the model: `choose` turns what a recipe says into it, `placed` brings batches
there from pinned memory without waiting, `fetch` brings many numbers back with one wait. Streams and events are those of torch's
module for the device (`torch.cuda` for "cuda"), so nothing else in the engine names a vendor.

The same bits in every run, on a GPU too: our kernels have fixed reduction trees; of torch's own operations `deterministic` takes the
variants that have them, and float32 accumulation for 16-bit products. No GPU has run this: on a machine without one the tests run
whole trainings on a device of their own that keeps tensors apart and lets copies arrive as late as they may.
"""

import contextlib
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from enginepost.errors import EnginepostError

B = TypeVar("B")
_NAME = re.compile(r"cuda(?::(\d+))?")


def choose(name: str, say: Callable[[str], None] | None = None) -> torch.device:
    """The device that `name` means: "cpu", "cuda", "cuda:1", or "auto", which is the first GPU whose kernels pass their tests,
    else the CPU; `say` is told which and why. A GPU becomes torch's current one, since kernels run there.

    Raises: EnginepostError for another name, a GPU that is not there, a build without CUDA kernels, kernels that fail.
    """
    say = say or (lambda _: None)
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        found = torch.device("cuda", torch.cuda.current_device())
        wrong = _unfit(found)
        if wrong is not None:
            say(f"device: cpu, as {wrong}")
            return torch.device("cpu")
        say(f"device: {found}, {torch.cuda.get_device_name(found)}")
        return found
    match = _NAME.fullmatch(name)
    if match is None:
        raise EnginepostError(f"device {name!r} is not known; expected auto, cpu, cuda or cuda:1")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise EnginepostError(f"device {name}: {why}; use device cpu, or install torch for your GPU's driver")
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= torch.cuda.device_count():
        raise EnginepostError(f"device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from cuda:0")
    found = torch.device("cuda", index)
    wrong = _unfit(found)
    if wrong is not None:
        raise EnginepostError(f"device {name}: {wrong}")
    say(f"device: {found}, {torch.cuda.get_device_name(found)}")
    return found


def _unfit(device: torch.device) -> str | None:
    """Why a GPU cannot be used, None when it can. Makes it torch's current one."""
    from enginepost.kernels import backend, selftest

    torch.cuda.set_device(device)
    if os.environ.get("ENGINEPOST_BACKEND") == "reference":
        return None
    if not backend.info()["cuda"]:
        return (
            "the extension is built without CUDA kernels; build it where nvcc is on PATH (`make setup`, or "
            "ENGINEPOST_CUDA=ON for every architecture)"
        )
    failed = selftest.first_failure(device)
    if failed is not None:
        return f"its kernels fail their tests ({failed}); `enginepost kernels` says more"
    return None


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within, on a GPU, torch's operations give the same bits every time, and products of 16-bit numbers accumulate in float32. An
    operation that has no such variant says so in a warning."""
    if device.type != "cuda":
        yield
        return
    # Read when the first product runs; without it cuBLAS may split a product otherwise each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    products = torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    reduced = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = False
    try:
        with warnings.catch_warnings():
            # Of one row it has no fixed order; `generate.sampling` gives it two.
            warnings.filterwarnings("ignore", message=".*cumsum.*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = reduced


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. From host memory it goes through pinned memory, queued behind the work that is there already; the host does
    not wait."""
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True) if x.device.type == "cpu" else x.to(device)


def tensor(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers on the device, as `sent`."""
    return sent(torch.tensor(values, dtype=dtype), device)


def placed(batch: B, device: torch.device) -> B:
    """A dataclass with its tensors on the device, as `sent`; those that its `HOST` names stay in host memory, where the loop looks
    at them without waiting for the device."""
    if device.type == "cpu":
        return batch
    stay = getattr(type(batch), "HOST", ())
    names = [f.name for f in dataclasses.fields(batch) if f.name not in stay]  # type: ignore[arg-type]
    tensors = {n: x for n in names if isinstance(x := getattr(batch, n), Tensor)}
    return dataclasses.replace(batch, **{n: sent(x, device) for n, x in tensors.items()})  # type: ignore[type-var]


def fetch(values: Sequence[float | Tensor]) -> list[float]:
    """The numbers, those that are scalars on a device brought to the host together: one wait, whatever their number."""
    there = [v.detach().double() for v in values if isinstance(v, Tensor)]
    found = iter(torch.stack(there).tolist() if there else [])
    return [next(found) if isinstance(v, Tensor) else float(v) for v in values]
