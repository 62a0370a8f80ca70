"""Process groups of a run, made once and passed on explicitly."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dla import compat
from megatron_dla.errors import UserError

T = TypeVar("T")


def initialize_distributed(device: str) -> None:
    """Join the process group that torchrun describes; a lone process makes its own of size one."""
    if dist.is_initialized():
        return
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(key, value)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world)


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank (a collective).

    Raises:
        UserError: on every rank, where rank 0 raised one.
    """
    outcome: list = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def initialize_model_parallel(tensor: int, seed: int, context: int = 1) -> None:
    """Megatron's groups (tensor innermost, then context, then data) and its random-state tracker."""
    compat.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, context_parallel_size=context)
        model_parallel_cuda_manual_seed(seed)
    made = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    if made != (tensor, context):
        raise RuntimeError(f"this process already has groups for tensor, context = {made}, not {(tensor, context)}")


def process_groups():
    """Megatron's `ProcessGroupCollection` of the current layout."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()
