"""Rewards: what completions are worth, by Python functions and by reward models, weighed.

A reward function has TRL's signature. It is called once a roll-out with keyword arguments, lists of one entry for each completion:

    prompts           texts, or lists of messages
    completions       texts, or for a conversation [{"role": "assistant", "content": text}]
    completion_ids    token ids, the stop token included
    <column>          every other key of the records

and returns as many numbers; None where it has no opinion. A function that takes fewer arguments is given those that it names.
"""

import importlib
import importlib.util
import inspect
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from enginepost.data import Tokenizer, render
from enginepost.data.chat import resolve
from enginepost.data.prompts import Prompt
from enginepost.errors import EnginepostError
from enginepost.recipe_online import Reward

Scorer = Callable[[list[Prompt], list[list[int]]], list[float | None]]


class RewardError(EnginepostError):
    """A reward cannot be found or called, or gave something that is no reward; the message names it and the prompt."""


@dataclass
class Judge:
    """One reward: its name in metrics (`rewards/NAME/mean`), its weight, and how completions are scored."""

    name: str
    weight: float
    score: Scorer


def load(
    items: Sequence[Reward], tokenizer: Tokenizer, *, vocab_size: int, dtype: torch.dtype, template: str | None = None,
    device: torch.device | str = "cpu",
) -> list[Judge]:  # fmt: skip
    """The rewards of a recipe. Raises RewardError for a function that cannot be imported, a reward model that does not fit."""
    judges: list[Judge] = []
    for item in items:
        if item.model is not None:
            name, score = (
                pathlib.Path(item.model).name,
                model_scorer(
                    item.model, tokenizer, vocab_size=vocab_size, dtype=dtype, template=template, device=device
                ),
            )
        else:
            function = item.function if callable(item.function) else find(item.function)
            name = getattr(function, "__name__", type(function).__name__)
            score = function_scorer(function, name, tokenizer)
        taken = sum(j.name == name or j.name.startswith(f"{name}_") for j in judges)
        judges.append(Judge(name if not taken else f"{name}_{taken + 1}", item.weight, score))
    return judges


def find(place: str) -> Callable[..., Any]:
    """The function that "file.py:name" or "package.module:name" means."""
    source, _, name = place.rpartition(":")
    try:
        if source.endswith(".py"):
            path = pathlib.Path(source)
            if not path.is_file():
                raise RewardError(f"rewards: {place}: there is no file {source}")
            spec = importlib.util.spec_from_file_location(f"enginepost_rewards_{path.stem}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.path.insert(0, str(path.resolve().parent))  # as for a script: it may import what lies beside it
            try:
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(path.resolve().parent))
        else:
            module = importlib.import_module(source)
    except EnginepostError:
        raise
    except Exception as error:
        raise RewardError(f"rewards: {place}: importing {source} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise RewardError(f"rewards: {place}: {source} has no function {name}; it has {', '.join(known) or 'none'}")
    return function


def function_scorer(function: Callable[..., Any], name: str, tokenizer: Tokenizer) -> Scorer:
    """Calls a reward function as the module says, and checks what it gives."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wanted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {p.name for p in parameters if p.default is p.empty and p.name in wanted}

    def call(prompts: list[Prompt], ids: list[list[int]]) -> Any:
        texts = [_text(c, tokenizer) for c in ids]
        columns = sorted(set().union(*(p.columns for p in prompts)))
        given: dict[str, Any] = {key: [p.columns.get(key) for p in prompts] for key in columns}
        given |= {
            "prompts": [p.value for p in prompts],
            "completions": [
                t if isinstance(p.value, str) else [{"role": "assistant", "content": t}]
                for p, t in zip(prompts, texts, strict=True)
            ],
            "completion_ids": ids,
        }
        missing = needed - set(given)
        if missing:
            raise RewardError(
                f"reward function {name} wants {', '.join(sorted(missing))}, but {prompts[0].place} has only the columns "
                f"{', '.join(columns) or 'of its prompt'}"
            )
        return function(**(given if takes_all else {k: v for k, v in given.items() if k in wanted}))

    def score(prompts: list[Prompt], ids: list[list[int]]) -> list[float | None]:
        try:
            values = call(prompts, ids)
        except EnginepostError:
            raise
        except Exception as error:
            raise RewardError(_raised(name, error, call, prompts, ids)) from error
        return check(values, name, prompts)

    return score


def model_scorer(
    path: str, tokenizer: Tokenizer, *, vocab_size: int, dtype: torch.dtype, template: str | None = None,
    device: torch.device | str = "cpu",
) -> Scorer:  # fmt: skip
    """Scores by a reward model: of prompt and completion, as they were drawn, and what a chat template writes after an answer."""
    from enginepost.model.scorer import load_scorer

    scorer = load_scorer(path, dtype, device)
    theirs, labels = scorer.model.spec.vocab_size, scorer.head.out_features
    if scorer.kind != "sequence" or labels != 1:
        raise RewardError(
            f"rewards: {path}: expected a sequence-classification checkpoint with one label, found {scorer.kind} "
            f"classification with {labels}"
        )
    if theirs != vocab_size:
        raise RewardError(
            f"rewards: {path}: the reward model has a vocabulary of {theirs} tokens and the policy one of {vocab_size}; it must "
            "read the policy's tokens, so train it from a model of the same family"
        )
    tail = after_an_answer(tokenizer, template)

    def score(prompts: list[Prompt], ids: list[list[int]]) -> list[float | None]:
        sequences = []
        for prompt, completion in zip(prompts, ids, strict=True):
            ended = completion[-1:] and completion[-1] in tokenizer.stop_ids and not isinstance(prompt.value, str)
            sequences.append([*prompt.ids, *completion, *(tail if ended else [])])
        return check(scorer.score(sequences), pathlib.Path(path).name, prompts)

    return score


def after_an_answer(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """What the chat template writes after the stop token of an answer (a line break, often): reward models have read it there."""
    if template is None and tokenizer.chat_template is None:
        return []
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.encode(render(turns, resolve(template, tokenizer), None, False, **tokenizer.special_tokens))
    stops = [i for i, id in enumerate(ids) if id in tokenizer.stop_ids]
    return ids[stops[-1] + 1 :] if stops else []


def check(values: Any, name: str, prompts: list[Prompt]) -> list[float | None]:
    """Rewards as they should be: one finite number, or None, for each completion."""
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        found = list(values)
    except TypeError:
        raise RewardError(
            f"reward function {name} returned {values!r}, expected a list of {len(prompts)} numbers, one for each completion"
        ) from None
    if len(found) != len(prompts):
        raise RewardError(
            f"reward function {name} returned {len(found)} rewards for {len(prompts)} completions (of {prompts[0].place} and on); "
            "it must return one for each, in their order"
        )
    rewards: list[float | None] = []
    for value, prompt in zip(found, prompts, strict=True):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward function {name} returned {value!r} for {prompt.place}, which is no number"
            ) from None
        if number is not None and not math.isfinite(number):
            raise RewardError(
                f"reward function {name} returned {number} for {prompt.place}; return None for a completion that it cannot score"
            )
        rewards.append(number)
    return rewards


def score_all(judges: list[Judge], prompts: list[Prompt], ids: list[list[int]]) -> Tensor:
    """float64 `[S, K]`: reward k of completion s, NaN for None."""
    columns = [[math.nan if v is None else v for v in judge.score(prompts, ids)] for judge in judges]
    return torch.tensor(columns, dtype=torch.float64).T


def _raised(
    name: str, error: Exception, call: Callable[..., Any], prompts: list[Prompt], ids: list[list[int]]
) -> str:  # fmt: skip
    """Which completion makes it raise: the first that does so alone."""
    for prompt, completion in zip(prompts, ids, strict=True):
        try:
            call([prompt], [completion])
        except Exception as alone:
            error = alone
            break
    else:
        prompt = prompts[0]
    shown = prompt.value if isinstance(prompt.value, str) else prompt.value[-1].get("content")
    return f"reward function {name} raised {type(error).__name__}: {error}; the prompt was {prompt.place}: {str(shown)[:200]!r}"


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    """What a completion says, without the stop token that ended it. Ids that only the model's padded vocabulary has say nothing."""
    ids = ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids
    return tokenizer.decode([i for i in ids if i < tokenizer.vocab_size], skip_special=True)
