"""How far an adapted model is from its frozen base: the KL divergence of their predictions, token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, base: Tensor, group: Any) -> Tensor:
        ctx.dtype = logits.dtype
        log_p, log_q = _log_softmax(logits, group), _log_softmax(base, group)
        q = log_q.exp()
        divergence = (q * (log_q - log_p)).sum(-1)
        dist.all_reduce(divergence, group=group)
        ctx.save_for_backward(log_p.exp() - q)
        return divergence

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (difference,) = ctx.saved_tensors
        return (gradient[..., None] * difference).to(ctx.dtype), None, None


def _log_softmax(logits: Tensor, group: Any) -> Tensor:
    """[..., V / TP], in fp32 at least, over the whole vocabulary."""
    x = logits.double() if logits.dtype == torch.float64 else logits.float()
    most = x.amax(-1, keepdim=True)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    x = x - most
    total = x.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return x - total.log()


def divergence(logits: Tensor, base: Tensor, group: Any) -> Tensor:
    """KL(base || model) of each token, in nats, [...]; its gradient is that of `logits` alone.

    Args:
        logits, base: [..., V / TP], this tensor-parallel rank's part. group: of the tensor-parallel ranks.
    """
    return _Divergence.apply(logits, base, group)
