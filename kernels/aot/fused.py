"""The configurations of the fused passes to compile: what the shipped configs launch, and a model with every option."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dla.kernels.fused.inputs import Shape, recurrence_inputs
from megatron_dla.kernels.fused.loss import cross_entropy
from megatron_dla.kernels.fused.norm import gated_norm

from .dla import shipped

ALL = (80, 90, 100)
PREFIX = "fused-"  # of every name here


@dataclass(frozen=True)
class Config:
    """One mixer. `packed`: rows of documents; `biased`: convolutions have biases."""

    name: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    packed: bool = True
    biased: bool = False
    archs: tuple[int, ...] = ALL


def _config(name: str, delta: bool, sizes: tuple[int, int, int, int, int], **more) -> Config:
    heads, groups, value_dim, key_dim, capacity = sizes
    shape = Shape(heads, groups, value_dim, key_dim, capacity, 4, halo=more.pop("halo", 0), gdn=delta)
    return Config(f"{PREFIX}{name}", shape, **more)


def configs() -> tuple[Config, ...]:
    whole = [c for c in shipped() if c.name.endswith("-tp1")]
    named = [_config(c.name, c.delta, (c.heads, c.groups or 1, c.value_dim, c.key_dim, c.capacity)) for c in whole]
    options = dict(halo=3, packed=False, biased=True, archs=(90,))
    return (
        *named,
        _config("mamba2-fp32-256", False, (6, 2, 256, 256, 15), dtype=torch.float32, **options),
        _config("gdn-fp16-odd", True, (6, 6, 100, 60, 7), dtype=torch.float16, **options),
    )


def names(arch: int) -> list[str]:
    return [config.name for config in configs() if arch in config.archs]


def exercise(name: str) -> None:
    """Every launch of the configuration `name`."""
    config = next(c for c in configs() if c.name == name)
    shape, dtype, T = config.shape, config.dtype, 256
    widths = dict(zip(("value", "query", "key", "step", "strength", "slot"), shape.columns, strict=True))
    packed = torch.zeros(1, shape.halo + T, sum(shape.columns), dtype=dtype, requires_grad=True)
    parts = dict(zip(widths, packed.split(list(shape.columns), -1), strict=True))
    sections = {key: x if key in ("value", "query", "key") else x[:, shape.halo :] for key, x in parts.items()}
    channels = list(shape.columns[:3])
    convolutions = [torch.zeros(n, shape.width, dtype=dtype, requires_grad=True) for n in channels]
    biases = [torch.zeros(n, dtype=dtype, requires_grad=True) if config.biased else None for n in channels]
    slots = (shape.heads, shape.capacity)
    gates = [torch.zeros(n, requires_grad=True) for n in ((shape.heads,), (shape.heads,), slots, slots)]
    starts = torch.zeros(1, shape.halo + T, dtype=torch.bool) if config.packed else None
    results = recurrence_inputs(sections, convolutions, biases, gates, shape, starts)
    skip, D = (None, None) if shape.gdn else (results[-1], torch.zeros(shape.heads, requires_grad=True))
    gate = torch.zeros(1, T, shape.heads, shape.value_dim, dtype=dtype, requires_grad=True)
    weight = torch.zeros(shape.value_dim, dtype=dtype, requires_grad=True)
    y = gated_norm(results[2], gate, weight, 1e-5, gate_first=not shape.gdn, skip=skip, D=D)
    logits = torch.zeros(1, T, 1000, dtype=dtype, requires_grad=True)
    losses = cross_entropy(logits, torch.zeros(1, T, dtype=torch.int64))
    ends = [y, losses, *results]
    torch.autograd.backward(ends, [torch.zeros_like(x) for x in ends])
