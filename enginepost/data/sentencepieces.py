"""tokenizer.model through sentencepiece, behind the same face as a tokenizer.json.

Sentencepiece knows no added tokens and treats the spelling of its own control tokens as plain text, so a text is cut at special
tokens first, and each piece between them is encoded alone. It also puts a space before every piece ("dummy prefix"). Models saved
with `legacy: true`, or without the key, were used that way; the others get the space at the very start of a text only.

Offsets come from the serialized SentencePieceText message, a stable wire format: field 2 repeated {id 2, begin 4, end 5}, in bytes.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from enginepost.data.files import DataError
from enginepost.data.tokenizer import Ids, Offsets

# ModelProto{normalizer_spec{add_dummy_prefix: false}}: protobuf merges what is appended into what came before.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceEngine:
    """ids of `tokenizer.model`, then those of `added_tokens_decoder` in the config."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import sentencepiece

        try:
            proto = path.read_bytes()
            self._prefixed = sentencepiece.SentencePieceProcessor(model_proto=proto)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path}: not a usable sentencepiece model: {error}") from error
        self._legacy = bool(config.get("legacy", True))
        size = self._prefixed.get_piece_size()
        pieces = {self._prefixed.id_to_piece(i): i for i in range(size) if self._prefixed.is_control(i)}
        added = config.get("added_tokens_decoder") or {}
        try:
            self._added = {int(id): token["content"] for id, token in added.items()}
            special = {token["content"]: int(id) for id, token in added.items() if token.get("special", True)}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is not {{id: {{content}}}}"
            ) from error
        self.specials = {**pieces, **special}
        self._cut = {**pieces, **{token: id for id, token in self._added.items()}}
        self.vocab_size = max([size - 1, *self._added]) + 1
        self._size = size
        longest_first = sorted(self._cut, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.adds_bos = True  # the Llama family's default, where tokenizer_config.json does not say add_bos_token

    def encode(self, texts: list[str]) -> list[Ids]:
        return [np.array([id for id, _, _ in self._tokens(text)], dtype=np.int32) for text in texts]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Ids, Offsets]]:
        found = []
        for text in texts:
            table = np.array(list(self._tokens(text)), dtype=np.int64).reshape(-1, 3)
            found.append((table[:, 0].astype(np.int32), table[:, 1:]))
        return found

    def decode(self, ids: list[int], skip_special: bool) -> str:
        out: list[str] = []
        run: list[int] = []
        special = set(self.specials.values())
        for id in [*ids, -1]:
            if id in self._added or id in special or id < 0:
                if run:
                    out.append(self._prefixed.decode(run))
                    run = []
                if id >= 0 and not (skip_special and id in special):
                    out.append(self.token(id) or "")
            else:
                run.append(id)
        return "".join(out)

    def token(self, id: int) -> str | None:
        if id in self._added:
            return self._added[id]
        return self._prefixed.id_to_piece(id) if 0 <= id < self._size else None

    def id(self, token: str) -> int | None:
        if token in self._cut:
            return self._cut[token]
        found = self._prefixed.piece_to_id(token)
        return None if found == self._prefixed.unk_id() and token != self._prefixed.id_to_piece(found) else found

    def _tokens(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(id, first character, one past the last character)"""
        at = 0
        for match in self._pattern.finditer(text):
            yield from self._between(text, at, match.start())
            yield self._cut[match.group()], match.start(), match.end()
            at = match.end()
        yield from self._between(text, at, len(text))

    def _between(self, text: str, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        if start == end:
            return
        piece = text[start:end]
        engine = self._prefixed if self._legacy or start == 0 else self._bare
        message = engine.encode(piece, out_type="serialized_proto")
        if piece.isascii():
            yield from ((id, start + a, start + b) for id, a, b in _pieces(message))
            return
        width = [len(char.encode()) for char in piece]
        character = np.repeat(np.arange(len(piece)), width)  # byte -> its character
        for id, a, b in _pieces(message):
            first = int(character[a]) if a < len(character) else len(piece)
            yield id, start + first, start + (int(character[b - 1]) + 1 if b > a else first)


def _pieces(message: bytes) -> Iterator[tuple[int, int, int]]:
    """(id, begin byte, end byte) of each piece in a SentencePieceText message."""
    for field, value in _fields(message):
        if field == 2 and isinstance(value, bytes):
            inner = {key: item for key, item in _fields(value) if isinstance(item, int)}
            yield inner.get(2, 0), inner.get(4, 0), inner.get(5, 0)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Protobuf wire format: a varint key (field << 3 | type), then a varint (type 0) or length and bytes (type 2)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        if key & 7 == 2:
            yield key >> 3, message[at : at + value]
            at += value
        elif key & 7 == 0:
            yield key >> 3, value
        else:
            raise DataError(f"sentencepiece gave a message of an unknown form (wire type {key & 7})")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
