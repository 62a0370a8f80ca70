"""The hierarchy of Log-Linear Attention (arXiv 2506.04761) as a partition: every token opens a slot, and slots merge as
in a Fenwick tree.

The token at position t of its document sees itself at level 0. Each bit of t that is set stands for the tokens of a
slot: token s is at level floor(log2(t xor s)) + 1, and level l >= 1 holds 2^(l-1) tokens or none. The slot that a token
at position p opened is a part of an older one from position p + (lowest set bit of p) on. So the hierarchy is a set of
starts and deaths as any other, and all forms of the recurrence take it; only the readout weights go by level.

With K levels, level K - 1 holds whatever is older (*: as published, 2^(K-2) tokens, since no row is longer than
2^(K-1)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import EMPTY, Partition, SlotCache
from .documents import document_starts
from .rules import positions


def deaths(position: Tensor, levels: int) -> Tensor:
    """The position at which the slot that opened at `position` (int64, in its document) merges into an older one; the
    first token's never does (a huge one)."""
    lowest = torch.where(position > 0, position & -position, 1 << 40)
    at_most = torch.where(position > 0, 1 << (levels - 2), 1 << 40)
    return position + torch.minimum(lowest, at_most)


def level_of_slot(position: Tensor, levels: int) -> Tensor:
    """The level of each slot by recency, int64 [..., K], at `position` [...]; anything where there is no slot."""
    bit = torch.arange(levels - 2, device=position.device)
    counted = (position[..., None] >> bit) & 1  # levels 1 to K - 2
    last = position[..., None] >= 1 << (levels - 2)
    there = torch.cat([torch.ones_like(last), counted.bool(), last], -1)
    return (~there).int().sort(dim=-1, stable=True).indices  # those that are there, the newest first


def fenwick_partition(v: Tensor, levels: int, cu_seqlens: Tensor | None, cache: SlotCache | None) -> Partition:
    """The partition of the tokens of v [B, T, H, Dv]; scores are 0, for none decides anything."""
    B, T, H, _ = v.shape
    where = positions(document_starts(cu_seqlens, B, T, v.device), H, cache)[..., :1]  # all heads are alike
    row = torch.arange(T, device=v.device)[None, :, None]
    death = (row + deaths(where, levels) - where).clamp(max=T).int().expand(B, T, H).contiguous()
    cache_death = None
    if cache is not None:
        began = (cache.start - cache.start[..., :1]).clamp(min=0)  # in the document, which the oldest slot began
        ends = (deaths(began, levels) - cache.held()[..., None]).clamp(max=T)
        cache_death = torch.where(cache.start > EMPTY, ends, T).int()
    return Partition(
        torch.ones(B, T, H, dtype=torch.bool, device=v.device), death,
        torch.zeros(B, T, H, device=v.device), cache_death=cache_death,
    )  # fmt: skip


def weights_by_recency(weights: Tensor, cu_seqlens: Tensor | None, cache: SlotCache | None) -> Tensor:
    """Readout weights by level -> by recency, [B, T, H, K] both."""
    B, T, H, levels = weights.shape
    where = positions(document_starts(cu_seqlens, B, T, weights.device), H, cache)[..., :1]
    return weights.gather(-1, level_of_slot(where, levels).expand_as(weights))
