"""LLM post-training on one's own machine: `load`, `train`, `render`. Importing this imports neither torch nor the extension."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.data import render as render
    from enginepost.generate import load as load
    from enginepost.train import train as train

_HOME = {"load": "enginepost.generate", "train": "enginepost.train", "render": "enginepost.data"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
