"""What fits: the longest context, the largest batch, and the switches of a recipe that bring it under a budget at the least cost."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from enginepost.plan.machine import Machine
from enginepost.plan.memory import Peak, Setup, step_peak
from enginepost.plan.speed import step_seconds

# Of the budget, for what is allocated beside what is counted: unlike sizes in a GPU's caching allocator, small tensors on a CPU.
MARGIN = {"cpu": 1.03, "cuda": 1.06}
LONGEST = 1 << 22  # tokens; the search ends there
MLP_CHUNK = 1024  # tokens: enough rows for products at the full rate


@dataclasses.dataclass(frozen=True)
class Choice:
    """Recipe keys to change, what they lead to, and whether the result of training stays the same to the bit."""

    changes: dict[str, Any]
    setup: Setup
    peak: Peak
    seconds: float
    same_bits: bool


def fits(peak: Peak, machine: Machine) -> bool:
    """Whether a run stays within the machine's memory, and its host's where that is known."""
    if machine.memory is not None and peak.total * MARGIN[machine.device] > machine.memory:
        return False
    return machine.host is None or sum(peak.host.values()) <= machine.host


def longest_context(s: Setup, machine: Machine) -> int:
    """Tokens of the longest sequence that fits alone in a micro-batch (of a pair, each of the two); 0 when none does."""
    return _largest(lambda n: dataclasses.replace(s, tokens=n * s.each), machine, LONGEST)


def largest_batch(s: Setup, machine: Machine, max_length: int) -> int:
    """The largest batch_size at this max_length; 0 when not even one bin fits."""
    return _largest(
        lambda n: dataclasses.replace(s, tokens=n * max_length * s.each), machine, max(1, LONGEST // max_length)
    )


def _largest(made: Callable[[int], Setup], machine: Machine, top: int) -> int:
    low, high = 0, 1
    while high < top and fits(step_peak(made(high)), machine):
        low, high = high, min(2 * high, top)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(step_peak(made(middle)), machine) else (low, middle)
    return low


def choices(
    s: Setup, machine: Machine, *, batch_size: int, max_length: int, keys: Iterable[str], context: int
) -> list[Choice]:
    """Every combination of the switches named in `keys`, fits or not, the cheapest first: those that keep the results, then by time,
    then by the number of keys."""
    options: dict[str, list[tuple[dict[str, Any], dict[str, Any], bool]]] = {}
    for key in keys:
        options[key] = [({}, {}, True), *_options(key, s, machine, batch_size, max_length)]
    found = []
    for combination in itertools.product(*options.values()):
        changes: dict[str, Any] = {}
        fields: dict[str, Any] = {}
        same = True
        for recipe_keys, setup_fields, bits in combination:
            changes |= recipe_keys
            fields |= setup_fields
            same = same and bits
        setup = dataclasses.replace(s, **fields)
        if setup.in_backward and setup.micro_batches > 1:
            continue  # the first micro-batch would move the weights before the others are seen
        seconds = step_seconds(setup, machine, context)
        found.append(Choice(changes, setup, step_peak(setup), seconds, same))
    return sorted(found, key=lambda c: (not c.same_bits, round(c.seconds, 6), len(c.changes), c.peak.total))


def cheapest(found: Iterable[Choice], machine: Machine) -> Choice | None:
    """The first choice that fits."""
    return next((c for c in found if fits(c.peak, machine)), None)


def utmost(found: Iterable[Choice], machine: Machine) -> tuple[int, Choice] | None:
    """(the longest context of all choices, the first choice that allows it); None where none allows any."""
    longest: tuple[int, Choice] | None = None
    for choice in found:
        # Worth a search only where more than the best so far fits.
        more = 1 if longest is None else longest[0] + max(1, longest[0] // 1000)
        if fits(step_peak(dataclasses.replace(choice.setup, tokens=more * choice.setup.each)), machine):
            longest = longest_context(choice.setup, machine), choice
    return longest


def _options(
    key: str, s: Setup, machine: Machine, batch_size: int, max_length: int
) -> list[tuple[dict[str, Any], dict[str, Any], bool]]:
    """(recipe keys, fields of Setup, same bits) of the values that a switch has beside the recipe's own."""
    if key == "checkpointing":
        ways = (True, False, "host") if machine.device == "cuda" else (bool(s.checkpointing), not s.checkpointing)
        return [({key: way}, {key: way}, True) for way in ways if way != s.checkpointing]
    if key == "mlp_chunk" and s.mlp_chunk is None:
        return [
            ({key: MLP_CHUNK}, {key: MLP_CHUNK}, True)
        ]  # the same sums in another order, as with smaller micro-batches
    if key == "optimizer_in_backward" and not s.in_backward and s.micro_batches == 1:
        return [({key: True, "clip": None}, {"in_backward": True}, False)]
    if key == "weights" and not s.full:
        homes = ("resident", "host", "disk") if machine.device == "cuda" else ("resident", "disk")
        return [({key: home}, {key: home}, True) for home in homes if home != s.weights]
    if key == "quantize" and not s.full and s.quantize is None:
        return [({key: kind}, {key: kind}, False) for kind in ("nf4", "nf4-double")]
    if key == "optimizer" and s.moment_bits == 32:
        return [({key: "adamw8bit"}, {"moment_bits": 8}, False)]
    if key == "optimizer_states" and s.states == "device" and machine.device == "cuda":
        return [({key: "host"}, {"states": "host"}, False)]  # the CPU's arithmetic in place of the GPU's
    if key == "batch_size" and batch_size > 1 and s.rollout is not None:  # how a roll-out is cut, changes nothing
        return [({key: 1}, {"tokens": s.tokens // batch_size, "micro_batches": s.micro_batches * batch_size}, True)]
    if key == "batch_size" and batch_size > 1:
        # As many tokens an optimizer step, in smaller micro-batches: the same sum in another order.
        sizes = [n for n in (batch_size // 2, batch_size // 4, 1) if n >= 1 and batch_size % n == 0]
        return [
            (
                {"batch_size": n, "gradient_accumulation": s.micro_batches * batch_size // n},
                {"tokens": n * max_length * s.each, "micro_batches": s.micro_batches * batch_size // n},
                True,
            )
            for n in dict.fromkeys(sizes)
        ]
    return []


def described(changes: Mapping[str, Any]) -> str:
    """`weights=disk checkpointing=true`: as the command line takes it."""
    return " ".join(
        f"{k}={'null' if v is None else str(v).lower() if isinstance(v, bool) else v}" for k, v in changes.items()
    )
