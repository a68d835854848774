"""The door of every kernel family: arrays of other libraries come in and go out through DLPack; a family is called by its name.

    from enginepost import kernels
    out, lse = kernels.attention(q, k, v, cu_seqlens)        # q, k, v: torch, numpy, jax, anything with __dlpack__

Nothing is copied on the way in or out; results come back in the library of the first array that is not a torch tensor. Gradients
are torch's: only tensors carry them.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def make_callable(module: str, main: Callable[..., Any]) -> None:
    """Put the function `main` where Python keeps `module`, with the module's names as its attributes.

    `kernels.attention` is then one object whatever was imported before, usable as the function (torch.compile traces it) and as
    the module. A module of a class with `__call__` would do without torch.compile, which refuses to call modules. The two share
    one dictionary, so that setting an attribute sets the module's variable.
    """
    names = sys.modules[module].__dict__
    names.update(main.__dict__)
    main.__dict__ = names
    sys.modules[module] = main  # type: ignore[assignment]


def takes_arrays(function: F) -> F:
    """Let a function of tensors take anything with `__dlpack__`, in lists and dataclasses too, and answer in kind.

    Raises ValueError naming the argument that its library will not hand over.
    """
    return _door(function, in_place=False)


def takes_arrays_in_place(function: F) -> F:
    """The same for a function that writes to its arguments: it takes tensors and writable numpy arrays. Arrays that may not be
    written (jax's never may) are refused."""
    return _door(function, in_place=True)


def _door(function: F, in_place: bool) -> F:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        guest = None
        for value in (*args, *kwargs.values()):
            if value is not None and not isinstance(value, (Tensor, int, float, str)):
                guest = _guest(value)
                if guest is not None:
                    break
        if guest is None:
            return function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = _to_torch(value, f"{function.__name__}: {name}", in_place)
        with torch.no_grad():
            return _like(function(*bound.args, **bound.kwargs), guest)

    return call  # type: ignore[return-value]


def _fields(value: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass's instance; () for anything else."""
    return () if isinstance(value, type) else _fields_of(type(value))  # type: ignore[arg-type]  # mypy: a class is hashable


@functools.cache
def _fields_of(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def _guest(value: Any) -> Any:
    """The first array in `value` that is not a torch tensor; None when there is none."""
    if value is None or isinstance(value, (Tensor, int, float, str)):
        return None
    if isinstance(value, (list, tuple)):
        return next((found for found in map(_guest, value) if found is not None), None)
    if names := _fields(value):
        return _guest([getattr(value, name) for name in names])
    return value if hasattr(value, "__dlpack__") else None


def _to_torch(value: Any, name: str, in_place: bool) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return [_to_torch(item, f"{name}[{i}]", in_place) for i, item in enumerate(value)]
    if fields := _fields(value):
        return dataclasses.replace(value, **{f: _to_torch(getattr(value, f), f"{name}.{f}", in_place) for f in fields})
    if not hasattr(value, "__dlpack__"):
        return value
    if in_place and not getattr(getattr(value, "flags", None), "writeable", False):
        raise ValueError(
            f"{name} would be written to, but a {type(value).__name__} is read-only; pass a torch tensor or a writable numpy array"
        )
    try:
        return torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = getattr(value, "dtype", "unknown dtype")
        raise ValueError(
            f"{name}: {type(value).__name__} of {kind} cannot be handed over through DLPack: {error}"
        ) from error


def _like(result: Any, guest: Any) -> Any:
    """Tensors in `result` as arrays of guest's library; as they are where it has no from_dlpack."""
    if isinstance(result, (list, tuple)):
        return type(result)(_like(item, guest) for item in result)
    if not isinstance(result, Tensor) or not hasattr(guest, "__array_namespace__"):
        return result
    return guest.__array_namespace__().from_dlpack(result)
