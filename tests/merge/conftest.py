"""Fixtures of the merge tests."""

import pathlib
from collections.abc import Callable

import pytest
from small_checkpoints import save, tensors


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Directories base, a, b, c."""
    home = tmp_path_factory.mktemp("family")
    for i, name in enumerate(("base", "a", "b", "c")):
        save(home / name, tensors(i))
    return home


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    def to_file(text: str) -> pathlib.Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return to_file
