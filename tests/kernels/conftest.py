"""Uninitialised memory is NaN (or a huge number) in every kernel test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` holds NaN: a kernel that leaves an element of its output unwritten cannot pass by luck."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills every uninitialised tensor
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
