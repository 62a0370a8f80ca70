"""The configurations of the DLA operator that `aot.py` compiles: forward, backward, partition and decode."""

from __future__ import annotations

import inspect
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dla.kernels.dla import Partition, SlotCache, decode_step, dla_attention, partition
from megatron_dla.kernels.dla.attention import BACKENDS

ALL = (80, 90, 100)
HOPPER = (90,)


@dataclass(frozen=True)
class Config:
    """One use of the operator. `learned`: tau has a gradient; `cached`: memory comes in and goes out."""

    name: str
    dtype: torch.dtype
    key_dim: int
    value_dim: int
    delta: bool
    capacity: int = 30
    learned: bool = False
    cached: bool = False
    documents: tuple[int, ...] = ()
    tokens: int = 256
    mixed: bool = False  # fp32 queries and keys beside 16-bit values, as after an L2 norm in fp32
    archs: tuple[int, ...] = HOPPER


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Longest first, so that two processes end together. Hopper gets every shape, the others those of the shipped models.
CONFIGS = (
    Config("gdn-bf16-256", BF16, 256, 256, True),
    Config("mamba2-bf16-256-K64", BF16, 256, 256, False, capacity=64),
    Config("gdn-bf16-128", BF16, 128, 128, True, learned=True, archs=ALL),
    Config("mamba2-bf16-128", BF16, 128, 128, False, learned=True, archs=ALL),
    Config("gdn-fp32-128", FP32, 128, 128, True),
    Config("gdn-bf16-96x160-odd", BF16, 96, 160, True, tokens=250, documents=(70, 133)),
    Config("mamba2-bf16-96x160-odd", BF16, 96, 160, False, tokens=250),
    Config("gdn-bf16-64-K15-cache", BF16, 64, 64, True, capacity=15, cached=True),
    Config("mamba2-bf16-128x64-K64-cache", BF16, 128, 64, False, capacity=64, cached=True),
    Config("gdn-mixed-128", BF16, 128, 128, True, mixed=True),
    Config("mamba2-bf16-128-long", BF16, 128, 128, False, tokens=8704),  # heads of a group added up, shards repaired
    Config("gdn-bf16-64-shards", BF16, 64, 64, True, tokens=4096),
    Config("gdn-fp16-64", FP16, 64, 64, True, documents=(70, 133)),
    Config("mamba2-fp16-128", FP16, 128, 128, False),
    Config("mamba2-fp32-64", FP32, 64, 64, False, archs=ALL),
)


def missing() -> str:
    """Why there is nothing to compile, or an empty string."""
    return "" if "triton" in BACKENDS else "the DLA operator has no triton backend"


def names(arch: int) -> list[str]:
    return [config.name for config in CONFIGS if arch in config.archs]


def _inputs(config: Config, heads: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    low = config.dtype
    qk = torch.float32 if config.mixed else low
    groups, T = (heads, config.tokens) if config.delta else (1, config.tokens)

    def randn(*shape: int) -> Tensor:
        return torch.randn(1, T, *shape, generator=gen)

    x = {
        "q": randn(groups, config.key_dim).to(qk),
        "k": torch.nn.functional.normalize(randn(groups, config.key_dim), dim=-1).to(qk),
        "v": randn(heads, config.value_dim).to(low),
        "g": -randn(heads).abs(),
        "slot_weights": randn(heads, config.capacity),
    }
    if config.delta:
        x["beta"] = torch.rand(1, T, heads, generator=gen)
    return {name: value.requires_grad_() for name, value in x.items()}


def exercise(name: str, heads: int = 16, backend: str = "triton") -> None:
    """Every launch of the configuration `name`. Sizes are small; only their divisibility by 16 is like a real run's."""
    config = next(c for c in CONFIGS if c.name == name)
    x = _inputs(config, heads)
    tau: Any = torch.full((heads,), 1.2, requires_grad=True) if config.learned else 1.2
    ends = torch.tensor([0, *config.documents, config.tokens], dtype=torch.int32) if config.documents else None
    shape = (1, heads, config.capacity, config.key_dim, config.value_dim)
    cache = SlotCache.empty(*shape) if config.cached else None
    rule: dict[str, Any] = dict(tau=tau, capacity=config.capacity)
    packed: dict[str, Any] = dict(rule, cu_seqlens=ends, cache=cache)

    def decide(backend: str) -> Partition:
        return partition(x["k"], x["v"], x["g"], x.get("beta"), **packed, backend=backend)

    def train() -> None:
        decided = decide("torch")  # nothing is executed, so the decisions to follow come from torch
        kwargs = dict(packed, partition=decided, return_cache=config.cached)
        out, final = dla_attention(**x, **kwargs, backend=backend)  # type: ignore[arg-type, misc]
        outs = [out] if final is None else [out, final.states]
        torch.autograd.backward(outs, [torch.ones_like(y) for y in outs])

    def decode() -> None:
        if "backend" not in inspect.signature(decode_step).parameters:
            return
        one = {key: value.detach()[:, :1] for key, value in x.items()}
        fixed = dict(rule, tau=tau.detach() if config.learned else tau, backend=backend)
        decode_step(**one, **fixed, cache=SlotCache.empty(*shape))  # type: ignore[arg-type]

    failed = []
    for part in (train, lambda: decide(backend), decode):
        try:
            part()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            failed.append(f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")
    if failed:
        raise RuntimeError("; ".join(failed))
