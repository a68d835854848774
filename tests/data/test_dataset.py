"""`prepare`: what is trained on, what is refused, and the counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from enginepost.data import DataError, Dataset, Tokenizer, collate, prepare
from enginepost.data.chat import resolve

GOLDEN = Path(__file__).parent.parent / "golden"
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    SYSTEM, {"role": "user", "content": "What is six?"}, {"role": "assistant", "content": " It is 😀 6."},
    {"role": "user", "content": "And seven?"}, {"role": "assistant", "content": "7\n\n"},
]  # fmt: skip
Write = Callable[..., Path]


def trained(dataset: Dataset, tokenizer: Tokenizer, index: int = 0) -> list[str]:
    """The runs of trained text of one sequence."""
    sequence = dataset[index]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.labels.astype(int), [0]])))
    return [tokenizer.decode(sequence.ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def text(dataset: Dataset, tokenizer: Tokenizer, index: int = 0) -> str:
    return tokenizer.decode(dataset[index].ids)


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        ("chatml", CHAT, [" It is 😀 6.<|im_end|>", "7\n\n<|im_end|>"]),
        ("llama3", CHAT, ["It is 😀 6.<|eot_id|>", "7<|eot_id|>"]),
        ("mistral", CHAT, [" It is 😀 6.</s>", " 7</s>"]),
        ("zephyr", CHAT, [" It is 😀 6.</s>", "7\n\n</s>"]),
        ("alpaca", CHAT, [" It is 😀 6.</s>", "7\n\n</s>"]),
        ("gemma", CHAT, ["It is 😀 6.<end_of_turn>\n", "7<end_of_turn>\n"]),  # end_of_turn is no special token of this model
        (str(GOLDEN / "templates" / "closing_eos.jinja"), CHAT, [" It is 😀 6.<|end|>\n", "7\n\n<|end|>\n</s>"]),
        (str(GOLDEN / "templates" / "generation.jinja"), CHAT, [" It is 😀 6.<|im_end|>", "7\n\n<|im_end|>"]),
        (str(GOLDEN / "templates" / "thinking.jinja"), CHAT[:3], ["<think>\n\n</think>\n\n It is 😀 6.<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_are_trained(
    jsonl: Write, tokenizer: Tokenizer, template: str, turns: list, expected: list[str]
) -> None:
    dataset = prepare(jsonl({"messages": turns}), tokenizer, template=template, max_length=512)
    assert trained(dataset, tokenizer) == expected
    assert text(dataset, tokenizer).count("<s>") <= 1
    only_last = prepare(jsonl({"messages": turns}), tokenizer, template=template, train_on="last", max_length=512)
    assert trained(only_last, tokenizer) == expected[-1:]
    everything = prepare(jsonl({"messages": turns}), tokenizer, template=template, train_on="all", max_length=512)
    assert everything.report.trained_tokens == len(everything[0].ids) - 1
    assert everything[0].ids.tolist() == dataset[0].ids.tolist()


@pytest.mark.parametrize("template", ["chatml", str(GOLDEN / "templates" / "generation.jinja")])
def test_turns_not_to_train(jsonl: Write, tokenizer: Tokenizer, template: str) -> None:
    turns = [*CHAT[:2], {**CHAT[2], "train": False}, *CHAT[3:]]
    dataset = prepare(jsonl({"messages": turns}), tokenizer, template=template, max_length=512)
    assert trained(dataset, tokenizer) == ["7\n\n<|im_end|>"]
    dataset = prepare(jsonl({"messages": turns}), tokenizer, template=template, train_on="all", max_length=512)
    assert "".join(trained(dataset, tokenizer)) == text(dataset, tokenizer).replace(
        " It is 😀 6.<|im_end|>", ""
    ).removeprefix("<|im_start|>")


def test_tools_are_rendered_and_calls_trained(jsonl: Write, tokenizer: Tokenizer) -> None:
    golden = json.loads((GOLDEN / "templates.json").read_text())
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": 1}'}}
    turns = [*golden["conversations"]["tools"]]
    turns[1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    path = jsonl({"messages": turns, "tools": golden["tools"]})
    dataset = prepare(path, tokenizer, template=str(GOLDEN / "templates" / "tools_in_system.jinja"), max_length=2048)
    called = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 1}}\n</tool_call><|im_end|>'
    assert trained(dataset, tokenizer)[1] == "Grey.<|im_end|>"
    assert called.endswith(trained(dataset, tokenizer)[0])
    case = next(c for c in golden["cases"] if c["template"] == "tools_in_system" and c["conversation"] == "tools")
    assert text(dataset, tokenizer) == case["text"]


def test_prefix_property(jsonl: Write, tokenizer: Tokenizer) -> None:
    turns = [CHAT[1], {"role": "assistant", "content": "<think>\n2*3\n</think>\n\n6"}, *CHAT[3:]]
    path = jsonl({"messages": CHAT}, {"messages": turns})
    template = str(GOLDEN / "templates" / "thinking.jinja")
    with pytest.raises(DataError) as error:
        prepare(path, tokenizer, template=template, max_length=512)
    for part in (
        f"{path}:1: ",
        "message 3 is written differently",
        "one has '<think>",
        "the other ' It is",
        "train_on: last",
    ):
        assert part in str(error.value)
    dataset = prepare(path, tokenizer, template=template, train_on="last", max_length=512)
    assert trained(dataset, tokenizer, 1) == ["<think>\n\n</think>\n\n7\n\n<|im_end|>"]


def test_an_answer_that_does_not_continue_the_prompt(jsonl: Write, tokenizer: Tokenizer) -> None:
    opens = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    turns = [CHAT[1], {"role": "assistant", "content": "6"}]
    with pytest.raises(DataError, match=r"message 2 does not continue the prompt.*one has '<think>' and the other '6'"):
        prepare(jsonl({"messages": turns}), tokenizer, template=opens, max_length=512)
    turns[1] = {"role": "assistant", "content": "<think>2*3</think>6"}
    dataset = prepare(jsonl({"messages": turns}), tokenizer, template=opens, max_length=512)
    assert trained(dataset, tokenizer) == ["2*3</think>6"]


def test_raw_text(jsonl: Write, tokenizer: Tokenizer) -> None:
    dataset = prepare(jsonl({"text": "six"}, {"text": "<s>six</s>"}), tokenizer, max_length=64)
    assert [text(dataset, tokenizer, i) for i in (0, 1)] == ["<s>six</s>"] * 2
    assert dataset[0].labels.tolist() == [False] + [True] * (len(dataset[0].ids) - 1)


def test_prompt_completion(jsonl: Write, tokenizer: Tokenizer) -> None:
    path = jsonl({"prompt": "What is six?", "completion": " It is 6."})
    dataset = prepare(path, tokenizer, max_length=64)
    assert text(dataset, tokenizer) == "<s>What is six? It is 6.</s>"
    assert trained(dataset, tokenizer) == [" It is 6.</s>"] and dataset.report.straddling == 0
    chat = prepare(path, tokenizer, template="chatml", max_length=64)
    assert trained(chat, tokenizer) == [" It is 6.<|im_end|>"]
    everything = prepare(path, tokenizer, train_on="all", max_length=64)
    assert everything[0].labels.sum() == len(everything[0].ids) - 1


def test_texts_beside_a_chat_template(jsonl: Write, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Path(shutil.copytree(GOLDEN / "templates" / "tokenizer", tmp_path / "model"))
    (model / "chat_template.jinja").write_text(resolve("chatml", tokenizer))
    chat_model, path = Tokenizer.load(model), jsonl({"prompt": "six?", "completion": "6"}, {"messages": CHAT})
    plain = prepare(path, chat_model, max_length=512)
    assert text(plain, tokenizer) == "<s>six?6</s>" and "1 prompt/completion texts used without" in str(plain.report)
    rendered = prepare(path, chat_model, template="default", max_length=512)
    assert text(rendered, tokenizer).startswith("<|im_start|>user\nsix?<|im_end|>") and rendered.report.untemplated == 0
    assert text(plain, tokenizer, 1) == text(rendered, tokenizer, 1)


def test_a_token_across_the_boundary_is_trained_and_counted(jsonl: Write, tokenizer: Tokenizer) -> None:
    joined = next(t for t in ("What is", "six") if len(tokenizer.encode(t)) < len(t))
    ids, offsets = tokenizer.encode_with_offsets(joined)
    start, _ = max(offsets, key=lambda o: o[1] - o[0])
    cut = start + 1
    dataset = prepare(jsonl({"prompt": joined[:cut], "completion": joined[cut:]}), tokenizer, max_length=64)
    assert trained(dataset, tokenizer) == [joined[start:] + "</s>"] and dataset.report.straddling == 1
    assert "spans the end of a prompt" in str(dataset.report)
    assert dataset[0].ids.tolist() == [0, *ids, 1]


def test_message_lists_train_the_completion_only(jsonl: Write, tokenizer: Tokenizer) -> None:
    dataset = prepare(jsonl({"prompt": CHAT[:4], "completion": CHAT[4:]}), tokenizer, template="chatml", max_length=512)
    assert trained(dataset, tokenizer) == ["7\n\n<|im_end|>"]


def test_pretraining_pieces_make_each_token_a_target_once(jsonl: Write, tokenizer: Tokenizer) -> None:
    documents = ["What is six times seven? " * 20, "six", ""]
    path = jsonl(*({"text": document} for document in documents))
    dataset = prepare(path, tokenizer, method="pretrain", max_length=16)
    assert max(dataset.lengths) == 16 and min(dataset.lengths) >= 2 and dataset.report.skipped == 1
    batch = collate(dataset.sequences)
    targets = batch.targets[batch.targets != -100].tolist()
    whole = [[*tokenizer.encode(document), 1] for document in documents[:2]]
    assert targets == whole[0] + whole[1]
    assert {s.row for s in dataset} == {1, 2} and dataset.report.trained_tokens == len(targets)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the keys \['messages'\] fit no record format. Tried: text"):
        prepare(jsonl({"messages": CHAT}), tokenizer, method="pretrain", max_length=16)


def test_masked_rows(jsonl: Write, tokenizer: Tokenizer) -> None:
    path = jsonl({"messages": CHAT}, *({"messages": CHAT[:2]} for _ in range(7)))
    with pytest.raises(DataError) as error:
        prepare(path, tokenizer, template="chatml", max_length=512)
    assert "7 of 8 rows have no token to train on" in str(error.value)
    assert f"{path}:2, {path}:3" in str(error.value) and "and 2 more" in str(error.value)


def test_overlong(jsonl: Write, tokenizer: Tokenizer) -> None:
    long_answer = [*CHAT[:2], {"role": "assistant", "content": "six " * 60}]
    long_prompt = [{"role": "user", "content": "six " * 100}, CHAT[4]]
    path = jsonl({"messages": CHAT[:3]}, {"messages": long_answer}, {"messages": long_prompt})
    with pytest.raises(DataError) as error:
        prepare(path, tokenizer, template="chatml", max_length=80)
    message = str(error.value)
    assert "2 of 3 rows are longer than max_length = 80" in message and f"{path}:2 (" in message
    assert "Raise max_length, or set overlong: truncate" in message
    dropped = prepare(path, tokenizer, template="chatml", max_length=80, overlong="drop")
    assert (len(dropped), dropped.report.dropped, dropped.report.truncated) == (1, 2, 0)
    cut = prepare(path, tokenizer, template="chatml", max_length=80, overlong="truncate")
    assert (len(cut), cut.report.dropped, cut.report.truncated, cut.lengths.max()) == (2, 1, 1, 80)
    assert "1 rows truncated to max_length; 1 overlong rows dropped" in str(cut.report)
    with pytest.raises(DataError, match="no sequence is left of 3 rows"):
        prepare(path, tokenizer, template="chatml", max_length=8, overlong="drop")


def test_ids_outside_the_vocabulary(jsonl: Write, tokenizer: Tokenizer) -> None:
    path = jsonl({"text": "zz"}, {"text": "What is six times seven?"})
    assert len(prepare(path, tokenizer, max_length=64, vocab_size=340)) == 2
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: token '.+' has id \d+, but the model's vocabulary has 264 rows"
    ):
        prepare(path, tokenizer, max_length=64, vocab_size=264)


def test_several_files_and_formats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"text": "six"}) + "\n")
    (tmp_path / "b.csv").write_text("instruction,input,output\nadd,1 2,3\n")
    (tmp_path / "c.txt").write_text("one document\n\nstill the same")
    dataset = prepare(tmp_path, tokenizer, template="chatml", max_length=512)
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.txt"))
    assert dataset.report.formats == {a: {"messages": 1, "text": 1}, b: {"alpaca": 1}, c: {"text": 1}}
    assert [s.place for s in dataset] == [f"{a}:1", f"{a}:2", f"{b}:1", f"{c}:1"]
    assert (dataset.report.rows, dataset.report.sequences, dataset.report.tokens) == (4, 4, len(dataset.ids))
    assert dataset[-1].source == c
    with pytest.raises(IndexError):
        dataset[4]


def test_batches_of_rows_do_not_change_the_result(
    jsonl: Write, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": CHAT} if i % 3 else {"text": f"row {i}"} for i in range(20)]
    whole = prepare(jsonl(*rows), tokenizer, template="chatml", max_length=512)
    monkeypatch.setattr("enginepost.data.dataset.BATCH_ROWS", 3)
    parts = prepare(jsonl(*rows), tokenizer, template="chatml", max_length=512)
    assert np.array_equal(whole.ids, parts.ids) and np.array_equal(whole.labels, parts.labels)
    assert np.array_equal(whole.offsets, parts.offsets) and [s.row for s in parts] == list(range(1, 21))


def test_rows_that_do_not_end_on_a_stop_token(jsonl: Write, tokenizer: Tokenizer) -> None:
    report = prepare(jsonl({"messages": CHAT}), tokenizer, template="gemma", max_length=512).report
    assert report.no_stop == 1 and "will not learn to stop" in str(report)
    assert prepare(jsonl({"messages": CHAT}), tokenizer, template="zephyr", max_length=512).report.no_stop == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "the data set is empty: no record in .*rows.jsonl"),
        ([{"text": ""}], {}, "no sequence is left of 1 rows in .*1 empty documents skipped"),
        ([{"text": "a"}, {"q": 1}], {}, r"rows\.jsonl:2: the keys \['q'\] fit no record format. Tried: messages"),
        ([{"messages": CHAT}], {}, r"rows\.jsonl:1: these rows are conversations, .* alpaca, chatml"),
        ([{"messages": CHAT}], {"template": "nope"}, "no chat template 'nope'"),
        ([{"messages": [*CHAT, CHAT[4]]}], {"template": "mistral"}, r"rows\.jsonl:1: .*refuses .*alternate"),
        (
            [{"messages": [CHAT[4]]}],
            {"template": "{{ messages[0].content.nope.x }}"},
            r"rows\.jsonl:1: the chat template",
        ),
        ([{"messages": [CHAT[2], CHAT[1]]}], {"template": "alpaca"}, r"rows\.jsonl:1: .*begins with an assistant turn"),
        ([{"text": "a\ud800"}], {}, r"rows\.jsonl:1: .*surrogate"),
        ([{"text": "a"}], {"train_on": "some"}, "train_on must be one of assistant, all, last, got 'some'"),
        ([{"text": "a"}], {"method": "dpo"}, "method must be one of sft, pretrain"),
        ([{"text": "a"}], {"overlong": "skip"}, "overlong must be one of"),
        ([{"text": "a"}], {"max_length": 1}, "max_length must be at least 2"),
    ],
)
def test_refused(jsonl: Write, tokenizer: Tokenizer, rows: list, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(jsonl(*rows), tokenizer, **{"max_length": 512, **options})
