"""The recipe: one YAML file of few, flat keys that says what a training run does.

`Recipe` is the list of keys, types and defaults; a method with keys of its own (`beta`, `loss`) has a subclass of it, found by
`recipe_class`, so that every recipe is flat and a key that its method does not use is refused. `load_recipe` reads a file (or a
mapping), applies `key=value` overrides, and turns every mistake into one message with its place: file, line, key, what was expected
and what came. Relative paths are relative to the current directory, as on the command line.
"""

import difflib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from enginepost.errors import EnginepostError


class RecipeError(EnginepostError):
    """A mistake in a recipe or an override; the message has one line per mistake."""


def _paths(value: Any) -> Any:
    """One path or a list of them -> a list of strings."""
    items = [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(items, list) or not items or not all(isinstance(i, (str, os.PathLike)) and str(i) for i in items):
        raise ValueError("expected a path, a glob or a list of them")
    return [os.fspath(i) for i in items]


def _validation(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, float) and 0 < value < 1:
        return value
    try:
        return _paths(value)
    except ValueError:
        raise ValueError("expected a fraction of the rows between 0 and 1, or a path (or a list of paths)") from None


def _targets(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(i, str) for i in value)):
        return value
    raise ValueError('expected "all-linear" or a list of module names such as [q_proj, v_proj]')


def _method(value: str) -> str:
    if value not in METHODS:
        near = difflib.get_close_matches(value, METHODS, n=1)
        raise ValueError(f"expected {', '.join(METHODS)}" + (f" (did you mean {near[0]}?)" if near else ""))
    return value


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?", re.IGNORECASE)


def memory_size(text: str) -> float | None:
    """Bytes of an amount of memory such as 12GB, 512MB or 8GiB (binary); a bare number is GB. None for anything else.

    >>> memory_size("12GB"), memory_size("8GiB"), memory_size("0.5"), memory_size("much")
    (12000000000.0, 8589934592.0, 500000000.0, None)
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or float(found[1]) <= 0:
        return None
    return float(found[1]) * (1024.0 if found[3] else 1000.0) ** ("kmgt".index((found[2] or "g").lower()) + 1)


def _memory(value: Any) -> Any:
    text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    if value is None or text == "auto" or memory_size(text) is not None:
        return None if value is None else text
    raise ValueError("expected auto, or an amount of memory such as 12GB")


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
        raise ValueError("expected auto, cpu, cuda or cuda:1")
    return value


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


Path = Annotated[str, BeforeValidator(_text)]
Paths = Annotated[list[str], BeforeValidator(_paths)]
Unit = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Lora(_Strict):
    """Low-rank adapters (arXiv 2106.09685): the base stays frozen, B A of rank r is learned beside every target matrix."""

    r: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Unit = 0.0
    targets: Annotated[str | list[str], BeforeValidator(_targets)] = "all-linear"
    rslora: bool = False  # scale alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)
    dora: bool = False  # learn the magnitude of each output too (arXiv 2402.09353)
    rank_pattern: dict[str, Count] = {}
    alpha_pattern: dict[str, float] = {}


class Recipe(_Strict):
    """Every key of a recipe with its default; all that methods sft and pretrain have."""

    UNUSED: ClassVar[frozenset[str]] = frozenset()  # keys below that the method of a subclass has no use for
    OWN_LEARNING_RATES: ClassVar[tuple[float, float]] = (2e-4, 1e-5)  # default for LoRA and for full fine-tuning

    # what
    model: Path  # a Hugging Face model directory
    data: Paths  # files, directories or globs
    method: Annotated[str, AfterValidator(_method)] = "sft"
    output: Path | None = None  # the run directory; default runs/<name of the recipe file>
    adapter: Path | None = None  # a PEFT adapter directory to continue from
    # rows
    validation: Annotated[float | list[str] | None, BeforeValidator(_validation)] = None
    format: Literal["auto", "text", "prompt_completion", "alpaca", "sharegpt", "messages"] = "auto"
    template: str | None = None  # a chat template by name or a file; default: the model's own
    train_on: Literal["assistant", "all", "last"] = "assistant"
    max_length: Annotated[int, Field(ge=2)] = 2048  # tokens of a bin, and the longest sequence
    overlong: Literal["error", "drop", "truncate"] = "error"
    # steps
    packing: bool = True
    batch_size: Count = 1  # bins in a micro-batch: what is in memory at once
    gradient_accumulation: Count = 4  # micro-batches in an optimizer step
    epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: Count | None = None  # when given, decides instead of epochs
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    # optimizer
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # moments in 32 or in 8 bits
    optimizer_states: Literal["device", "host"] = "device"  # where moments and master weights live, and are updated
    optimizer_in_backward: bool = False  # update each weight as soon as its gradient is there, and free that
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # default: the method's; 2e-4 for LoRA, 1e-5 for full
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Unit = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1  # where cosine and linear end, as a share of learning_rate
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[list[Unit], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # largest global gradient norm; null = no clipping
    # model
    device: Annotated[str, AfterValidator(_device)] = "auto"  # auto: a GPU whose kernels pass their tests, else the CPU
    dtype: Literal["bf16", "fp32"] = "bf16"
    lora: Lora | None = Lora()  # null = full fine-tuning
    quantize: Literal["nf4", "nf4-double", "fp4"] | None = None  # the frozen weights in 4 bits (QLoRA)
    weights: Literal["resident", "host", "disk"] = "resident"  # where the frozen weights live; see docs/memory.md
    # recompute each block's activations in backward: less memory, about a quarter more time. "host" and "bf16" say how the inputs of
    # the blocks are kept: in a GPU's host memory, or rounded to bfloat16 (that alters the gradients of an fp32 run)
    checkpointing: bool | Literal["host", "bf16"] = True
    mlp_chunk: Count | None = None  # tokens of which a block's MLP is computed at a time; null = all of a micro-batch
    memory: Annotated[str | None, BeforeValidator(_memory)] = None  # auto or 12GB: choose weights and checkpointing
    # run
    save_every: Count = 100  # optimizer steps between checkpoints: what a crash can cost
    keep_last: Count = 2
    log_every: Count = 1
    eval_every: Count | None = None  # default: once an epoch
    tensorboard: bool = False

    @property
    def peak_learning_rate(self) -> float:
        low_rank, full = self.OWN_LEARNING_RATES
        return self.learning_rate or (full if self.lora is None else low_rank)

    def dump(self) -> str:
        """The recipe with every key as YAML: what the run directory keeps. (With an adapter, that one says what lora would.)"""
        hidden = self.UNUSED if self.adapter is None else self.UNUSED | {"lora"}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=set(hidden)), sort_keys=False)


# Method -> module and class of its recipe, imported when the method is named; their keys are flat like all others.
METHODS: dict[str, tuple[str, str]] = {
    "sft": ("enginepost.recipe", "Recipe"),
    "pretrain": ("enginepost.recipe", "Recipe"),
    "dpo": ("enginepost.recipe_offline", "DpoRecipe"),
    "orpo": ("enginepost.recipe_offline", "OrpoRecipe"),
    "simpo": ("enginepost.recipe_offline", "SimpoRecipe"),
    "cpo": ("enginepost.recipe_offline", "CpoRecipe"),
    "kto": ("enginepost.recipe_offline", "KtoRecipe"),
    "reward": ("enginepost.recipe_offline", "RewardRecipe"),
    "prm": ("enginepost.recipe_offline", "PrmRecipe"),
    "distill": ("enginepost.recipe_offline", "DistillRecipe"),
    "grpo": ("enginepost.recipe_online", "GrpoRecipe"),
    "rloo": ("enginepost.recipe_online", "RlooRecipe"),
    "ppo": ("enginepost.recipe_online", "PpoRecipe"),
    "gkd": ("enginepost.recipe_online", "GkdRecipe"),
}


def recipe_class(method: Any) -> type[Recipe]:
    """The Recipe of a method; `Recipe` itself for what is not the name of one."""
    if not isinstance(method, str) or method not in METHODS:
        return Recipe
    module, name = METHODS[method]
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type) and issubclass(found, Recipe)
    return found


# What a resumed run may change: none of these alters a weight, but for the device, where the loop says so.
FREE_ON_RESUME = {
    "output",
    "device",
    "save_every",
    "keep_last",
    "log_every",
    "eval_every",
    "tensorboard",
    "checkpointing",
    "weights",
    "memory",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-4 as a number (YAML 1.2), where PyYAML's own rule wants 2.0e-4."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Recipe:
    """Read and check a recipe.

    Args: recipe: a YAML file or a mapping of its keys; overrides: {"key": value} or ["key=value"], dotted for nested keys
    ("lora.r=8"), the values of the second form parsed as YAML.
    Raises: RecipeError with one line per mistake.
    """
    name = "recipe" if isinstance(recipe, Mapping) else os.fspath(recipe)
    places: dict[tuple[str, ...], str] = {}
    values = dict(recipe) if isinstance(recipe, Mapping) else _read(name, places)
    given = parse_overrides(overrides) if not isinstance(overrides, Mapping) else dict(overrides)
    for key, value in given.items():
        _override(values, key, value, places)
    method = values.get("method", "sft")
    cls = recipe_class(method)
    try:
        checked = cls.model_validate(values)
    except ValidationError as error:
        found = [_describe(e, name, places, method) for e in error.errors()]
        raise RecipeError("\n".join(sorted(found, key=_line))) from None
    unused = [key for key in values if key in cls.UNUSED]
    if unused:
        raise RecipeError("\n".join(_unused(places.get((key,), name), key, checked.method) for key in unused))
    if checked.output is None:
        stem = "run" if isinstance(recipe, Mapping) else pathlib.Path(name).stem
        checked = checked.model_copy(update={"output": os.path.join("runs", stem)})
    if checked.adapter is not None and "lora" in checked.model_fields_set:
        place = places.get(("lora",), name)
        if checked.lora is None:
            raise RecipeError(
                f"{place}: lora: the recipe continues the adapter {checked.adapter}, so it cannot train all weights; remove the key "
                "lora, or fuse the adapter into the model first (`enginepost fuse`) and remove the key adapter"
            )
        raise RecipeError(
            f"{place}: lora: the recipe continues the adapter {checked.adapter}, so rank, scale and targets are the adapter's own; "
            "remove the key lora"
        )
    if checked.optimizer_in_backward:
        _check_in_backward(checked, places, name)
    for key in ("quantize", "weights"):
        if checked.lora is None and getattr(checked, key) not in (None, "resident"):
            raise RecipeError(
                f"{places.get((key,), name)}: {key}: only frozen weights can be in 4 bits or out of memory, and with `lora: null` "
                f"all of them train; remove the key {key}, or train an adapter"
            )
    return checked


def _check_in_backward(recipe: Recipe, places: Mapping[tuple[str, ...], str], name: str) -> None:
    for key, needed, why in (
        ("clip", None, "the global norm is known only when every weight has moved"),
        ("gradient_accumulation", 1, "the first micro-batch would move the weights before the others have been seen"),
    ):
        if getattr(recipe, key) != needed:
            place = places.get((key,), places.get(("optimizer_in_backward",), name))
            raise RecipeError(
                f"{place}: {key}: with optimizer_in_backward it must be {_kind(needed)}, got {_kind(getattr(recipe, key))}: {why}; "
                f"set `{key}: {_kind(needed)}`, or remove the key optimizer_in_backward"
            )


def _read(path: str, places: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """The mapping in a YAML file; `places` receives "file:line" of every key."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot read the recipe: {reason}") from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{path}: the recipe is empty; it needs at least `model` and `data`")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(
                f"{path}:{node.start_mark.line + 1}: expected `key: value` lines, got {_kind(node.value)}"
            )
        _places(node, (), path, places)
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    assert isinstance(values, dict)
    return values


def _places(node: yaml.MappingNode, prefix: tuple[str, ...], path: str, places: dict[tuple[str, ...], str]) -> None:
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        where = (*prefix, str(key.value))
        if where in places:
            raise RecipeError(f"{place}: {'.'.join(where)}: given twice; the first is at {places[where]}")
        places[where] = place
        if isinstance(value, yaml.MappingNode):
            _places(value, where, path, places)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {text!r}: expected key=value, such as max_steps=100 or lora.r=8")
        try:
            parsed[key.strip()] = yaml.load(value, Loader=_Loader) if value else None
        except yaml.YAMLError:
            raise RecipeError(f"override {text!r}: the value is not valid YAML; quote it if it is text") from None
    return parsed


def _override(values: dict[str, Any], dotted: str, value: Any, places: dict[tuple[str, ...], str]) -> None:
    path = tuple(dotted.split("."))
    for depth in range(1, len(path)):
        inner = values.get(path[depth - 1])
        values[path[depth - 1]] = dict(inner) if isinstance(inner, dict) else {}
        values = values[path[depth - 1]]
    values[path[-1]] = value
    for known in [p for p in places if p[: len(path)] == path]:
        del places[known]
    places[path] = f"override {dotted}={value if isinstance(value, str) else json.dumps(value, default=str)}"


def _line(message: str) -> int:
    found = re.search(r":(\d+): ", message)
    return int(found[1]) if found else 0


def _unused(place: str, key: str, method: str) -> str:
    users = [
        name for name in METHODS if key in recipe_class(name).model_fields and key not in recipe_class(name).UNUSED
    ]
    return f"{place}: {key}: method {method} does not use this key ({', '.join(users)} do); remove it"


def _describe(error: Any, name: str, places: dict[tuple[str, ...], str], method: Any) -> str:
    """One pydantic error as "file:line: key: what was expected and what came"."""
    loc = tuple(str(part) for part in error["loc"])
    place = next((places[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in places), name)
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        cls = recipe_class(method)
        if len(loc) == 1 and any(key in recipe_class(other).model_fields for other in METHODS):
            return _unused(place, key, str(method))
        keys = [k for k in cls.model_fields if k not in cls.UNUSED]
        fields = list(Lora.model_fields) if len(loc) == 2 and loc[0] == "lora" else keys
        near = difflib.get_close_matches(loc[-1], fields, n=1, cutoff=0.6)
        hint = f"did you mean {'.'.join((*loc[:-1], near[0]))}?" if near else f"the keys are {', '.join(fields)}"
        return f"{place}: {key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{place}: {key}: missing; {_EXPECTED_KEYS.get(key, 'every recipe needs it')}"
    return f"{place}: {key}: {_expectation(error)}, got {_kind(error['input'])}"


_EXPECTED_KEYS = {
    "model": "give the directory of a Hugging Face model, such as `model: models/SmolLM2-135M`",
    "data": "give a file, a directory, a glob or a list of them, such as `data: rows.jsonl`",
}
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys, or null",
    "too_short": "a list of two numbers",
    "too_long": "a list of two numbers",
}


def _expectation(error: Any) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _TYPES:
        return f"expected {_TYPES[kind]}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "")
        near = difflib.get_close_matches(str(error["input"]), re.split(r", | or ", allowed), n=1)
        return f"expected {allowed}" + (f" (did you mean {near[0]}?)" if near else "")
    bounds = {
        "greater_than": "above",
        "greater_than_equal": "of at least",
        "less_than": "below",
        "less_than_equal": "of at most",
    }
    if kind in bounds:
        return f"expected a number {bounds[kind]} {next(iter(context.values()))}"
    if kind == "value_error":
        return str(context["error"])
    return f"expected otherwise: {error['msg']}"


def _kind(value: Any) -> str:
    """What came, for an error: the value as YAML would show it and its type where that is not plain."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) < 80 else f"a text of {len(value)} characters"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
    return repr(value)


def changed_keys(before: Recipe, after: Recipe) -> list[str]:
    """Keys (dotted) whose values differ and would change the weights of a run: a resumed run must not change them."""
    a, b = before.model_dump(), after.model_dump()
    changed = []
    for key in a:
        rounds = key == "checkpointing" and "bf16" in (a[key], b[key])
        if (key in FREE_ON_RESUME and not rounds) or a[key] == b[key]:
            continue
        if isinstance(a[key], dict) and isinstance(b[key], dict):
            changed += [f"{key}.{inner}" for inner in a[key] if a[key][inner] != b[key].get(inner)]
        else:
            changed.append(key)
    return changed
