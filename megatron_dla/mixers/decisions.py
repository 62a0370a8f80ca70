"""Partitions of a forward pass under activation checkpointing: computed once, reused by the recomputation.

A second computation could round differently (another kernel, another tile order) and flip a boundary; the gradient
would then be of another function than the loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from megatron_dla.kernels.dla import Partition


class Decisions:
    """One mixer's kept partitions, first in, first out: micro-batches do not overlap within a layer."""

    def __init__(self) -> None:
        self._kept: deque[Partition] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, decide: Callable[[], Partition]) -> Partition:
        """Returns `decide()`, or the kept partition in the recomputation of an activation checkpoint."""
        from megatron.core.tensor_parallel.random import is_checkpointing

        if not is_checkpointing():
            return decide()
        if torch.is_grad_enabled():  # the recomputation
            return self._kept.popleft()
        self._kept.append(decide())
        return self._kept[-1]
