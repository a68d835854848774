"""Preference records: every shape that is detected, what is trained on, and what is refused."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from enginepost.data import Tokenizer
from enginepost.data.files import DataError
from enginepost.data.preference_records import parse_graded, parse_pair, parse_steps
from enginepost.data.preferences import Preferences, prepare_preferences

USER = {"role": "user", "content": "what is six times seven?"}
GOOD, BAD = {"role": "assistant", "content": "forty two"}, {"role": "assistant", "content": "a fox"}


def asked(*before: dict[str, str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [*before, USER, GOOD], [*before, USER, BAD]


SYSTEM = {"role": "system", "content": "a small model"}
SHARE = [{"from": "human", "value": USER["content"]}]
SHAPES: dict[str, dict[str, Any]] = {
    "TRL explicit": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "UltraFeedback": {
        "prompt": USER["content"], "prompt_id": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD],
        "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "prompt with answers as messages": {"prompt": USER["content"], "chosen": [GOOD], "rejected": BAD},
    "LLaMA-Factory alpaca": {"instruction": "what is", "input": "six times seven?", "chosen": "forty two", "rejected": "a fox"},
    "LLaMA-Factory sharegpt": {
        "conversations": SHARE, "chosen": {"from": "gpt", "value": "forty two"}, "rejected": {"from": "gpt", "value": "a fox"},
    },
    "Axolotl": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "Axolotl argilla": {"instruction": USER["content"], "chosen_response": "forty two", "rejected_response": "a fox"},
    "Intel": {"question": USER["content"], "chosen": "forty two", "rejected": "a fox", "system": None},
    "Argilla distilabel": {"input": USER["content"], "chosen": "forty two", "rejected": "a fox", "rating": [9, 2]},
    "JSON in a text column": {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_conversations_of_every_shape_are_one(shape: str) -> None:
    pair = parse_pair(SHAPES[shape], "f:1")
    wanted = ("what is\nsix times seven?" if "alpaca" in shape else USER["content"], "forty two", "a fox")
    assert pair.chosen.messages is not None and pair.rejected.messages is not None
    contents = [[m["content"] for m in side.messages or []] for side in (pair.chosen, pair.rejected)]
    assert contents == [[wanted[0], wanted[1]], [wanted[0], wanted[2]]]
    assert [m["role"] for m in pair.chosen.messages] == ["user", "assistant"]
    assert pair.chosen.train == pair.rejected.train == [False, None]


def test_system_multi_turn_and_margin() -> None:
    intel = {"system": "a small model", "question": "what?", "chosen": "six", "rejected": "seven", "margin": 2}
    pair = parse_pair(intel, "f:1")
    assert [m["role"] for m in pair.chosen.messages or []] == ["system", "user", "assistant"] and pair.margin == 2.0
    before = [SYSTEM, USER, BAD]
    a, b = asked(*before)
    pair = parse_pair({"chosen": a, "rejected": b}, "f:1")
    assert pair.chosen.train == [False] * 4 + [None]  # the earlier answer belongs to the prompt
    tail = [GOOD, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    pair = parse_pair({"prompt": [USER], "chosen": tail, "rejected": [BAD]}, "f:1")
    assert pair.chosen.train == [False, None, None, None]


def test_texts() -> None:
    pair = parse_pair({"prompt": "six times", "chosen": " seven", "rejected": " one"}, "f:1")
    assert (pair.chosen.text, pair.chosen.prompt_length) == ("six times seven", 9)
    hh = "\n\nHuman: what is\n\nAssistant:"
    pair = parse_pair({"chosen": f"{hh} I think six", "rejected": f"{hh} I think one"}, "f:1")
    assert pair.chosen.prompt_length == len(hh)
    pair = parse_pair({"chosen": "the quick brown fox", "rejected": "the quick bread"}, "f:1")
    assert pair.chosen.text[: pair.chosen.prompt_length] == "the quick"


GRADED: dict[str, dict[str, Any]] = {
    "TRL text": {"prompt": "what?", "completion": " forty two", "label": True},
    "TRL messages": {"prompt": [USER], "completion": [GOOD], "label": True},
    "LLaMA-Factory": {"conversations": [*SHARE, {"from": "gpt", "value": "forty two"}], "kto_tag": True},
    "LLaMA-Factory alpaca": {"instruction": "what?", "output": "forty two", "kto_tag": True},
    "Axolotl": {"question": "what?", "completion": "forty two", "label": True},
    "messages": {"messages": [USER, GOOD], "label": True},
}


@pytest.mark.parametrize("shape", GRADED)
def test_graded_answers(shape: str) -> None:
    (found,) = parse_graded(GRADED[shape], "f:1")
    assert found.desirable
    if found.answer.messages is None:
        assert found.answer.text[found.answer.prompt_length :] == " forty two"
    else:
        assert found.answer.messages[-1]["content"] == "forty two" and found.answer.train[-1] is None
        assert not any(found.answer.train[:-1])
    (found,) = parse_graded({**GRADED[shape], **{k: False for k in ("label", "kto_tag") if k in GRADED[shape]}}, "f:1")
    assert not found.desirable


def test_pairs_are_two_graded_answers() -> None:
    good, bad = parse_graded(SHAPES["TRL explicit"], "f:1")
    assert good.desirable and not bad.desirable and (good.answer.messages or [])[-1] == GOOD


BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": " b", "rejected": " b"}, r"chosen and rejected are the same \(' b'\)"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "", "rejected": " b"}, "the chosen answer is empty"),
    (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": " "}]},
        "the rejected answer is empty",
    ),
    (
        {"prompt": [USER], "chosen": "forty", "rejected": "fox"},
        "prompt is a list of messages, so chosen and rejected should be",
    ),
    (
        {"prompt": 3, "chosen": "forty", "rejected": "fox"},
        "prompt should be text or a list of messages, found a number",
    ),
    ({"prompt": "a", "chosen": " b"}, r"the keys \['chosen', 'prompt'\] are not those of paired preferences"),
    ({"chosen": "six", "rejected": "one"}, "begin differently, so there is no prompt"),
    ({"chosen": [USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "begin with different messages"),
    ({"prompt": "else", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "do not begin with the prompt 'else'"),
    ({"chosen": "six", "rejected": [BAD]}, "should both be texts or both be conversations, found text and a list"),
    ({"prompt": "a", "chosen": " b", "rejected": " c", "margin": "big"}, "margin should be a number, found text"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen has no assistant turn"),
    ([1], "a record is a JSON object, this one is a list"),
]  # type: ignore[list-item]


@pytest.mark.parametrize(("record", "expected"), BAD_PAIRS)
def test_bad_pairs(record: Any, expected: str) -> None:
    with pytest.raises(DataError, match=f"f:7: .*{expected}"):
        parse_pair(record, "f:7")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "completion": " b", "label": 1}, "label should be true or false, found 1"),
        ({"prompt": "a", "completion": " b", "label": "true"}, "label should be true or false, found 'true'"),
        ({"conversations": SHARE, "kto_tag": "yes"}, "kto_tag should be true or false, found 'yes'"),
        ({"prompt": "a", "completion": " ", "label": True}, "the graded answer is empty"),
        ({"prompt": "a", "completion": " b"}, "are not those of unpaired preferences"),
    ],
)
def test_bad_grades(record: Any, expected: str) -> None:
    with pytest.raises(DataError, match=f"f:7: .*{expected}"):
        parse_graded(record, "f:7")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": [True]}, "2 completions and 1 labels"),
        ({"labels": [True, 0]}, "the label of step 2 should be true or false, found 0"),
        ({"completions": ["six", " "]}, "step 2 should be text that is not empty"),
        ({"prompt": 1}, "prompt should be text or a list of messages"),
        ({"labels": None}, "are not those of step labels"),
    ],
)
def test_bad_steps(change: dict[str, Any], expected: str) -> None:
    record = {"prompt": "what?", "completions": ["six", "seven"], "labels": [True, False], **change}
    with pytest.raises(DataError, match=f"f:7: .*{expected}"):
        parse_steps(record, "f:7")


def prepared(
    directory: pathlib.Path, tmp_path: pathlib.Path, records: list[Any], **keys: Any
) -> tuple[Preferences, Tokenizer]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    tokenizer = Tokenizer.load(directory)
    return prepare_preferences(
        tmp_path / "rows.jsonl", tokenizer, **{"kind": "paired", "max_length": 200, **keys}
    ), tokenizer


def test_tokens_and_labels_of_a_pair(tiny_tokenizer_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found, tokenizer = prepared(tiny_tokenizer_dir, tmp_path, [SHAPES["TRL explicit"], SHAPES["Axolotl"]])
    assert len(found) == 2 and found.margins is None and len(found.dataset) == 4
    chosen, rejected = found.dataset[0], found.dataset[1]
    prompt = "<|im_start|>user\nwhat is six times seven?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen.ids) == prompt + "forty two<|im_end|>\n"
    assert tokenizer.decode(chosen.ids[chosen.labels]) == "forty two<|im_end|>"
    assert tokenizer.decode(rejected.ids[rejected.labels]) == "a fox<|im_end|>"
    assert found.shared().tolist() == [len(tokenizer.encode(prompt))] * 2
    assert found.dataset.report.rows == 2 and found.dataset.report.formats == {
        str(tmp_path / "rows.jsonl"): {"preference": 2, "messages": 2}
    }


def test_a_prompt_that_is_no_prefix_is_refused(tiny_tokenizer_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    record = {"prompt": "what is six tim", "chosen": "es seven", "rejected": "e flies"}
    with pytest.raises(
        DataError,
        match=r"rows.jsonl:1: the tokens of the prompt are not the first .* reads \[.*\] there, .* \[.*\]\. Move",
    ):
        prepared(tiny_tokenizer_dir, tmp_path, [record])


def test_overlong_pairs(tiny_tokenizer_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = [
        {"prompt": "six", "chosen": " seven", "rejected": " two"},
        {"prompt": "six", "chosen": " seven", "rejected": " one" * 30},
        {"prompt": "six " * 40 + "six", "chosen": " seven", "rejected": " two"},
    ]
    with pytest.raises(DataError, match="2 of 3 rows are longer than max_length = 24"):
        prepared(tiny_tokenizer_dir, tmp_path, records, max_length=24)
    found, _ = prepared(tiny_tokenizer_dir, tmp_path, records, max_length=24, overlong="drop")
    assert len(found) == 1 and found.dataset.report.dropped == 2
    found, _ = prepared(tiny_tokenizer_dir, tmp_path, records, max_length=24, overlong="truncate")
    assert len(found) == 2 and found.dataset.report.truncated == 1 and found.dataset.lengths.max() == 24
    assert found.dataset.report.dropped == 1  # nothing of its answers was left


def test_margins_grades_and_steps(tiny_tokenizer_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    records = [
        {"prompt": "six", "chosen": " seven", "rejected": " two", "margin": 1.5},
        {"prompt": "six", "chosen": " one", "rejected": " two"},
    ]
    found, _ = prepared(tiny_tokenizer_dir, tmp_path, records)
    assert found.margins is not None and found.margins.tolist() == [1.5, 0.0]
    found, _ = prepared(tiny_tokenizer_dir, tmp_path, records, kind="unpaired")
    assert found.desirable is not None and found.desirable.tolist() == [True, False, True, False]
    steps = {"prompt": "what is six times seven?", "completions": ["six", "forty two"], "labels": [False, True]}
    found, tokenizer = prepared(tiny_tokenizer_dir, tmp_path, [steps], kind="stepwise")
    sequence, newline = found.dataset[0], tokenizer.encode("\n")
    assert tokenizer.decode(sequence.ids) == "what is six times seven?six\nforty two\n"
    assert found.classes is not None and found.classes[found.classes >= 0].tolist() == [0, 1]
    assert sequence.ids[sequence.labels].tolist() == newline * 2 and np.array_equal(found.classes >= 0, sequence.labels)
    chat, _ = prepared(tiny_tokenizer_dir, tmp_path, [{**steps, "prompt": [USER]}], kind="stepwise")
    assert tokenizer.decode(chat.dataset[0].ids).startswith(
        "<|im_start|>user\nwhat is six times seven?<|im_end|>\n<|im_start|>assistant\nsix"
    )
