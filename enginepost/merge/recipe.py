"""mergekit's YAML, read as it is: `models`, `slices` or `modules`, parameters with filters and gradients, several documents.

Everything becomes slices: `models: [A, B]` is one slice over all layers. A parameter of a tensor is looked up in the slice's source,
the slice, the module and the recipe, in this order; in each, the first matching filter counts, and a list of numbers is a gradient:
piecewise linear over t = layer / (layers of the slice - 1), t = 0 for tensors outside the layers.

Messages name the file, the line and the key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from enginepost.merge import elements, sums, task_vectors  # noqa: F401  (they register the methods)
from enginepost.merge.registry import METHODS, REQUIRED, MergeError, Method, Param, find, suggest

DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class ModelRef:
    """`path`, `org/name`, `...@revision`, `...+adapter`."""

    path: str
    adapter: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        text = self.path + (f"@{self.revision}" if self.revision else "")
        return text + (f"+{self.adapter}" if self.adapter else "")


@dataclass
class Source:
    """One model's part in a slice. layers: [begin, end), or None for all. where: file and line."""

    model: ModelRef
    layers: tuple[int, int] | None
    parameters: dict[str, Any]
    where: str


@dataclass
class Slice:
    sources: list[Source]
    base_model: ModelRef | None
    parameters: dict[str, Any]
    where: str


@dataclass
class Module:
    slices: list[Slice]
    parameters: dict[str, Any]


@dataclass
class TokenSource:
    """Where the embedding of one token comes from. kind: "model", "model_token", "zero" or "" (as the rule has it)."""

    kind: str = ""
    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass
class TokenizerSetting:
    source: str | ModelRef  # "union", "base" or a model
    tokens: dict[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass
class Recipe:
    """One merge. name: of a document that later ones may use as a model. text: the YAML as it was."""

    file: str
    text: str
    name: str | None
    method: Method
    base_model: ModelRef | None
    modules: dict[str, Module]
    parameters: dict[str, Any]
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerSetting | None
    chat_template: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def slices(self) -> Iterator[Slice]:
        for module in self.modules.values():
            yield from module.slices

    def references(self) -> list[ModelRef]:
        """All models, the base first, then as listed."""
        found = [self.base_model] if self.base_model else []
        for piece in self.slices:
            found += [piece.base_model] if piece.base_model else []
            found += [source.model for source in piece.sources]
        return list(dict.fromkeys(found))


def read_recipes(path: str | Path) -> list[Recipe]:
    """The documents of a recipe file, those that others use first. MergeError says what will not do, and in which line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise MergeError(f"{path}: is not UTF-8 text; a recipe is a YAML file.") from None
    return parse_recipes(text, str(path))


def parse_recipes(text: str, file: str = "recipe") -> list[Recipe]:
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise MergeError(f"{file}{line}: is not valid YAML: {getattr(error, 'problem', error)}.") from None
    if not nodes:
        raise MergeError(f"{file}: is empty; a recipe says at least merge_method and models.")
    recipes = [
        _Reader(file, text if len(nodes) == 1 else _source(text, nodes, i)).recipe(n) for i, n in enumerate(nodes)
    ]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            what = (
                f"two documents are named {name!r}" if name else "two documents have no name; only the last merge may"
            )
            raise MergeError(f"{file}: {what}; give each a name: of its own.")
    return _ordered(recipes, file)


def _source(text: str, nodes: list[yaml.Node], i: int) -> str:
    end = nodes[i + 1].start_mark.index if i + 1 < len(nodes) else len(text)
    return text[nodes[i].start_mark.index : end].rstrip().removesuffix("---").rstrip() + "\n"


def _ordered(recipes: list[Recipe], file: str) -> list[Recipe]:
    by_name = {recipe.name: recipe for recipe in recipes if recipe.name}
    done: list[Recipe] = []
    open_: list[str] = []

    def visit(recipe: Recipe) -> None:
        if recipe in done:
            return
        label = recipe.name or "the unnamed merge"
        if label in open_:
            raise MergeError(f"{file}: the merges use one another in a circle: {' -> '.join([*open_, label])}.")
        open_.append(label)
        for model in recipe.references():
            if model.path in by_name:
                visit(by_name[model.path])
        open_.pop()
        done.append(recipe)

    for recipe in recipes:
        visit(recipe)
    return done


class _Reader:
    """Walks the YAML nodes of one document, which know their lines."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.text = file, text
        self.notes: list[str] = []

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def items(self, node: yaml.Node, what: str, known: tuple[str, ...] = ()) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """{key: (key node, value node)} of a mapping; unknown keys are errors."""
        if not isinstance(node, yaml.MappingNode):
            raise MergeError(f"{self.at(node)}: {what} must be a mapping (key: value), and it is {_kind(node)}.")
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise MergeError(f"{self.at(key)}: merge keys (<<) are not read here; write the keys out.")
            name = str(key.value)
            if known and name not in known:
                raise MergeError(f"{self.at(key)}: {what} has no key {name!r}; {suggest(name, known)}.")
            if name in found:
                raise MergeError(f"{self.at(key)}: {what} has the key {name!r} twice.")
            found[name] = (key, value)
        return {name: pair for name, pair in found.items() if pair[1].tag != "tag:yaml.org,2002:null"}

    def sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise MergeError(
                f"{self.at(node)}: {what} must be a list with at least one entry, and it is {_kind(node)}."
            )
        return list(node.value)

    def value(self, node: yaml.Node) -> Any:
        return yaml.SafeLoader("").construct_object(node, deep=True)

    def string(self, node: yaml.Node, what: str, choices: tuple[str, ...] = ()) -> str:
        value = self.value(node)
        if not isinstance(value, str) or not value:
            raise MergeError(f"{self.at(node)}: {what} must be text, and it is {value!r}.")
        if choices and value not in choices:
            raise MergeError(f"{self.at(node)}: {what} is {value!r}; {suggest(value, choices)}.")
        return value

    def model(self, node: yaml.Node, what: str = "model") -> ModelRef:
        if isinstance(node, yaml.MappingNode):  # the long form: {model: {path, revision}, lora: {path}}
            items = self.items(node, what, ("model", "lora", "path", "revision", "override_architecture"))
            if "path" in items:
                revision = self.string(items["revision"][1], "revision") if "revision" in items else None
                return ModelRef(self.string(items["path"][1], "path"), revision=revision)
            inner = self.model(items["model"][1], what) if "model" in items else None
            if inner is None:
                raise MergeError(f"{self.at(node)}: {what} has neither path nor model.")
            adapter = self.model(items["lora"][1], "lora").path if "lora" in items else None
            return ModelRef(inner.path, adapter, inner.revision)
        text = self.string(node, what)
        parts = text.split("+")
        if len(parts) > 2 or not all(parts) or parts[0].count("@") > 1:
            raise MergeError(f"{self.at(node)}: {what} {text!r} is not of the form PATH[@REVISION][+ADAPTER].")
        path, _, revision = parts[0].partition("@")
        return ModelRef(path, parts[1] if len(parts) == 2 else None, revision or None)

    def parameters(self, pair: tuple[yaml.Node, yaml.Node] | None, method: Method, scope: str) -> dict[str, Any]:
        """{name: checked setting}. A parameter that only other methods have is noted; one that none has is an error."""
        if pair is None:
            return {}
        found: dict[str, Any] = {}
        known = [p.name for p in method.parameters]
        for name, (key, node) in self.items(pair[1], "parameters").items():
            if name not in known:
                if any(p.name == name for m in METHODS.values() for p in m.parameters):
                    self.notes.append(f"{self.at(key)}: {method.name} does not use {name}; it has no effect.")
                    continue
                raise MergeError(f"{self.at(key)}: {method.name} has no parameter {name!r}; {suggest(name, known)}.")
            parameter = method.parameter(name)
            if parameter.scope == "shared" and scope == "source":
                self.notes.append(
                    f"{self.at(key)}: {name} is one value for all models; under a model it has no effect. "
                    "Move it to the recipe's parameters."
                )
                continue
            found[name] = self.setting(node, parameter)
        return found

    def setting(self, node: yaml.Node, parameter: Param) -> Any:
        """A value, a gradient (list of values), or a list of (filter or None, value or gradient)."""
        if isinstance(node, yaml.MappingNode):
            return [self.condition(node, parameter)]
        if isinstance(node, yaml.SequenceNode):
            if any(isinstance(entry, yaml.MappingNode) for entry in node.value):
                return [self.condition(entry, parameter) for entry in node.value]
            if not node.value:
                raise MergeError(f"{self.at(node)}: {parameter.name} is an empty list; give at least one value.")
            return [parameter.check(self.value(entry), self.at(entry)) for entry in node.value]
        return parameter.check(self.value(node), self.at(node))

    def condition(self, node: yaml.Node, parameter: Param) -> tuple[str | None, Any]:
        items = self.items(node, f"an entry of {parameter.name}", ("filter", "value"))
        if "value" not in items:
            raise MergeError(f"{self.at(node)}: an entry of {parameter.name} needs a value.")
        text = str(self.value(items["filter"][1])) if "filter" in items else None
        value = self.setting(items["value"][1], parameter)
        if isinstance(value, list) and any(isinstance(entry, tuple) for entry in value):
            raise MergeError(f"{self.at(node)}: filters of {parameter.name} cannot be nested.")
        return (None if text == "*" else text, value)

    def recipe(self, node: yaml.Node) -> Recipe:
        keys = ("name", "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
                "tokenizer_source", "tokenizer", "chat_template")  # fmt: skip
        top = self.items(node, "the recipe", keys)
        if "merge_method" not in top:
            raise MergeError(f"{self.at(node)}: the recipe has no merge_method; known: {', '.join(METHODS)}.")
        key, value = top["merge_method"]
        method = find(self.string(value, "merge_method"), self.at(key))
        given = [name for name in ("models", "slices", "modules") if name in top]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise MergeError(
                f"{self.at(node)}: a recipe has exactly one of models, slices and modules; this has {found}."
            )
        base = self.model(top["base_model"][1], "base_model") if "base_model" in top else None
        if given == ["modules"]:
            modules = {
                name: self.module(pair[1], method, base, name)
                for name, pair in self.items(top["modules"][1], "modules").items()
            }
        else:
            modules = {"": Module(self.slices_of(top, method, base), {})}
        if "tokenizer" in top and "tokenizer_source" in top:
            raise MergeError(f"{self.at(top['tokenizer'][0])}: give tokenizer or tokenizer_source, not both.")
        name = str(self.value(top["name"][1])) if "name" in top else None
        if name is not None and (not name or "/" in name or name.startswith(".")):
            raise MergeError(f"{self.at(top['name'][1])}: name {name!r} becomes a directory; use a plain word.")
        return Recipe(
            file=self.file,
            text=self.text,
            name=name,
            method=method,
            base_model=base,
            modules=modules,
            parameters=self.parameters(top.get("parameters"), method, "recipe"),
            dtype=self.string(top["dtype"][1], "dtype", DTYPES) if "dtype" in top else None,
            out_dtype=self.string(top["out_dtype"][1], "out_dtype", DTYPES) if "out_dtype" in top else None,
            tokenizer=self.tokenizer(top),
            chat_template=self.string(top["chat_template"][1], "chat_template") if "chat_template" in top else None,
            notes=self.notes,
        )

    def module(self, node: yaml.Node, method: Method, base: ModelRef | None, name: str) -> Module:
        items = self.items(node, f"module {name}", ("models", "slices", "parameters"))
        if ("models" in items) == ("slices" in items):
            raise MergeError(f"{self.at(node)}: module {name} needs either models or slices.")
        return Module(self.slices_of(items, method, base), self.parameters(items.get("parameters"), method, "module"))

    def slices_of(
        self, items: Mapping[str, tuple[yaml.Node, yaml.Node]], method: Method, base: ModelRef | None
    ) -> list[Slice]:
        if "models" in items:
            key, node = items["models"]
            sources = []
            for entry in self.sequence(node, "models"):
                found = self.items(entry, "an entry of models", ("model", "parameters"))
                if "model" not in found:
                    raise MergeError(f"{self.at(entry)}: an entry of models needs a model.")
                parameters = self.parameters(found.get("parameters"), method, "source")
                sources.append(Source(self.model(found["model"][1]), None, parameters, self.at(entry)))
            if base is not None and base not in [source.model for source in sources]:
                sources.append(Source(base, None, {}, self.at(key)))
            return [Slice(sources, None, {}, self.at(key))]
        return [self.slice(entry, method) for entry in self.sequence(items["slices"][1], "slices")]

    def slice(self, node: yaml.Node, method: Method) -> Slice:
        items = self.items(node, "a slice", ("sources", "base_model", "parameters", "residual_weight"))
        if "residual_weight" in items:
            self.notes.append(
                f"{self.at(items['residual_weight'][0])}: residual_weight has no effect (nor in mergekit)."
            )
        if "sources" not in items:
            raise MergeError(f"{self.at(node)}: a slice needs sources.")
        sources = []
        for entry in self.sequence(items["sources"][1], "sources"):
            found = self.items(entry, "a source", ("model", "layer_range", "parameters"))
            if "model" not in found or "layer_range" not in found:
                raise MergeError(f"{self.at(entry)}: a source needs model and layer_range: [begin, end).")
            span = self.value(found["layer_range"][1])
            if (
                not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span))
                or not 0 <= span[0] < span[1]
            ):
                raise MergeError(
                    f"{self.at(found['layer_range'][1])}: layer_range is {span!r}; two integers [begin, end) are meant."
                )
            parameters = self.parameters(found.get("parameters"), method, "source")
            sources.append(Source(self.model(found["model"][1]), (span[0], span[1]), parameters, self.at(entry)))
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            raise MergeError(
                f"{self.at(node)}: the sources of a slice must have equally many layers; these have {sorted(lengths)}."
            )
        base = self.model(items["base_model"][1], "base_model") if "base_model" in items else None
        return Slice(sources, base, self.parameters(items.get("parameters"), method, "slice"), self.at(node))

    def tokenizer(self, top: Mapping[str, tuple[yaml.Node, yaml.Node]]) -> TokenizerSetting | None:
        if "tokenizer_source" in top:
            return TokenizerSetting(self.tokenizer_source(top["tokenizer_source"][1]))
        if "tokenizer" not in top:
            return None
        items = self.items(top["tokenizer"][1], "tokenizer", ("source", "tokens", "pad_to_multiple_of"))
        setting = TokenizerSetting(self.tokenizer_source(items["source"][1]) if "source" in items else "union")
        if "pad_to_multiple_of" in items:
            value = self.value(items["pad_to_multiple_of"][1])
            if type(value) is not int or value < 1:
                raise MergeError(
                    f"{self.at(items['pad_to_multiple_of'][1])}: pad_to_multiple_of is {value!r}; a positive integer is meant."
                )
            setting.pad_to_multiple_of = value
        if "tokens" in items:
            for token, (_, node) in self.items(items["tokens"][1], "tokens").items():
                setting.tokens[token] = self.token(node, token)
        return setting

    def tokenizer_source(self, node: yaml.Node) -> str | ModelRef:
        if isinstance(node, yaml.ScalarNode) and node.value in ("union", "base"):
            return str(node.value)
        return self.model(node, "the tokenizer's source")

    def token(self, node: yaml.Node, token: str) -> TokenSource:
        items = self.items(node, f"token {token!r}", ("source", "force"))
        force = self.value(items["force"][1]) if "force" in items else False
        if not isinstance(force, bool):
            raise MergeError(f"{self.at(node)}: force of token {token!r} must be true or false.")
        if "source" not in items:
            return TokenSource(force=force)
        source = items["source"][1]
        if not (isinstance(source, yaml.MappingNode) and any(k.value == "kind" for k, _ in source.value)):
            return TokenSource("model", self.model(source, "source"), force=force)
        found = self.items(source, "source", ("kind", "model", "token", "token_id"))
        kind = self.string(found["kind"][1], "kind", ("zero", "model_token"))
        if kind == "zero":
            return TokenSource("zero", force=force)
        if "model" not in found or ("token" in found) == ("token_id" in found):
            raise MergeError(f"{self.at(source)}: a model_token names a model and either token or token_id.")
        name = str(self.value(found["token"][1])) if "token" in found else None
        token_id = self.value(found["token_id"][1]) if "token_id" in found else None
        if token_id is not None and (type(token_id) is not int or token_id < 0):
            raise MergeError(f"{self.at(source)}: token_id is {token_id!r}; an integer >= 0 is meant.")
        return TokenSource("model_token", self.model(found["model"][1]), name, token_id, force)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list" if node.value else "an empty list"
    return repr(node.value)


def evaluate(setting: Any, tensor: str, t: float) -> Any:
    """The value of a setting for a tensor at depth t; None where no filter matches."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], tuple):
        for text, value in setting:
            if text is None or text in tensor:
                return evaluate(value, tensor, t)
        return None
    if any(isinstance(v, (bool, str)) or v is None for v in setting):
        return setting[int(t * (len(setting) - 1))]
    place = t * (len(setting) - 1)
    first = int(place)
    fraction = place - first
    result = (1 - fraction) * setting[first] + fraction * setting[min(first + 1, len(setting) - 1)]
    return int(result) if all(isinstance(v, int) for v in setting) and result == int(result) else result


def look_up(parameter: Param, scopes: list[Mapping[str, Any]], tensor: str, t: float) -> Any:
    """The value from the first scope that has one, else the default (perhaps REQUIRED)."""
    for scope in scopes:
        if parameter.name in scope:
            value = evaluate(scope[parameter.name], tensor, t)
            if value is not None:
                return value
    return parameter.default


def parameters_of(
    recipe: Recipe, module: Module, piece: Slice, models: list[Source], tensor: str, names: list[str], t: float
) -> dict[str, Any]:
    """All parameters of one output tensor; per-model ones as lists over `models` (whose own tensor names filters see)."""
    outer: list[Mapping[str, Any]] = [piece.parameters, module.parameters, recipe.parameters]
    p: dict[str, Any] = {}
    for parameter in recipe.method.parameters:
        if parameter.scope == "shared":
            p[parameter.name] = _required(look_up(parameter, outer, tensor, t), parameter, recipe, tensor, piece.where)
        else:
            p[parameter.name] = [
                _required(
                    look_up(parameter, [s.parameters, *outer], name, t),
                    parameter,
                    recipe,
                    f"{name} of {s.model}",
                    s.where,
                )
                for s, name in zip(models, names, strict=True)
            ]
    wrong = recipe.method.refuse(p)
    if wrong:
        raise MergeError(f"{piece.where}: {tensor}: {wrong}.")
    return p


def _required(value: Any, parameter: Param, recipe: Recipe, tensor: str, where: str) -> Any:
    if value is REQUIRED:
        raise MergeError(
            f"{where}: {recipe.method.name} needs the parameter {parameter.name} ({parameter.about}), and none is set for {tensor}."
        )
    return parameter.check(value, where)


def open_document(path: str | os.PathLike[str], says: str) -> tuple[_Reader, yaml.Node]:
    """(reader, root node) of a YAML file of one document. `says`: what such a file holds, for the error about an empty one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: is not valid YAML: {error}.") from None
    if node is None:
        raise MergeError(f"{path}: is empty; {says}.")
    return _Reader(str(path), text), node
