"""Tokenizers of both kinds: ids, exact offsets, special tokens, templates, and broken files."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from enginepost.data import DataError, Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "templates" / "tokenizer"
TEXTS = [
    "",
    "What is six?",
    "  two  spaces ",
    "naïve 日本語 😀 e\u0301",
    "\n\na\r\nb\n",
    "<|im_start|>user\nhi<|im_end|>\n",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small sentencepiece model (BPE, byte fallback, nothing normalised away), as Llama 2 has."""
    root = tmp_path_factory.mktemp("pieces")
    (root / "corpus.txt").write_text("what is six times seven in base eight\nhello world, it is 52\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"), model_prefix=str(root / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    config = {
        "bos_token": "<s>", "eos_token": "</s>",
        "added_tokens_decoder": {"320": {"content": "<|im_end|>", "special": True}, "321": {"content": "<tab>", "special": False}},
    }  # fmt: skip
    (root / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def test_ids_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 7, 340)
    assert tokenizer.stop_ids == [1] and tokenizer.adds_bos
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    ids = tokenizer.encode("<|im_start|>six<|im_end|>")
    assert ids[0] == 2 and ids[-1] == 3 and 0 not in ids
    assert tokenizer.decode(ids) == "<|im_start|>six<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "six"
    assert tokenizer.token(ids[0]) == "<|im_start|>" and tokenizer.id("<|im_end|>") == 3


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_round_trip_and_offsets(tokenizer: Tokenizer, text: str) -> None:
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    covered = 0
    for start, end in offsets:  # in order, without gaps: leading spaces belong to the token that holds them
        assert start <= covered <= end
        covered = end
    assert covered == len(text)


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]
    found = [
        (ids.tolist(), [tuple(o) for o in offsets.tolist()])
        for ids, offsets in tokenizer.encode_batch_with_offsets(TEXTS)
    ]
    assert found == [tokenizer.encode_with_offsets(text) for text in TEXTS]


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 7, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("What is six times seven?")) == "What is six times seven?"
    assert len(tokenizer.encode_batch(["a"])[0]) == 1


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_offsets_of_sentencepiece_like_files(tmp_path: Path, style: str) -> None:
    """Llama 2 and Mistral files: "▁" for spaces, bytes for what is unknown, some tokens without characters of their own."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space = {"prepend_scheme": "first", "split": False}
    if style == "prepend":
        replace = tokenizers.normalizers.Replace(" ", "▁")
        core.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), replace])
    else:
        core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**space)
    strip = tokenizers.decoders.Strip(" ", 1, 0)
    back = tokenizers.decoders.Replace("▁", " ")
    core.decoder = tokenizers.decoders.Sequence(
        [back, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    core.train_from_iterator(["what is six times seven in base eight"] * 5, trainer)
    spec = json.loads(core.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = Tokenizer.load(tmp_path)
    text = "<s>what is  日six?\n😀</s> seven"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids[0] == 1 and 2 in ids and 0 not in ids
    covered = sorted({i for start, end in offsets for i in range(start, end)})
    assert covered == list(range(len(text)))
    assert all(b[0] >= a[0] and b[1] >= a[1] for a, b in pairwise(offsets))
    assert offsets[ids.index(2)] == (text.index("</s>"), text.index("</s>") + 4)


def test_side_files(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 6]}')
    config = {"eos_token": None, "add_bos_token": False, "chat_template": [
        {"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"},
    ]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (0, 1, [3, 6, 1], False)
    assert tokenizer.chat_template == "A" and tokenizer.chat_templates["tool_use"] == "B"
    (folder / "chat_template.jinja").write_text("C")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("D")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_templates == {"default": "C", "tool_use": "B", "rag": "D"}


def test_eos_from_the_generation_config_alone(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.eos_id, tokenizer.stop_ids, tokenizer.bos_id, tokenizer.adds_bos) == (3, [3], None, False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a usable tokenizer"),
        ("tokenizer.json", "{}", "tokenizer.json: not a usable tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "a JSON object is expected"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "eos_token is '<nope>', which is not in the vocabulary"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "list of {name, template}"),
    ],
)
def test_broken_files(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(folder)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer.json and no tokenizer.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="no such model directory"):
        Tokenizer.load(tmp_path / "nowhere")


def test_decode_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="token id 340 is outside this tokenizer's vocabulary of 340"):
        tokenizer.decode([3, 340])


def test_sentencepiece_equals_the_library(pieces: Path) -> None:
    tokenizer = Tokenizer.load(pieces)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    for text in TEXTS:
        if "<|im_end|>" not in text:
            assert tokenizer.encode(text) == plain.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.adds_bos) == (1, 2, 322, True)


def test_sentencepiece_special_tokens(pieces: Path) -> None:
    tokenizer = Tokenizer.load(pieces)
    ids, offsets = tokenizer.encode_with_offsets("<s>hello<|im_end|>é<tab></s>")
    assert [ids[0], ids[-1], *(i for i in ids if i >= 320)] == [1, 2, 320, 321]
    assert tokenizer.decode(ids) == "<s>hello<|im_end|>é<tab></s>"
    assert tokenizer.decode(ids, skip_special=True) == "helloé<tab>"
    assert offsets[0] == (0, 3) and offsets[-1] == (24, 28)
    assert tokenizer.id("<nope>") is None and tokenizer.id("<|im_end|>") == 320


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="aé日😀 \nsix", max_size=30))
def test_sentencepiece_offsets(pieces: Path, text: str) -> None:
    ids, offsets = Tokenizer.load(pieces).encode_with_offsets(text)
    assert len(ids) == len(offsets)
    covered = set()
    for start, end in offsets:
        assert 0 <= start <= end <= len(text)
        covered.update(range(start, end))
    assert covered == set(range(len(text)))


def test_sentencepiece_prefix_space(pieces: Path) -> None:
    modern = pieces / "modern"
    modern.mkdir(exist_ok=True)
    shutil.copy(pieces / "tokenizer.model", modern)
    config = json.loads((pieces / "tokenizer_config.json").read_text())
    (modern / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": False}))
    text = "hello<|im_end|>hello"
    old, new = ([t.token(i) for i in t.encode(text)] for t in (Tokenizer.load(pieces), Tokenizer.load(modern)))
    cut = old.index("<|im_end|>")
    assert old[:cut] == old[cut + 1 :] and old[0].startswith("▁")
    assert new[: cut + 1] == old[: cut + 1] and not new[cut + 1].startswith("▁")


def test_sentencepiece_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a usable sentencepiece model"):
        Tokenizer.load(tmp_path)
