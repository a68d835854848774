"""`enginepost plan`: one Plan, as a table or as JSON. `settled` is what `memory:` in a recipe leads to, `advice` what is said when a
run goes out of memory."""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from enginepost.errors import EnginepostError
from enginepost.plan import choose
from enginepost.plan.block import ITEMS
from enginepost.plan.machine import Machine, gpu, size, this_machine
from enginepost.plan.memory import PROCESS, Peak, Setup, step_peak
from enginepost.plan.setup import config_of, setup_of
from enginepost.plan.speed import step_seconds
from enginepost.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from rich.console import Console

SWITCHES = ("checkpointing", "weights", "batch_size", "quantize", "mlp_chunk", "optimizer", "optimizer_states",
            "optimizer_in_backward")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plan:
    """peak: the recipe as it stands; fits: None when no memory is known; longest_context: tokens of one sequence, largest_batch:
    bins of max_length, both with the recipe's other keys; change: the cheapest switches that make it fit, None where it fits already
    or nothing does; utmost: (longest context of all combinations of switches, the combination) where it does not fit."""

    recipe: Recipe
    machine: Machine
    setup: Setup
    peak: Peak
    fits: bool | None
    seconds: float
    longest_context: int | None
    largest_batch: int | None
    change: choose.Choice | None
    utmost: tuple[int, choose.Choice] | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.setup.tokens * self.setup.micro_batches / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: bytes, seconds, tokens."""
        change = self.change
        return {
            "machine": self.machine.name,
            "device": self.machine.device,
            "memory": self.machine.memory,
            "tokens_per_micro_batch": self.setup.tokens,
            "device_peak": round(self.peak.total),
            "device_items": {k: round(self.peak.items[k]) for k in ITEMS if k in self.peak.items},
            "device_peak_at": self.peak.when,
            "mapped": round(self.peak.mapped),
            "host_peak": round(sum(self.peak.host.values())),
            "host_items": {k: round(v) for k, v in self.peak.host.items()},
            "fits": self.fits,
            "seconds_per_step": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "longest_context": self.longest_context,
            "largest_batch_size": self.largest_batch,
            "utmost": None if self.utmost is None else {"context": self.utmost[0], "keys": self.utmost[1].changes},
            "change": None
            if change is None
            else {
                "keys": change.changes,
                "device_peak": round(change.peak.total),
                "seconds_per_step": change.seconds,
                "same_results": change.same_bits,
            },
        }

    def show(self, console: "Console") -> None:
        """The table and the lines below it."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        table.add_column("item", no_wrap=True)
        table.add_column("GB", justify="right")
        table.add_column("", justify="right", no_wrap=True)
        for item, title in ITEMS.items():
            nbytes = self.peak.items.get(item, 0)
            if nbytes >= 5e6:
                table.add_row(title, _gb(nbytes), f"{100 * nbytes / self.peak.total:.0f}%")
        table.add_row("[bold]peak[/bold]", f"[bold]{_gb(self.peak.total)}[/bold]", f"in {self.peak.when}")
        console.print(table)
        for line in self.lines():
            console.print(line, markup=False, highlight=False)

    def lines(self) -> list[str]:
        """What the table does not say."""
        found = []
        if self.machine.device == "cpu":
            found.append(
                f"pages of files (libraries): {_gb(self.peak.mapped)} GB beside it, which the system can take back"
            )
        else:
            host = ", ".join(f"{_host_title(k)} {_gb(v)}" for k, v in self.peak.host.items())
            found.append(f"host memory: {_gb(sum(self.peak.host.values()))} GB ({host})")
        found.append(
            f"speed, roughly: {_number(self.tokens_per_second)} tokens/s, {_number(self.seconds)} s an optimizer step of "
            f"{self.setup.tokens * self.setup.micro_batches} tokens, on {self.machine.name}"
        )
        if self.setup.rollout is not None:
            found.append("the time of drawing roll-outs and of scoring them is not in it")
        if self.machine.memory is None:
            return [*found, "how much memory there is, is not known here; say --gpu or --memory to see what fits"]
        found.append(self._verdict())
        if self.fits:
            return [*found, *self._limits()]
        if self.change is not None:
            note = (
                ""
                if self.change.same_bits
                else "; it changes the weights that are trained over, or the optimizer's rounding"
            )
            found.append(
                f"cheapest change that fits: {choose.described(self.change.changes)}: {_gb(self.change.peak.total)} GB, "
                f"{_number(self.change.seconds)} s a step{note}"
            )
        else:
            found.append(_nothing(self.setup, self.machine))
        if self.utmost is not None:
            tokens, choice = self.utmost
            keys = choose.described(
                {k: v for k, v in choice.changes.items() if k not in ("batch_size", "gradient_accumulation")}
            )
            found.append(
                f"the longest sequence that any switches allow: {tokens} tokens" + (f", with {keys}" if keys else "")
            )
        return found

    def _verdict(self) -> str:
        """Whether it fits, and what of it does not."""
        assert self.machine.memory is not None
        said = f"in {_gb(self.machine.memory)} GB"
        if self.fits:
            return f"fits {said}"
        short, host = [], sum(self.peak.host.values())
        if self.peak.total * choose.MARGIN[self.machine.device] > self.machine.memory:
            near = self.peak.total <= self.machine.memory
            beside = round(100 * (choose.MARGIN[self.machine.device] - 1))
            short.append(said + (f", with {beside} % for what is allocated beside it" if near else ""))
        if self.machine.host is not None and host > self.machine.host:
            short.append(f"in {_gb(self.machine.host)} GB of host memory, of which it needs {_gb(host)}")
        return "does not fit " + ", nor ".join(short)

    def _limits(self) -> list[str]:
        return [
            f"with the recipe's other keys: one sequence of up to {self.longest_context} tokens, or batch_size up to "
            f"{self.largest_batch} at max_length {self.recipe.max_length}"
        ]


def plan(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    on: str | None = None,
    memory: str | None = None,
    host: str | None = None,
    tflops: float | None = None,
) -> Plan:
    """Predict the memory and the time of a recipe, without weights or data.

    Args: recipe, overrides: as for `enginepost.train`; `model` may also be the name of a public architecture. on: a GPU by name or
        size, default this CPU; memory: to stay within, such as "12GB", default the recipe's `memory` or what is there; host: host
        memory beside a GPU; tflops: the rate of matrix products, where it is known.
    Raises: EnginepostError for a mistake in any of them.
    """
    settings = load_recipe(recipe, overrides or {})
    budget = size(memory) if memory else stated(settings)
    if on is not None:
        machine = gpu(on, size(host) if host else None, tflops)
        machine = dataclasses.replace(
            machine, memory=min(budget, machine.memory or budget) if budget else machine.memory
        )
    else:
        machine = this_machine(budget, tflops)
    setup = setup_of(settings, config_of(settings.model), device=machine.device, threads=machine.threads)
    return make_plan(settings, setup, machine)


def make_plan(recipe: Recipe, setup: Setup, machine: Machine) -> Plan:
    """The Plan of what a recipe and a machine lead to."""
    peak = step_peak(setup)
    known = machine.memory is not None
    fit = choose.fits(peak, machine) if known else None
    change, utmost = None, None
    if fit is False:
        found = _choices(recipe, setup, machine, SWITCHES)
        change = choose.cheapest(found, machine)
        utmost = choose.utmost([c for c in found if "batch_size" not in c.changes], machine)
    return Plan(
        recipe, machine, setup, peak, fit, step_seconds(setup, machine, recipe.max_length),
        choose.longest_context(setup, machine) if known else None,
        choose.largest_batch(setup, machine, recipe.max_length) if known else None, change,
        utmost,
    )  # fmt: skip


def _choices(recipe: Recipe, setup: Setup, machine: Machine, keys: tuple[str, ...]) -> list[choose.Choice]:
    usable = [k for k in keys if k in type(recipe).model_fields]
    return choose.choices(
        setup, machine, batch_size=recipe.batch_size, max_length=recipe.max_length, keys=usable,
        context=recipe.max_length,
    )  # fmt: skip


def settled(recipe: Recipe, machine: Machine | None = None) -> tuple[Recipe, str]:
    """For a recipe with `memory`: residency and checkpointing within the budget, where the recipe does not say them itself.

    Args: machine: what the run may use, default this CPU.

    Returns: (the recipe with the choice made, what to tell the reader). None of the choices changes a bit of the result.
    Raises: EnginepostError when nothing fits: the plan, and what to change.
    """
    machine = machine or this_machine(stated(recipe))
    config = config_of(recipe.model)
    setup = setup_of(recipe, config, device=machine.device, threads=machine.threads)
    free = tuple(k for k in ("checkpointing", "weights") if k not in recipe.model_fields_set)
    # Without checkpointing a step is a quarter faster, so it is where the search begins.
    start = dataclasses.replace(
        setup,
        checkpointing=setup.checkpointing and "checkpointing" not in free,
        weights="resident" if "weights" in free else setup.weights,
    )
    found = _choices(recipe, start, machine, free)
    best = choose.cheapest(found, machine)
    budget = "" if machine.memory is None else f" of {_gb(machine.memory)}"
    if best is None:
        raise EnginepostError(advice(recipe, setup, machine))
    taken = {"checkpointing": best.setup.checkpointing, "weights": best.setup.weights}
    chosen = recipe.model_copy(update={k: taken[k] for k in free})
    return chosen, (
        f"memory: {choose.described(taken)}: {_gb(best.peak.total)}{budget} GB at the peak, in {best.peak.when}"
    )


def advice(recipe: Recipe, setup: Setup, machine: Machine) -> str:
    """Why a run does not fit, as text: the largest items and what to change."""
    made = make_plan(recipe, setup, machine)
    largest = sorted(made.peak.items.items(), key=lambda kv: -kv[1])[:4]
    items = ", ".join(f"{ITEMS[k]} {_gb(v)}" for k, v in largest)
    return "\n".join([f"the run needs {_gb(made.peak.total)} GB, in {made.peak.when}: {items}", *made.lines()[2:]])


def stated(recipe: Recipe) -> float | None:
    """The recipe's own budget in bytes; None for none, or `auto`."""
    said = getattr(recipe, "memory", None)
    return None if said in (None, "auto") else size(said)


def _nothing(setup: Setup, machine: Machine) -> str:
    alone = PROCESS[machine.device] * choose.MARGIN[machine.device]
    if machine.memory is not None and machine.memory < alone:
        return f"no run fits: Python, torch and the driver alone take {_gb(alone)} GB"
    if setup.full:
        return (
            "no switch makes it fit; train an adapter instead of all weights (`lora: {r: 16}`), or take a smaller model"
        )
    return "no switch makes it fit; take a shorter max_length or a smaller model"


def _host_title(item: str) -> str:
    return {
        "process": "Python and torch",
        "weights": "pinned weights",
        "slots": "pinned slots",
        "optimizer": "optimizer moments",
        "masters": "float32 master weights",
        "inputs": "block inputs",
    }[item]


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"
