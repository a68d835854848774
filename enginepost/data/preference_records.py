"""Shapes of preference records as three kinds.

    paired     a prompt and two answers, one better      -> Pair(chosen, rejected, margin)
    unpaired   a prompt, an answer, good or bad          -> Graded(answer, desirable)
    stepwise   a prompt, steps, each right or wrong      -> Steps(record, labels)

Shapes, told apart by their keys in this order (a key whose value is null counts as absent); `A|B` are other names:

    paired     preference  {"prompt", "chosen", "rejected", "system"?}   texts, lists of messages, or one message; where chosen and
                           rejected repeat the prompt (UltraFeedback), it is what both begin with            TRL, UltraFeedback
               sharegpt    {"conversations", "chosen", "rejected"}                                           LLaMA-Factory
               messages    {"messages", "chosen", "rejected"}                                                Axolotl
               alpaca      {"instruction"|"question"|"input", "input"?, "system"?, "chosen"|"chosen_response", "rejected"|...}
                                                                                       LLaMA-Factory, Argilla, Intel
               implicit    {"chosen", "rejected"}                  whole conversations or texts; the prompt is what both begin with
               all with "margin"? (a number)
    unpaired   unpaired    {"prompt", "completion", "label"}       label: true or false                      TRL
               sharegpt    {"conversations"|"messages", "kto_tag"|"label"}    the last message is graded     LLaMA-Factory
               alpaca      {"instruction"|"question", "input"?, "output"|"completion"|"response", "kto_tag"|"label"}
               any paired shape: chosen is good, rejected is bad
    stepwise   stepwise    {"prompt", "completions", "labels"}     lists of the same length                  TRL

Texts are used as they are (bos and eos around them) unless a `template` is named; the other shapes are conversations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from enginepost.data.chat import Message
from enginepost.data.files import DataError
from enginepost.data.records import Record, conversation, kind_of, list_of, maybe_json, sharegpt, text_of, with_system

CHOSEN, REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
QUESTIONS, ANSWERS, TAGS = (
    ("instruction", "question", "input"),
    ("output", "completion", "response"),
    ("label", "kto_tag"),
)
HH_TURN = "\n\nAssistant:"  # of the texts of Anthropic's hh-rlhf


@dataclass
class Pair:
    """Two conversations or two texts with the same beginning; nothing of that beginning is trained on."""

    format: str
    chosen: Record
    rejected: Record
    margin: float | None = None


@dataclass
class Graded:
    """One conversation or text; what follows its prompt was found good or bad."""

    format: str
    answer: Record
    desirable: bool


@dataclass
class Steps:
    """A prompt and the steps of a solution, as texts; `labels` says which steps are right."""

    format: str
    prompt: str | list[Message]
    steps: list[str]
    labels: list[bool]


def parse_pair(value: Any, place: str) -> Pair:
    """The paired record at `place` ("file:row"). Raises DataError: no known shape, no answer, two answers that are the same."""
    record = _record(value, place)
    chosen, rejected = _first(record, CHOSEN), _first(record, REJECTED)
    if chosen is None or rejected is None:
        raise _unknown(
            record,
            place,
            "paired preferences",
            "chosen and rejected, with prompt, messages, conversations, instruction",
        )
    sides = [maybe_json(record[key]) for key in (chosen, rejected)]
    prompt_key = next((k for k in ("prompt", "conversations", "messages", *QUESTIONS) if k in record), None)
    if prompt_key == "messages" and all(isinstance(s, list) and len(s) > 1 for s in sides):
        prompt_key = None  # whole conversations; `messages` repeats one of them
    if prompt_key is None:
        pair = _implicit(record, sides, place)
    elif prompt_key == "prompt":
        pair = _explicit(record, sides, place)
    else:
        opening, format = _opening(record, prompt_key, place)
        pair = Pair(format, *_answers(format, opening, sides, record, place))
    _check_pair(pair, place)
    margin = record.get("margin")
    if margin is not None:
        if isinstance(margin, bool) or not isinstance(margin, (int, float)):
            raise DataError(f"{place}: margin should be a number, found {kind_of(margin)}")
        pair.margin = float(margin)
    return pair


def parse_graded(value: Any, place: str) -> list[Graded]:
    """The graded answers at `place`: one, or two from a paired record. Raises DataError; a label must be true or false."""
    record = _record(value, place)
    tag = _first(record, TAGS)
    if tag is None:
        if _first(record, CHOSEN) and _first(record, REJECTED):
            pair = parse_pair(record, place)
            return [Graded(pair.format, pair.chosen, True), Graded(pair.format, pair.rejected, False)]
        raise _unknown(record, place, "unpaired preferences", "prompt, completion and label (true or false)")
    desirable = record[tag]
    if not isinstance(desirable, bool):
        raise DataError(f"{place}: {tag} should be true or false, found {desirable!r}")
    answer_key = _first(record, ANSWERS)
    if "prompt" in record and answer_key:
        graded = _explicit(record, [maybe_json(record[answer_key])] * 2, place).chosen
        format = "unpaired"
    elif "conversations" in record or "messages" in record:
        key = "conversations" if "conversations" in record else "messages"
        opening, format = _opening(record, key, place)
        graded = conversation(format, opening, record, place)
        _only_last(graded)
    elif (question := _first(record, QUESTIONS)) and answer_key:
        opening, format = _opening(record, question, place)
        graded = _answer(format, opening, record[answer_key], record, place, answer_key)
    else:
        raise _unknown(record, place, "unpaired preferences", "prompt, completion and label (true or false)")
    if not _answer_text(graded).strip():
        raise DataError(f"{place}: the graded answer is empty")
    return [Graded(format, graded, desirable)]


def parse_steps(value: Any, place: str) -> Steps:
    """The stepwise record at `place`. Raises DataError; there must be as many labels as steps, each true or false."""
    record = _record(value, place)
    if not {"prompt", "completions", "labels"} <= set(record):
        raise _unknown(
            record, place, "step labels", "prompt, completions (a list of texts) and labels (true or false for each)"
        )
    steps, labels = list_of(record["completions"], "completions", place), list_of(record["labels"], "labels", place)
    prompt = maybe_json(record["prompt"])
    if not isinstance(prompt, (str, list)):
        raise DataError(f"{place}: prompt should be text or a list of messages, found {kind_of(prompt)}")
    if len(steps) != len(labels) or not steps:
        raise DataError(f"{place}: {len(steps)} completions and {len(labels)} labels; each step has one label")
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), 1):
        if not isinstance(step, str) or not step.strip():
            raise DataError(f"{place}: step {number} should be text that is not empty, found {kind_of(step)} {step!r}")
        if not isinstance(label, bool):
            raise DataError(f"{place}: the label of step {number} should be true or false, found {label!r}")
    return Steps("stepwise", prompt, steps, labels)


def _record(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record is a JSON object, this one is {kind_of(value)}")
    return {key: item for key, item in value.items() if item is not None}


def _first(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in record), None)


def _unknown(record: dict[str, Any], place: str, kind: str, wanted: str) -> DataError:
    return DataError(f"{place}: the keys {sorted(map(str, record))} are not those of {kind}: give {wanted}")


def _named(sides: list[Any]) -> list[tuple[Any, str]]:
    return list(zip(sides, ("chosen", "rejected"), strict=True))


def _opening(record: dict[str, Any], key: str, place: str) -> tuple[list[Any], str]:
    """The messages before the answers, and the name of the shape."""
    if key == "conversations":
        found = sharegpt(record, place)
        turns: list[Any] = found.messages or []
        return turns, "sharegpt"
    if key == "messages":
        return with_system(list_of(record["messages"], "messages", place), record, place), "messages"
    user = text_of(record, key, place)
    if key == "instruction" and str(record.get("input", "")).strip():
        user = f"{user}\n{text_of(record, 'input', place)}"
    return with_system([{"role": "user", "content": user}], record, place), "alpaca"


def _turns(side: Any, place: str, name: str) -> list[Any]:
    """An answer as messages: a text, one message, or a list of them; {from, value} as well as {role, content}."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    turns = [side] if isinstance(side, dict) else side
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: {name} should be text, a message or a list of messages, found {kind_of(side)}")
    if all(isinstance(t, dict) and "from" in t and "value" in t for t in turns):
        return sharegpt({"conversations": turns}, place).messages or []
    return turns


def _answer(format: str, opening: list[Any], side: Any, record: dict[str, Any], place: str, name: str) -> Record:
    """The conversation of `opening` and an answer; only the assistant turns of the answer are trained on."""
    answer = _turns(side, place, name)
    found = conversation(format, [*opening, *answer], record, place)
    found.train[: len(opening)] = [False] * len(opening)
    if not any(m["role"] == "assistant" for m in (found.messages or [])[len(opening) :]):
        raise DataError(f"{place}: {name} has no assistant turn")
    return found


def _answers(
    format: str, opening: list[Any], sides: list[Any], record: dict[str, Any], place: str
) -> tuple[Record, Record]:
    chosen, rejected = (_answer(format, opening, side, record, place, name) for side, name in _named(sides))
    return chosen, rejected


def _texts(format: str, texts: list[str], prompt_length: int) -> tuple[Record, Record]:
    chosen, rejected = (Record(format, text=text, prompt_length=prompt_length) for text in texts)
    return chosen, rejected


def _explicit(record: dict[str, Any], sides: list[Any], place: str) -> Pair:
    prompt = maybe_json(record["prompt"])
    if isinstance(prompt, str) and all(isinstance(s, str) for s in sides) and not record.get("system"):
        return Pair("preference", *_texts("preference", [prompt + s for s in sides], len(prompt)))
    if isinstance(prompt, str):
        if all(
            isinstance(s, list) and len(s) > 1 and isinstance(s[0], dict) and s[0].get("role") != "assistant"
            for s in sides
        ):
            return _implicit(record, sides, place, prompt)  # UltraFeedback: the conversations begin with the prompt
        opening: list[Any] = with_system([{"role": "user", "content": prompt}], record, place)
    elif isinstance(prompt, list):
        opening = with_system(prompt, record, place)
    else:
        raise DataError(f"{place}: prompt should be text or a list of messages, found {kind_of(prompt)}")
    if isinstance(prompt, list) and any(isinstance(s, str) for s in sides):
        raise DataError(
            f"{place}: prompt is a list of messages, so chosen and rejected should be messages too, found text"
        )
    return Pair("preference", *_answers("preference", opening, sides, record, place))


def _implicit(record: dict[str, Any], sides: list[Any], place: str, prompt: str | None = None) -> Pair:
    if all(isinstance(s, str) for s in sides):
        length = _common_text(*sides)
        if length == 0:
            raise DataError(
                f"{place}: chosen and rejected begin differently, so there is no prompt; give it under the key prompt"
            )
        return Pair("implicit", *_texts("implicit", sides, length))
    if not all(isinstance(s, list) for s in sides):
        found = " and ".join(kind_of(s) for s in sides)
        raise DataError(
            f"{place}: without a prompt, chosen and rejected should both be texts or both be conversations, found {found}"
        )
    turns = [_turns(s, place, n) for s, n in _named(sides)]
    same = 0
    while same < min(map(len, turns)) and turns[0][same] == turns[1][same]:
        same += 1
    if same == len(turns[0]) == len(turns[1]):
        raise DataError(f"{place}: chosen and rejected are the same; a pair needs two answers")
    if same == 0:
        raise DataError(
            f"{place}: chosen and rejected begin with different messages, so there is no prompt; give it under the key prompt"
        )
    if prompt is not None and not any(isinstance(t, dict) and t.get("content") == prompt for t in turns[0][:same]):
        raise DataError(f"{place}: chosen and rejected do not begin with the prompt {prompt[:60]!r}")
    format = "preference" if prompt is not None else "implicit"
    opening = with_system(turns[0][:same], record, place) if turns[0][0].get("role") != "system" else turns[0][:same]
    return Pair(format, *_answers(format, opening, [t[same:] for t in turns], record, place))


def _common_text(a: str, b: str) -> int:
    """Characters of the prompt that two texts share: up to the last assistant header in hh-rlhf's form, else to white space."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    header = a.rfind(HH_TURN, 0, same)
    if header >= 0:
        return header + len(HH_TURN)
    while same and not a[same - 1].isspace():
        same -= 1
    return len(a[:same].rstrip())  # the space belongs to the answer's first word, as tokenizers have it


def _only_last(record: Record) -> None:
    messages = record.messages or []
    record.train = [False] * (len(messages) - 1) + [None]


def _answer_text(record: Record) -> str:
    """What of a record is trained on, as text."""
    if record.messages is None:
        return record.text[record.prompt_length :]
    kept = (
        m
        for m, wish in zip(record.messages, record.train, strict=True)
        if wish is not False and m["role"] == "assistant"
    )
    return "".join(f"{m['content']}{m.get('tool_calls') or ''}" for m in kept)


def _check_pair(pair: Pair, place: str) -> None:
    texts = _answer_text(pair.chosen), _answer_text(pair.rejected)
    for name, text in zip(("chosen", "rejected"), texts, strict=True):
        if not text.strip():
            raise DataError(f"{place}: the {name} answer is empty; a completion needs at least one token")
    if texts[0] == texts[1]:
        raise DataError(f"{place}: chosen and rejected are the same ({texts[0][:60]!r}); a pair needs two answers")


PARSERS: dict[str, Callable[[Any, str], list[Any]]] = {
    "paired": lambda value, place: [parse_pair(value, place)],
    "unpaired": parse_graded,
    "stepwise": lambda value, place: [parse_steps(value, place)],
}
