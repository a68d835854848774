"""Checkpoints on disk: safetensors read through memory maps and written as a stream, PEFT adapters, fusing the two,
4-bit checkpoints."""

from enginepost.checkpoint.adapter import Adapter, LoraWeights, parse_adapter, read_adapter, write_adapter
from enginepost.checkpoint.atomic import write_bytes, write_json
from enginepost.checkpoint.bnb import dequantize, is_quantized, quantize, read_quantized, weight_names
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
    "dequantize",
    "fuse",
    "is_quantized",
    "parse_adapter",
    "quantize",
    "read_adapter",
    "read_quantized",
    "save_tensors",
    "weight_names",
    "write_adapter",
    "write_bytes",
    "write_json",
]
