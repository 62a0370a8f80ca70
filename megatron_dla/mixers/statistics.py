"""How slots are used in one training step: which pairs merge, how large slots are, how they are read."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.kernels.dla import Partition
from megatron_dla.kernels.dla.cache import FIRST_SCORE
from megatron_dla.kernels.dla.documents import begin_of_document
from megatron_dla.kernels.dla.statistics import count

SIZES = 24  # slots of 1, 2 to 3, 4 to 7, ... tokens; larger ones in the last
FIXED = 4  # columns before those by size and by slot
MOST, LEAST = 0.5, 1 / 4096  # of the tokens open a slot, where the rule of boundaries still decides anything


class SlotStatistics:
    """Sums over this rank's tokens, float64 [H local, columns]: merges, those of the newest two slots, slots opened
    within documents, tokens; slots at the end of a row by size; readout weights by slot, and the tokens of these."""

    def __init__(self, heads: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.sums = torch.zeros(heads, FIXED + SIZES + capacity + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, decided: Partition, first: int) -> None:
        """Merges, of the heads from `first` on. Of slots that came from another rank (chain) nothing is counted."""
        counts = count(decided)
        begins = (decided.start & ((decided.score - FIRST_SCORE).abs() < 1e-6)).sum((0, 1))  # of documents
        columns = counts.merges, counts.newest, counts.boundaries - begins, counts.tokens
        self.sums[first : first + len(begins), :FIXED] += torch.stack(columns, 1)

    @torch.no_grad()
    def add_sizes(self, decided: Partition, starts: Tensor | None, first: int) -> None:
        """Sizes of the slots at the end of each row, in its last document; starts: bool [B, T] or None."""
        start, death = decided.start, decided.death
        B, T, H = start.shape
        index = torch.arange(T, device=start.device)[:, None]
        begin = index[:1, None] if starts is None else begin_of_document(starts)[:, -1:, None]
        live = torch.where(start & (death >= T) & (index >= begin), index, -1)
        opened = live.topk(min(self.capacity, T), 1).values  # [B, slots, H], newest first
        ends = torch.cat([torch.full_like(opened[:, :1], T), opened[:, :-1]], 1)
        size = torch.where(opened >= 0, ends - opened, 0)
        place = size.clamp(min=1).double().log2().long().clamp(max=SIZES - 1)
        sums = torch.zeros(H, SIZES, dtype=torch.float64, device=start.device)
        sums.scatter_add_(1, place.flatten(0, 1).T, (size > 0).double().flatten(0, 1).T)
        self.sums[first : first + H, FIXED : FIXED + SIZES] += sums

    @torch.no_grad()
    def add_weights(self, weights: Tensor, first: int) -> None:
        """Readout weights [B, T, H, K] of the heads from `first` on, of all tokens."""
        B, T, H, _ = weights.shape
        rows = self.sums[first : first + H, FIXED + SIZES :]
        rows[:, :-1] += weights.double().sum((0, 1))
        rows[:, -1] += B * T


def report(
    layers: list[SlotStatistics], data: dist.ProcessGroup, tensor: dist.ProcessGroup
) -> tuple[dict[str, Any], float]:
    """Of all ranks together (a collective): metrics, and the boundary rate without first tokens of documents.

    `newest_merge_share_by_layer`: None without merges. `slot_sizes`: shares by tokens in a slot. `slot_weights`: means
    by recency.
    """
    local = torch.stack([layer.sums for layer in layers])
    dist.all_reduce(local, group=data)
    parts = [torch.empty_like(local) for _ in range(tensor.size())]
    dist.all_gather(parts, local.contiguous(), group=tensor)
    sums = torch.cat(parts, 1).sum(1).cpu()  # [layers, columns]
    merges, newest = sums[:, 0].tolist(), sums[:, 1].tolist()
    found: dict[str, Any] = {
        "newest_merge_share_by_layer": [round(n / m, 4) if m else None for m, n in zip(merges, newest, strict=True)],
    }
    sizes = sums[:, FIXED : FIXED + SIZES].sum(0)
    if sizes.sum():
        shares = (sizes / sizes.sum()).tolist()
        found["slot_sizes"] = {_tokens(n): round(share, 4) for n, share in enumerate(shares) if share}
    weights = sums[:, FIXED + SIZES :].sum(0)
    found["slot_weights"] = {str(n): round(w, 4) for n, w in enumerate((weights[:-1] / weights[-1]).tolist())}
    return found, (sums[:, 2].sum() / sums[:, 3].sum()).item()


def _tokens(bin_: int) -> str:
    return "1" if bin_ == 0 else f"{2**bin_}+" if bin_ == SIZES - 1 else f"{2**bin_}-{2 ** (bin_ + 1) - 1}"


def degenerate(rate: float) -> str:
    """What is wrong with a boundary rate at which the threshold decides nothing, and the remedy; "" = nothing."""
    if LEAST <= rate <= MOST:
        return ""
    what = "most tokens open a slot, and merges alone decide what a slot holds: raise model.tau"
    if rate < LEAST:
        what = "hardly a token opens a slot, and one state does the work of all: lower model.tau"
    return f"{what}, or use model.tau_mode=calibrated with model.boundary_rate"
