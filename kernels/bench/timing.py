"""Timing: device events with a cold L2 on CUDA, processor time on a CPU; median and spread of repeats."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dla.errors import UserError


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, fastest and slowest of the repeats."""

    ms: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def __str__(self) -> str:
        return f"{self.ms:.3g} ms ({self.low:.3g}..{self.high:.3g}, {self.repeats} repeats)"


def seconds(budget: float) -> float:
    """`--budget`, checked. Raises UserError."""
    if not 0 < budget < math.inf:
        raise UserError(f"--budget {budget:g}: want seconds, more than 0")
    return budget


class Stopwatch:
    """Times calls on one device, repeating until `budget_s` is used.

    On CUDA a repeat lies between two events, after a write over twice the L2 (a layer in a model finds its inputs cold
    too), and nothing is read before the device is done; the first call, which may compile, does not count. On a CPU a
    repeat is processor time of this process: with one thread (`dla bench` sets that) it is the wall time of an idle
    machine, and a neighbour on a shared one does not count.
    """

    def __init__(self, device: torch.device, budget_s: float = 0.5, least: int = 3, most: int = 30) -> None:
        self.device, self.budget_s, self.least, self.most = device, budget_s, least, most
        self.flush: torch.Tensor | None = None
        if device.type == "cuda":
            l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
            self.flush = torch.empty(2 * l2, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a single call."""
        if self.flush is None:
            begin = time.process_time()
            call()
            return 1e3 * (time.process_time() - begin)
        self.flush.zero_()
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return begin_event.elapsed_time(end_event)

    def measure(self, call: Callable[[], Any]) -> Timing:
        """Repeat within the budget, at least `least` times; a call over eight budgets long is timed once."""
        first = self.once(call)
        if self.flush is not None:
            first = self.once(call)
        if first > 8e3 * self.budget_s:
            return Timing.of([first])
        wanted = round(1e3 * self.budget_s / max(first, 1e-3))
        samples = [first, *(self.once(call) for _ in range(min(max(wanted, self.least), self.most) - 1))]
        return Timing.of(samples)


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one call needs at its peak beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
