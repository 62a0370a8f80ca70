"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.training.step import MicroBatch, Pack, token_losses


@torch.no_grad()
def validate(
    engine: Any,
    batches: Iterable[MicroBatch],
    groups: Any,
    device: torch.device,
    pack: Pack,
    token_bytes: Tensor | None = None,
) -> dict[str, float]:
    """One pass over held-out rows; every data-parallel rank has the same number of batches.

    Args:
        groups: Megatron's ProcessGroupCollection. token_bytes: [vocab], UTF-8 bytes each token stands for.

    Returns:
        val_loss (nats a token) and, with `token_bytes`, val_bpb (bits a byte of text).
    """
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for batch in batches:
        losses, labels, mask = token_losses(engine, batch, pack(batch), groups, device)
        size = mask if token_bytes is None else token_bytes[labels] * mask
        totals += torch.stack([(losses * mask).sum(), mask.sum(), size.sum()]).double()
    dist.all_reduce(totals, group=groups.dp_cp)
    engine.train()
    nats, count, size = totals.tolist()
    values = {"val_loss": nats / count}
    return values if token_bytes is None else values | {"val_bpb": nats / math.log(2) / size}
