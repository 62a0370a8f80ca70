"""What a partition says about a head: boundaries, merges, and how large its slots are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Partition


@dataclass
class Counts:
    """Of each head, over all rows: int64 [H].

    Attributes:
        tokens: that were read. boundaries: tokens that opened a slot. merges: slots that the capacity rule removed.
        newest: those of them that joined the last two slots, which undoes the boundary before.
    """

    tokens: Tensor
    boundaries: Tensor
    merges: Tensor
    newest: Tensor


@torch.no_grad()
def count(part: Partition) -> Counts:
    """Counts of a partition of rows without an incoming cache."""
    start, death = part.start, part.death.long()
    B, T, H = start.shape
    index = torch.arange(T, device=start.device)[:, None].expand(B, T, H)
    opened = torch.where(start, index, -1).cummax(1).values  # the newest slot after each token
    merged = start & (death < T)
    before = opened.gather(1, (death - 1).clamp(min=0, max=T - 1))
    return Counts(
        start.new_full((H,), B * T, dtype=torch.int64), start.sum((0, 1)), merged.sum((0, 1)),
        (merged & (before == index)).sum((0, 1)),
    )  # fmt: skip


def sizes(start: Tensor, death: Tensor, capacity: int) -> Tensor:
    """Tokens in each slot by recency after every token of one head, int64 [T, K]: start, death [T], one document."""
    T = len(start)
    at, p = torch.arange(T, device=start.device)[:, None], torch.arange(T, device=start.device)
    live = start & (p <= at) & (death > at)  # [T, T]: after token `at`, whether the slot that opened at p is there
    found = torch.where(live, p, -1).sort(1, descending=True).values[:, :capacity]
    found = torch.nn.functional.pad(found, (0, capacity - found.shape[1]), value=-1)
    ends = torch.cat([at + 1, found[:, :-1]], 1)
    return torch.where(found >= 0, ends - found, 0)
