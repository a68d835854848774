"""Record formats as one shape.

    messages            {"messages": [{role, content, tool_calls?, train? | weight?, ...}], "tools"?, "chat_template_kwargs"?}
    sharegpt            {"conversations": [{from, value, train? | weight?}], "system"?, "tools"?}
    alpaca              {"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}
    prompt_completion   {"prompt", "completion", "tools"?}, both text or both lists of messages
    text                {"text"}

A record's format is read from its keys, in that order (a key whose value is null counts as absent), unless one is forced.
Content given as parts is joined to text, and tool-call arguments given as a JSON text become the object that templates expect.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from enginepost.data.chat import Message
from enginepost.data.files import DataError

KEYS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant", "developer": "developer",
}  # fmt: skip


@dataclass
class Record:
    """One record: a conversation, or raw text of which everything from `prompt_length` characters on is trained.

    train: for each message, the record's own wish (True, False) or None; for a conversation only.
    """

    format: str
    messages: list[Message] | None = None
    train: list[bool | None] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    context: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    prompt_length: int = 0


def parse(value: Any, place: str, format: str = "auto") -> Record:
    """The record at `place` ("file:row"). Raises DataError naming the place, the keys found and the formats tried."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record is a JSON object, this one is {kind_of(value)}")
    record = {key: item for key, item in value.items() if item is not None}
    if format != "auto" and format not in KEYS:
        raise DataError(f"unknown format {format!r}: use auto, {', '.join(KEYS)}")
    tried = list(KEYS) if format == "auto" else [format]
    chosen = next((name for name in tried if all(key in record for key in KEYS[name])), None)
    if chosen is None:
        wanted = "; ".join(f"{name} ({', '.join(KEYS[name])})" for name in tried)
        hint = (
            ". It looks like preference data, which fine-tuning cannot use"
            if {"chosen", "rejected"} <= set(record)
            else ""
        )
        raise DataError(f"{place}: the keys {sorted(map(str, record))} fit no record format. Tried: {wanted}{hint}")
    return PARSERS[chosen](record, place)


def _messages(record: dict[str, Any], place: str) -> Record:
    return conversation("messages", list_of(record["messages"], "messages", place), record, place)


def sharegpt(record: dict[str, Any], place: str) -> Record:
    turns = list_of(record["conversations"], "conversations", place)
    messages = []
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, dict) and "role" in turn and "content" in turn:  # ShareGPT in name, OpenAI in keys
            messages.append(turn)
            continue
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            found = sorted(turn) if isinstance(turn, dict) else kind_of(turn)
            raise DataError(
                f"{place}: turn {number} of conversations should have the keys from and value, found {found}"
            )
        role = ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise DataError(f"{place}: turn {number} is from {turn['from']!r}; known: {', '.join(ROLES)}")
        more = {key: turn[key] for key in ("train", "weight") if key in turn}
        if turn["from"] == "function_call":
            calls = _json(turn["value"], f"the function_call of turn {number}", place)
            calls = [_call(call, number, place) for call in (calls if isinstance(calls, list) else [calls])]
            messages.append({"role": role, "content": "", "tool_calls": calls, **more})
        else:
            messages.append({"role": role, "content": turn["value"], **more})
    return conversation("sharegpt", with_system(messages, record, place), record, place)


def _alpaca(record: dict[str, Any], place: str) -> Record:
    instruction, output = text_of(record, "instruction", place), text_of(record, "output", place)
    extra = text_of(record, "input", place) if "input" in record else ""
    messages = []
    for pair in list_of(record.get("history") or [], "history", place):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(side, str) for side in pair)):
            raise DataError(f"{place}: history should be a list of [user, assistant] texts")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    user = f"{instruction}\n{extra}" if extra.strip() else instruction
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    return conversation("alpaca", with_system(messages, record, place), record, place)


def _prompt_completion(record: dict[str, Any], place: str) -> Record:
    prompt, completion = (maybe_json(record[key]) for key in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Record("prompt_completion", text=prompt + completion, prompt_length=len(prompt))
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        raise DataError(
            f"{place}: prompt and completion should both be text or both be lists of messages,"
            f" found {kind_of(prompt)} and {kind_of(completion)}"
        )
    found = conversation("prompt_completion", [*prompt, *completion], record, place)
    found.train[: len(prompt)] = [False] * len(prompt)
    return found


def _plain(record: dict[str, Any], place: str) -> Record:
    return Record("text", text=text_of(record, "text", place))


PARSERS = {
    "messages": _messages, "sharegpt": sharegpt, "alpaca": _alpaca, "prompt_completion": _prompt_completion, "text": _plain,
}  # fmt: skip


def conversation(format: str, turns: list[Any], record: dict[str, Any], place: str) -> Record:
    if not turns:
        raise DataError(f"{place}: the conversation has no messages")
    messages, train = [], []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            found = f"the keys {sorted(map(str, turn))}" if isinstance(turn, dict) else kind_of(turn)
            raise DataError(f"{place}: message {number} should be an object with a role and a content, found {found}")
        message = {key: value for key, value in turn.items() if key not in ("train", "weight") and value is not None}
        if "content" not in message and not message.get("tool_calls"):
            raise DataError(f"{place}: message {number} ({turn['role']}) has neither content nor tool_calls")
        message["content"] = _content(message.get("content", ""), number, place)
        if not message.get("tool_calls", True):
            del message["tool_calls"]
        elif "tool_calls" in message:
            calls = list_of(message["tool_calls"], f"tool_calls of message {number}", place)
            message["tool_calls"] = [_call(call, number, place) for call in calls]
        messages.append(message)
        train.append(_wish(turn, number, place))
    tools = maybe_json(record.get("tools") or None)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise DataError(f"{place}: tools should be a list of JSON schemas, found {kind_of(tools)}")
    context = maybe_json(record.get("chat_template_kwargs") or {})
    if not isinstance(context, dict):
        raise DataError(f"{place}: chat_template_kwargs should be an object, found {kind_of(context)}")
    taken = {"messages", "tools", "template", "add_generation_prompt"} & set(context)
    if taken:
        raise DataError(f"{place}: chat_template_kwargs cannot set {', '.join(sorted(taken))}")
    return Record(format, messages=messages, train=train, tools=tools or None, context=context)


def _wish(turn: dict[str, Any], number: int, place: str) -> bool | None:
    """`train: bool`, or OpenAI's `weight: 0 | 1`."""
    wish = turn.get("train", turn.get("weight"))
    if wish is None:
        return None
    if wish not in (0, 1):
        raise DataError(f"{place}: message {number}: train should be true or false (weight: 0 or 1), found {wish!r}")
    if wish and turn["role"] != "assistant":
        raise DataError(
            f"{place}: message {number} asks to be trained on, but is a {turn['role']} turn; only assistant turns can be chosen"
            " one by one (train_on: all takes every turn)"
        )
    return bool(wish)


def _content(content: Any, number: int, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f"{place}: the content of message {number} should be text or a list of parts, found {kind_of(content)}"
        )
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = repr(part.get("type")) if isinstance(part, dict) else kind_of(part)
            raise DataError(
                f"{place}: message {number} has a content part of type {kind}; only text parts are supported"
            )
        if "train" in part or "weight" in part:
            raise DataError(
                f"{place}: message {number}: train is read from whole messages, not from their content parts"
            )
    return "".join(part["text"] for part in content)


def _call(call: Any, number: int, place: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments": object}}, whichever of the usual spellings it came in."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{place}: a tool call of message {number} should have a function with a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"the arguments of {function['name']} in message {number}", place)
    outer = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def with_system(messages: list[Message], record: dict[str, Any], place: str) -> list[Message]:
    if not record.get("system"):
        return messages
    return [{"role": "system", "content": text_of(record, "system", place)}, *messages]


def text_of(record: dict[str, Any], key: str, place: str) -> str:
    if not isinstance(record[key], str):
        raise DataError(f"{place}: {key} should be text, found {kind_of(record[key])}")
    return record[key]


def list_of(value: Any, key: str, place: str) -> list[Any]:
    value = maybe_json(value)
    if not isinstance(value, list):
        raise DataError(f"{place}: {key} should be a list, found {kind_of(value)}")
    return value


def maybe_json(value: Any) -> Any:
    """A list or object that a text column (CSV, parquet) holds as JSON; anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _json(value: Any, what: str, place: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: {what} is not valid JSON: {error.msg} at column {error.colno}") from error


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
