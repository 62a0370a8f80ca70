"""Throughput, remaining time and memory of a run."""

from __future__ import annotations

import resource
import sys
import time

import torch


class StepMeter:
    """Tokens per second since the last reading, and the estimated time left.

    Validation and checkpoints count in the time left, not in the throughput.
    """

    def __init__(self, step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self._start_step, self._start = step, time.monotonic()
        self._tokens, self._busy = 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._busy += seconds

    def tokens_per_s(self) -> float:
        """Since the last call."""
        rate = self._tokens / self._busy if self._busy else 0.0
        self._tokens, self._busy = 0, 0.0
        return rate

    def eta_s(self, step: int) -> float:
        done = step - self._start_step
        return (time.monotonic() - self._start) / done * (self.total_steps - step) if done else float("nan")


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident set size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def clock(seconds: float) -> str:
    """1h02m, 3m20s or 45s."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
