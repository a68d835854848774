"""A run within its memory: what `memory` in a recipe chooses, how the C library gives memory back, and what is said when it is out.

glibc raises the size from which an allocation gets pages of its own (M_MMAP_THRESHOLD) as large ones are freed, up to 32 MB, and
keeps in its heap what lies below. Activations are of that size, so a run held 50 to 60 MB more than was alive at its peak, by chance
of their order. With the threshold at 1 MB resident memory follows what is alive, at no cost in time that could be measured.
"""

import contextlib
import ctypes
import dataclasses
import sys
from collections.abc import Callable, Iterator

import torch

from enginepost.errors import EnginepostError
from enginepost.plan.machine import available, this_machine
from enginepost.plan.memory import PROCESS, step_peak
from enginepost.plan.report import advice, settled
from enginepost.plan.setup import config_of, setup_of
from enginepost.recipe import Recipe

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class OutOfMemory(EnginepostError):
    """The run needs more memory than there is: the message is its plan, and what to change."""


def settle(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with residency and checkpointing chosen where `memory` asks for it; see `enginepost.plan.report.settled`."""
    if recipe.memory is None:
        return recipe
    chosen, message = settled(recipe)
    say(message)
    return chosen


def warning(recipe: Recipe, free: float | None) -> str | None:
    """What to say before a run that may need more than the `free` bytes that a process can still take: on Linux such a run is more
    often killed than told. None where it fits."""
    machine = this_machine()
    setup = setup_of(recipe, config_of(recipe.model), threads=machine.threads)
    peak = step_peak(setup)
    if free is None or peak.total - PROCESS["cpu"] <= free:
        return None
    shown = dataclasses.replace(machine, memory=free + PROCESS["cpu"])
    return f"warning: this run may be killed for want of memory: {advice(recipe, setup, shown)}"


@contextlib.contextmanager
def guarded(recipe: Recipe) -> Iterator[None]:
    """Within, memory is given back as it is freed, and running out of it is an OutOfMemory with the plan."""
    _give_back()
    said = warning(recipe, available())
    if said is not None:
        print(said, flush=True)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        machine = this_machine()
        setup = setup_of(recipe, config_of(recipe.model), threads=machine.threads)
        free = available()
        now = "" if free is None else f" ({free / 1e9:.2f} GB are free now)"
        raise OutOfMemory(f"out of memory{now}: {advice(recipe, setup, machine)}") from error


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "std::bad_alloc" in str(error)


def _give_back() -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 24)
