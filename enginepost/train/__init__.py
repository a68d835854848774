"""The trainer. `enginepost.train("recipe.yaml", max_steps=10)` runs it: calling the package calls `enginepost.train.loop.train`.

loop.py        one loop for every objective
objectives/    pure functions of per-token log-probabilities
optimizer.py   AdamW over named parameters, float32 accumulation and master weights
schedule.py    learning rate of a step, the steps of a run
reference.py   the policy that preferences are measured from, and the cache of its log-probabilities
teacher.py     the cache of a teacher's most likely tokens
state.py       the run directory: atomic checkpoints, resume
monitor.py     progress, metrics.jsonl, TensorBoard, spikes
"""

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.train.loop import train as train


class _Package(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> str:
        from enginepost.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "train":
        from enginepost.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
