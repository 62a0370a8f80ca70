"""The interface between the trainer and what it trains; the tasks are in `megatron_dla.tasks`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from megatron_dla.checkpoint.weights import CheckpointLayout
from megatron_dla.config import AdapterRunConfig, RunConfig
from megatron_dla.processes import print_or_drop
from megatron_dla.training.device import Device
from megatron_dla.training.step import Judge, StepResult


@dataclass(frozen=True)
class Runtime:
    """This rank's place in a started run.

    Attributes:
        groups: Megatron's ProcessGroupCollection. device: where its tensors are. dtype: of weights and activations.
    """

    groups: Any
    device: torch.device
    dtype: torch.dtype

    def print(self, text: str) -> None:
        """Print a line, on rank 0 only. A run whose terminal or reader has gone trains and saves on without output."""
        if dist.get_rank() == 0:
            print_or_drop(text)


class Loader(Protocol):
    """The training batches of one data-parallel rank, resumable at any step."""

    total_wait_s: float
    """Seconds in `next_step`, of this process."""

    steps: int
    """That `next_step` has returned, before this start too."""

    @property
    def tokens_seen(self) -> int:
        """By all data-parallel ranks together."""

    def next_step(self) -> Sequence[Any]:
        """This rank's micro batches of the next step, each with the fields of `data.packing.Batch`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON state of this rank."""

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state from those of all data-parallel ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a merged state."""


class Task(ABC):
    """What a run trains: its checks, model, data, step and metrics.

    The checks and `describe` run on machines without Megatron, before any process group exists. The trainer then calls
    `build` once on every rank, and the other methods after it.
    """

    config: RunConfig | AdapterRunConfig
    runtime: Runtime
    loader: Loader
    """Both set by `build`."""
    left_out: Collection[int] = ()
    """Batches that are passed over, by the number of steps before them in the data."""

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """Tokens a row."""

    @abstractmethod
    def check_config(self, world_size: int, device: Device) -> None:
        """Check all that does not need the data.

        Raises:
            UserError: one message with the key, the value and the fix.
        """

    @abstractmethod
    def check_data(self, world_size: int) -> None:
        """Check the files that a run reads. Raises as `check_config`."""

    @abstractmethod
    def describe(self, device: Device) -> dict[str, str]:
        """Lines about model and data, {title: text}, that a run prints when it starts. `check_config` has passed."""

    @property
    @abstractmethod
    def trained_parameters(self) -> int:
        """Of the whole model, before any partition: those that a checkpoint holds."""

    def plan(self, world_size: int, device: Device) -> str:
        """Estimates that `--dry-run` adds."""
        return ""

    def files(self) -> list[Path]:
        """Files to copy into the run directory, beside config.yaml."""
        return []

    @abstractmethod
    def layout(self) -> CheckpointLayout:
        """What identifies a checkpoint of this run; the trainer fills in tags and shapes."""

    @abstractmethod
    def build(self, runtime: Runtime) -> nn.Module:
        """This rank's part of the model, initialised and tagged, before weights are loaded; also makes `loader`."""

    @abstractmethod
    def train_step(self, engine: Any, step: int, judge: Judge | None) -> StepResult:
        """One optimizer step after `step` finished ones, on `next_batches`; `judge` decides about its update."""

    def next_batches(self) -> Sequence[Any]:
        """This rank's micro batches of the next step, whose place is kept for `last_batch`, past those `left_out`."""
        while self.loader.steps in self.left_out:
            self.loader.next_step()
        self._before = self.loader.state_dict()
        return self.loader.next_step()

    def last_batch(self) -> dict[str, Any]:
        """Where the rows of the last step are, as JSON (a collective).

        `batch`: steps before it in the data; `rows`: the first and last of its rows, counted over the run at this batch
        size; `data`: the state of the data from which it is drawn.
        """
        state, size = self._merged(self._before), self.config.training.global_batch_size
        number = state["steps"]
        return {"batch": number, "rows": [number * size, (number + 1) * size - 1], "data": state}

    @property
    def flops_per_token(self) -> float | None:
        """Of forward and backward pass for one token of the whole model; None where it is not known."""
        return None

    def metrics(self) -> dict[str, Any]:
        """Metrics of this task since the last call, on top of the trainer's own (a collective)."""
        return {}

    @abstractmethod
    def validate(self, engine: Any) -> dict[str, Any]:
        """`val_loss` (nats a token) and whatever else is measured on held-out data (a collective)."""

    def state_dict(self) -> dict[str, Any]:
        """State of the data over all data-parallel ranks, as JSON (a collective)."""
        return self._merged(self.loader.state_dict())

    def _merged(self, state: dict[str, Any]) -> dict[str, Any]:
        group = self.runtime.groups.dp
        states: list[Any] = [None] * group.size()
        dist.all_gather_object(states, state, group=group)
        return self.loader.merge_states(states) | {"global_batch_size": self.config.training.global_batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result.

        Raises:
            UserError: the state belongs to other data.
        """
        self.loader.load_state_dict(state)
        rows = self.config.training.global_batch_size
        before = state.get("global_batch_size", rows)  # older checkpoints do not have it
        if before != rows:
            self.runtime.print(
                f"note: training.global_batch_size was {before} and is {rows} from step {state['steps'] + 1} on; "
                "training.steps and the learning rate schedule still count steps"
            )
