"""The measured column of the ledger: the same step on a real device, timed whole and by component.

The step is run under torch.profiler with a mark around every operation and Triton launch that names its component. A
GPU kernel belongs to the mark within whose time its launch call falls; without a GPU a component's time is that of its
marks.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dla.config import RunConfig
from megatron_dla.gpus import find_gpu
from megatron_dla.model.counts import flops_per_token
from megatron_dla.model.gpt import padded_vocab

from .record import Recording, patched_launches
from .step import Step, one_process

MARK = "ledger: "


class _Marks(TorchDispatchMode):
    """A mark around every operation, which changes nothing."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with record_function(MARK + self.recording.component("")):
            out = func(*args, **(kwargs or {}))
        self.recording.remember_node()
        return out


@contextlib.contextmanager
def marked(recording: Recording) -> Iterator[None]:
    """Marks around all operations and Triton launches inside; backward passes stay on this thread."""
    from triton.runtime.jit import JITFunction

    stock = JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + recording.component(self.__name__)):
            return stock(self, *args, **kwargs)

    with patched_launches(run), torch.autograd.set_multithreading_enabled(False), _Marks(recording):
        yield


def component_ms(trace: dict[str, Any]) -> dict[str, float]:
    """Component -> milliseconds, from a Chrome trace of one thread's marks (times in microseconds)."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X"]
    marks = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(MARK))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(MARK)
    )
    starts = [begin for begin, _, _ in marks]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    found: dict[str, float] = {}
    for kernel in kernels:
        at = launched.get(kernel["args"].get("correlation"), -1.0)
        n = bisect.bisect_right(starts, at) - 1
        name = marks[n][2] if n >= 0 and at <= marks[n][1] else "outside the marks"
        found[name] = found.get(name, 0.0) + kernel["dur"] / 1e3
    if not kernels:
        for begin, end, name in marks:
            found[name] = found.get(name, 0.0) + (end - begin) / 1e3
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _by_component(step: Step, device: torch.device) -> dict[str, float]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    recording = Recording()
    with profile(activities=activities) as profiler, marked(recording):
        step.run(recording)
        _synchronize(device)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return component_ms(json.loads(path.read_text()))


def measure(config: RunConfig, device: torch.device, repeats: int = 3) -> dict[str, Any]:
    """Run one micro batch and one update of `config` on `device`.

    Returns:
        `step_ms` (fastest of `repeats`, after one that compiles), `tokens_per_s` and `mfu` (None where the device's
        peak is not known) of such steps, `peak_bytes` (None on a CPU), and `ms` by component, of one more step.
    """
    with one_process(device) as groups:
        step = Step(config, groups, device=device)
        tokens = config.training.micro_batch_size * step.T
        step.run(Recording())
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step.run(Recording())
            _synchronize(device)
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        ms = _by_component(step, device)
    flops = flops_per_token(config.model, padded_vocab(step.vocabulary, config.model.vocab_multiple), step.T) * tokens
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    gpu = find_gpu(name)
    return {
        "device": name or "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step_ms": 1e3 * min(seconds),
        "tokens_per_s": tokens / min(seconds),
        "mfu": None if gpu is None else flops / min(seconds) / gpu.dense,
        "peak_bytes": peak,
        "ms": ms,
    }
