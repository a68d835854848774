"""Roughly how long a step takes: matrix products at the device's rate, or traffic with the host where that takes longer.

    FLOP a token    2 N forward, 2 N backward to the input, 2 N more where weights train, 2 N again with checkpointing
                    N elements of the blocks' linear layers; the head 4 V h while it is frozen, 8 V h when it trains
                    an MLP in chunks is made once more, unless the recomputation of its block leaves it out (model/chunked.py)
                    attention 4 q c forward over c keys on average, 2.5 times that backward

It says which of two recipes is faster, and is within a factor of two of the time on a machine whose rate is known.
"""

import functools

from enginepost.model.layout import layout
from enginepost.model.spec import ModelSpec
from enginepost.plan.machine import Machine
from enginepost.plan.memory import Setup, blob_bytes, total, trained_sizes

HOST_BANDWIDTH = 20e9  # bytes a second of an update in host memory


@functools.cache
def _linear_elements(spec: ModelSpec) -> int:
    return sum(e.size for e in layout(spec) if e.linear)


def flops(s: Setup, context: int) -> float:
    """Of one micro-batch of s.tokens tokens in sequences of `context`."""
    spec = s.spec
    linear = _linear_elements(spec)
    passes = 2 + (1 if s.full else 0) + (1 if s.checkpointing else 0)
    attention = 0.0
    for layer in spec.layers:
        keys = min(context, layer.window) if layer.window else context / 2
        attention += 4 * spec.heads * spec.head_dim * keys
    head = (8 if s.full else 4) * spec.vocab_size * spec.hidden_size
    mlp = 0.0
    if s.mlp_chunk is not None and s.mlp_chunk < s.tokens and (s.checkpointing is not True or spec.post_norm):
        mlp = 2.0 * 3 * spec.hidden_size * spec.intermediate_size * len(spec.layers)
    low_rank = 6 * total(s.adapter_sizes)
    return s.tokens * (2 * linear * passes + attention * (3.5 + (1 if s.checkpointing else 0)) + head + low_rank + mlp)


def step_seconds(s: Setup, machine: Machine, context: int) -> float:
    """Of one optimizer step: its micro-batches, then the update."""
    compute = flops(s, context) / machine.flops
    if s.itemsize == 4 and machine.device == "cuda":
        compute *= 4  # float32 runs on half-rate TF32 tensor cores at best
    streamed = 0.0
    if s.weights == "disk" or (s.weights == "host" and machine.device == "cuda"):
        link = machine.link if s.weights == "host" else min(machine.link, 2e9)
        # Forward and backward; the last block of one direction is the first of the other.
        streamed = 2 * blob_bytes(s) * len(s.spec.layers) / link
    if s.checkpointing == "host" and machine.device == "cuda":
        streamed += 2 * s.tokens * s.spec.hidden_size * s.itemsize * len(s.spec.layers) / machine.link
    update = 28.0 * total(trained_sizes(s)) / machine.bandwidth
    if s.states == "host" and machine.device == "cuda":  # gradient down, parameter up, the update at a host's rate
        update = total(trained_sizes(s)) * ((4 + (s.itemsize if s.full else 4)) / machine.link + 28.0 / HOST_BANDWIDTH)
    return s.micro_batches * max(compute, streamed) + update
