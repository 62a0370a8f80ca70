"""Clients that are not requirements of this package: `make test-clients` installs them; elsewhere these are skipped."""

from __future__ import annotations

import importlib.util

import pytest

from tests.hf.conftest import exported, saved, tokenizer, use_modules_cache
from tests.hf.releases import CLIENTS

__all__ = ["exported", "saved", "tokenizer", "use_modules_cache"]
MISSING = [name for name in CLIENTS if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if MISSING:
        skip = pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)} (make test-clients)")
        for item in items:
            if item.path.parent.name == "clients":
                item.add_marker(skip)
