"""Stop signals: remembered when they arrive, acted on at a step boundary by all ranks together."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Catches SIGTERM and SIGUSR1 for as long as it is entered."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, device=device)
        self._caught = 0

    def __enter__(self) -> StopRequest:
        self._previous = {s: signal.signal(s, self._remember) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._caught = number

    def agreed(self) -> bool:
        """True on every rank if any rank caught a signal (a collective: call it once a step on all ranks)."""
        self._flag.fill_(float(self._caught))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return bool(self._flag.item())
