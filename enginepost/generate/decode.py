"""Generation: all prompts through one packed stream.

A step is one forward pass over whatever tokens are due: the whole prompt of a sequence that has just got a slot, the last token of
one that is running. A sequence that ends frees its slot for the next prompt in the queue. Nothing is padded.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from enginepost.errors import EnginepostError
from enginepost.generate.cache import KVCache, token_bytes
from enginepost.generate.sampling import check_sampling, next_tokens, uniform
from enginepost.model.transformer import Transformer

MOST_SLOTS = 64
CACHE_BYTES = 2 << 30  # of keys and values; fewer slots where they would take more
STEP_TOKENS = 8192  # no further prompt joins a step that has as many tokens


@dataclass
class _Running:
    index: int  # of the prompt
    ids: list[int]
    due: int  # ids at the end that the cache does not hold yet
    prompt: int
    generator: np.random.Generator

    def generated(self) -> list[int]:
        return self.ids[self.prompt :]


@torch.no_grad()
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
    check_sampling(temperature, top_p, top_k, max_new_tokens)
    _check_prompts(model, prompts)
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return results
    training, checkpointing = model.training, model.checkpointing
    model.eval()
    try:
        capacity = max(len(p) for p in prompts) + max_new_tokens
        slots = max(1, min(MOST_SLOTS, len(prompts), CACHE_BYTES // (capacity * token_bytes(model))))
        cache = KVCache(model, slots, capacity)
        waiting, stops = deque(range(len(prompts))), frozenset(stop_ids)
        running: list[_Running | None] = [None] * slots
        while True:
            _admit(running, waiting, prompts, cache, seed)
            active = [(s, r) for s, r in enumerate(running) if r is not None]
            if not active:
                return results
            _forget_where_rope_switches(model, active, cache)
            counts = np.zeros(slots, dtype=np.int64)
            for s, r in active:
                counts[s] = r.due
            cu_seqlens, positions = cache.extend(counts)
            ids = [i for _, r in active for i in r.ids[-r.due :]]
            hidden = model.hidden(torch.tensor(ids, device=cache.device), cu_seqlens, positions, cache)
            last = torch.tensor([int(cu_seqlens[s + 1]) - 1 for s, _ in active]) if len(ids) > len(active) else None
            logits = model.logits(hidden if last is None else hidden[last.to(hidden.device)])
            draws = [uniform(r.generator) for _, r in active] if temperature else []
            new = next_tokens(logits, draws, temperature=temperature, top_p=top_p, top_k=top_k).tolist()
            for (s, r), token in zip(active, new, strict=True):
                r.due = 1
                if token not in stops:
                    r.ids.append(token)
                if token in stops or len(r.ids) - r.prompt == max_new_tokens:
                    results[r.index] = r.generated()
                    running[s] = None
    finally:
        model.train(training)
        model.checkpointing = checkpointing


def _admit(
    running: list[_Running | None], waiting: deque[int], prompts: Sequence[Sequence[int]], cache: KVCache, seed: int
) -> None:
    """Give free slots to waiting prompts, as many as one step may hold."""
    tokens = 0
    for s, r in enumerate(running):
        if r is None and waiting and (tokens == 0 or tokens + len(prompts[waiting[0]]) <= STEP_TOKENS):
            index = waiting.popleft()
            ids = list(prompts[index])
            running[s] = _Running(index, ids, len(ids), len(ids), np.random.default_rng([seed, index]))
            cache.used[s] = 0
            tokens += len(ids)


def _forget_where_rope_switches(model: Transformer, active: list[tuple[int, _Running]], cache: KVCache) -> None:
    """longrope has other frequencies above a length: a sequence that has just grown past it starts its cache anew."""
    for rope in model.spec.ropes:
        if rope.switches_at is not None:
            for s, r in active:
                if cache.used[s] == rope.switches_at and len(r.ids) > rope.switches_at:
                    cache.used[s] = 0
                    r.due = len(r.ids)


def _check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    spec = model.spec
    stretches = any(rope.kind == "dynamic" for rope in spec.ropes)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise EnginepostError(f"prompt {i} is empty; give at least one token, such as the beginning-of-text token")
        if len(prompt) > spec.max_position and not stretches:
            raise EnginepostError(
                f"prompt {i} has {len(prompt)} tokens, more than the {spec.max_position} (max_position_embeddings) that the model "
                "was made for; shorten it"
            )
