"""A run within its memory: what `memory` in a recipe chooses, and what is said when it is out of it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch

from enginepost.errors import EnginepostError
from enginepost.plan.machine import Machine, available, card, this_machine
from enginepost.plan.memory import PROCESS, Setup, step_peak
from enginepost.plan.report import advice, settled, stated
from enginepost.plan.setup import config_of, setup_of
from enginepost.recipe import Recipe
from enginepost.train.weights import device_of


class OutOfMemory(EnginepostError):
    """The run needs more memory than there is: the message is its plan, and what to change."""


def settle(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with residency and checkpointing chosen where `memory` asks for it; see `enginepost.plan.report.settled`."""
    if recipe.memory is None:
        return recipe
    chosen, message = settled(recipe, machine_of(recipe))
    say(message)
    return chosen


def machine_of(recipe: Recipe) -> Machine:
    """What the run may use: this CPU's memory or, on a GPU, what is free of the card's, within the recipe's `memory`."""
    device = device_of(recipe)
    if device.type == "cpu":
        return this_machine(stated(recipe))
    api = torch.get_device_module(device)
    free, total = api.mem_get_info(device)
    # What this process holds already is the run's as well: its context, and the few tensors of the kernels' self-test.
    return card(api.get_device_name(device), float(total), min(float(total), free + PROCESS["cuda"]), stated(recipe))


def capped(recipe: Recipe) -> float | None:
    """Hold torch's allocator to the recipe's `memory` on a GPU, less the driver's context, which it does not see; returns the share
    of the card that is left to it, None without a budget. Beyond it an allocation fails, and the run ends with its plan."""
    device, budget = device_of(recipe), stated(recipe)
    if device.type == "cpu" or budget is None:
        return None
    api = torch.get_device_module(device)
    total = api.mem_get_info(device)[1]
    share = min(1.0, max(0.0, (budget - PROCESS["cuda"]) / total))
    api.set_per_process_memory_fraction(share, device)
    return float(share)


def _setup(recipe: Recipe, machine: Machine) -> Setup:
    return setup_of(recipe, config_of(recipe.model), device=machine.device, threads=machine.threads)


def warning(recipe: Recipe, free: float | None) -> str | None:
    """What to say before a run that may need more than the `free` bytes that a process can still take: on Linux such a run is more
    often killed than told. None where it fits."""
    machine = this_machine()
    setup = _setup(recipe, machine)
    peak = step_peak(setup)
    if free is None or peak.total - PROCESS["cpu"] <= free:
        return None
    shown = dataclasses.replace(machine, memory=free + PROCESS["cpu"])
    return f"warning: this run may be killed for want of memory: {advice(recipe, setup, shown)}"


@contextlib.contextmanager
def guarded(recipe: Recipe) -> Iterator[None]:
    """Within, running out of memory is an OutOfMemory with the plan. On a GPU torch's allocator is held to the recipe's `memory`."""
    on_cpu = device_of(recipe).type == "cpu"
    machine = machine_of(recipe)
    said = warning(recipe, available()) if on_cpu else None  # a GPU says no where Linux kills
    if said is not None:
        print(said, flush=True)
    capped(recipe)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        free = available() if on_cpu else None
        now = "" if free is None else f" ({free / 1e9:.2f} GB are free now)"
        where = "" if on_cpu else f" on {machine.name}"
        shown = this_machine() if on_cpu else machine
        raise OutOfMemory(f"out of memory{where}{now}: {advice(recipe, _setup(recipe, shown), shown)}") from error


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "std::bad_alloc" in str(error)
