"""Differentiable exchanges between neighbouring context-parallel ranks: a convolution's halo, and slot states."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Neighbours:
    """The context-parallel ranks before and after this one; rank r holds the tokens before those of rank r + 1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        ranks = dist.get_process_group_ranks(group)
        self.before = ranks[self.rank - 1] if self.rank > 0 else None
        self.after = ranks[self.rank + 1] if self.rank + 1 < self.size else None

    def shift(self, x: Tensor, forwards: bool) -> Tensor:
        """Send every rank's x to the next (or previous) rank; returns zeros where there is no neighbour."""
        to, source = (self.after, self.before) if forwards else (self.before, self.after)
        got, ops = torch.zeros_like(x), []
        if to is not None:
            ops.append(dist.P2POp(dist.isend, x.contiguous(), to, self.group))
        if source is not None:
            ops.append(dist.P2POp(dist.irecv, got, source, self.group))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        return got

    def send(self, x: Tensor, to: int | None) -> None:
        dist.send(x.contiguous(), to, group=self.group)

    def receive(self, like: Tensor, source: int | None) -> Tensor:
        got = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(got, source, group=self.group)
        return got


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, chain: Neighbours) -> Tensor:
        ctx.chain, ctx.shape, ctx.width = chain, x.shape, width
        return chain.shift(x[:, -width:], forwards=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        back = gradient.new_zeros(ctx.shape)
        back[:, -ctx.width :] = ctx.chain.shift(gradient, forwards=False)
        return back, None, None


def halo(x: Tensor, width: int, chain: Neighbours) -> Tensor:
    """The last `width` tokens of the rank before, [B, width, C]; zeros on the first rank. x: [B, T, C], T >= width."""
    return _Halo.apply(x, width, chain) if width else x[:, :0]


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, like: Tensor, chain: Neighbours) -> Tensor:
        ctx.chain = chain
        return chain.receive(like, chain.before)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        ctx.chain.send(gradient, ctx.chain.before)
        return None, None, None


class _SendStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, states: Tensor, incoming: Tensor | None, chain: Neighbours) -> Tensor:
        ctx.chain, ctx.incoming = chain, None if incoming is None else torch.zeros_like(incoming)
        ctx.like = torch.empty_like(states, memory_format=torch.contiguous_format)
        if chain.after is not None:
            chain.send(states, chain.after)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        chain = ctx.chain
        states = torch.zeros_like(ctx.like) if chain.after is None else chain.receive(ctx.like, chain.after)
        return gradient, states, ctx.incoming, None


def receive_states(anchor: Tensor, like: Tensor, chain: Neighbours) -> Tensor:
    """A tensor from the rank before; the backward pass sends its gradient back there.

    Args:
        anchor: any input that requires a gradient, so that autograd reaches this function. like: shape and dtype.
    """
    return _Receive.apply(anchor, like, chain)


def send_states(out: Tensor, states: Tensor, incoming: Tensor | None, chain: Neighbours) -> Tensor:
    """Send `states` to the rank after; the backward pass of the returned `out` receives their gradient from there.

    `incoming` (from `receive_states`) is tied to `out`, so that its gradient is sent back even where it is zero.
    """
    return _SendStates.apply(out, states, incoming, chain)
