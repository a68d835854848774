"""A model directory's tokenizer: text to ids with character offsets, and back.

    tokenizer.json           through `tokenizers` (truncation, padding and offset trimming switched off: they would lose text)
    tokenizer.model          through `sentencepiece`, when there is no tokenizer.json; see sentencepieces.py
    tokenizer_config.json    bos/eos/pad tokens, add_bos_token, chat_template (text, or a list of named ones)
    special_tokens_map.json  the same tokens where the config lacks them
    chat_template.jinja      the chat template; wins over the config. additional_chat_templates/NAME.jinja hold more
    generation_config.json   eos_token_id, one or several: the ids at which generation stops

No special token is ever added by `encode`: chat templates write their own. Special tokens spelled out in the text become their ids.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from enginepost.data.files import DataError

Ids = NDArray[np.int32]
Offsets = NDArray[np.int64]  # [n, 2]: first character of each token, and one past its last


class Engine(Protocol):
    """What turns text into ids: the `tokenizers` library or sentencepiece."""

    vocab_size: int
    specials: dict[str, int]
    adds_bos: bool

    def encode(self, texts: list[str]) -> list[Ids]: ...
    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Ids, Offsets]]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def token(self, id: int) -> str | None: ...
    def id(self, token: str) -> int | None: ...


class Tokenizer:
    """Text to ids and back.

    bos_id, eos_id, pad_id: int, or None where the model has none. stop_ids: ids that end a generation (eos_id included).
    vocab_size: the highest id + 1; a model's embedding may have more rows. special_tokens: {"bos_token": "<s>", ...}, what a
    template sees. chat_template: jinja source or None. adds_bos: does the model expect bos in front of raw text.
    """

    def __init__(self, engine: Engine, config: dict[str, Any], templates: dict[str, str], stop_ids: list[int]) -> None:
        self._engine = engine
        self.vocab_size = engine.vocab_size
        self.specials = engine.specials
        self.special_tokens = _special_tokens(config)
        self.chat_templates = templates
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.stop_ids = list(dict.fromkeys([*stop_ids, *([] if self.eos_id is None else [self.eos_id])]))
        self.eos_id = self.stop_ids[0] if self.eos_id is None and self.stop_ids else self.eos_id
        wish = config.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (engine.adds_bos if wish is None else bool(wish))

    @staticmethod
    def load(directory: str | Path) -> "Tokenizer":
        """The tokenizer of a model directory. Raises DataError when a file is missing or broken."""
        root = Path(directory)
        if not root.is_dir():
            raise DataError(
                f"{directory}: no such model directory (a tokenizer.json or tokenizer.model is looked for in it)"
            )
        config = {**_json(root / "special_tokens_map.json"), **_drop_none(_json(root / "tokenizer_config.json"))}
        engine: Engine
        if (root / "tokenizer.json").exists():
            engine = FastEngine(root / "tokenizer.json")
        elif (root / "tokenizer.model").exists():
            from enginepost.data.sentencepieces import SentencePieceEngine

            engine = SentencePieceEngine(root / "tokenizer.model", config)
        else:
            raise DataError(
                f"{directory}: no tokenizer.json and no tokenizer.model here. A vocab.json with merges.txt can be converted by "
                "loading it as a fast tokenizer in transformers and saving it again"
            )
        return Tokenizer(engine, config, _templates(root, config), _stop_ids(root))

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    def encode(self, text: str) -> list[int]:
        return self._engine.encode([text])[0].tolist()

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """ids, and for each the characters [start, end) of `text` that it stands for."""
        ids, offsets = self._engine.encode_with_offsets([text])[0]
        return ids.tolist(), [(start, end) for start, end in offsets.tolist()]

    def encode_batch(self, texts: list[str]) -> list[Ids]:
        return self._engine.encode(texts)

    def encode_batch_with_offsets(self, texts: list[str]) -> list[tuple[Ids, Offsets]]:
        """For each text: ids int32 [n], offsets int64 [n, 2]."""
        return self._engine.encode_with_offsets(texts)

    def decode(self, ids: "list[int] | Ids", *, skip_special: bool = False) -> str:
        """The text of `ids`; skip_special leaves special tokens out. Raises DataError for an id outside the vocabulary."""
        plain = [int(i) for i in ids]
        wrong = next((i for i in plain if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise DataError(f"token id {wrong} is outside this tokenizer's vocabulary of {self.vocab_size}")
        return self._engine.decode(plain, skip_special)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of one id, as in "Ġworld"."""
        return self._engine.token(int(id)) or f"<id {id}>"

    def id(self, token: str) -> int | None:
        return self._engine.id(token)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        found = self._engine.id(token)
        if found is None and name != "pad_token":
            raise DataError(f"tokenizer_config.json says {name} is {token!r}, which is not in the vocabulary")
        return found


class FastEngine:
    """tokenizer.json through the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            spec = _keep_offsets(json.loads(path.read_text(encoding="utf-8")))
            self._fast = Fast.from_str(json.dumps(spec))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a usable tokenizer: {error}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = False
        added = self._fast.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in added.items() if token.special}
        self.vocab_size = max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        bare, dressed = (self._fast.encode("a", add_special_tokens=add).ids for add in (False, True))
        self.adds_bos = len(dressed) > len(bare) and dressed[0] in added and dressed[:1] != bare[:1]

    def encode(self, texts: list[str]) -> list[Ids]:
        found = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.int32) for e in found]

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Ids, Offsets]]:
        found = self._fast.encode_batch(texts, add_special_tokens=False)
        return [(np.array(e.ids, dtype=np.int32), _table(e.offsets)) for e in found]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._fast.decode(ids, skip_special_tokens=skip_special)

    def token(self, id: int) -> str | None:
        return self._fast.id_to_token(id)

    def id(self, token: str) -> int | None:
        return self._fast.token_to_id(token)


def _table(offsets: list[tuple[int, int]]) -> Offsets:
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    return flat.reshape(-1, 2)


def _keep_offsets(spec: Any) -> Any:
    # trim_offsets moves a token's start past its leading space; spans need to know to whom that space belongs.
    if isinstance(spec, dict):
        return {
            key: False if key == "trim_offsets" else value if key == "model" else _keep_offsets(value)
            for key, value in spec.items()
        }
    return [_keep_offsets(item) for item in spec] if isinstance(spec, list) else spec


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Entries such as "bos_token": "<s>" or "bos_token": {"content": "<s>", ...}."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _templates(root: Path, config: dict[str, Any]) -> dict[str, str]:
    declared = config.get("chat_template")
    found: dict[str, str] = {}
    if isinstance(declared, str):
        found["default"] = declared
    elif isinstance(declared, list):
        try:
            found = {entry["name"]: entry["template"] for entry in declared}
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{root / 'tokenizer_config.json'}: chat_template should be a text or a list of {{name, template}}"
            ) from error
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    if (root / "chat_template.jinja").exists():
        found["default"] = (root / "chat_template.jinja").read_text(encoding="utf-8")
    return found


def _stop_ids(root: Path) -> list[int]:
    declared = _json(root / "generation_config.json").get("eos_token_id")
    if declared is None:
        declared = _json(root / "config.json").get("eos_token_id")
    return [] if declared is None else [int(i) for i in (declared if isinstance(declared, list) else [declared])]


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def _drop_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}
