"""A differentiable sum of activations over the ranks of a group."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return _Sum.apply(gradient, ctx.group), None


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's x, on all ranks. Each rank uses it, so gradients are summed over the ranks as well."""
    return _Sum.apply(x, group)
