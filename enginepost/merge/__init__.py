"""Merging models: `merge` for checkpoints by mergekit's recipes, `merge_tensors` for arrays, METHODS for what there is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.merge.adapters import AdapterMergeReport as AdapterMergeReport
    from enginepost.merge.adapters import merge_adapters as merge_adapters
    from enginepost.merge.apply import merge_tensors as merge_tensors
    from enginepost.merge.evolution import EvolveReport as EvolveReport
    from enginepost.merge.evolution import evolve as evolve
    from enginepost.merge.experts import assemble as assemble
    from enginepost.merge.low_rank import ExtractReport as ExtractReport
    from enginepost.merge.low_rank import extract as extract
    from enginepost.merge.registry import METHODS as METHODS
    from enginepost.merge.registry import MergeError as MergeError
    from enginepost.merge.registry import Method as Method
    from enginepost.merge.registry import Param as Param
    from enginepost.merge.registry import method as method
    from enginepost.merge.registry import register as register
    from enginepost.merge.run import MergeReport as MergeReport
    from enginepost.merge.run import merge as merge

_HOME = {
    "merge_tensors": "apply",
    "AdapterMergeReport": "adapters",
    "merge_adapters": "adapters",
    "assemble": "experts",
    "EvolveReport": "evolution",
    "evolve": "evolution",
    "ExtractReport": "low_rank",
    "extract": "low_rank",
    "METHODS": "registry",
    "MergeError": "registry",
    "Method": "registry",
    "Param": "registry",
    "method": "registry",
    "register": "registry",
    "MergeReport": "run",
    "merge": "run",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        importlib.import_module("enginepost.merge.apply")  # the methods register themselves
        return getattr(importlib.import_module(f"enginepost.merge.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
