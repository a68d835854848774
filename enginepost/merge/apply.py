"""One tensor merged: the reduction, then the combination chunk by chunk; and `merge_tensors` for arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from enginepost.device import choose
from enginepost.kernels import backend
from enginepost.kernels.merge import MAX_INPUTS
from enginepost.merge import elements, sums, task_vectors  # noqa: F401  (they register the methods)
from enginepost.merge.registry import REQUIRED, MergeError, Method, find, suggest
from enginepost.merge.tensors import CHUNK, CPU, Inputs

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def merge_tensors(
    method: str,
    tensors: Sequence[Any],
    base: Any = None,
    *,
    name: str = "tensor",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    device: torch.device | str | None = None,
    **parameters: Any,
) -> Any:
    """Merge arrays of one shape by a named method.

    Args:
        method: `linear`, `ties`, ... (enginepost.merge.METHODS).
        tensors: torch tensors or numpy arrays, the models.
        base: the base model's, for methods that have one.
        name: with `seed`, the key of the random masks.
        dtype: of the result; by default the widest of the inputs.
        chunk: elements worked on at a time; the result does not depend on it.
        device: where the arithmetic is done: "cpu", "cuda", "cuda:1" or "auto"; by default where the first tensor lies. Methods
            that work row by row or are made of torch's operations, and float64, go to the CPU. The bits are the same.
        parameters: the method's. Per-model ones as a list, or one value for all. (`lambda` is a keyword of Python: pass
            `**{"lambda": 0.5}`.)
    Returns:
        A torch tensor on the device of the first, or a numpy array if that is one.
    Raises:
        MergeError: an unknown method or parameter, or inputs that do not fit together. EnginepostError: a device that is not here.
    """
    given = [t for t in (*tensors, *([] if base is None else [base]))]
    if not given:
        raise MergeError("merge_tensors: there is nothing to merge: give at least one tensor.")
    arrays = [torch.from_numpy(np.ascontiguousarray(t)) if isinstance(t, np.ndarray) else t for t in given]
    for i, t in enumerate(arrays):
        which = "base" if i >= len(tensors) else f"tensors[{i}]"
        if not isinstance(t, Tensor) or t.dtype not in FLOATS:
            kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise MergeError(f"merge_tensors: {which} is {kind}; floating point tensors or arrays are merged.")
        if t.shape != arrays[0].shape:
            raise MergeError(
                f"merge_tensors: {which} has shape {list(t.shape)}, and tensors[0] {list(arrays[0].shape)}; they must be equal."
            )
    arrays = [t.detach() for t in arrays]
    chosen = find(method, "merge_tensors")
    models, base_tensor = arrays[: len(tensors)], arrays[-1] if base is not None else None
    if chosen.base == "ignored" and base_tensor is not None:
        raise MergeError(f"merge_tensors: {method} has no base; list it among the tensors.")
    check_count(chosen, len(models), base_tensor is not None, "merge_tensors")
    p = complete(chosen, parameters, len(models), "merge_tensors")
    if dtype is None:
        dtype = arrays[0].dtype
        for t in arrays:
            dtype = torch.promote_types(dtype, t.dtype)
    inputs = prepare(chosen, Inputs(name, models, base_tensor, seed=seed, chunk=chunk), p)
    place(chosen, inputs, p, _chosen(device, arrays[0]))
    out = torch.empty(inputs.numel, dtype=dtype, device=arrays[0].device)
    with one_thread(inputs.device):
        if chosen.whole_model(p) and chosen.survey is not None:
            inputs.shared = chosen.survey([(inputs, p)])
        for start, piece in merged_chunks(chosen, inputs, p, dtype):
            out[start : start + piece.numel()] = piece
    out = out.view(inputs.shape)
    return out.numpy() if isinstance(given[0], np.ndarray) else out


def _chosen(device: torch.device | str | None, first: Tensor) -> torch.device:
    if device is not None:
        return choose(str(device))
    return first.device if first.is_cuda and backend.info()["cuda"] else CPU


def check_count(method: Method, models: int, base: bool, where: str) -> None:
    """Raise unless the method takes that many models, with or without a base."""
    if method.base == "required" and not base:
        raise MergeError(f"{where}: {method.name} needs a base model; set base_model.")
    low, high = method.models
    if models < low or (high is not None and models > high):
        wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        beside = " besides the base" if method.base == "required" else ""
        raise MergeError(f"{where}: {method.name} merges {wanted} model{'s' * (low != 1)}{beside}, and {models} came.")


def complete(method: Method, given: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
    """Parameters checked and defaults filled in; per-model ones become lists."""
    known = [parameter.name for parameter in method.parameters]
    for key in given:
        if key not in known:
            raise MergeError(f"{where}: {method.name} has no parameter {key!r}; {suggest(key, known)}.")
    p: dict[str, Any] = {}
    for parameter in method.parameters:
        value = given.get(parameter.name, parameter.default)
        if value is REQUIRED:
            raise MergeError(f"{where}: {method.name} needs the parameter {parameter.name} ({parameter.about}).")
        if parameter.scope == "shared":
            p[parameter.name] = parameter.check(value, where)
            continue
        values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * models
        if len(values) != models:
            raise MergeError(f"{where}: {parameter.name} has {len(values)} values for {models} models.")
        p[parameter.name] = [parameter.check(v, where) for v in values]
    wrong = method.refuse(p)
    if wrong:
        raise MergeError(f"{where}: {wrong}.")
    return p


def prepare(method: Method, inputs: Inputs, p: Mapping[str, Any]) -> Inputs:
    """Set how the method wants its chunks."""
    inputs.rows = method.rows(p)
    inputs.columns = max(1, method.columns(p, inputs.shape))
    return inputs


def place(method: Method, inputs: Inputs, p: Mapping[str, Any], device: torch.device) -> Inputs:
    """Send the chunks to a device, if the kernels there take method and dtypes; to the CPU otherwise."""
    tensors = [*inputs.models, *([] if inputs.base is None else [inputs.base])]
    taken = all(t.dtype in backend.GPU_FLOATS for t in tensors) and len(tensors) <= MAX_INPUTS
    inputs.device = device if method.gpu(p) and taken else CPU
    return inputs


def merged_chunks(
    method: Method,
    inputs: Inputs,
    p: Mapping[str, Any],
    dtype: torch.dtype,
    seen: Callable[[Any], None] = lambda chunk: None,
) -> Iterator[tuple[int, Tensor]]:
    """(element offset, piece of the result in `dtype`, where the chunks are) one after the other; `seen` gets each chunk before
    it is combined."""
    if inputs.numel == 0:
        return
    facts = method.reduce(inputs, p) if method.reduce is not None else None
    for chunk in inputs.chunks():
        seen(chunk)
        if method.writes:
            out = torch.empty(chunk.numel, dtype=dtype, device=inputs.device)
            method.combine(chunk, p, facts, out)
        else:
            out = method.combine(chunk, p, facts).reshape(-1).to(dtype)
        yield chunk.start, out


@contextmanager
def one_thread(device: torch.device = CPU) -> Iterator[None]:
    """torch's sums depend on its thread count; a merge has its own threads, one tensor each. A GPU becomes torch's current one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
