"""The tokens that a model's tokenizer files know, whichever files those are: what a merge of vocabularies matches rows by.

tokenizer.json             the tokenizers library's; the only one that a merge can add tokens to
tokenizer.model            sentencepiece: piece i has id i; added tokens are in tokenizer_config.json or added_tokens.json
vocab.json (+ merges.txt)  byte-level BPE as GPT-2 has it; added tokens likewise
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enginepost.checkpoint.format import parse_json
from enginepost.merge.models import Model
from enginepost.merge.registry import MergeError

_SHIFTED = (
    "XGLMTokenizer",
    "XLMRobertaTokenizer",
    "CamembertTokenizer",
    "MBartTokenizer",
)  # ids are not those of the pieces
_HOW = "`AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)` of transformers makes a tokenizer.json"


@dataclass
class Tokens:
    """ids: {token: id}, the added ones included, in the order of ids. added: {token: its entry of `added_tokens`}.
    file: what was read. content: tokenizer.json, or None where the model has none."""

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    file: Path
    content: dict[str, Any] | None = None


def read_tokens(model: Model) -> Tokens:
    """A model's vocabulary. Raises MergeError where it has no tokenizer file that says it, or a broken one."""
    where = model.directory
    if (where / "tokenizer.json").exists():
        return _of_tokenizer_json(where / "tokenizer.json")
    if (where / "tokenizer.model").exists():
        return _ordered(_pieces(where / "tokenizer.model", model), _added(where), where / "tokenizer.model")
    if (where / "vocab.json").exists():
        vocab = _json(where / "vocab.json")
        return _ordered(_checked(vocab, where / "vocab.json"), _added(where), where / "vocab.json")
    raise MergeError(
        f"{model.ref}: has no tokenizer.json, tokenizer.model or vocab.json, one of which a merge of vocabularies needs. Copy "
        "them from the model it was made from, or leave `tokenizer` out of the recipe."
    )


def extended(tokens: Tokens, entries: list[dict[str, Any]], model: Model) -> dict[str, Any]:
    """tokenizer.json with added tokens behind its own. Raises MergeError where the model has none to extend."""
    if tokens.content is None:
        raise MergeError(
            f"{model.ref}: the merged vocabulary adds {len(entries)} tokens to its own (the first is {entries[0]['content']!r}), "
            f"and {tokens.file.name} cannot take them. {_HOW}: do that in {model.directory}; or let the vocabulary be one "
            "model's (`tokenizer: {source: base}`)."
        )
    content = json.loads(json.dumps(tokens.content))
    content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]
    return content


def _of_tokenizer_json(path: Path) -> Tokens:
    content = _json(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise MergeError(f"{path}: is not a tokenizer of the tokenizers library (it has no model).")
    listed = content["model"].get("vocab", {})
    if isinstance(listed, dict):
        ids = _checked(listed, path)
    else:  # Unigram: [[piece, score], ...]
        ids = {str(entry[0]): i for i, entry in enumerate(listed)}
    added = {str(entry["content"]): dict(entry) for entry in content.get("added_tokens") or []}
    return _ordered(ids, added, path, content)


def _ordered(
    ids: Mapping[str, int], added: dict[str, dict[str, Any]], file: Path, content: dict[str, Any] | None = None
) -> Tokens:
    every = {**ids, **{token: int(entry["id"]) for token, entry in added.items()}}
    return Tokens(dict(sorted(every.items(), key=lambda item: item[1])), added, file, content)


def _pieces(path: Path, model: Model) -> dict[str, int]:
    import sentencepiece

    config = path.parent / "tokenizer_config.json"
    kind = str((_json(config) if config.exists() else {}).get("tokenizer_class", "")).removesuffix("Fast")
    if kind in _SHIFTED:
        raise MergeError(
            f"{model.ref}: {kind} gives tokens other ids than those of the pieces in tokenizer.model, so they cannot be read off "
            f"it. {_HOW}."
        )
    try:
        engine = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except (RuntimeError, ValueError, OSError) as error:
        raise MergeError(f"{path}: not a usable sentencepiece model: {error}") from None
    return {engine.id_to_piece(i): i for i in range(engine.get_piece_size())}


def _added(directory: Path) -> dict[str, dict[str, Any]]:
    """{token: entry} of tokenizer_config.json's added_tokens_decoder, else of added_tokens.json."""
    config, older = directory / "tokenizer_config.json", directory / "added_tokens.json"
    listed = _json(config).get("added_tokens_decoder") if config.exists() else None
    try:
        if listed:
            return {str(entry["content"]): {**entry, "id": int(number)} for number, entry in listed.items()}
        if older.exists():
            return {str(token): {"id": int(number)} for token, number in _json(older).items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise MergeError(
            f"{config if listed else older}: the added tokens are not {{id: {{content}}}}, or {{token: id}}."
        ) from None
    return {}


def _checked(listed: Any, path: Path) -> dict[str, int]:
    if not isinstance(listed, dict) or not all(isinstance(number, int) for number in listed.values()):
        raise MergeError(f"{path}: the vocabulary is not {{token: id}}.")
    return {str(token): number for token, number in listed.items()}


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), path, "the tokenizer")
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror}.") from None
