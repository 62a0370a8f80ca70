"""The parts of one projection, whose gradients the fused passes write side by side: no copy puts them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PackedGradient:
    """The gradient [B, T, columns] of a projection, made by the first backward pass that writes a part of it.

    sizes: columns of each part, in order.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes
        self.parts: dict[str, Tensor] = {}
        self.whole: Tensor | None = None

    def part(self, name: str, like: Tensor) -> Tensor:
        """Where the gradient [B, T, size] of a part goes; its dtype and device are those of `like` [B, T, ...]."""
        if self.whole is None:
            B, T = like.shape[:2]
            whole = torch.empty(T, B, sum(self.sizes.values()), dtype=like.dtype, device=like.device)
            self.whole = whole.transpose(0, 1)  # as Megatron's linear layers have it
            self.parts = dict(zip(self.sizes, self.whole.split(list(self.sizes.values()), -1), strict=True))
        return self.parts[name]

    def take(self, gradients: dict[str, Tensor | None]) -> Tensor:
        """The whole, with what other passes computed copied in; the next backward pass begins anew."""
        some = next(x for x in gradients.values() if x is not None)
        for name, gradient in gradients.items():
            place = self.part(name, some)
            if gradient is None:
                place.zero_()
            elif not _same_memory(gradient, place):
                place.copy_(gradient)
        whole, self.whole, self.parts = self.whole, None, {}
        assert whole is not None
        return whole


def _same_memory(x: Tensor, y: Tensor) -> bool:
    """Of two tensors of one shape."""
    if x.untyped_storage()._cdata != y.untyped_storage()._cdata or x.storage_offset() != y.storage_offset():
        return False
    return all(a == b for a, b, n in zip(x.stride(), y.stride(), x.shape, strict=True) if n > 1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: PackedGradient):
        ctx.gradient = gradient
        return x.split(list(gradient.sizes.values()), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        return ctx.gradient.take(dict(zip(ctx.gradient.sizes, gradients, strict=True))), None


def split(x: Tensor, gradient: PackedGradient) -> tuple[Tensor, ...]:
    """The parts of x [B, T, columns]; a backward pass that is given `gradient` may write theirs into it."""
    return _Split.apply(x, gradient)
