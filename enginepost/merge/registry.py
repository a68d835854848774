"""Merge methods by name: a method is a reduction over the tensor and an element-wise combination, declared with its parameters.

    @method("near", paper="https://...", parameters=[Param("t", float)], base="required")
    def near(chunk, p, facts):
        return [torch.lerp(chunk.b, x, p["t"]) for x in chunk.x][0]

`reduce(inputs, p)` may go through `inputs.chunks()` as often as it likes and returns whatever `combine(chunk, p, facts)` needs: a
few numbers, never a copy of the tensor. `combine` returns float32 of the chunk's shape; declared with `writes=True` it has a fourth
argument, the output in its final dtype, which the kernels round to as they write.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from enginepost.errors import EnginepostError
from enginepost.merge.tensors import Inputs

REQUIRED = object()


class MergeError(EnginepostError):
    """A recipe, input or output of a merge that will not do; the message names the model, tensor or key, and the fix."""


@dataclass(frozen=True)
class Param:
    """A parameter of a method.

    name: as in the recipe. kind: float, int, bool or str. default: REQUIRED if there is none.
    scope: "shared" (one value a tensor), "input" (one for every model, the base too) or "model" (every model but the base).
    choices: the values of a str. low, high: inclusive bounds. about: one line for docs and `--help`.
    """

    name: str
    kind: type = float
    default: Any = REQUIRED
    scope: str = "shared"
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    about: str = ""

    def check(self, value: Any, where: str) -> Any:
        """The value as this parameter's kind; `where` begins the message of a MergeError."""
        if value is None and self.default is None:
            return None
        wanted = {float: "a number", int: "an integer", bool: "true or false", str: "text"}[self.kind]
        if self.kind is float and isinstance(value, str):
            try:  # YAML 1.1 reads 1e-5 as text
                value = float(value)
            except ValueError:
                pass
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.kind is bool and numeric and value in (0, 1):
            value = bool(value)
        good = (
            numeric
            if self.kind is float
            else numeric and float(value).is_integer()
            if self.kind is int
            else isinstance(value, self.kind)
        )
        if not good:
            raise MergeError(f"{where}: {self.name} must be {wanted}, and it is {value!r}.")
        value = self.kind(value)
        if self.kind is float and not abs(value) < float("inf"):
            raise MergeError(f"{where}: {self.name} must be finite, and it is {value}.")
        if self.choices and value not in self.choices:
            raise MergeError(f"{where}: {self.name} is {value!r}; it can be {', '.join(self.choices)}.")
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            low, high = self.low, self.high
            bounds = f"between {low} and {high}" if high is not None and low is not None else f"at least {low}"
            raise MergeError(f"{where}: {self.name} is {value}; it must be {bounds}.")
        return value


Reduce = Callable[[Inputs, Mapping[str, Any]], Any]
Combine = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """A merge method.

    base: "required", "optional" or "ignored" (then the base is merged as one more model). models: least and most number of models
    without the base. writes: combine has a fourth argument, the 1-D output in its final dtype, and returns nothing.
    rows: given the parameters, whether chunks must hold whole rows; columns: given parameters and shape, the length of a row.
    survey: for what is decided over the whole model: when `whole_model(parameters)` it is called once, before the merge, with
    [(inputs, parameters)] of every tensor; what it returns is each tensor's `inputs.shared`.
    refuse: given the parameters, each of which is right by itself, what is wrong with them together; None: nothing.
    gpu: given the parameters, whether reduce and combine leave all arithmetic on elements to enginepost.kernels.merge, which takes
    tensors on a GPU and gives the same bits there.
    """

    name: str
    combine: Combine
    reduce: Reduce | None = None
    parameters: tuple[Param, ...] = ()
    base: str = "ignored"
    models: tuple[int, int | None] = (1, None)
    paper: str = ""
    about: str = ""
    writes: bool = False
    survey: Callable[[Any], Any] | None = None
    rows: Callable[[Mapping[str, Any]], bool] = lambda p: False
    columns: Callable[[Mapping[str, Any], tuple[int, ...]], int] = lambda p, shape: shape[-1] if shape else 1
    random: bool = False
    whole_model: Callable[[Mapping[str, Any]], bool] = lambda p: False
    gpu: Callable[[Mapping[str, Any]], bool] = lambda p: False
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda p: None

    def parameter(self, name: str) -> Param:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(name)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    if method.name in METHODS:
        raise MergeError(f"there is a merge method named {method.name!r} already; choose another name.")
    METHODS[method.name] = method
    return method


def method(name: str, **declared: Any) -> Callable[[Combine], Combine]:
    """Decorator: register a combination as the method `name`; keywords are the fields of Method."""

    def declare(combine: Combine) -> Combine:
        parameters = tuple(declared.pop("parameters", ()))
        register(Method(name, combine, parameters=parameters, **declared))
        return combine

    return declare


def find(name: str, where: str = "merge_method") -> Method:
    """The method of that name; MergeError with the nearest names otherwise."""
    if name not in METHODS:
        raise MergeError(f"{where}: there is no merge method {name!r}; {suggest(name, list(METHODS))}.")
    return METHODS[name]


def suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? Known: {', '.join(known)}" if close else f"known: {', '.join(known)}"
