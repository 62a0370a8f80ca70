"""Stop requests, by signal or by file: noticed by one rank, acted on at a step boundary by all ranks together."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Catches SIGTERM and SIGUSR1 for as long as it is entered.

    Args:
        device: of the collective. asked: this rank's other reason to stop as a small number, 0 for none.
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
        """The same on every rank: the largest reason or signal number of any, 0 to go on.

        A collective: call it once a step on all ranks.
        """
        self._flag.fill_(float(max(self._caught, self._asked())))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return int(self._flag.item())
