"""Context parallelism by heads: each rank holds a part of every sequence, and for the recurrence all of it for a part
of the heads. One all-to-all there, one back.

The sequence is cut contiguously: rank r holds tokens [r S / cp, (r + 1) S / cp) of every row. A parameter's
gradient is partial on every rank (its tokens, or its heads) and summed over data x context ranks, see `mpu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllToAll.apply(gradient.contiguous(), ctx.group), None


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] -> [ranks, ...]: entry i of this rank becomes entry `this rank` of rank i."""
    return _AllToAll.apply(x.contiguous(), group)


class HeadExchange:
    """Moves activations between this rank's tokens of all heads and all tokens of this rank's heads.

    A *unit* is a head or a q/k group. With fewer groups than ranks, each rank gets the group that its heads read.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def to_heads(self, tensors: Sequence[Tensor], units: Sequence[int]) -> list[Tensor]:
        """All tensors in one all-to-all: each [B, S / cp, units * c] -> [B, S, this rank's units * c].

        Args:
            units: of each tensor; a multiple or a divisor of the group's size.
        """
        parts = []
        for x, n in zip(tensors, units, strict=True):
            x = x.unflatten(-1, (n, -1))
            if n < self.size:
                x = x.repeat_interleave(self.size // n, dim=2)
            parts.append(x.reshape(*x.shape[:2], self.size, -1))
        sizes = [x.shape[-1] for x in parts]
        packed = torch.cat(parts, -1).permute(2, 0, 1, 3)  # [cp (heads), B, S / cp, C]
        return list(all_to_all(packed, self.group).transpose(0, 1).flatten(1, 2).split(sizes, -1))

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, this rank's units * c] -> [B, S / cp, units * c]."""
        packed = x.unflatten(1, (self.size, -1)).transpose(0, 1)  # [cp (tokens), B, S / cp, C]
        return all_to_all(packed, self.group).permute(1, 2, 0, 3).flatten(2)

    def local(self, weight: Tensor, units: int) -> Tensor:
        """This rank's units of a per-head or per-group parameter [units * c, ...]."""
        if units % self.size == 0:
            return weight.chunk(self.size)[self.rank]
        return weight.chunk(units)[self.rank * units // self.size]


def context_slice(x: Tensor, group: dist.ProcessGroup | None, dim: int = 1) -> Tensor:
    """This rank's contiguous part of the sequence axis `dim`."""
    return x if group is None or group.size() == 1 else x.chunk(group.size(), dim)[group.rank()].contiguous()
