"""Record formats: detection by keys, normalisation, and errors that name the place."""

import pytest

from enginepost.data import DataError
from enginepost.data.records import parse

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = parse({"messages": [USER, ANSWER], "tools": tools, "text": "x", "chat_template_kwargs": {"k": 1}}, "f:1")
    assert record.format == "messages" and record.messages == [USER, ANSWER]
    assert record.tools == tools and record.context == {"k": 1} and record.train == [None, None]


def test_messages_in_a_text_column() -> None:
    record = parse({"messages": '[{"role": "user", "content": "q"}]', "tools": '[{"name": "f"}]'}, "f:1")
    assert record.messages == [USER] and record.tools == [{"name": "f"}]


def test_content_parts_and_tool_calls() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "7"}],
        },
        {"role": "assistant", "content": "x", "tool_calls": []},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    ]
    messages = parse({"messages": turns}, "f:1").messages
    assert messages is not None
    assert messages[0]["content"] == "ab"
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"id": "7", **CALL}]}
    assert messages[2] == {"role": "assistant", "content": "x"}
    assert messages[3]["tool_calls"] == [CALL]


def test_train_wishes() -> None:
    turns = [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}, {**USER, "train": False}]
    record = parse({"messages": turns}, "f:1")
    assert record.train == [None, False, None, True, False]
    assert record.messages == [USER, ANSWER, USER, ANSWER, USER]


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a", "train": False},
    ]  # fmt: skip
    record = parse({"conversations": turns, "system": "s", "tools": "[]"}, "f:1")
    assert record.format == "sharegpt" and record.tools is None
    assert record.messages == [
        {"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"}, ANSWER,
    ]  # fmt: skip
    assert record.train == [None, None, None, None, False]
    assert parse({"conversations": [USER, ANSWER]}, "f:1").messages == [USER, ANSWER]


def test_alpaca() -> None:
    record = parse({"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]}, "f:1")
    assert record.format == "alpaca"
    assert record.messages == [
        {"role": "system", "content": "s"}, USER, ANSWER,
        {"role": "user", "content": "i\nx"}, {"role": "assistant", "content": "o"},
    ]  # fmt: skip
    plain = parse(
        {"instruction": "i", "input": " ", "output": "o", "history": None, "text": "rendered"}, "f:1"
    ).messages
    assert plain == [{"role": "user", "content": "i"}, {"role": "assistant", "content": "o"}]


def test_prompt_completion() -> None:
    record = parse({"prompt": "p ", "completion": "c"}, "f:1")
    assert (record.text, record.prompt_length, record.messages) == ("p c", 2, None)
    record = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, "f:1")
    assert record.messages == [USER, ANSWER, USER, ANSWER] and record.train == [False, False, False, None]


def test_forced_format() -> None:
    both = {"messages": [USER, ANSWER], "text": "t"}
    assert parse(both, "f:1").format == "messages"
    assert parse(both, "f:1", "text").text == "t"
    with pytest.raises(DataError, match=r"f:1: the keys \['text'\].*Tried: alpaca \(instruction, output\)$"):
        parse({"text": "t"}, "f:1", "alpaca")
    with pytest.raises(
        DataError, match=r"unknown format 'chat'.*auto, messages, sharegpt, alpaca, prompt_completion, text"
    ):
        parse(both, "f:1", "chat")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"question": "q", "answer": "a"}, r"keys \['answer', 'question'\] fit no record format. Tried: messages \(messages"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference data"),
        ({"text": None}, r"keys \[\]"),
        ([1], "is a list"),
        (None, "is null"),
        ({"text": 3}, "text should be text, found a number"),
        ({"instruction": "i", "output": ["o"]}, "output should be text, found a list"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, "history should be"),
        ({"messages": "hello"}, "messages should be a list, found text"),
        ({"messages": []}, "no messages"),
        ({"messages": ["hi"]}, "message 1 should be an object with a role and a content, found text"),
        ({"messages": [{"content": "x"}]}, r"message 1 .*found the keys \['content'\]"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 2 \(assistant\) has neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 1 should be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content part of type 'image'; only text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "train": True}]}]}, "whole messages"),
        ({"messages": [{**USER, "train": True}]}, "only assistant turns"),
        ({"messages": [{**ANSWER, "train": "no"}]}, "train should be true or false"),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "tool call of message 1"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}]},
         "arguments of f in message 1 is not valid JSON"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools should be a list"),
        ({"messages": [USER], "chat_template_kwargs": [1]}, "chat_template_kwargs should be an object"),
        ({"messages": [USER], "chat_template_kwargs": {"template": "x"}}, "cannot set template"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 is from 'alien'; known: human"),
        ({"conversations": [{"from": "human", "text": "x"}]}, r"turn 1 .*found \['from', 'text'\]"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "function_call of turn 1 is not valid JSON"),
        ({"prompt": "p", "completion": [ANSWER]}, "both be text or both be lists"),
    ],
)  # fmt: skip
def test_wrong_records(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse(value, "data/x.jsonl:17")
    assert str(error.value).startswith("data/x.jsonl:17: ")
