"""Models that were quantised while they were loaded, kept on disk by the content of what they were made from.

    CACHE/quantized/<blake2b of kind and weights>/      a `*-bnb-4bit` model directory, as `enginepost quantize` writes it
    CACHE/digests.json                                  {file: [bytes, mtime in ns, inode, blake2b]}: a file is hashed once

CACHE is `$ENGINEPOST_CACHE`, else `$XDG_CACHE_HOME/enginepost`, else `~/.cache/enginepost`. All of it may be deleted at any time.
Two processes that want the same copy wait for each other; a copy appears whole or not at all.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from enginepost.checkpoint.atomic import write_json
from enginepost.checkpoint.bnb import is_quantized, quantize
from enginepost.checkpoint.format import CheckpointError
from enginepost.checkpoint.reader import Checkpoint

KINDS = {"nf4": ("nf4", False), "nf4-double": ("nf4", True), "fp4": ("fp4", False)}  # name -> (quant_type, double)
_VERSION = "1"  # raise when `quantize` writes other bits
_CHUNK = 1 << 22


def cache_directory() -> Path:
    """Where copies are kept; it need not exist."""
    if os.environ.get("ENGINEPOST_CACHE"):
        return Path(os.environ["ENGINEPOST_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "enginepost"


def quantized_copy(model_dir: str | os.PathLike[str], kind: str, say: Callable[[str], None] | None = None) -> Path:
    """The directory of the model in 4 bits, made now unless it was made before.

    Args: model_dir: of Hugging Face, not quantised; kind: "nf4", "nf4-double" or "fp4"; say: told before what takes long.
    Raises: CheckpointError: a model that is quantised already, an unknown kind, a cache that cannot be written.
    """
    if kind not in KINDS:
        raise CheckpointError(f"quantize {kind!r} is not known; use {', '.join(KINDS)}.")
    model_dir = Path(model_dir)
    checkpoint = Checkpoint(model_dir)
    if any(is_quantized(checkpoint, name) for name in checkpoint.names):
        raise CheckpointError(
            f"{model_dir}: is quantised already; leave quantize out, and its own 4-bit weights are used."
        )
    root = cache_directory()
    with _locked(root / "quantized"):
        whole = hashlib.blake2b(f"{_VERSION} {kind}".encode(), digest_size=16)
        for file in checkpoint.files:
            whole.update(_digest(file, root / "digests.json").encode())
        target = root / "quantized" / whole.hexdigest()
        if not target.exists():
            if say is not None:
                say(f"quantising {model_dir} to {kind}, once; the copy is kept in {target}")
            quant_type, double = KINDS[kind]
            quantize(model_dir, target, quant_type=quant_type, double=double)
    return target


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot keep a quantised copy: {error.strerror}; set ENGINEPOST_CACHE to a directory with room, or "
            "quantise once with `enginepost quantize` and give that model."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _digest(file: Path, memo: Path) -> str:
    """blake2b of a file's bytes; remembered while its size, time and inode stay."""
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
        assert isinstance(known, dict)
    except (OSError, ValueError, AssertionError):
        known = {}
    path = os.path.realpath(file)
    seen = os.stat(path)
    stamp = [seen.st_size, seen.st_mtime_ns, seen.st_ino]
    entry = known.get(path)
    if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
        return entry[-1]
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as handle:
        while piece := handle.read(_CHUNK):
            digest.update(piece)
    known[path] = [*stamp, digest.hexdigest()]
    write_json(memo, known)
    return digest.hexdigest()
