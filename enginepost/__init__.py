"""LLM post-training on one's own machine: `load`, `train`, `render`. Importing this imports neither torch nor the extension."""

import os
from typing import TYPE_CHECKING, Any

# torch's OpenMP threads wait for each other by spinning, for milliseconds: where anything else wants a core, they take it from the
# very thread that they wait for (a step of a small model then takes ten times as long). Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from enginepost.data import render as render
    from enginepost.generate import load as load
    from enginepost.train import train as train


def cmake_prefix() -> str:
    """The directory for CMAKE_PREFIX_PATH with which `find_package(enginepost)` finds the kernel library of this installation.

    It holds lib/libenginepost.so, include/enginepost/*.h and lib/cmake/enginepost. Raises EnginepostError where the extension is
    not built.
    """
    import importlib.util
    import pathlib

    from enginepost.errors import EnginepostError

    spec = importlib.util.find_spec("enginepost._core")
    if spec is None or spec.origin is None:
        raise EnginepostError(
            "the native extension is not built, so there is no library to link; `make setup` builds it"
        )
    return str(pathlib.Path(spec.origin).parent)


_HOME = {"load": "enginepost.generate", "train": "enginepost.train", "render": "enginepost.data"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
