"""Chat templates: jinja source in, text out, byte for byte what Hugging Face's `apply_chat_template` writes.

A template is a stranger's program, so it runs in jinja's immutable sandbox. It sees `messages`, `tools`, `documents`,
`add_generation_prompt`, the special tokens (`bos_token`, `eos_token`, ...) and any further context, the functions
`raise_exception(text)` and `strftime_now(format)`, `break` and `continue`, and a `tojson` that does not escape HTML.
`{% generation %} ... {% endgeneration %}` marks what the assistant wrote.

Templates shipped by name, in templates/: chatml, llama3, mistral, gemma, phi3, zephyr, alpaca.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError as JinjaError
from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from enginepost.data.files import DataError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser
    from jinja2.runtime import Macro

    from enginepost.data.tokenizer import Tokenizer

Message = dict[str, Any]
HOME = Path(__file__).parent / "templates"
# Unicode noncharacters, which no text may hold: they stand around generated text while its place is looked for.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def render(
    messages: list[Message],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **context: Any,
) -> str:
    """The text of a conversation.

    Args: messages [{role, content, ...}], keys that are None count as absent; template is jinja source; tools is a list of JSON
    schemas; add_generation_prompt ends with the header of an assistant turn; context is what else the template sees.
    Raises DataError when the template is broken, or calls raise_exception.
    """
    return _run(_compile(template, False), messages, tools, add_generation_prompt, context)


def render_generation(
    messages: list[Message], template: str, tools: list[dict[str, Any]] | None = None, **context: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the character spans [start, end) that the template puts inside `{% generation %}`, in order."""
    plain = render(messages, template, tools, **context)
    marked = _run(_compile(template, True), messages, tools, False, context)
    spans, at, start = [], 0, 0
    for part in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if part == _OPEN:
            start = at
        elif part == _CLOSE:
            spans.append((start, at))
        else:
            at += len(part)
    if re.sub(f"[{_OPEN}{_CLOSE}]", "", marked) != plain:
        raise DataError(
            "the chat template changes what is inside {% generation %}, so its place in the text is unknown"
        )
    return plain, spans


def has_generation_tag(template: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def resolve(name: str | None, tokenizer: "Tokenizer", tools: bool = False) -> str:
    """Jinja source of the template a recipe names: a shipped or a model's own name, a .jinja file, jinja source itself, or None
    for the model's default (its `tool_use` template when the row has tools)."""
    own = tokenizer.chat_templates
    if name is None:
        if tools and "tool_use" in own:
            return own["tool_use"]
        if "default" in own:
            return own["default"]
        more = f" The model has templates named {', '.join(own)}." if own else ""
        raise DataError(
            "these rows are conversations, and the model has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json). Name one with `template`: {', '.join(shipped())}, or a .jinja file.{more}"
        )
    if name in own:
        return own[name]
    if name in shipped():
        return (HOME / f"{name}.jinja").read_text(encoding="utf-8")
    if "{%" in name or "{{" in name:
        return name
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise DataError(f"no chat template {name!r}: it is not a file, and the names are {', '.join([*own, *shipped()])}")


def shipped() -> list[str]:
    """The names of the templates that come with enginepost."""
    return sorted(path.stem for path in HOME.glob("*.jinja"))


def _run(
    template: "Template", messages: list[Message], tools: Any, add_generation_prompt: bool, context: dict[str, Any]
) -> str:
    try:
        return template.render(
            messages=[_message(m) for m in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{"documents": None, **context},
        )
    except JinjaError as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"the chat template fails on this conversation: {type(error).__name__}: {error}") from error


def _message(message: Message) -> Message:
    # As transformers does: absent rather than None, and reasoning under each of the names that templates read.
    found = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in found:
            return {"thinking": found[key], **found, "reasoning_content": found[key]}
    return found


@lru_cache(maxsize=64)
def _compile(source: str, marked: bool) -> "Template":
    environment = _environment(marked)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error


@lru_cache(maxsize=2)
def _environment(marked: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.globals["enginepost_marked"] = marked
    return environment


class _Generation(Extension):
    """`{% generation %} body {% endgeneration %}`: the body, between marks where marks are asked for."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: "Parser") -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        block.set_lineno(line)
        return block

    def _mark(self, caller: "Macro") -> str:
        marked = self.environment.globals["enginepost_marked"]
        return f"{_OPEN}{caller()}{_CLOSE}" if marked else str(caller())


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
