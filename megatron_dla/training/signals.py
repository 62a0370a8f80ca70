"""Stop requests by signal or file: seen by one rank, acted on by all ranks together after a step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Context manager that catches SIGTERM and SIGUSR1.

    Args:
        device: of the collective. asked: returns another reason to stop on this rank, a small number; 0 = none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, device: torch.device, asked: Callable[[], int]) -> None:
        self._flag = torch.zeros(1, device=device)
        self._caught, self._asked = 0, asked

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._caught = number

    def agreed(self) -> int:
        """Largest reason or signal number over all ranks; 0 = continue. A collective: call it once a step."""
        self._flag.fill_(float(max(self._caught, self._asked())))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return int(self._flag.item())
