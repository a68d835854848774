"""Checkpoints on disk: safetensors read through memory maps and written as a stream, PEFT adapters, and fusing the two."""

from enginepost.checkpoint.adapter import Adapter, LoraWeights, parse_adapter, read_adapter, write_adapter
from enginepost.checkpoint.atomic import write_bytes, write_json
from enginepost.checkpoint.format import CheckpointError
from enginepost.checkpoint.fuse import FuseReport, fuse
from enginepost.checkpoint.reader import Checkpoint
from enginepost.checkpoint.side_files import copy_side_files
from enginepost.checkpoint.writer import Writer, save_tensors

__all__ = [
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "FuseReport",
    "LoraWeights",
    "Writer",
    "copy_side_files",
    "fuse",
    "parse_adapter",
    "read_adapter",
    "save_tensors",
    "write_adapter",
    "write_bytes",
    "write_json",
]
