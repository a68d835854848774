"""Which characters of a rendered conversation are trained on.

By prefix rendering: with m[:i] the first i messages, assistant turn i is the text between

    render(m[:i], add_generation_prompt=True)   and   render(m[:i+1])

so it starts where generation would start, and ends with its end-of-turn token. Both must be prefixes of the whole rendering: a
template that writes earlier turns differently once later ones follow (thinking removed, say) trains on text that the model never
sees, and is refused with the place where the texts part. A template with `{% generation %}` tags names the spans itself.

White space after the end-of-turn token ("<|im_end|>\n") belongs to the template, not to the answer, and is not trained on.
"""

from collections.abc import Iterable
from typing import Any

from enginepost.data.chat import has_generation_tag, render, render_generation
from enginepost.data.files import DataError
from enginepost.data.records import Record

Span = tuple[int, int]


def conversation(
    record: Record, template: str, train_on: str, special: dict[str, str], end_tokens: Iterable[str] = ()
) -> tuple[str, list[Span]]:
    """The text of a conversation and its trained character spans [start, end), in order.

    Args: train_on "assistant", "last" (the last assistant turn) or "all"; special are the tokens a template sees (bos_token, ...);
    end_tokens are the spellings of special tokens. Raises DataError (without the record's place, which the caller knows).
    """
    assert record.messages is not None
    roles = [message["role"] for message in record.messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant"]
    chosen = [i for i in (turns[-1:] if train_on == "last" else turns) if record.train[i] is not False]
    turn = _Turns(record, template, {**special, **record.context}, tuple(end_tokens))
    if train_on == "all":
        unwanted = [i for i, wish in enumerate(record.train) if wish is False]
        return turn.text, _complement([turn.span(i) for i in unwanted], len(turn.text))
    if not chosen:
        return turn.text, []
    if has_generation_tag(template):
        return turn.text, turn.tagged(chosen, turns)
    return turn.text, [turn.span(i) for i in chosen]


class _Turns:
    """One conversation, rendered as a whole and as far as each turn."""

    def __init__(self, record: Record, template: str, context: dict[str, Any], end_tokens: tuple[str, ...]) -> None:
        self.messages = record.messages or []
        self.tools, self.template, self.context, self.end_tokens = record.tools, template, context, end_tokens
        self.text = render(self.messages, template, self.tools, **context)

    def span(self, i: int) -> Span:
        before = self._before(i)
        after = self._render(i + 1, False)
        if not after.startswith(before):
            what = f"message {i + 1} does not continue the prompt that generation would start from"
            cure = "Give the answer what the prompt opens (thinking, say), set chat_template_kwargs (enable_thinking: false, say)"
            raise _parted(what, before, after, cure)
        eos = self.context.get("eos_token") or ""
        if not self.text.startswith(after) and eos and self.text.startswith(after.removesuffix(eos)):
            after = after.removesuffix(eos)  # a template that closes the whole conversation with eos (phi3)
        if not self.text.startswith(after):
            what = f"message {i + 1} is written differently once later messages follow"
            raise _parted(what, after, self.text, "Use train_on: last")
        return self._without_tail(len(before), len(after))

    def tagged(self, chosen: list[int], turns: list[int]) -> list[Span]:
        _, spans = render_generation(self.messages, self.template, self.tools, **self.context)
        if chosen == turns:
            return spans
        if len(spans) != len(turns):
            raise DataError(
                f"the chat template marks {len(spans)} spans with {{% generation %}} for {len(turns)} assistant turns, so single"
                " turns cannot be chosen (train_on: last, or train: false)"
            )
        return [spans[turns.index(i)] for i in chosen]

    def _before(self, i: int) -> str:
        answering = self.messages[i]["role"] == "assistant"
        if i:
            return self._render(i, answering)
        try:
            return self._render(0, True) if answering else ""
        except DataError as error:
            raise DataError(
                f"the conversation begins with an assistant turn, where the template cannot: {error}"
            ) from error

    def _render(self, count: int, add_generation_prompt: bool) -> str:
        if count == len(self.messages) and not add_generation_prompt:
            return self.text
        return render(self.messages[:count], self.template, self.tools, add_generation_prompt, **self.context)

    def _without_tail(self, start: int, end: int) -> Span:
        body = self.text[start:end].rstrip()
        return (start, start + len(body)) if body.endswith(self.end_tokens) else (start, end)


def _complement(unwanted: list[Span], length: int) -> list[Span]:
    edges = [0, *(edge for span in unwanted for edge in span), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def _parted(what: str, one: str, other: str, cure: str) -> DataError:
    at = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return DataError(
        f"the chat template has no clear place for an answer: {what}. At character {at}, after"
        f" {one[max(0, at - 40) : at]!r}, one has {one[at : at + 60]!r} and the other {other[at : at + 60]!r}."
        f" {cure}, a template with {{% generation %}} tags, or another `template`"
    )
