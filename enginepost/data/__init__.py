"""Data: files -> records -> messages -> tokens and labels -> packed batches.

files.py       jsonl, json, parquet, csv and text as a stream of records, each with its place "file:row"
records.py     record formats (messages, sharegpt, alpaca, prompt_completion, text) as one shape
chat.py        chat templates: the jinja sandbox, the templates shipped by name
spans.py       which characters of a rendered conversation are trained on
tokenizer.py   tokenizer.json or tokenizer.model, special tokens, offsets
dataset.py     `prepare`: all of the above, to ids and labels in flat arrays
packing.py     best-fit packing and `collate`
preview.py     a coloured view of what is trained on

Names are imported on first use, so that `import enginepost.data` loads neither torch nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enginepost.data.chat import render as render
    from enginepost.data.dataset import Dataset as Dataset
    from enginepost.data.dataset import Report as Report
    from enginepost.data.dataset import prepare as prepare
    from enginepost.data.files import DataError as DataError
    from enginepost.data.packing import Batch as Batch
    from enginepost.data.packing import Sequence as Sequence
    from enginepost.data.packing import collate as collate
    from enginepost.data.packing import plan_batches as plan_batches
    from enginepost.data.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "Batch": "packing", "DataError": "files", "Dataset": "dataset", "Report": "dataset", "Sequence": "packing",
    "Tokenizer": "tokenizer", "collate": "packing", "plan_batches": "packing", "prepare": "dataset", "render": "chat",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'enginepost.data' has no attribute {name!r}")
    return getattr(import_module(f"enginepost.data.{_HOME[name]}"), name)
