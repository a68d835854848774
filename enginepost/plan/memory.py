"""The peak memory of a training step, item by item, from a model's config alone.

A step is played through with sizes in place of tensors: `Tape` holds what is alive, by item, and remembers the highest total and
what it was made of. What is allocated and freed, and when, follows the code: Block.forward of model/transformer.py, the autograd
functions of kernels/*.py, AdamW of train/optimizer.py. Only the blocks at the two ends are played, as every item between them
grows or shrinks evenly from one to the other.

    T tokens, e bytes an element, h width, q = heads * D, kv = kv_heads * D, I inner width, R summed ranks of a linear layer

    kept of a block       T e (4 h + 2 q + 2 kv + 3 I) + 4 T R + lse          all blocks, or with checkpointing the one at work
    kept with checkpointing   T e h a block
    with mlp_chunk        3 I and the ranks of the MLP are those of a chunk, and of one block, with checkpointing or without
    head                  4 T h, the direction of each log-probability, while the head is frozen
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from enginepost.model.layout import block_bytes, layout, match_targets
from enginepost.model.spec import ModelSpec

# Items, in the order in which reports show them.
ITEMS = {
    "weights": "weights that stay",
    "slots": "weights that stream through",
    "adapters": "adapters",
    "masters": "float32 master weights",
    "gradients": "gradients",
    "optimizer": "optimizer moments",
    "inputs": "block inputs kept for the backward pass",
    "activations": "activations",
    "head": "head",
    "batch": "tokens and rotary tables",
    "workspace": "kernels' workspace",
    "process": "Python, torch and the driver",
}
MLP = ("gate_up", "down")
SMALLEST8 = 4096  # elements from which 8-bit moments are used (kernels/adamw.py)
# Anonymous memory of a process that has imported torch and this package and trained something small, beside what is counted here:
# measured on x86-64 Linux, torch 2.6 to 2.9. On a GPU: the context, which the allocator does not see.
PROCESS = {"cpu": 257e6, "cuda": 0.6e9}
MAPPED = {"cpu": 0.14e9, "cuda": 1.0e9}  # pages of libraries in memory
HOST_PROCESS = 1.2e9  # host memory of a process that has a GPU


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that decides the memory of a step.

    tokens: of the largest micro-batch; ranks: {linear layer: (rank, outputs) of each of its updates} of the block with the most;
    adapter_sizes: elements of every adapter tensor; in_backward: weights move within the backward pass, and gradients come and go.
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
    in_backward: bool = False
    device: str = "cpu"
    threads: int = 1


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


class Tape:
    """What is alive, in bytes by item, and the highest total so far."""

    def __init__(self) -> None:
        self.now: dict[str, float] = dict.fromkeys(ITEMS, 0.0)
        self.total, self.top = 0.0, 0.0
        self.at_top: dict[str, float] = {}
        self.moment, self.when = "", ""

    def take(self, nbytes: float, item: str = "activations") -> tuple[str, float]:
        """Allocate; what comes back is for `free`."""
        self.now[item] += nbytes
        self.total += nbytes
        if self.total > self.top:
            self.top, self.at_top, self.when = self.total, dict(self.now), self.moment
        return item, nbytes

    def free(self, *held: tuple[str, float]) -> None:
        for item, nbytes in held:
            self.now[item] -= nbytes
            self.total -= nbytes


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
    tape.free(tape.take(0 if s.in_backward else gradients, "gradients"))
    items = {k: v for k, v in tape.at_top.items() if v}
    return Peak(items, tape.when, MAPPED[s.device], _host(s))


def _standing(tape: Tape, s: Setup) -> None:
    """What is alive from the first step to the last."""
    tape.take(PROCESS[s.device], "process")
    resident, slots = weight_bytes(s)
    tape.take(resident, "weights")
    tape.take(slots, "slots")
    trained = trained_sizes(s)
    tape.take(0 if s.full else 4 * _total(trained), "adapters")
    tape.take(_moment_bytes(trained, s.moment_bits), "optimizer")
    tape.take(4 * _total(trained) if s.full and s.itemsize != 4 else 0, "masters")
    spec, tokens = s.spec, s.tokens
    tape.take(3 * 8 * tokens, "batch")
    for rope in spec.ropes:
        tape.take(2 * 4 * tokens * rope.dim // 2, "batch")
    tape.take(workspace_bytes(s), "workspace")


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
    """Embedding and head stay in their files too (model/residency.py, StoredTable): the head is in memory while the loss is made."""
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


@functools.cache
def _total(sizes: tuple[int, ...]) -> int:
    return sum(sizes)


@functools.cache
def _moment_bytes(sizes: tuple[int, ...], bits: int) -> int:
    """Both moments; in 8 bits with a float32 scale for every 256 elements (kernels/adamw.py)."""
    eight = [bits == 8 and size >= SMALLEST8 for size in sizes]
    return sum(2 * n + 8 * -(-n // 256) if e else 8 * n for n, e in zip(sizes, eight, strict=True))


def _gradient_bytes(s: Setup) -> float:
    return 4.0 * _total(trained_sizes(s))


def workspace_bytes(s: Setup) -> float:
    """The largest scratch that a kernel asks for: a thread keeps one, which grows to that (csrc/bindings.cpp)."""
    spec, tokens = s.spec, s.tokens
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    padded = -(-tokens // 32) * 32
    head = padded * (spec.hidden_size + 16) * (3 if s.full else 1)
    attention = tokens * q
    widths = (spec.hidden_size, q + 2 * kv, q, 2 * spec.intermediate_size, spec.intermediate_size)
    packed = max(min(32e6 / 4, tokens * k) + s.threads * 0.75e6 / 4 for k in widths) if s.device == "cpu" else 0.0
    return 4.0 * max(head + s.threads * 1e5, attention + s.threads * 2e5, packed)


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
        tape.free(*_forward(tape, s)[0])
    else:
        inputs = tape.take(0, "inputs")
        mine = tape.take(h, "activations")
        others = tape.take(kept_bytes(s) * block, "activations")
    if block == layers - 1:
        kept = [] if s.checkpointing else _forward(tape, s)[0]
        tape.moment = "the head"
        _head(tape, s, h)
        tape.free(*kept)
    trained_embedding = tape.take(
        spec.vocab_size * spec.hidden_size * s.itemsize if s.full and spec.tied else 0, "head"
    )
    dout = tape.take(h)
    tape.moment = f"the backward pass of block {block}"
    kept_again = _forward(tape, s, again=s.checkpointing is True)[1]
    again = tape.take(h if s.checkpointing else 0)  # the output made again, from which the block's backward pass begins
    _backward(tape, s, kept_again, h)
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
    hidden, wide = tape.take(h, "head"), 4 * tokens * spec.hidden_size
    table = tape.take(_table_bytes(s) if _tables_on_disk(s) else 0, "head")
    rows = tape.take(4 * 4 * tokens, "head")
    if not s.full:
        direction = tape.take(wide, "head")
        scaled = tape.take(wide, "head")
        rounded = tape.take(h, "head") if s.itemsize != 4 else tape.take(0, "head")
        tape.free(scaled, direction)
        tape.free(tape.take(h, "head"), rounded)
    else:
        dhidden = tape.take(h, "head")
        dweight = tape.take(spec.vocab_size * spec.hidden_size * s.itemsize, "head")
        tape.free(dhidden, dweight)
    tape.free(hidden, rows, table)


Held = tuple[str, float]


@dataclasses.dataclass
class _Kept:
    """What a block's forward pass leaves for its backward pass."""

    norms: Held
    qkv: Held
    attention: Held
    middle: Held
    gate_up: Held
    inner: Held
    low_rank: dict[str, Held]

    def all(self) -> list[Held]:
        return [
            self.norms, self.qkv, self.attention, self.middle, self.gate_up, self.inner, *self.low_rank.values()
        ]  # fmt: skip


def _sizes(s: Setup) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a block."""
    spec = s.spec
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "qkv": (spec.hidden_size, q + 2 * kv), "o": (q, spec.hidden_size),
        "gate_up": (spec.hidden_size, 2 * spec.intermediate_size), "down": (spec.intermediate_size, spec.hidden_size),
    }  # fmt: skip


def kept_bytes(s: Setup) -> float:
    """Bytes that a block without checkpointing keeps, its input not counted (its output is the next one's)."""
    quiet = Tape()
    held, kept = _forward(quiet, s)
    quiet.free(*held)
    return sum(n for _, n in kept.all()) + s.tokens * s.spec.hidden_size * s.itemsize


def _linear(tape: Tape, s: Setup, name: str) -> Held:
    """The forward pass of a linear layer, its output not counted; returns what is kept for the low-rank update."""
    inputs, outputs = _sizes(s)[name]
    parts = s.ranks.get(name, ())
    total = sum(r for r, _ in parts)
    kept = tape.take(4.0 * total * (inputs + s.tokens) + (4.0 * s.tokens * outputs if s.dora and parts else 0))
    if parts:
        whole = len(parts) == 1 and parts[0][1] == outputs
        tape.free(tape.take(0 if whole else 4.0 * total * outputs))
        if s.dropout:
            tape.free(tape.take(16.0 * s.tokens * inputs))
        if s.dora:
            tape.free(tape.take(4.0 * s.tokens * outputs))
    return kept


def _chunk(s: Setup) -> Setup | None:
    """The same for one chunk of the MLP; None where it is computed whole."""
    if s.mlp_chunk is None or s.mlp_chunk >= s.tokens:
        return None
    return dataclasses.replace(s, tokens=s.mlp_chunk)


def _mlp(tape: Tape, s: Setup) -> tuple[Held, Held, dict[str, Held]]:
    """The forward pass of the MLP, its output not counted: gate|up, what the down projection takes, the low-rank updates'."""
    inner = s.tokens * s.spec.intermediate_size * s.itemsize
    gate_up = tape.take(2 * inner)
    low = {"gate_up": _linear(tape, s, "gate_up")}
    act = tape.take(inner)
    low["down"] = _linear(tape, s, "down")
    return gate_up, act, low


def _chunk_forward(tape: Tape, s: Setup) -> None:
    """The MLP chunk by chunk, nothing of which is kept."""
    c = _chunk(s)
    assert c is not None
    gate_up, act, low = _mlp(tape, c)
    tape.free(tape.take(c.tokens * c.spec.hidden_size * c.itemsize))
    tape.free(gate_up, act, *low.values())


def _forward(tape: Tape, s: Setup, again: bool = False) -> tuple[list[Held], _Kept]:
    """A block's forward pass, or its recomputation. The tensors that it leaves are not freed: they come back twice, as a list and by
    name."""
    spec, tokens, e = s.spec, s.tokens, s.itemsize
    h, q = tokens * spec.hidden_size * e, tokens * spec.heads * spec.head_dim * e
    qkv = tokens * _sizes(s)["qkv"][1] * e
    low: dict[str, Held] = {}
    norms = tape.take((h if spec.pre_norm else 0) + 4 * tokens)
    projected = tape.take(qkv)
    low["qkv"] = _linear(tape, s, "qkv")
    if spec.qk_norm:
        # The projection stays, for its norms and for v; q and k once more, rotated.
        qk = qkv - tokens * spec.kv_heads * spec.head_dim * e
        normed, turned = tape.take(qk), tape.take(qk)
        tape.free(normed)
        turned = (turned[0], turned[1] + projected[1])
    else:
        turned = tape.take(qkv)
    attention = tape.take(q + 4 * tokens * spec.heads)
    if not spec.qk_norm:
        tape.free(projected)
    a = tape.take(h)
    low["o"] = _linear(tape, s, "o")
    if spec.post_norm:
        a = (a[0], a[1] + tape.take(h + 4 * tokens)[1])
    middle = tape.take(2 * h + 4 * tokens if spec.pre_norm else h)
    if _chunk(s) is None:
        gate_up, act, mlp = _mlp(tape, s)
        low |= mlp
        m = tape.take(h)
    else:
        gate_up = act = low["gate_up"] = low["down"] = tape.take(0)
        m = tape.take(h)
        if not again or spec.post_norm:  # recomputation stops before it where nothing behind it is kept
            _chunk_forward(tape, s)
    if spec.post_norm:
        tape.free(tape.take(h))
        norms = (norms[0], norms[1] + a[1] - h + m[1])  # both branches, before their norms
        tape.free((a[0], h))
    else:
        tape.free(a, m)
    kept = _Kept(norms, turned, attention, middle, gate_up, act, low)
    return kept.all(), kept


def _linear_backward(tape: Tape, s: Setup, name: str, kept: Held) -> None:
    """The gradients of a linear layer's update or weight, as they come and go; that of its input is not counted."""
    inputs, outputs = _sizes(s)[name]
    parts = s.ranks.get(name, ())
    total = sum(r for r, _ in parts)
    held = tape.take(4.0 * s.tokens * total * 2 + 4.0 * total * inputs * 2)
    if s.dora and parts:
        tape.free(tape.take(12.0 * s.tokens * outputs))
    if s.dropout and parts:
        tape.free(tape.take(16.0 * s.tokens * inputs))
    if s.full:
        tape.free(tape.take(inputs * outputs * s.itemsize, "gradients"))
    if s.quantize and name in ("qkv", "gate_up") and s.itemsize != 4 and not s.spec.fused_checkpoint:
        tape.free(tape.take(4.0 * s.tokens * inputs))
    tape.free(held, kept)


def _backward(tape: Tape, s: Setup, kept: _Kept, h: float) -> None:
    """A block's backward pass, after which nothing of it is left. The gradient of its output is the caller's."""
    spec, tokens, e = s.spec, s.tokens, s.itemsize
    if _chunk(s) is None:
        dy = _mlp_backward(tape, s, kept.inner, kept.gate_up, kept.low_rank)
    else:
        dy = _chunk_backward(tape, s, h)
    dh = tape.take(h)
    tape.free(dy, kept.middle)
    d_attention = tape.take(tokens * spec.heads * spec.head_dim * e)
    _linear_backward(tape, s, "o", kept.low_rank["o"])
    d_qkv = tape.take(tokens * _sizes(s)["qkv"][1] * e)
    tape.free(d_attention, kept.attention, kept.qkv)
    d_turned = tape.take(d_qkv[1])
    tape.free(d_qkv)
    dx = tape.take(h)
    _linear_backward(tape, s, "qkv", kept.low_rank["qkv"])
    tape.free(d_turned)
    again = tape.take(h)
    tape.free(dx, kept.norms, dh, again)


def _mlp_backward(tape: Tape, s: Setup, act: Held, gate_up: Held, low: Mapping[str, Held]) -> Held:
    """The backward pass of the MLP; the gradient of its input comes back."""
    inner = act[1]
    d_inner = tape.take(inner)
    _linear_backward(tape, s, "down", low["down"])
    tape.free(act)
    d_gate_up = tape.take(2 * inner)
    tape.free(d_inner, gate_up)
    dy = tape.take(s.tokens * s.spec.hidden_size * s.itemsize)
    _linear_backward(tape, s, "gate_up", low["gate_up"])
    tape.free(d_gate_up)
    return dy


def _chunk_backward(tape: Tape, s: Setup, h: float) -> Held:
    """The same, chunk by chunk: each is computed once more; the parameters' gradients, of the chunk in their own dtype, add up in
    float32."""
    c = _chunk(s)
    assert c is not None
    dy = tape.take(h)
    if s.full:
        matrices = [inputs * outputs for name, (inputs, outputs) in _sizes(s).items() if name in MLP]
        trained = sum(matrices)
    else:
        trained = sum(r * (_sizes(s)[name][0] + rows) for name in MLP for r, rows in s.ranks.get(name, ()))
    sums = tape.take(4.0 * trained, "gradients")
    gate_up, act, low = _mlp(tape, c)
    m = tape.take(c.tokens * c.spec.hidden_size * c.itemsize)
    dy_chunk = _mlp_backward(tape, dataclasses.replace(c, full=False), act, gate_up, low)
    of_chunk = tape.take(trained * (s.itemsize if s.full else 4.0), "gradients")
    tape.free(m)
    if s.full and s.itemsize != 4 and s.device == "cpu":  # torch widens what it adds, matrix by matrix
        tape.free(tape.take(4.0 * max(matrices), "gradients"))
    tape.free(dy_chunk, of_chunk, sums)
    return dy


def _host(s: Setup) -> dict[str, float]:
    """Host memory of a run on a GPU; {} on a CPU, where it is the device's."""
    if s.device == "cpu":
        return {}
    held = {"process": HOST_PROCESS}
    if s.weights == "host":
        held["weights"] = float(blob_bytes(s) * len(s.spec.layers))
    if s.weights == "disk":
        held["slots"] = weight_bytes(s)[1]
    if s.checkpointing == "host":
        held["inputs"] = float(s.tokens * s.spec.hidden_size * s.itemsize * len(s.spec.layers))
    return held
