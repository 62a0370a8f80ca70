"""Which trainer a config asks for: of a whole model, or of an adapter (a `delta_mem` section)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dla.config import AdapterRunConfig, RunConfig


def trainer_of(config: RunConfig | AdapterRunConfig) -> tuple[Callable[[Any, int], object], Callable[..., int]]:
    """(check, train): `check(config, world_size)` raises UserError for what a start would trip over; `train(config, *,
    dry_run, world_size)` returns the exit code."""
    if isinstance(config, AdapterRunConfig):
        from megatron_dla.training.adapter_run import check_adapter_run, train_adapter

        return check_adapter_run, train_adapter
    from megatron_dla.training.run import check_run, train

    return check_run, train
