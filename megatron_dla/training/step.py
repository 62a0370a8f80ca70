"""One optimizer step whose gradient is that of the mean loss over all tokens of the global batch, at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.parallel.context import context_slice


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


def dropped_update(engine: Any) -> bool:
    """Whether the last step's gradient was not finite, which ZeRO-1 to 3 do not apply (ZeRO-0 does, and cannot say)."""
    norm = engine.get_global_grad_norm()
    return norm is not None and not math.isfinite(norm)


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
    objective: Callable[[Any, Tensor], Tensor] | None = None,
    before_update: Callable[[], None] | None = None,
) -> float:
    """Forward, backward and update over this data-parallel rank's micro batches.

    Args:
        engine: a DeepSpeed engine. batches: whole rows; context-parallel ranks get the same rows and take their part.
        groups: Megatron's ProcessGroupCollection.
        objective: (packed, loss) -> what is differentiated: `loss` with a penalty, which is averaged over
            micro batches and data-parallel ranks. `packed` is what `pack` returned for the micro batch.
        before_update: called when every gradient is reduced and not yet applied.

    Returns:
        Mean loss (nats a token, weighted by `loss_mask`) over the global batch, the same on every rank.
    """
    counted = torch.stack([b.loss_mask.sum() for b in batches]).sum().double().to(device)
    dist.all_reduce(counted, group=groups.dp)
    # DeepSpeed averages over micro-batches and over data x context ranks; dividing by the batch's own count of tokens
    # makes the gradient that of the mean over all its tokens, whatever the layout
    scale = len(batches) * groups.dp_cp.size() / counted.item()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        packed = pack(batch)
        losses, _, mask = token_losses(engine, batch, packed, groups, device)
        loss = (losses.float() * mask).sum()
        engine.backward(loss * scale if objective is None else objective(packed, loss * scale))
        if before_update is not None and number == len(batches) - 1:
            before_update()
        engine.step()
        total += loss.detach()
    dist.all_reduce(total, group=groups.dp_cp)
    return (total / counted).item()
