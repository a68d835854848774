"""Will it fit? The memory and time of a recipe, told from a config.json before anything is loaded. Nothing here imports torch.

memory.py     the peak of a training step, item by item
workspace.py  scratch of the kernels
setup.py      a recipe and a config -> what memory.py needs
methods.py    what a method holds beside that: references, teachers, reward models, roll-outs
machine.py    GPUs by name, this machine, amounts of memory
speed.py      roughly how long a step takes
choose.py     the longest context, the largest batch, the cheapest switches that fit
report.py     the table and the JSON of `enginepost plan`; what `enginepost train` says and decides
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.plan.report import Plan as Plan
    from enginepost.plan.report import plan as plan


def __getattr__(name: str) -> Any:
    if name in ("Plan", "plan"):
        from enginepost.plan import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
