"""One optimizer step whose gradient is that of the mean loss over all tokens of the global batch, at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.parallel.context import context_slice
from megatron_dla.training.update import Update


class MicroBatch(Protocol):
    """Whole rows: `tokens`, `labels` int64 and `loss_mask` float32, each [b, T]."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...

    @property
    def loss_mask(self) -> Tensor: ...


Pack = Callable[[Any], Any]
"""Batch -> Megatron's `packed_seq_params` of its forward pass."""


Judge = Callable[[float, float], bool]
"""(loss, gradient norm) of a step -> whether its update is left out. Both are equal on every rank; nan: not finite."""


class StepResult(NamedTuple):
    """Of one optimizer step, the same on every rank.

    Attributes:
        loss: mean (nats a token, weighted by `loss_mask`) over the global batch. grad_norm: of its gradient before
            clipping; nan where it is not finite. dropped: weights and moments are as they were.
    """

    loss: float
    grad_norm: float
    dropped: bool


def token_losses(
    engine: Any, batch: MicroBatch, packed: Any, groups: Any, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass over this rank's part of a batch of whole rows.

    Returns:
        losses (nats), labels and loss mask, each [b, T / context-parallel size].
    """
    rows = (batch.tokens, batch.labels, batch.loss_mask)
    tokens, labels, mask = (context_slice(x, groups.cp).to(device) for x in rows)
    return engine(tokens, None, None, labels=labels, packed_seq_params=packed), labels, mask


def train_step(
    engine: Any,
    batches: Sequence[MicroBatch],
    groups: Any,
    device: torch.device,
    pack: Pack,
    *,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = token_losses,
    objective: Callable[[Any, Tensor], Tensor] | None = None,
    before_update: Callable[[], None] | None = None,
    judge: Judge | None = None,
) -> StepResult:
    """Forward, backward and update over this data-parallel rank's micro batches.

    Args:
        engine: a DeepSpeed engine. batches: whole rows; context-parallel ranks get the same rows and take their part.
        groups: Megatron's ProcessGroupCollection.
        forward: see `token_losses`.
        objective: (packed, loss) -> what is differentiated: `loss` with a penalty, which is averaged over
            micro batches and data-parallel ranks. `packed` is what `pack` returned for the micro batch.
        before_update: called when every gradient is reduced and not yet applied.
        judge: asked before the update; a gradient that is not finite is never applied. None: the engine decides, and
            the norm is left to it.
    """
    counted = torch.stack([b.loss_mask.sum() for b in batches]).sum().double().to(device)
    dist.all_reduce(counted, group=groups.dp)
    # DeepSpeed averages over micro-batches and over data x context ranks; dividing by the batch's own count of tokens
    # makes the gradient that of the mean over all its tokens, whatever the layout
    count = max(counted.item(), 1.0)  # a batch of an adapter may hold no answer
    scale = len(batches) * groups.dp_cp.size() / count
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        packed = pack(batch)
        losses, _, mask = forward(engine, batch, packed, groups, device)
        loss = (losses.float() * mask).sum()
        engine.backward(loss * scale if objective is None else objective(packed, loss * scale))
        total += loss.detach()
        if number < len(batches) - 1:
            engine.step()
    if before_update is not None:
        before_update()
    dist.all_reduce(total, group=groups.dp_cp)
    mean = total / count
    if judge is None:
        engine.step()
        return StepResult(mean.item(), math.nan, False)
    # tensor-parallel ranks compute the same loss; that they decide the same must not hang on its last bit
    dist.broadcast(mean, group=groups.tp, group_src=0)
    update = Update(engine, lambda norm: judge(mean.item(), norm))
    update.apply()
    return StepResult(mean.item(), update.norm, update.dropped)
