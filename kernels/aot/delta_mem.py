"""The configurations of δ-mem to compile: scan forward and backward, and the one-token step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dla.kernels.delta_mem import delta_mem_scan, delta_mem_step

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
    x = {key: torch.rand(B, T, N, r, dtype=config.dtype).requires_grad_() for key in inputs}
    state = torch.zeros(B, N, r, r, requires_grad=True)
    flags = {key: torch.ones(B, T, dtype=torch.bool) for key in ("reset", "write_mask")} if config.masked else {}
    reads, final = delta_mem_scan(**x, **flags, initial_state=state, backend="triton")  # type: ignore[arg-type]
    torch.autograd.backward([reads, final], [torch.ones_like(reads), torch.ones_like(final)])
    one = {key: value.detach()[:, 0] for key, value in x.items()}
    write = torch.ones(B, dtype=torch.bool) if config.masked else True
    delta_mem_step(**one, state=state.detach(), write=write, backend="triton")
