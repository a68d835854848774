"""What is alive while a block runs: `Tape` counts it, the functions below play a block's forward and backward pass on one.

They follow, tensor by tensor, Block.forward of model/transformer.py, model/chunked.py and the autograd functions of kernels/*.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from enginepost.plan import workspace

if TYPE_CHECKING:
    from enginepost.plan.memory import Setup

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
    "others": "reference, teacher, reward models",
    "cache": "keys and values of roll-outs",
    "process": "Python, torch and the driver",
}
MLP = ("gate_up", "down")

Held = tuple[str, float]


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


def linear_sizes(s: "Setup") -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of a block."""
    spec = s.spec
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return {
        "qkv": (spec.hidden_size, q + 2 * kv), "o": (q, spec.hidden_size),
        "gate_up": (spec.hidden_size, 2 * spec.intermediate_size), "down": (spec.intermediate_size, spec.hidden_size),
    }  # fmt: skip


def kept_bytes(s: "Setup") -> float:
    """Bytes that a block without checkpointing keeps, its input not counted (its output is the next one's)."""
    quiet = Tape()
    held, kept = block_forward(quiet, s)
    quiet.free(*held)
    return sum(n for _, n in kept.all()) + s.tokens * s.spec.hidden_size * s.itemsize


def _linear(tape: Tape, s: "Setup", name: str) -> Held:
    """The forward pass of a linear layer, its output not counted; returns what is kept for the low-rank update."""
    inputs, outputs = linear_sizes(s)[name]
    parts = s.ranks.get(name, ())
    total = sum(r for r, _ in parts)
    kept = tape.take(4.0 * total * (inputs + s.tokens) + (4.0 * s.tokens * outputs if s.dora and parts else 0))
    tape.free(tape.take(workspace.product(s, name, backward=False), "workspace"))
    if parts:
        whole = len(parts) == 1 and parts[0][1] == outputs
        tape.free(tape.take(0 if whole else 4.0 * total * outputs))
        if s.dropout:
            tape.free(tape.take(s.tokens * inputs * s.itemsize))
        if s.dora:
            tape.free(tape.take(4.0 * s.tokens * outputs))
    return kept


def _in_chunks(s: "Setup") -> bool:
    """Whether the MLP is computed a chunk at a time."""
    return s.mlp_chunk is not None and s.mlp_chunk < s.tokens


def _chunk(s: "Setup") -> "Setup":
    """The same for one chunk of the MLP."""
    assert s.mlp_chunk is not None
    return dataclasses.replace(s, tokens=s.mlp_chunk)


def _mlp(tape: Tape, s: "Setup") -> tuple[Held, Held, dict[str, Held]]:
    """The forward pass of the MLP, its output not counted: gate|up, what the down projection takes, the low-rank updates'."""
    inner = s.tokens * s.spec.intermediate_size * s.itemsize
    gate_up = tape.take(2 * inner)
    low = {"gate_up": _linear(tape, s, "gate_up")}
    act = tape.take(inner)
    low["down"] = _linear(tape, s, "down")
    return gate_up, act, low


def _chunk_forward(tape: Tape, s: "Setup") -> None:
    """The MLP chunk by chunk, nothing of which is kept."""
    c = _chunk(s)
    gate_up, act, low = _mlp(tape, c)
    tape.free(tape.take(c.tokens * c.spec.hidden_size * c.itemsize))
    tape.free(gate_up, act, *low.values())


def block_forward(tape: Tape, s: "Setup", again: bool = False) -> tuple[list[Held], _Kept]:
    """A block's forward pass, or its recomputation. The tensors that it leaves are not freed: they come back twice, as a list and by
    name."""
    spec, tokens, e = s.spec, s.tokens, s.itemsize
    h, q = tokens * spec.hidden_size * e, tokens * spec.heads * spec.head_dim * e
    qkv = tokens * linear_sizes(s)["qkv"][1] * e
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
    # Keys and values, a prompt's for both answers.
    copies = 2 * tokens * spec.kv_heads * spec.head_dim * e if s.shares else 0
    attention = tape.take(q + 4 * tokens * spec.heads + copies)
    if not spec.qk_norm:
        tape.free(projected)
    a = tape.take(h)
    low["o"] = _linear(tape, s, "o")
    if spec.post_norm:
        a = (a[0], a[1] + tape.take(h + 4 * tokens)[1])
    middle = tape.take(2 * h + 4 * tokens if spec.pre_norm else h)
    if not _in_chunks(s):
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


def quiet_forward(tape: Tape, s: "Setup") -> None:
    """A block's forward pass without gradients, as of a teacher or in a roll-out: the stream, attention's or the MLP's tensors."""
    spec, wide = s.spec, s.tokens * s.itemsize
    h, inner = wide * spec.hidden_size, wide * spec.intermediate_size
    attention = wide * linear_sizes(s)["qkv"][1] * 2 + wide * spec.heads * spec.head_dim
    tape.free(tape.take(2 * h + max(attention, h + 3 * inner)))


def _linear_backward(tape: Tape, s: "Setup", name: str, kept: Held) -> None:
    """The gradients of a linear layer's update or weight, as they come and go; that of its input is not counted."""
    inputs, outputs = linear_sizes(s)[name]
    parts = s.ranks.get(name, ())
    total = sum(r for r, _ in parts)
    held = tape.take(4.0 * s.tokens * total * 2 + 4.0 * total * inputs * 2)
    scratch = tape.take(workspace.product(s, name, backward=True), "workspace")
    if s.dora and parts:
        tape.free(tape.take(12.0 * s.tokens * outputs))
    if s.dropout and parts:
        tape.free(tape.take((4.0 if s.itemsize == 4 else 6.0) * s.tokens * inputs))
    if s.full:
        tape.free(tape.take(inputs * outputs * s.itemsize, "gradients"))
    if s.quantize and name in ("qkv", "gate_up") and s.itemsize != 4 and not s.spec.fused_checkpoint:
        tape.free(tape.take(4.0 * s.tokens * inputs))
    tape.free(scratch, held, kept)


def block_backward(tape: Tape, s: "Setup", kept: _Kept, h: float) -> None:
    """A block's backward pass, after which nothing of it is left. The gradient of its output is the caller's."""
    spec, tokens, e = s.spec, s.tokens, s.itemsize
    if not _in_chunks(s):
        dy = _mlp_backward(tape, s, kept.inner, kept.gate_up, kept.low_rank)
    else:
        dy = _chunk_backward(tape, s, h)
    dh = tape.take(h)
    tape.free(dy, kept.middle)
    d_attention = tape.take(tokens * spec.heads * spec.head_dim * e)
    _linear_backward(tape, s, "o", kept.low_rank["o"])
    d_qkv = tape.take(tokens * linear_sizes(s)["qkv"][1] * e)
    tape.free(tape.take(workspace.attention_backward(s), "workspace"))
    tape.free(d_attention, kept.attention, kept.qkv)
    d_turned = tape.take(d_qkv[1])
    tape.free(d_qkv)
    dx = tape.take(h)
    _linear_backward(tape, s, "qkv", kept.low_rank["qkv"])
    tape.free(d_turned)
    again = tape.take(h)
    tape.free(dx, kept.norms, dh, again)


def _mlp_backward(tape: Tape, s: "Setup", act: Held, gate_up: Held, low: Mapping[str, Held]) -> Held:
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


def _chunk_backward(tape: Tape, s: "Setup", h: float) -> Held:
    """The same, chunk by chunk: each is computed once more; the parameters' gradients, of the chunk in their own dtype, add up in
    float32."""
    c = _chunk(s)
    dy = tape.take(h)
    if s.full:
        matrices = [inputs * outputs for name, (inputs, outputs) in linear_sizes(s).items() if name in MLP]
        trained = sum(matrices)
    else:
        trained = sum(r * (linear_sizes(s)[name][0] + rows) for name in MLP for r, rows in s.ranks.get(name, ()))
    sums = tape.take(4.0 * trained, "gradients")
    gate_up, act, low = _mlp(tape, c)
    m = tape.take(c.tokens * c.spec.hidden_size * c.itemsize)
    dy_chunk = _mlp_backward(tape, dataclasses.replace(c, full=False) if c.full else c, act, gate_up, low)
    of_chunk = tape.take(trained * (s.itemsize if s.full else 4.0), "gradients")
    tape.free(m)
    if s.full and s.itemsize != 4 and s.device == "cpu":  # torch widens what it adds, matrix by matrix
        tape.free(tape.take(4.0 * max(matrices), "gradients"))
    tape.free(dy_chunk, of_chunk, sums)
    return dy
