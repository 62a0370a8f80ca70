"""Held-out loss and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.parallel.context import context_slice
from megatron_dla.training.step import MicroBatch, Pack, token_losses

_FIRST, _BINS = 16, 32  # tokens of the first range of positions; ranges, each twice as long as the one before


@torch.no_grad()
def validate(
    engine: Any,
    sources: Mapping[str, Iterable[MicroBatch]],
    groups: Any,
    device: torch.device,
    pack: Pack,
    token_bytes: Tensor | None = None,
    positions: Callable[[Any], Tensor] | None = None,
) -> dict[str, Any]:
    """One pass over held-out rows; every data-parallel rank has the same number of batches of each source.

    Args:
        groups: Megatron's ProcessGroupCollection. token_bytes: [vocab], UTF-8 bytes each token stands for.
        positions: batch -> tokens that the model reads before each one, int64 [b, T].

    Returns:
        val_loss (nats a token) and, with `token_bytes`, val_bpb (bits a byte of text), of all sources; of
        several ones also val_loss_by_source {name: nats a token}. With `positions`, val_bpb_by_position {tokens
        read before: bits a byte}.
    """
    engine.eval()
    by_position = torch.zeros(2, _BINS, dtype=torch.float64, device=device)  # nats, bytes
    totals = torch.zeros(len(sources), 3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    for total, batches in zip(totals, sources.values(), strict=True):
        for batch in batches:
            losses, labels, mask = token_losses(engine, batch, pack(batch), groups, device)
            size = mask if token_bytes is None else token_bytes[labels] * mask
            total += torch.stack([(losses * mask).sum(), mask.sum(), size.sum()]).double()
            if positions is not None:
                bins = _bin(context_slice(positions(batch), groups.cp).to(device)).flatten()
                by_position.scatter_add_(1, bins.expand(2, -1), torch.stack([losses * mask, size]).flatten(1).double())
    dist.all_reduce(totals, group=groups.dp_cp)
    engine.train()
    nats, count, size = totals.sum(0).tolist()
    values: dict[str, Any] = {"val_loss": nats / count}
    if len(sources) > 1:
        values["val_loss_by_source"] = {name: x / n for name, (x, n, _) in zip(sources, totals.tolist(), strict=True)}
    if token_bytes is None:
        return values
    values["val_bpb"] = nats / math.log(2) / size
    if positions is not None:
        dist.all_reduce(by_position, group=groups.dp_cp)
        pairs = enumerate(by_position.T.tolist())
        values["val_bpb_by_position"] = {_name(n): nats / math.log(2) / size for n, (nats, size) in pairs if size}
    return values


def _bin(positions: Tensor) -> Tensor:
    """0 to 15 tokens before, 16 to 31, 32 to 63, ..."""
    half = _FIRST // 2
    return positions.clamp(min=half).double().log2().floor().long() - int(math.log2(half))


def _name(number: int) -> str:
    return f"0-{_FIRST - 1}" if number == 0 else f"{_FIRST * 2 ** (number - 1)}-{_FIRST * 2**number - 1}"
