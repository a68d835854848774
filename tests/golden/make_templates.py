"""Golden texts, ids and assistant masks of chat templates, as transformers' `apply_chat_template` gives them.

    .venv-peers/bin/python tests/golden/make_templates.py            writes templates.json and templates/tokenizer/
    PYTHONPATH=. .venv-peers/bin/python tests/golden/make_templates.py --peers
                                                                     renders every template of the installed TRL with both

The templates are the ones that enginepost ships and those in templates/, written in the manner of published ones to use the same
features (tools, thinking, closing eos, generation tags, macros, loop controls). The tokenizer is a small byte-level BPE.
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
SHIPPED = HERE.parent.parent / "enginepost" / "data" / "templates"
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city — now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SIX = {"role": "user", "content": "What is six times seven in base eight?"}


def call(city: str) -> dict:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": 1}}}


CONVERSATIONS = {
    "one": [SIX, {"role": "assistant", "content": "52"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, SIX, {"role": "assistant", "content": "52"}],
    "turns": [
        {"role": "system", "content": "Be brief."}, SIX, {"role": "assistant", "content": " It is 52. "},
        {"role": "user", "content": "  And in base two?\n"}, {"role": "assistant", "content": "101010\n"},
    ],
    "unicode": [
        {"role": "user", "content": "naïve 日本語 😀 e\u0301 <b>&amp;\"quoted\"</b> {{ not jinja }}"},
        {"role": "assistant", "content": "Ünï\u2028cødé ✓\tтест"},
    ],
    "newlines": [{"role": "user", "content": "\n\na\r\nb\n"}, {"role": "assistant", "content": "\n\n1\n\n2\n"}],
    "question": [SIX],
    "thinking": [
        SIX, {"role": "assistant", "content": "<think>\n6*7=42\n</think>\n\n52"},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes.", "reasoning_content": "\n42=5*8+2\n"},
    ],
    "tools": [
        {"role": "user", "content": "Weather in Zürich?"}, {"role": "assistant", "content": "", "tool_calls": [call("Zürich")]},
        {"role": "tool", "name": "weather", "content": "{\"sky\": \"grey\"}"}, {"role": "assistant", "content": "Grey."},
    ],
    "two_calls": [
        {"role": "user", "content": "Weather in A and B?"},
        {"role": "assistant", "content": None, "tool_calls": [call("A"), call("<B>")]},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "1 and 2."},
    ],
    "assistant_first": [{"role": "assistant", "content": "Hello"}, SIX],
}  # fmt: skip
CONTEXTS = {"thinking": [{"enable_thinking": False}], "tools_in_user": [{"tools_in_user_message": False}]}


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [str(m["content"]) for turns in CONVERSATIONS.values() for m in turns] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    bos = (SPECIAL[0], core.token_to_id(SPECIAL[0]))
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def expected(
    tokenizer: PreTrainedTokenizerFast, source: str, turns: list, tools: list | None, prompt: bool, context: dict
) -> dict:
    arguments = {"chat_template": source, "tools": tools, "add_generation_prompt": prompt, **context}
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
    except Exception as error:  # raise_exception, or a template that cannot take this conversation
        return {"error": type(error).__name__}
    found = {"text": text}
    if "generation" in source and "endgeneration" in source and not prompt:
        both = tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        found |= {"ids": both["input_ids"], "mask": both["assistant_masks"]}
    return found


def cases(sources: dict[str, str]) -> list[dict]:
    tokenizer = make_tokenizer()
    found = []
    for name, source in sources.items():
        for conversation, turns in CONVERSATIONS.items():
            with_tools = conversation in ("tools", "two_calls")
            for prompt in (False, True):
                for context in [{}, *(CONTEXTS.get(name, []) if prompt else [])]:
                    tools = [WEATHER] if with_tools else None
                    case = {
                        "template": name,
                        "conversation": conversation,
                        "tools": with_tools,
                        "prompt": prompt,
                        "context": context,
                    }
                    found.append(case | expected(tokenizer, source, turns, tools, prompt, context))
    return found


def write() -> None:
    sources = {
        path.stem: path.read_text()
        for path in sorted([*SHIPPED.glob("*.jinja"), *(HERE / "templates").glob("*.jinja")])
    }
    golden = {"tools": [WEATHER], "conversations": CONVERSATIONS, "cases": cases(sources)}
    lines = [json.dumps(case, ensure_ascii=False) for case in golden.pop("cases")]
    text = json.dumps(golden, ensure_ascii=False)[:-1] + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n"
    (HERE / "templates.json").write_text(text)
    folder = HERE / "templates" / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": {"content": "<pad>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
    print(f"{len(lines)} cases")


def compare_with_peers() -> None:
    import trl

    from enginepost.data import DataError, render
    from enginepost.data.chat import has_generation_tag, render_generation

    same = refused = 0
    tokenizer = make_tokenizer()
    for path in sorted((pathlib.Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        source = path.read_text()
        for case in cases({path.stem: source}):
            turns, tools = CONVERSATIONS[case["conversation"]], [WEATHER] if case["tools"] else None
            try:
                text = render(turns, source, tools, case["prompt"], **tokenizer.special_tokens_map, **case["context"])
            except DataError:
                assert "error" in case, (path.stem, case)
                refused += 1
                continue
            assert text == case.get("text"), (path.stem, case, text)
            same += 1
            if has_generation_tag(source) and "mask" in case:
                _, spans = render_generation(turns, source, tools, **tokenizer.special_tokens_map)
                offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
                mask = [int(any(b > x and a < y for x, y in spans)) for a, b in offsets]
                assert mask == case["mask"], (path.stem, case["conversation"])
    print(f"{same} texts are equal, {refused} conversations are refused by both")


if __name__ == "__main__":
    compare_with_peers() if "--peers" in sys.argv else write()
