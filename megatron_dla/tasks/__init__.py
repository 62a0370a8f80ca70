"""What a run trains: a whole model (`pretrain`), or an adapter on a frozen one (`adapter`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dla.config import AdapterRunConfig, RunConfig

if TYPE_CHECKING:
    from megatron_dla.training.task import Task


def make_task(config: RunConfig | AdapterRunConfig) -> Task:
    """The task that a config asks for."""
    if isinstance(config, AdapterRunConfig):
        from megatron_dla.tasks.adapter.task import AdapterTask

        return AdapterTask(config)
    from megatron_dla.tasks.pretrain import PretrainTask

    return PretrainTask(config)
