"""Device and precision of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dla.config import TrainingSection
from megatron_dla.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """Where a run computes, and in what.

    Attributes:
        type: "cpu" or "cuda". bf16: weights and activations are bf16, else fp32. planned: of a plan, maybe for another
            machine.
    """

    type: str
    bf16: bool
    planned: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def current(self) -> torch.device:
        """This rank's device; under CUDA, `torch.cuda.set_device` was called."""
        return torch.device("cuda", torch.cuda.current_device()) if self.type == "cuda" else torch.device(self.type)

    def __str__(self) -> str:
        return f"{self.type}, {'bf16' if self.bf16 else 'fp32'}"


def resolve_device(training: TrainingSection, *, planned: bool = False) -> Device:
    """The device that a training section asks for; "auto" is CUDA where this machine has it.

    Args:
        planned: for `--dry-run`, which may plan for CUDA on a machine without it.

    Raises:
        ConfigError: CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    kind = training.device if training.device != "auto" else "cuda" if available else "cpu"
    if kind == "cuda" and not available and not planned:
        raise ConfigError(
            "training.device = cuda, but torch finds no CUDA device here: use training.device=cpu or auto"
        )
    bf16 = training.precision == "bf16" or (training.precision == "auto" and kind == "cuda")
    return Device(kind, bf16, planned)
