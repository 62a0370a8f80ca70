"""A tiny data directory."""

import shutil
from pathlib import Path

import pytest

from tests.support.rows import build_words


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_words(tmp_path_factory.mktemp("made"), "data {x,y}", seed=0)  # a name that shard lists would expand


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "data")
