"""Stop requests by signal or file: seen by one rank, acted on by all ranks together after a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_dla.processes import StopSignals, end_by


class StopRequest:
    """Context manager that catches SIGUSR1 and the signals of `StopSignals`.

    A process without a launcher ends at once at the second of those; launchers count for their ranks, which may get
    more than one signal for one request (from Slurm and from torchrun).

    Args:
        device: of the collective. asked: returns another reason to stop on this rank, a small number; 0 = none.
    """

    def __init__(self, device: torch.device, asked: Callable[[], int]) -> None:
        self._flag = torch.zeros(1, device=device)
        self._caught, self._asked = 0, asked
        again = self._remember if "TORCHELASTIC_RUN_ID" in os.environ else end_by
        self._signals = StopSignals(self._remember, again)

    def __enter__(self) -> StopRequest:
        self._signals.__enter__()
        self._previous = signal.signal(signal.SIGUSR1, lambda number, _: self._remember(number))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous)
        self._signals.__exit__()

    def _remember(self, number: int) -> None:
        self._caught = number

    def agreed(self) -> int:
        """Largest reason or signal number over all ranks; 0 = continue. A collective: call it once a step."""
        self._flag.fill_(float(max(self._caught, self._asked())))
        dist.all_reduce(self._flag, op=dist.ReduceOp.MAX)
        return int(self._flag.item())
