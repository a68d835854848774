"""Chat templates: text, ids and assistant masks equal to transformers' (golden/make_templates.py), the sandbox, and their choice."""

import json
from pathlib import Path

import pytest

from enginepost.data import DataError, Tokenizer, render
from enginepost.data.chat import render_generation, resolve, shipped

GOLDEN = Path(__file__).parent.parent / "golden"
DATA = json.loads((GOLDEN / "templates.json").read_text())
NAMES = sorted({case["template"] for case in DATA["cases"]})


def source_of(name: str, tokenizer: Tokenizer) -> str:
    own = GOLDEN / "templates" / f"{name}.jinja"
    return own.read_text() if own.exists() else resolve(name, tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name: str, tokenizer: Tokenizer) -> None:
    source = source_of(name, tokenizer)
    texts = 0
    for case in (case for case in DATA["cases"] if case["template"] == name):
        turns = DATA["conversations"][case["conversation"]]
        tools = DATA["tools"] if case["tools"] else None
        arguments = (turns, source, tools, case["prompt"])
        if "error" in case:
            with pytest.raises(DataError):
                render(*arguments, **tokenizer.special_tokens, **case["context"])
        else:
            text = render(*arguments, **tokenizer.special_tokens, **case["context"])
            assert text == case["text"], case["conversation"]
            texts += 1
    assert texts >= 8


def test_generation_spans_equal_transformers_mask(tokenizer: Tokenizer) -> None:
    source = source_of("generation", tokenizer)
    cases = [case for case in DATA["cases"] if "mask" in case]
    assert len(cases) >= 5
    for case in cases:
        turns = DATA["conversations"][case["conversation"]]
        text, spans = render_generation(turns, source, **tokenizer.special_tokens)
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert text == case["text"] and ids == case["ids"]
        assert [int(any(b > x and a < y for x, y in spans)) for a, b in offsets] == case["mask"]


def test_every_shipped_template_is_in_the_golden_file() -> None:
    assert shipped() == ["alpaca", "chatml", "gemma", "llama3", "mistral", "phi3", "zephyr"]
    assert set(shipped()) <= set(NAMES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self._TemplateReference__context.environment.globals.update(x=1) }}",
        "{% include 'x' %}",
        "{{ range(10**9) | list }}",
    ],
)
def test_sandbox(attack: str) -> None:
    with pytest.raises(DataError, match="chat template"):
        render([{"role": "user", "content": "x"}], attack)


def test_messages_are_not_changed() -> None:
    turns = [{"role": "assistant", "content": None, "thinking": "t"}]
    assert render(turns, "{{ messages[0].keys() | list }}") == "['thinking', 'role', 'reasoning_content']"
    assert turns == [{"role": "assistant", "content": None, "thinking": "t"}]


def test_strftime_now() -> None:
    assert len(render([], "{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("a\n{% if %}", "syntax error in line 2"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nosuch }}", "syntax error|nosuch"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render([{"role": "user", "content": "x"}], source)


def test_generation_marks_do_not_survive_a_filter_that_counts() -> None:
    source = "{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(DataError, match="changes what is inside"):
        render_generation([], source)


def test_resolve(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert "<|im_start|>" in resolve("chatml", tokenizer)
    file = tmp_path / "own.jinja"
    file.write_text("{{ 'own' }}")
    assert resolve(str(file), tokenizer) == "{{ 'own' }}"
    assert resolve("{{ bos_token }}", tokenizer) == "{{ bos_token }}"
    with pytest.raises(DataError, match=r"alpaca, chatml, gemma, llama3, mistral, phi3, zephyr"):
        resolve("chatlm", tokenizer)
    with pytest.raises(DataError, match=r"has no chat template .*alpaca, chatml"):
        resolve(None, tokenizer)
