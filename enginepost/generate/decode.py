"""Generation: all prompts through one packed stream.

A step is one forward pass over whatever tokens are due: the whole prompt of a sequence that has just got a slot, the last token of
one that is running. A sequence that ends frees its slot for the next in the queue. Nothing is padded.

Of several samples of one prompt, the first computes the prompt; the others fork its cache when that is done, and draw their first
token from the same logits. Samples that find no free slot wait: one slot beside the running ones, the shelf, keeps their prompt.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from enginepost.device import tensor
from enginepost.errors import EnginepostError
from enginepost.generate.cache import KVCache, token_bytes
from enginepost.generate.sampling import check_sampling, next_tokens, uniform
from enginepost.model.transformer import Transformer

MOST_SLOTS = 64
CACHE_BYTES = 2 << 30  # of keys and values; fewer slots where they would take more
STEP_TOKENS = 8192  # no further prompt joins a step that has as many tokens


@dataclass
class Completion:
    """What was drawn for a prompt. ids: with the stop id, if one ended it; `stopped` says whether. logprobs: of each id under the
    model at the temperature it was drawn with (at 1 when greedy), before top-k and top-p."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


@dataclass
class _Running:
    prompt: int  # its number
    ids: list[int]
    due: int  # ids at the end that the cache does not hold yet; 0 for one that waits to fork its prompt
    generator: np.random.Generator
    completion: Completion


@dataclass
class _Shelf:
    """The prompt whose samples found no free slot, kept in a slot that never runs."""

    slot: int
    prompt: int = -1
    logits: Tensor | None = None  # [V], after its last token


def generate(
    model: Transformer, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float = 0.0,
    top_p: float = 1.0, top_k: int = 0, stop_ids: Collection[int] = (), seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Continue every prompt.

    Args:
        prompts: token ids, of any lengths.
        max_new_tokens: per prompt, at most.
        temperature: 0 = greedy; else as in `enginepost.generate.sampling`, with top_p and top_k.
        stop_ids: a sequence ends when it draws one of these.
        seed: prompt i draws from a generator keyed by (seed, i).

    Returns: for each prompt the new ids, without the stop id that ended it.
    Raises: EnginepostError for an empty prompt, an id outside the vocabulary, a setting out of range.
    """
    drawn = _decode(
        model, prompts, samples=1, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        stop_ids=stop_ids, keys=[(seed, i) for i in range(len(prompts))], logprobs=False,
    )  # fmt: skip
    return [c.ids[:-1] if c.stopped else c.ids for (c,) in drawn]


def sample(
    model: Transformer, prompts: Sequence[Sequence[int]], *, samples: int, max_new_tokens: int, temperature: float = 1.0,
    top_p: float = 1.0, top_k: int = 0, stop_ids: Collection[int] = (), seed: int = 0,
    keys: Sequence[Sequence[int]] | None = None,
) -> list[list[Completion]]:  # fmt: skip
    """`samples` completions of every prompt, with log-probabilities: roll-outs. A prompt is computed once for all of its samples.

    Args: as for `generate`; keys: for each prompt numbers that, after the seed and before the number of the sample, key its
        generators (default its place in the list), so that what a prompt gets need not depend on which others are beside it.
    Returns: for each prompt its completions. Raises: EnginepostError as `generate` does.
    """
    if samples < 1:
        raise EnginepostError(f"samples must be at least 1, got {samples}")
    keys = [(i,) for i in range(len(prompts))] if keys is None else keys
    return _decode(
        model, prompts, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
        stop_ids=stop_ids, keys=[(seed, *key) for key in keys], logprobs=True,
    )  # fmt: skip


@torch.no_grad()
def _decode(
    model: Transformer, prompts: Sequence[Sequence[int]], *, samples: int, max_new_tokens: int, temperature: float,
    top_p: float, top_k: int, stop_ids: Collection[int], keys: Sequence[Sequence[int]], logprobs: bool,
) -> list[list[Completion]]:  # fmt: skip
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    _check_prompts(model, prompts)
    results = [[Completion() for _ in range(samples)] for _ in prompts]
    if not prompts:
        return results
    training, checkpointing = model.training, model.checkpointing
    model.eval()
    try:
        capacity = max(len(p) for p in prompts) + max_new_tokens
        slots = max(1, min(MOST_SLOTS, len(prompts) * samples, CACHE_BYTES // (capacity * token_bytes(model))))
        cache = KVCache(model, slots + (samples > 1), capacity)
        shelf = _Shelf(slots)
        waiting = deque((p, i) for p in range(len(prompts)) for i in range(samples))
        stops = frozenset(stop_ids)
        running: list[_Running | None] = [None] * slots
        while True:
            places = _admit(running, waiting, prompts, shelf)
            for s, p, i, due in places:
                generator = np.random.default_rng([*keys[p], i] if samples > 1 else keys[p])
                running[s] = _Running(p, list(prompts[p]), due, generator, results[p][i])
            active = [(s, r) for s, r in enumerate(running) if r is not None]
            if not active:
                return results
            _forget_where_rope_switches(model, active, cache)
            leaders = {p: s for s, p, _, due in places if due}
            computed = _forward(model, [(s, r) for s, r in active if r.due], cache)
            logits = _fork(cache, shelf, active, leaders, computed)
            if waiting and waiting[0][0] != shelf.prompt:
                _shelve(cache, shelf, waiting[0][0], leaders, computed)
            draws = [uniform(r.generator) for _, r in active] if temperature else []
            drawn = next_tokens(logits, draws, temperature=temperature, top_p=top_p, top_k=top_k)
            if logprobs:
                policy = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
                chosen = policy.gather(1, drawn.unsqueeze(1)).squeeze(1).tolist()
            for row, ((s, r), token) in enumerate(zip(active, drawn.tolist(), strict=True)):
                r.due = 1
                r.ids.append(token)
                r.completion.ids.append(token)
                if logprobs:
                    r.completion.logprobs.append(chosen[row])
                r.completion.stopped = token in stops
                if r.completion.stopped or len(r.completion.ids) == max_new_tokens:
                    running[s] = None
                    cache.clear(s)
    finally:
        model.train(training)
        model.checkpointing = checkpointing


def _admit(
    running: list[_Running | None], waiting: deque[tuple[int, int]], prompts: Sequence[Sequence[int]], shelf: _Shelf
) -> list[tuple[int, int, int, int]]:
    """Give free slots to waiting samples, as many as one step may hold: (slot, prompt, sample, tokens due) of each. Only the first
    sample of a prompt has tokens due."""
    places: list[tuple[int, int, int, int]] = []
    tokens, computed = 0, {shelf.prompt}
    for s, r in enumerate(running):
        if r is None and waiting:
            prompt, sample = waiting[0]
            due = 0 if prompt in computed else len(prompts[prompt])
            if tokens and tokens + due > STEP_TOKENS:
                break
            waiting.popleft()
            computed.add(prompt)
            tokens += due
            places.append((s, prompt, sample, due))
    return places


def _forward(model: Transformer, due: list[tuple[int, _Running]], cache: KVCache) -> dict[int, Tensor]:
    """Logits `[V]` after the last token of each sequence that has tokens due, by slot."""
    if not due:
        return {}
    counts = np.zeros(cache.slots, dtype=np.int64)
    for s, r in due:
        counts[s] = r.due
    cu_seqlens, positions = cache.extend(counts)
    ids = [i for _, r in due for i in r.ids[-r.due :]]
    hidden = model.hidden(tensor(ids, cache.device), cu_seqlens, positions, cache)
    if len(ids) > len(due):
        ends = np.cumsum(counts)
        hidden = hidden[tensor([int(ends[s]) - 1 for s, _ in due], cache.device)]
    return dict(zip([s for s, _ in due], model.logits(hidden), strict=True))


def _fork(
    cache: KVCache, shelf: _Shelf, active: list[tuple[int, _Running]], leaders: dict[int, int], logits: dict[int, Tensor]
) -> Tensor:  # fmt: skip
    """Logits `[S, V]` of the active sequences; one whose prompt another slot has computed takes it over, logits and all."""
    rows = []
    for s, r in active:
        if r.due:
            rows.append(logits[s])
        elif r.prompt in leaders:
            cache.fork(leaders[r.prompt], s)
            rows.append(logits[leaders[r.prompt]])
        else:
            assert shelf.logits is not None
            cache.fork(shelf.slot, s)
            rows.append(shelf.logits)
    return torch.stack(rows)


def _shelve(cache: KVCache, shelf: _Shelf, prompt: int, leaders: dict[int, int], logits: dict[int, Tensor]) -> None:
    """Keep the prompt of the first sample in the queue, if this step has computed it; else the shelf is empty."""
    shelf.prompt = prompt if prompt in leaders else -1
    if prompt in leaders:
        cache.fork(leaders[prompt], shelf.slot)
        shelf.logits = logits[leaders[prompt]].clone()


def _forget_where_rope_switches(model: Transformer, active: list[tuple[int, _Running]], cache: KVCache) -> None:
    """longrope has other frequencies above a length: a sequence that has just grown past it starts its cache anew."""
    for rope in model.spec.ropes:
        if rope.switches_at is not None:
            for s, r in active:
                if cache.used[s] == rope.switches_at and len(r.ids) > rope.switches_at:
                    cache.clear(s)
                    r.due = len(r.ids)


def _check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    spec = model.spec
    if model.device.type != "cpu":
        for prompt in prompts:
            model.check(torch.tensor(prompt, dtype=torch.int64))
    stretches = any(rope.kind == "dynamic" for rope in spec.ropes)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise EnginepostError(f"prompt {i} is empty; give at least one token, such as the beginning-of-text token")
        if len(prompt) > spec.max_position and not stretches:
            raise EnginepostError(
                f"prompt {i} has {len(prompt)} tokens, more than the {spec.max_position} (max_position_embeddings) that the model "
                "was made for; shorten it"
            )
