"""Checkpoints on disk: safetensors read through memory maps and written as a stream, PEFT adapters, and fusing the two."""

from enginepost.checkpoint.atomic import write_bytes, write_json
from enginepost.checkpoint.format import CheckpointError
from enginepost.checkpoint.reader import Checkpoint
from enginepost.checkpoint.side_files import copy_side_files
from enginepost.checkpoint.writer import Writer, save_tensors

__all__ = ["Checkpoint", "CheckpointError", "Writer", "copy_side_files", "save_tensors", "write_bytes", "write_json"]
