"""`cross_entropy` without fp32 logits: three passes over them, and a gradient in their place."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.launch import on_device, power_of_two
from .triton_loss import loss_backward_kernel, loss_forward_kernel

BLOCK = 4096  # logits at a time


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None):
        logits, labels = logits.contiguous(), labels.contiguous()
        V, N = logits.shape[-1], labels.numel()
        ctx.first = V * group.rank() if group is not None else 0
        largest = torch.empty(N, dtype=torch.float32, device=logits.device)
        sums = torch.empty(2, N, dtype=torch.float32, device=logits.device)
        with on_device(logits):
            loss_forward_kernel[(N,)](
                logits, labels, largest, sums, N, V, ctx.first, BV=min(power_of_two(V), BLOCK), num_warps=8
            )
        if group is not None and group.size() > 1:
            mine = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
            sums[0] *= (mine - largest).exp()
            dist.all_reduce(sums, group=group)
        logsum = sums[0].log()
        ctx.save_for_backward(logits, labels, largest, logsum)
        ctx.used = False
        return (logsum - (sums[1] - largest)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        if ctx.used:
            raise RuntimeError("the loss's backward pass ran already: the logits have become their gradient")
        ctx.used = True
        logits, labels, largest, logsum = ctx.saved_tensors
        V = logits.shape[-1]
        with on_device(logits):
            loss_backward_kernel[(labels.numel(),)](
                logits, labels, largest, logsum, gradient.float().contiguous(), V, ctx.first,
                BV=min(power_of_two(V), BLOCK), num_warps=8,
            )  # fmt: skip
        return logits, None, None


def cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross entropy of each token in nats, fp32 [...], as Megatron's `vocab_parallel_cross_entropy` without smoothing.

    The backward pass writes the gradient over the logits: nothing else may read them, and it runs once.

    Args:
        logits: [..., V], bf16, fp16 or fp32; with a group, this rank's equal part of the vocabulary.
        labels: int64 [...], numbers in the whole vocabulary.

    Raises:
        RuntimeError: a second backward pass.
    """
    return _CrossEntropy.apply(logits, labels, group)
