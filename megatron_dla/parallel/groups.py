"""Process groups of a run, made once and passed on explicitly."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dla import compat
from megatron_dla.environment import environment_number
from megatron_dla.errors import UserError

T = TypeVar("T")
FIX = "unset it, or start with torchrun or `dla run`"


@dataclass(frozen=True)
class Place:
    """Of this process in its run. Attributes: local: among the `local_world` processes of its machine."""

    rank: int
    world: int
    local: int
    local_world: int


def launched_place() -> Place:
    """This process's place as torchrun's environment variables say it; alone without them.

    Raises:
        UserError: a variable has a bad value, or one that joining the other processes needs is missing.
    """
    world = environment_number("WORLD_SIZE", 1, FIX, least=1)
    rank = environment_number("RANK", 0, FIX)
    if rank >= world:
        raise UserError(f"RANK = {rank} in the environment: want less than WORLD_SIZE = {world}: {FIX}")
    local_world = environment_number("LOCAL_WORLD_SIZE", 1, FIX, least=1)
    local = environment_number("LOCAL_RANK", 0, FIX)
    if "LOCAL_WORLD_SIZE" in os.environ and local >= local_world:
        raise UserError(
            f"LOCAL_RANK = {local} in the environment: want less than LOCAL_WORLD_SIZE = {local_world}: {FIX}"
        )
    environment_number("MASTER_PORT", 1, FIX, least=1, most=65535)
    if not dist.is_initialized():
        _check_meeting(world)
    return Place(rank, world, local, local_world)


def _check_meeting(world: int) -> None:
    """UserError where a variable that tells the processes where to meet is missing: they would wait for each other."""
    if world > 1:
        because, needed = f"WORLD_SIZE = {world}", ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    else:
        if not (address := os.environ.get("MASTER_ADDR")):
            return
        because, needed = f"MASTER_ADDR = {address!r}", ["MASTER_PORT"]
    for name in needed:
        if not os.environ.get(name):
            first = because.partition(" ")[0]
            raise UserError(
                f"{because} in the environment, but {name} is not set: unset {first}, or start with torchrun or "
                "`dla run`"
            )


def initialize_distributed(device: str) -> None:
    """Join the process group that torchrun describes; a lone process makes its own of size one.

    Raises:
        UserError: see `launched_place`.
    """
    if dist.is_initialized():
        return
    place = launched_place()
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(key, value)
    if device == "cuda":
        torch.cuda.set_device(place.local)
    backend = "nccl" if device == "cuda" else "gloo"
    if os.environ.get("MASTER_ADDR"):
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=place.rank, world_size=place.world)


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
