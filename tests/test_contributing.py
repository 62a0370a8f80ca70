"""What CONTRIBUTING.md names exists: files, the tables of the layer letters, and tests."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
PATHS = sorted({p for p in re.findall(r"`([\w./*]+/[\w./*]*)`", TEXT) if "NAME" not in p})
TABLES = re.findall(r"`megatron_dla/([\w/]+)\.py`, `([A-Z_]+)`", TEXT)


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    assert list(ROOT.glob(path)), path


def test_every_table_of_letters_is_named() -> None:
    from megatron_dla.config import LETTERS

    assert len(TABLES) == 4
    for module, table in TABLES:
        if module == "hf/layers_dla":  # imported from an exported directory only
            (source,) = re.findall(
                rf"^{table} = {{(.*?)}}", (ROOT / f"megatron_dla/{module}.py").read_text(), re.M | re.S
            )
            assert re.findall(r'"(.)":', source) == list(LETTERS)
        else:
            found = getattr(importlib.import_module(f"megatron_dla.{module.replace('/', '.')}"), table)
            assert list(found) == list(LETTERS)


def test_the_tests_of_a_new_letter_exist() -> None:
    assert "-k every_letter" in TEXT
    for path in ("tests/parallel/test_tensor_parallel.py", "tests/hf/test_modeling.py"):
        assert f"`{path}`" in TEXT and "every_letter" in (ROOT / path).read_text()
