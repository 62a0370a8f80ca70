"""Launch utilities of the Triton kernels: device, grid arithmetic, compute capability."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton


def on_device(x: torch.Tensor) -> AbstractContextManager:
    """Launch on the tensor's GPU, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two >= max(n, least)."""
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def compute_capability(device: torch.device) -> int:
    """90 for Hopper; of what is compiled for if the tensors are on the CPU, and 90 in the interpreter."""
    if device.type == "cuda":
        return _capability(torch.cuda.current_device() if device.index is None else device.index)
    if triton.knobs.runtime.interpret:
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)
