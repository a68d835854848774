"""LLM post-training on one's own machine: `load`, `train`, `render`. Importing this imports neither torch nor the extension."""

from typing import TYPE_CHECKING, Any

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
