"""Prompts for roll-outs: what the model is to answer, and what else its record says, for reward functions.

    {"prompt": text or messages, ...}                        the other keys are columns that rewards are given
    messages, sharegpt, alpaca, prompt_completion            as for fine-tuning; the answer that the record ends with is taken off

An answer that was taken off is the column `completion` (unless the record has one of that name), and the answer of distillation on
the data's own answers. A text prompt is used as it is, after bos where the tokenizer adds it; with a `template` it is a user turn.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from enginepost.data import records
from enginepost.data.chat import Message, render, resolve
from enginepost.data.files import DataError, Paths, find, read
from enginepost.data.tokenizer import Tokenizer

SHOWN = 5  # rows that an error names


@dataclass
class Prompt:
    """One prompt. ids: its tokens; value: the text, or the messages, as reward functions see it; columns: the other keys of the
    record; answer: tokens of the record's own answer, its stop token included, or None; place: "file:row"."""

    ids: list[int]
    value: str | list[Message]
    columns: dict[str, Any]
    answer: list[int] | None
    place: str


class Prompts:
    """Prompts in the order of the files. `report` is one line about them; `fingerprint` a hash of all that roll-outs see."""

    def __init__(self, rows: list[Prompt], report: str) -> None:
        self.rows, self.report = rows, report

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Prompt:
        return self.rows[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    def subset(self, index: np.ndarray) -> "Prompts":
        return Prompts([self.rows[i] for i in index], self.report)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for p in self.rows:
            digest.update(json.dumps([p.ids, p.columns, p.answer], sort_keys=True, default=str).encode())
        return digest.hexdigest()


def load_prompts(
    paths: Paths, tokenizer: Tokenizer, *, template: str | None = None, max_tokens: int, overlong: str = "error",
    vocab_size: int | None = None, answers: bool = False,
) -> Prompts:  # fmt: skip
    """Read the prompts of `paths`.

    Args: template: of chats, by name, file or source, default the model's own; max_tokens: of a prompt (with `answers`, of prompt
        and answer); overlong: "error" or "drop"; vocab_size: of the model; answers: every record must have an answer.
    Raises: DataError that names the row: no prompt, an empty one, one too long, none left.
    """
    if overlong not in ("error", "drop"):
        raise DataError(
            f"overlong: {overlong}: a prompt cannot be cut, as its end is what is answered; use error or drop"
        )
    rows: list[Prompt] = []
    too_long: list[tuple[str, int]] = []
    for path in find(paths):
        for number, value in read(path):
            prompt = _prompt(value, f"{path}:{number}", tokenizer, template, answers)
            tokens = len(prompt.ids) + (len(prompt.answer or ()) if answers else 0)
            if tokens > max_tokens:
                too_long.append((prompt.place, tokens))
                continue
            _check_ids(prompt, tokenizer, vocab_size)
            rows.append(prompt)
    if too_long and overlong == "error":
        named = ", ".join(f"{place} ({tokens} tokens)" for place, tokens in too_long[:SHOWN])
        more = f" and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else ""
        raise DataError(
            f"{len(too_long)} prompts are longer than the {max_tokens} tokens that max_length leaves beside the completion: "
            f"{named}{more}. Raise max_length, lower max_completion_length, or set overlong: drop"
        )
    if not rows:
        raise DataError(f"no prompt is left in {paths}" + (f": {len(too_long)} are too long" if too_long else ""))
    lengths = np.array([len(p.ids) for p in rows])
    report = (
        f"{len(rows):,} prompts of {lengths.min():,} to {lengths.max():,} tokens (median {int(np.median(lengths)):,})"
    )
    return Prompts(rows, report + (f"; {len(too_long):,} overlong ones dropped" if too_long else ""))


def _prompt(value: Any, place: str, tokenizer: Tokenizer, template: str | None, answers: bool) -> Prompt:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a record is a JSON object, this one is {type(value).__name__}")
    record = {k: v for k, v in value.items() if v is not None}
    found: str | list[Message]
    tools = record.get("tools")
    if "prompt" in record:
        found = record["prompt"]
        answer = record.get("completion")
        columns = {k: v for k, v in record.items() if k != "prompt"}
    else:
        parsed = records.parse(value, place)
        if parsed.messages is None:
            raise DataError(f"{place}: a record of raw text has no prompt; give the key prompt, or messages")
        found, answer, tools = parsed.messages, None, parsed.tools
        if found[-1].get("role") == "assistant":
            found, answer = found[:-1], found[-1].get("content", "")
        taken = {"messages", "conversations", "instruction", "input", "output", "history", "system", "tools"}
        columns = {k: v for k, v in record.items() if k not in taken}
        if answer is not None:
            columns.setdefault("completion", answer)
    if isinstance(answer, list):  # messages of a conversational completion
        answer = answer[0].get("content") if len(answer) == 1 and isinstance(answer[0], dict) else None
    if isinstance(found, str) and template is not None:
        found = [{"role": "user", "content": found}]
    text, ending = _render(found, tools, answer, place, tokenizer, template)
    ids = tokenizer.encode(text)
    if isinstance(found, str) and tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise DataError(f"{place}: the prompt is empty")
    if answers and ending is None:
        raise DataError(
            f"{place}: the record has no answer, and part of the prompts keep theirs; add one, or set lmbda: 1"
        )
    return Prompt(ids, found, columns, None if ending is None else _ended(tokenizer.encode(ending), tokenizer), place)


def _render(
    found: Any, tools: Any, answer: Any, place: str, tokenizer: Tokenizer, template: str | None
) -> tuple[str, str | None]:  # fmt: skip
    """(text of the prompt, text of the answer as it follows it)."""
    if isinstance(found, str):
        return found, answer if isinstance(answer, str) else None
    if not (isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found)):
        raise DataError(f"{place}: prompt should be a text or a list of messages with role and content")
    if found[-1]["role"] == "assistant":
        raise DataError(f"{place}: the prompt ends with a turn of the assistant, which leaves nothing to answer")
    try:
        source = resolve(template, tokenizer, tools is not None)
        text = render(found, source, tools, True, **tokenizer.special_tokens)
        if not isinstance(answer, str):
            return text, None
        turn = {"role": "assistant", "content": answer}
        whole = render([*found, turn], source, tools, False, **tokenizer.special_tokens)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    if not whole.startswith(text):
        return text, None
    return text, whole[len(text) :]


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """An answer up to its stop token: what a template writes after it is no part of it. One without gets eos."""
    stops = [i for i, id in enumerate(ids) if id in tokenizer.stop_ids]
    if stops:
        return ids[: stops[-1] + 1]
    return ids if tokenizer.eos_id is None else [*ids, tokenizer.eos_id]


def _check_ids(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    worst = max([*prompt.ids, *(prompt.answer or ())])
    if vocab_size is not None and worst >= vocab_size:
        raise DataError(
            f"{prompt.place}: token {tokenizer.token(worst)!r} has id {worst}, but the model's vocabulary has {vocab_size} rows: "
            "the tokenizer and the model do not belong together"
        )
