"""The safetensors format: what a header says, and every way in which it can lie.

A file is

    u64 little-endian n | n bytes of JSON, padded with spaces | tensor data

and the JSON is `{"__metadata__": {str: str}, name: {"dtype": "BF16", "shape": [4, 3], "data_offsets": [begin, end]}, ...}`, offsets
in bytes from the end of the header. Tensors tile the data exactly: sorted by offset each begins where the one before ended, the
first at 0, the last at the end of the file. (Format: https://huggingface.co/docs/safetensors, "Format".)

Nothing here trusts a file: a header that breaks a rule is a CheckpointError naming the file, the tensor and the rule.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from enginepost.errors import EnginepostError

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation


class CheckpointError(EnginepostError):
    """A checkpoint, adapter or index that cannot be read or written; the message names the file and the tensor."""


_DTYPE_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {  # older torch lacks some of the float8 kinds
    name: getattr(torch, attribute) for name, attribute in _DTYPE_NAMES.items() if hasattr(torch, attribute)
}
NAME_OF_DTYPE: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes [begin, end) of the file (not of the data section)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes that a contiguous tensor takes."""
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def parse_json(text: bytes, path: Path, what: str) -> Any:
    """JSON from a file that is not trusted: UTF-8 only, no key twice, no nesting bombs."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise CheckpointError(
                        f"{path}: {what} has the key {key!r} twice; the file is damaged, fetch it again."
                    )
                seen.add(key)
        return result

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: {what} is not UTF-8 text (byte {error.start}); {_guess(text)}.") from None
    except RecursionError:
        raise CheckpointError(f"{path}: {what} is nested too deeply to be one; the file is damaged.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON: {error}; {_guess(text)}.") from None


def _guess(start: bytes) -> str:
    """What a file that is not safetensors probably is, from its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer instead of the weights: run `git lfs pull` where it was cloned"
    if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
        return "this looks like a PyTorch pickle (.bin, .pt): convert it to safetensors first"
    if start.startswith(b"GGUF"):
        return "this is a GGUF file: use the safetensors checkpoint it was made from"
    if start.lstrip()[:1] == b"<":
        return "this looks like a web page saved under the file's name: download it again"
    return "the file is damaged or is not safetensors: download it again"


def read_header(file: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of an open file.

    Args:
        file: descriptor of a regular file.
        path: its name, for messages.
    Returns:
        Tensors by name in the order of their bytes, and the `__metadata__` strings.
    Raises:
        CheckpointError: whatever is wrong with it.
    """
    size = os.fstat(file).st_size
    start = os.pread(file, 64, 0)
    if size < 8:
        raise CheckpointError(
            f"{path}: {size} bytes is too short for a safetensors file (8 bytes of header length come first); "
            "the file is truncated, download it again."
        )
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER or length < 2:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes; between 2 and {MAX_HEADER} are possible; {_guess(start)}."
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: the header claims {length} bytes but the file has only {size - 8} after its length; "
            "it is truncated, download it again."
        )
    text = os.pread(file, length, 8)
    if len(text) != length:
        raise CheckpointError(f"{path}: the file shrank while it was read.")
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{path}: the header does not begin with '{{' as a safetensors header must; {_guess(start)}."
        )
    header = parse_json(text, path, "the safetensors header")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    data = 8 + length
    tensors = {name: _tensor_info(name, entry, data, path) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_tiling(tensors, data, size, path)
    return tensors, metadata


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must be an object of strings, and it is {_short(value)}.")
    if not all(_is_unicode(key) and _is_unicode(item) for key, item in value.items()):
        raise CheckpointError(f"{path}: __metadata__ holds text that is not valid Unicode.")
    return value


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no file name, terminal or writer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tensor_info(name: str, entry: Any, data: int, path: Path) -> TensorInfo:
    where = f"{path}: tensor {_short(name)}"
    if not _is_unicode(name):
        raise CheckpointError(f"{where}: the name is not valid Unicode.")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets, found {_short(entry)}.")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise CheckpointError(f"{where}: the key {key!r} is missing.")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {_short(kind)} is unknown here (torch {torch.__version__}); known: {', '.join(DTYPES)}."
        )
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where}: shape {_short(shape)} is not a list of sizes >= 0.")
    if len(shape) > 64:
        raise CheckpointError(f"{where}: {len(shape)} dimensions; at most 64 can be held.")
    extent = dtype.itemsize
    for n in shape:
        extent *= max(n, 1)  # an empty tensor still has strides, which must fit 63 bits
        if extent >= 1 << 63:
            raise CheckpointError(f"{where}: shape {_short(shape)} is beyond what memory can address.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} is not [begin, end] with 0 <= begin <= end.")
    begin, end = offsets
    need = tensor_bytes(dtype, tuple(shape))
    if end - begin != need:
        raise CheckpointError(
            f"{where}: data_offsets [{_short(begin)}, {_short(end)}] span {_short(end - begin)} bytes, "
            f"but {kind} {shape} takes {need}."
        )
    return TensorInfo(dtype, tuple(shape), data + begin, data + end)


def _check_tiling(tensors: Mapping[str, TensorInfo], data: int, size: int, path: Path) -> None:
    position, previous = data, "the header"
    for name, info in tensors.items():
        if info.begin < position:
            raise CheckpointError(
                f"{path}: tensors {_short(previous)} and {_short(name)} overlap by {position - info.begin} bytes."
            )
        if info.begin > position:
            raise CheckpointError(
                f"{path}: {info.begin - position} bytes before tensor {_short(name)} belong to no tensor; the format forbids gaps."
            )
        if info.end > size:
            raise CheckpointError(
                f"{path}: tensor {_short(name)} ends at byte {info.end} but the file has {size}; it is truncated, download it again."
            )
        position, previous = info.end, name
    if position != size:
        raise CheckpointError(
            f"{path}: {size - position} bytes after the last tensor belong to no tensor; the file is damaged."
        )


def _short(value: Any) -> str:
    text = (
        str(value)
        if type(value) is int and abs(value) < 1 << 80
        else ascii(value)
        if type(value) is not int
        else "(huge)"
    )
    return text if len(text) <= 100 else text[:100] + "..."


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header bytes (length included, padded to 8) for tensors, and where each goes in the file.

    Wider dtypes come first, so that every tensor is aligned to its item size; within a dtype the given order holds.
    """
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    place: dict[str, tuple[int, int]] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
        dtype, shape = tensors[name]
        end = position + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [position, end]}
        place[name] = (position, end)
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"a header of {len(text)} bytes is over the format's limit of {MAX_HEADER}: use more shards."
        )
    start = 8 + len(text)
    infos = {
        name: TensorInfo(tensors[name][0], tensors[name][1], start + begin, start + end)
        for name, (begin, end) in place.items()
    }
    return struct.pack("<Q", len(text)) + text, infos
