"""Throughput, remaining time and memory of a run."""

from __future__ import annotations

import resource
import sys
import time

import torch


class StepMeter:
    """Speed since the last reading, and the estimated time left.

    Validation and checkpoints count in the time left, not in the speed.

    Args:
        step: finished ones. devices: of the whole run. flops_per_token: of the model, None where it is not known.
        peak: FLOP/s of one device, None where it is not known.
    """

    def __init__(
        self, step: int, total_steps: int, devices: int = 1, flops_per_token: float | None = None,
        peak: float | None = None,
    ) -> None:  # fmt: skip
        self.total_steps, self.devices, self.flops_per_token, self.peak = total_steps, devices, flops_per_token, peak
        self._start_step, self._start = step, time.monotonic()
        self._steps, self._tokens, self._busy, self._waited = 0, 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, waited: float = 0.0) -> None:
        """A step of `tokens`, of the whole run, which took `seconds`, `waited` of them for data."""
        self._steps += 1
        self._tokens += tokens
        self._busy += seconds
        self._waited += waited

    def read(self) -> dict[str, float]:
        """Since the last call: tokens_per_s of the run and tokens_per_s_per_device, step_s (seconds), data_wait_share
        of this rank, and, where they are known, tflops of a device (1e12 FLOP/s) and mfu (share of its peak)."""
        busy = self._busy or float("inf")
        rate = self._tokens / busy
        values = {
            "tokens_per_s": rate,
            "tokens_per_s_per_device": rate / self.devices,
            "step_s": self._busy / max(1, self._steps),
            "data_wait_share": self._waited / busy,
        }
        if self.flops_per_token is not None:
            flops = self.flops_per_token * rate / self.devices
            values["tflops"] = flops / 1e12
            if self.peak is not None:
                values["mfu"] = flops / self.peak
        self._steps, self._tokens, self._busy, self._waited = 0, 0, 0.0, 0.0
        return values

    def eta_s(self, step: int) -> float:
        done = step - self._start_step
        return (time.monotonic() - self._start) / done * (self.total_steps - step) if done else float("nan")


class MemoryMeter:
    """Memory of a device since the last reading, by torch's allocator; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak = 0.0

    def read(self) -> dict[str, float]:
        """memory_active_gb and memory_reserved_gb (peaks), their shares of the device's memory, and since the start
        alloc_retries and ooms."""
        if self.device.type != "cuda":
            return {}
        found, total = torch.cuda.memory_stats(self.device), torch.cuda.get_device_properties(self.device).total_memory
        self._peak = self.peak_gb()
        torch.cuda.reset_peak_memory_stats(self.device)
        active, reserved = (found.get(f"{kind}_bytes.all.peak", 0) for kind in ("active", "reserved"))
        return {
            "memory_active_gb": active / 1e9,
            "memory_active_share": active / total,
            "memory_reserved_gb": reserved / 1e9,
            "memory_reserved_share": reserved / total,
            "alloc_retries": found.get("num_alloc_retries", 0),
            "ooms": found.get("num_ooms", 0),
        }

    def peak_gb(self) -> float:
        """Since the start of the process."""
        return max(self._peak, memory_gb(self.device))


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
