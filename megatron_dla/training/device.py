"""Device and precision of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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


def resolve_device(training: Any, precision: str, *, planned: bool = False) -> Device:
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
    return Device(kind, precision == "bf16" or (precision == "auto" and kind == "cuda"), planned)
