"""One optimizer step whose gradient is that of the mean loss over all tokens of the global batch, at every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dla.adapters.calls import MemoryCall
from megatron_dla.data.packing import Batch
from megatron_dla.model.gpt import packed_sequence
from megatron_dla.parallel.context import context_slice


def dropped_update(engine: Any) -> bool:
    """Whether the last step's gradient was not finite, which ZeRO-1 to 3 do not apply (ZeRO-0 does, and cannot say)."""
    norm = engine.get_global_grad_norm()
    return norm is not None and not math.isfinite(norm)


def train_step(
    engine: Any,
    batches: Sequence[Batch],
    groups: Any,
    device: torch.device,
    seq_len: int,
    reset_at_documents: bool = True,
    before_update: Callable[[], None] | None = None,
    remember: Callable[[Batch], MemoryCall] | None = None,
) -> float:
    """Forward, backward and update over this data-parallel rank's micro batches.

    Args:
        engine: a DeepSpeed engine. batches: whole rows; context-parallel ranks are given the same and take their part.
        groups: Megatron's ProcessGroupCollection.
        before_update: called when every gradient is reduced and not yet applied.
        remember: what δ-mem layers are told of a micro batch; its gate penalty is added to the objective, averaged
            over micro batches and data-parallel ranks.

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
        rows = (batch.tokens, batch.labels, batch.loss_mask)
        tokens, labels, mask = (context_slice(x, groups.cp).to(device) for x in rows)
        borders = batch.cu_seqlens.to(device) if reset_at_documents else None
        packed, call = packed_sequence(borders, seq_len), None
        if remember is not None:
            from megatron_dla.adapters.delta_mem import with_memory

            call = remember(batch)
            packed = with_memory(call, seq_len, borders)
        losses = engine(tokens, None, None, labels=labels, packed_seq_params=packed)
        loss = (losses.float() * mask).sum()
        engine.backward(loss * scale if call is None else call.penalise(loss * scale))
        if before_update is not None and number == len(batches) - 1:
            before_update()
        engine.step()
        total += loss.detach()
    dist.all_reduce(total, group=groups.dp_cp)
    return (total / counted).item()
