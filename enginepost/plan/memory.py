"""The peak memory of a training step, item by item, from a model's config alone.

A step is played through with sizes in place of tensors: `Tape` holds what is alive, by item, and remembers the highest total and
what it was made of. What is allocated and freed, and when, follows the code: of blocks in plan/block.py, of
the rest here and in AdamW of train/optimizer.py. Only the blocks at the two ends are played, as every item between them
grows or shrinks evenly from one to the other.

    T tokens, e bytes an element, h width, q = heads * D, kv = kv_heads * D, I inner width, R summed ranks of a linear layer

    kept of a block       T e (4 h + 2 q + 2 kv + 3 I) + 4 T R + lse          all blocks, or with checkpointing the one at work
    kept with checkpointing   T e h a block
    with mlp_chunk        3 I and the ranks of the MLP are those of a chunk, and of one block, with checkpointing or without
    head                  4 T h, the direction of each log-probability, while the head is frozen

What a method holds beside that is in plan/methods.py: other models, their passes, roll-outs. Those come before a step's own passes
and after the step before, so the peak is the highest of these moments.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from enginepost.model.layout import block_bytes, layout, match_targets
from enginepost.model.pinned import pieces, taken
from enginepost.model.spec import ModelSpec
from enginepost.plan import workspace
from enginepost.plan.block import Tape, block_backward, block_forward, kept_bytes, quiet_forward

SMALLEST8 = 4096  # elements from which 8-bit moments are used (kernels/adamw.py)
# Anonymous memory of a process that has imported torch and this package and trained something small, beside what is counted here:
# measured on x86-64 Linux, torch 2.6 to 2.9. On a GPU: the context, which the allocator does not see.
PROCESS = {"cpu": 257e6, "cuda": 0.6e9}
MAPPED = {"cpu": 0.14e9, "cuda": 1.0e9}  # pages of libraries in memory
HOST_PROCESS = 1.2e9  # host memory of a process that has a GPU
HEAD_PART = 2 * 4032  # rows of a head in a file that are in memory at a time: PARTS of kernels/linear_logprob.py


@dataclasses.dataclass(frozen=True)
class Other:
    """A model beside the one that trains: its bytes; the tokens of its passes, 0 for those of a micro-batch; whether it is there
    only before the first step (its answers are kept on disk)."""

    name: str
    spec: ModelSpec
    nbytes: float
    tokens: int = 0
    before: bool = False


@dataclasses.dataclass(frozen=True)
class RollOut:
    """slots: sequences at once; stored: tokens whose keys and values are in memory at most; reserved: ... that a GPU sets aside;
    prompts: tokens of the longest step, which reads prompts."""

    slots: int
    stored: int
    reserved: int
    prompts: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a step.

    tokens: of the largest micro-batch; ranks: {linear layer: (rank, outputs) of each of its updates} of the block with the most;
    adapter_sizes: elements of every adapter tensor; in_backward: weights move within the backward pass, and gradients come and go.
    each: sequences of max_length in a bin; head: what stands on the hidden states ("logprob", "kl", "score"); takes: it gets a copy
    of the rows that it looks at; shares: two answers share the keys of a prompt; wide: a float32 copy of the hidden states (ppo).
    """

    spec: ModelSpec
    tokens: int
    micro_batches: int = 1
    itemsize: int = 2
    full: bool = False
    ranks: Mapping[str, tuple[tuple[int, int], ...]] = dataclasses.field(default_factory=dict)
    adapter_sizes: tuple[int, ...] = ()
    dora: bool = False
    dropout: bool = False
    checkpointing: bool | str = True  # "host": block inputs in host memory; "bf16": rounded to two bytes
    mlp_chunk: int | None = None  # tokens of which an MLP is computed at a time
    quantize: str | None = None
    weights: str = "resident"
    slots: int = 2
    moment_bits: int = 32
    states: str = "device"  # where moments and masters live
    in_backward: bool = False
    device: str = "cpu"
    threads: int = 1
    each: int = 1
    head: str = "logprob"
    takes: bool = False
    shares: bool = False
    wide: bool = False
    copies: float = 0.0  # bytes of adapters that do not train: a reference's
    others: tuple[Other, ...] = ()
    rollout: RollOut | None = None


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes at the highest moment: of the device (on a CPU: anonymous memory), by item; `when` names the moment. mapped: pages of
    files in memory beside it. host: bytes of host memory that a GPU run needs."""

    items: dict[str, float]
    when: str
    mapped: float
    host: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.items.values())


def adapter(spec: ModelSpec, targets: str | list[str], rank: int, patterns: Mapping[str, int], dora: bool) -> tuple[
    dict[str, tuple[tuple[int, int], ...]], tuple[int, ...]
]:  # fmt: skip
    """(ranks of the block that has the most, elements of every adapter tensor): see `Setup`."""
    blocks: dict[int, dict[str, list[tuple[int, int]]]] = {}
    sizes: list[int] = []
    for target in match_targets(spec, targets):
        r = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", target.path)), rank)
        rows = target.stop - target.start
        _, index, linear = target.linear.split(".")
        blocks.setdefault(int(index), {}).setdefault(linear, []).append((r, rows))
        sizes += [r * target.inputs, rows * r, *([rows] if dora else [])]
    most = max(blocks.values(), key=lambda b: sum(r for parts in b.values() for r, _ in parts))
    return {name: tuple(parts) for name, parts in most.items()}, tuple(sizes)


def step_peak(s: Setup) -> Peak:
    """The highest moment of a run's steps, from the second on (moments and gradients exist by then)."""
    tape = Tape()
    _standing(tape, s)
    layers = len(s.spec.layers)
    gradients = _gradient_bytes(s)
    ends = {layers - 1, 0}
    for block in sorted(ends, reverse=True):
        # Gradients of the blocks after this one are there already; with more than one micro-batch all are, from the first on.
        # Float32 gradients beside bfloat16 parameters are never given back (train/optimizer.py).
        always = s.micro_batches > 1 or (s.full and s.itemsize != 4)
        share = (layers - 1 - block) / layers
        there = tape.take(0 if s.in_backward else gradients if always else _passed(s, share), "gradients")
        _play(tape, s, block)
        tape.free(there)
    tape.moment = "the optimizer's step"
    there = tape.take(0 if s.in_backward else gradients, "gradients")
    for other in s.others:
        if not other.before:
            _pass(tape, s, other)
    _rollout(tape, s)
    tape.free(there)
    first = _before(s)
    tape = first if first.top > tape.top else tape
    items = {k: v for k, v in tape.at_top.items() if v}
    return Peak(items, tape.when, MAPPED[s.device], _host(s))


def _pass(tape: Tape, s: Setup, other: Other) -> None:
    """What another model says of a micro-batch, or of roll-outs."""
    tape.moment = f"the pass of the {other.name}"
    quiet = dataclasses.replace(s, spec=other.spec, tokens=other.tokens or s.tokens)
    hidden = tape.take(quiet.tokens * other.spec.hidden_size * s.itemsize)
    quiet_forward(tape, quiet)
    tape.free(hidden)


def _before(s: Setup) -> Tape:
    """The passes whose answers are kept on disk: no optimizer is there yet."""
    tape = Tape()
    early = [other for other in s.others if other.before]
    if early:
        _standing(tape, s, states=False)
    for other in early:
        held = tape.take(other.nbytes, "others")
        _pass(tape, s, other)
        tape.free(held)
    return tape


def _rollout(tape: Tape, s: Setup) -> None:
    """The step of a roll-out that reads prompts, with as much in the cache as at its end."""
    r, spec = s.rollout, s.spec
    if r is None:
        return
    tape.moment = "a roll-out"
    token = 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * s.itemsize
    cache = tape.take(token * (r.stored if s.device == "cpu" else r.reserved), "cache")
    quiet_forward(tape, dataclasses.replace(s, tokens=r.prompts))
    # Logits as they come, in float32, side by side, scaled, the policy's; and running sums in float64.
    tape.free(tape.take(r.slots * spec.vocab_size * (s.itemsize + 4.0 * 4 + 8), "head"), cache)


def _standing(tape: Tape, s: Setup, states: bool = True) -> None:
    """What is alive from the first step to the last. states: the optimizer's too."""
    tape.take(PROCESS[s.device], "process")
    resident, slots = weight_bytes(s)
    tape.take(resident, "weights")
    tape.take(slots, "slots")
    trained = trained_sizes(s)
    tape.take(0 if s.full else 4 * total(trained), "adapters")
    tape.take(s.copies + sum(o.nbytes for o in s.others if not o.before), "others")
    if states and (s.device == "cpu" or s.states == "device"):
        for item, nbytes in _state_bytes(s).items():
            tape.take(nbytes, item)
    spec, tokens = s.spec, s.tokens
    tape.take(3 * 8 * tokens, "batch")
    for rope in spec.ropes:
        tape.take(2 * 4 * tokens * rope.dim // 2, "batch")
    tape.take(workspace.standing(s), "workspace")


def weight_bytes(s: Setup) -> tuple[float, float]:
    """(weights that stay on the device, slots that the others stream through), in bytes."""
    blob, layers = blob_bytes(s), len(s.spec.layers)
    rest = float(_rest_elements(s.spec) * s.itemsize)
    if _tables_on_disk(s):
        rest -= (1 if s.spec.tied else 2) * _table_bytes(s)
    if s.weights == "resident" or (s.weights == "host" and s.device == "cpu"):
        return rest + blob * layers, 0.0
    return rest, float(min(s.slots, layers) * blob)


def _tables_on_disk(s: Setup) -> bool:
    """Embedding and head stay in their files too (model/residency.py, StoredTable): the loss reads the head a part at a time."""
    return s.weights == "disk" and s.device == "cpu"


def _table_bytes(s: Setup) -> float:
    return float(s.spec.vocab_size * s.spec.hidden_size * s.itemsize)


def blob_bytes(s: Setup) -> int:
    """Bytes of the linear layers of one block; all blocks have the same shapes."""
    return _blob_bytes(s.spec, s.quantize, s.itemsize)


@functools.cache
def _blob_bytes(spec: ModelSpec, quantize: str | None, itemsize: int) -> int:
    return block_bytes(spec, 0, quantize=quantize, itemsize=itemsize)


@functools.cache
def _rest_elements(spec: ModelSpec) -> int:
    """Embedding, head, norms, biases."""
    return sum(entry.size for entry in layout(spec) if not entry.linear)


@functools.cache
def _parameter_sizes(spec: ModelSpec) -> tuple[int, ...]:
    fused: dict[str, int] = {}
    for entry in layout(spec):
        fused[entry.parameter] = fused.get(entry.parameter, 0) + entry.size
    return tuple(fused.values())


def trained_sizes(s: Setup) -> tuple[int, ...]:
    """Elements of every tensor that trains."""
    return _parameter_sizes(s.spec) if s.full else s.adapter_sizes


def _passed(s: Setup, share: float) -> float:
    """Gradients that are there when the backward pass has gone through a share of the blocks: the table's comes last."""
    if not s.full:
        return _gradient_bytes(s) * share
    table = 4.0 * s.spec.vocab_size * s.spec.hidden_size
    head = 0.0 if s.spec.tied else table
    return head + share * (_gradient_bytes(s) - table - head)


def total(sizes: tuple[int, ...]) -> int:
    return sum(sizes)


@functools.cache
def _moment_bytes(sizes: tuple[int, ...], bits: int) -> int:
    """Both moments; in 8 bits with a float32 scale for every 256 elements (kernels/adamw.py)."""
    eight = [bits == 8 and size >= SMALLEST8 for size in sizes]
    return sum(2 * n + 8 * -(-n // 256) if e else 8 * n for n, e in zip(sizes, eight, strict=True))


def _state_bytes(s: Setup) -> dict[str, float]:
    """Of the optimizer, by item."""
    trained = trained_sizes(s)
    masters = 4 * total(trained) if s.full and s.itemsize != 4 else 0
    return {"optimizer": _moment_bytes(trained, s.moment_bits), "masters": masters}


def _gradient_bytes(s: Setup) -> float:
    return 4.0 * total(trained_sizes(s))


def _play(tape: Tape, s: Setup, block: int) -> None:
    """Forward to the head, the head, and back to `block`, whose backward pass is played."""
    spec, layers = s.spec, len(s.spec.layers)
    h = s.tokens * spec.hidden_size * s.itemsize
    tape.moment = f"the forward pass of block {block}"
    if s.checkpointing:
        each = s.tokens * spec.hidden_size * (2 if s.checkpointing == "bf16" else s.itemsize)
        away = s.checkpointing == "host" and s.device != "cpu"
        inputs = tape.take(each * (min(block, 2) if away else block), "inputs")
        mine = tape.take(h, "inputs")
        tape.free(*block_forward(tape, s)[0])
    else:
        inputs = tape.take(0, "inputs")
        mine = tape.take(h, "activations")
        others = tape.take(kept_bytes(s) * block, "activations")
    if block == layers - 1:
        kept = [] if s.checkpointing else block_forward(tape, s)[0]
        tape.moment = "the head"
        _head(tape, s, h)
        tape.free(*kept)
    trained_embedding = tape.take(
        spec.vocab_size * spec.hidden_size * s.itemsize if s.full and spec.tied else 0, "head"
    )
    dout = tape.take(h)
    tape.moment = f"the backward pass of block {block}"
    kept_again = block_forward(tape, s, again=s.checkpointing is True)[1]
    again = tape.take(h if s.checkpointing else 0)  # the output made again, from which the block's backward pass begins
    block_backward(tape, s, kept_again, h)
    tape.free(again)
    if block == 0 and s.full:
        # The table's own gradient is dense; with a tied head the two are added when both are there.
        tape.free(
            tape.take(
                spec.vocab_size * spec.hidden_size * s.itemsize * (2 if spec.tied and s.itemsize != 4 else 1), "head"
            )
        )
    tape.free(dout, mine, inputs, trained_embedding)
    if not s.checkpointing:
        tape.free(others)


def _head(tape: Tape, s: Setup, h: float) -> None:
    spec, tokens = s.spec, s.tokens
    hidden, wide = tape.take(h, "head"), 4.0 * tokens * spec.hidden_size
    if s.head == "score":
        tape.free(tape.take(h, "head"), hidden)  # the gradient of the rows that are looked at, among those that are not
        return
    # A divergence looks at the whole head; log-probabilities at two parts, one in use and one being read, and the rows of the
    # targets (kernels/linear_logprob.py).
    parts = (
        _table_bytes(s)
        if s.head == "kl"
        else h + min(2.0 * HEAD_PART * spec.hidden_size * s.itemsize, 2 * _table_bytes(s))
    )
    table = tape.take(parts if _tables_on_disk(s) else 0, "head")
    rows = tape.take(4 * 4 * tokens + (wide if s.wide else 0), "head")
    if s.head == "kl":
        _divergence(tape, s, h, wide)
    elif not s.full:
        direction = tape.take(wide, "head")
        tape.free(tape.take(workspace.head(s), "workspace"))
        scaled = tape.take(wide, "head")
        rounded = tape.take(h, "head") if s.itemsize != 4 else tape.take(0, "head")
        tape.free(scaled, direction)
        tape.free(tape.take(2 * h if s.takes else h, "head"), rounded)
    else:
        dhidden = tape.take(h, "head")
        dweight = tape.take(spec.vocab_size * spec.hidden_size * s.itemsize, "head")
        tape.free(tape.take(workspace.head(s), "workspace"))
        tape.free(dhidden, dweight)
    tape.free(hidden, rows, table)


def _divergence(tape: Tape, s: Setup, h: float, wide: float) -> None:
    """Of a teacher's distribution, in blocks of the vocabulary (kernels/linear_kl.py): one a side, one for a gradient in 16 bits
    or a product that is cut, and sums."""
    block = 4.0 * max(64 * s.tokens, 1 << (20 if s.device == "cpu" else 24))
    theirs = max((o.spec.hidden_size for o in s.others if not o.before), default=0)
    shown = tape.take(s.tokens * theirs * s.itemsize, "head")
    blocks = tape.take((3 if theirs else 2) * min(block, 4.0 * s.tokens * s.spec.vocab_size), "head")
    table = s.spec.vocab_size * s.spec.hidden_size * s.itemsize if s.full else 0
    sums = tape.take(wide + h + table, "head")
    tape.free(blocks, sums)
    tape.free(tape.take(h, "head"), shown)


def _host(s: Setup) -> dict[str, float]:
    """Host memory of a run on a GPU; {} on a CPU, where it is the device's."""
    if s.device == "cpu":
        return {}
    held = {"process": HOST_PROCESS}
    if s.weights == "host":
        held["weights"] = float(taken(blob_bytes(s)) * len(s.spec.layers))
    if s.weights == "disk":
        held["slots"] = float(min(s.slots, len(s.spec.layers)) * taken(blob_bytes(s)))
    if s.states == "host":
        held |= {item: nbytes for item, nbytes in _state_bytes(s).items() if nbytes}
    if s.checkpointing == "host":
        held["inputs"] = float(len(s.spec.layers) * sum(map(taken, pieces(s.tokens * s.spec.hidden_size * s.itemsize))))
    return held
