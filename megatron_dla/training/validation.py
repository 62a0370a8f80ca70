"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.training.step import MicroBatch, Pack, token_losses


@torch.no_grad()
def validate(
    engine: Any,
    sources: Mapping[str, Iterable[MicroBatch]],
    groups: Any,
    device: torch.device,
    pack: Pack,
    token_bytes: Tensor | None = None,
) -> dict[str, Any]:
    """One pass over held-out rows; every data-parallel rank has the same number of batches of each source.

    Args:
        groups: Megatron's ProcessGroupCollection. token_bytes: [vocab], UTF-8 bytes each token stands for.

    Returns:
        val_loss (nats a token) and, with `token_bytes`, val_bpb (bits a byte of text), of all sources; of
        several ones also val_loss_by_source {name: nats a token}.
    """
    engine.eval()
    totals = torch.zeros(len(sources), 3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for total, batches in zip(totals, sources.values(), strict=True):
        for batch in batches:
            losses, labels, mask = token_losses(engine, batch, pack(batch), groups, device)
            size = mask if token_bytes is None else token_bytes[labels] * mask
            total += torch.stack([(losses * mask).sum(), mask.sum(), size.sum()]).double()
    dist.all_reduce(totals, group=groups.dp_cp)
    engine.train()
    nats, count, size = totals.sum(0).tolist()
    values: dict[str, Any] = {"val_loss": nats / count}
    if len(sources) > 1:
        values["val_loss_by_source"] = {name: x / n for name, (x, n, _) in zip(sources, totals.tolist(), strict=True)}
    return values if token_bytes is None else values | {"val_bpb": nats / math.log(2) / size}
