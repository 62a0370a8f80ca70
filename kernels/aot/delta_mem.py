"""The configurations of δ-mem to compile: scan forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_dla.kernels.delta_mem import delta_mem_scan

ALL = (80, 90, 100)
PREFIX = "delta_mem-"  # of every name here


@dataclass(frozen=True)
class Config:
    """One use of the memory. `general`: keep and erase are given; `masked`: resets and masked writes."""

    name: str
    rank: int
    states: int = 1
    dtype: torch.dtype = torch.float32
    general: bool = False
    masked: bool = False
    archs: tuple[int, ...] = ALL


CONFIGS = (
    Config("delta_mem-64", 64, masked=True),
    Config("delta_mem-64-general", 64, general=True, archs=(90,)),
    Config("delta_mem-32", 32, masked=True),
    Config("delta_mem-24-bf16-general", 24, states=2, dtype=torch.bfloat16, general=True, archs=(90,)),
    Config("delta_mem-16", 16, states=4, masked=True),
    Config("delta_mem-16-general", 16, general=True, masked=True, archs=(90,)),
    Config("delta_mem-8", 8, archs=(90,)),
    Config("delta_mem-8-masked", 8, states=4, masked=True),
    Config("delta_mem-8-bf16-general", 8, states=4, dtype=torch.bfloat16, general=True, masked=True, archs=(90,)),
)


def names(arch: int) -> list[str]:
    return [config.name for config in CONFIGS if arch in config.archs]


def exercise(name: str) -> None:
    """Every launch of the configuration `name`, on several chunks; sizes are small."""
    config = next(c for c in CONFIGS if c.name == name)
    B, T, N, r = 2, 520, config.states, config.rank
    inputs = ["q", "k", "v", "beta", *(("keep", "erase") if config.general else ())]
    x: dict[str, Any] = {key: torch.rand(B, T, N, r, dtype=config.dtype).requires_grad_() for key in inputs}
    state = torch.zeros(B, N, r, r, requires_grad=True)
    if config.masked:
        x |= {key: torch.ones(B, T, dtype=torch.bool) for key in ("reset", "write_mask")}
    reads, final = delta_mem_scan(**x, initial_state=state, backend="triton")
    torch.autograd.backward([reads, final], [torch.ones_like(reads), torch.ones_like(final)])
