"""Vocabularies merged for models that have a sentencepiece model, or vocab.json and merges.txt, instead of tokenizer.json."""

import io
import json
import pathlib
from collections.abc import Callable

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from small_checkpoints import save, tensors

from enginepost.merge import MergeError, merge

Write = Callable[[str], pathlib.Path]
WIDE = ("model.embed_tokens.weight", "lm_head.weight")


def pieces(words: str, size: int) -> tuple[bytes, list[str]]:
    """A sentencepiece model trained on some words, and its pieces."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words.split() * 20), model_writer=out, vocab_size=size, model_type="bpe", minloglevel=2
    )
    engine = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    return out.getvalue(), [engine.id_to_piece(i) for i in range(engine.get_piece_size())]


def model(
    directory: pathlib.Path, seed: int, rows: int, config: dict[str, object] | None = None
) -> dict[str, torch.Tensor]:
    weights = tensors(seed, torch.float32)
    for name in WIDE:
        weights[name] = weights[name][:rows].clone()
    save(directory, weights, vocab_size=rows)
    (directory / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return weights


def recipe(tmp_path: pathlib.Path, source: str) -> str:
    return (
        f"models: [{{model: {tmp_path}/a}}, {{model: {tmp_path}/b}}]\nbase_model: {tmp_path}/a\nmerge_method: linear\n"
        f"parameters: {{weight: 1}}\ntokenizer: {{source: {source}}}\n"
    )


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
@pytest.mark.parametrize("source", ["base", "model"])
def test_rows_are_matched_by_token(kind: str, source: str, write: Write, tmp_path: pathlib.Path) -> None:
    """a has the tokens in one order, b in another with an added token: each row of the result is the mean of the same token's."""
    if kind == "sentencepiece":
        (proto, mine), (other, theirs) = pieces("abab baba cab", 12), pieces("acca caab bcb", 13)
    else:
        mine, theirs = [chr(97 + i) for i in range(9)], [chr(107 - i) for i in range(8)]
    added = {str(len(theirs)): {"content": "<|mark|>", "special": True}}
    a, b = (
        model(tmp_path / "a", 1, len(mine)),
        model(tmp_path / "b", 2, len(theirs) + 1, {"added_tokens_decoder": added}),
    )
    if kind == "sentencepiece":
        (tmp_path / "a" / "tokenizer.model").write_bytes(proto)
        (tmp_path / "b" / "tokenizer.model").write_bytes(other)
    else:
        for name, tokens in (("a", mine), ("b", theirs)):
            (tmp_path / name / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
            (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
    theirs.append("<|mark|>")
    assert set(mine) & set(theirs) and set(mine) != set(theirs)
    merge(write(recipe(tmp_path, "base" if source == "base" else f"{tmp_path}/b")), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    kept = mine if source == "base" else theirs
    for name in WIDE:
        assert got[name].shape[0] == len(kept)
        for i, token in enumerate(kept):
            rows = [w[name][tokens.index(token)] for w, tokens in ((a, mine), (b, theirs)) if token in tokens]
            torch.testing.assert_close(got[name][i], sum(rows, torch.zeros_like(rows[0])) / len(rows))
    file = "tokenizer.model" if kind == "sentencepiece" else "vocab.json"
    donor = tmp_path / ("a" if source == "base" else "b")
    assert (tmp_path / "out" / file).read_bytes() == (donor / file).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(kept)


def test_a_union_needs_a_file_that_takes_tokens(write: Write, tmp_path: pathlib.Path) -> None:
    """Where the union adds nothing it is made; else the message names the model, a token and the way to a tokenizer.json."""
    proto, mine = pieces("abab baba cab", 12)
    for seed, name in ((1, "a"), (2, "b")):
        model(tmp_path / name, seed, len(mine))
        (tmp_path / name / "tokenizer.model").write_bytes(proto)
    merge(write(recipe(tmp_path, "union")), tmp_path / "out")
    model(tmp_path / "b", 2, len(mine) + 1)
    (tmp_path / "b" / "added_tokens.json").write_text(json.dumps({"<|mark|>": len(mine)}))
    with pytest.raises(
        MergeError, match=r"/a: .* adds 1 tokens .*'<\|mark\|>'.* tokenizer.model cannot .*use_fast=True"
    ):
        merge(write(recipe(tmp_path, "union")), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_files_that_do_not_tell(write: Write, tmp_path: pathlib.Path) -> None:
    proto, mine = pieces("abab baba cab", 12)
    for seed, name in ((1, "a"), (2, "b")):
        model(tmp_path / name, seed, len(mine), {"tokenizer_class": "XGLMTokenizerFast"})
    with pytest.raises(MergeError, match=r"has no tokenizer.json, tokenizer.model or vocab.json"):
        merge(write(recipe(tmp_path, "base")), tmp_path / "out")
    (tmp_path / "a" / "tokenizer.model").write_bytes(proto)
    with pytest.raises(MergeError, match="XGLMTokenizer gives tokens other ids"):
        merge(write(recipe(tmp_path, "base")), tmp_path / "out")
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"x": 1}}))
    with pytest.raises(MergeError, match=r"tokenizer_config\.json: the added tokens are not"):
        merge(write(recipe(tmp_path, "base")), tmp_path / "out")
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(MergeError, match="not a usable sentencepiece model"):
        merge(write(recipe(tmp_path, "base")), tmp_path / "out")
