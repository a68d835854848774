"""The files of a Hugging Face model directory that are neither weights nor config.json: copied byte for byte, never rewritten."""

from __future__ import annotations

import os
from pathlib import Path

from enginepost.checkpoint.atomic import make_directory, write_bytes
from enginepost.checkpoint.format import CheckpointError

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
SIDE_DIRECTORIES = {"additional_chat_templates": ".jinja"}  # directory -> ending of the files that belong


def copy_side_files(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> list[str]:
    """Copy tokenizer, chat template and generation config from one model directory to another.

    Args:
        source: a model directory, or a file in one.
        destination: a directory; it is created if need be. Files of the same name are replaced, each atomically.
    Returns:
        The relative names copied.
    Raises:
        CheckpointError: the source does not exist; a file cannot be read or written.
    """
    source, destination = Path(source), Path(destination)
    if not source.exists():
        raise CheckpointError(f"{source}: no such model directory, so there is no tokenizer to copy.")
    if not source.is_dir():
        source = source.parent
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    for directory, ending in SIDE_DIRECTORIES.items():
        names += sorted(
            f"{directory}/{path.name}" for path in (source / directory).glob(f"*{ending}") if path.is_file()
        )
    make_directory(destination)
    if destination.samefile(source):
        return names
    for name in names:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{source / name}: cannot be read: {error.strerror}.") from None
        make_directory((destination / name).parent)
        write_bytes(destination / name, content)
    return names
