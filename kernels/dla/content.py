"""Content-addressed slot weights: slots whose keys match the query are read more.

Not in the paper, whose weights know a slot by its recency alone. With unit q and k, m_i the mean of the keys of slot
i's tokens, s the sharpness of a head and L live slots, the weight of slot i is multiplied by L softmax_i(s q^T m_i). So
s = 0 leaves the weights as they are, and the factors of a token have the mean 1. A slot is a range of tokens, so its
sum of keys is a difference of two prefix sums: O(T (K + C) Dk) for chunks of C tokens, with gradients to q, k and s by
autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import compute_dtype, lanes, unlanes
from .cache import Partition, SlotCache
from .documents import begin_of_document

_CHUNK = 64


def unit(x: Tensor) -> Tensor:
    """x over its norm along the last axis; 0 stays 0."""
    return F.normalize(x, dim=-1, eps=1e-6)


def content_weights(
    q: Tensor, k: Tensor, slot_weights: Tensor, sharpness: Tensor, part: Partition, resets: Tensor,
    cache: SlotCache | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Slot weights times the factor of each slot, and the sums of unit keys of the slots after the last token.

    Args:
        q, k: [B, T, G, Dk]. slot_weights: [B, T, H, K], by recency. sharpness: [H].
        part: of the tokens, with `cache_death` where there is a cache. resets: bool [B, T], document starts.
        cache: memory before the first token, with `keys`.

    Returns:
        [B, T, H, K] and, chronological, [B, H, K, Dk].
    """
    B, T, H, K = slot_weights.shape
    dtype = compute_dtype(slot_weights)
    query, key = (unit(lanes(x, H, dtype)).double() for x in (q, k))  # [N, T, Dk]; differences of long sums cancel
    start, death = (x.transpose(1, 2).flatten(0, 1) for x in (part.start, part.death))  # [N, T]
    begin = begin_of_document(resets).repeat_interleave(H, 0)
    counts = torch.ones_like(death)
    before = 0
    if cache is not None:  # K tokens in front, each with the keys of a slot
        assert cache.keys is not None and part.cache_death is not None
        before = K
        there = torch.arange(K, device=k.device) < cache.live.view(-1, 1)
        key = torch.cat([cache.keys.flatten(0, 1).double() * there[..., None], key], 1)
        counts = torch.cat([cache.count.view(-1, K).int() * there, counts], 1)
        start = torch.cat([there, start], 1)
        death = torch.cat([part.cache_death.flatten(0, 1), death], 1)
    death = torch.where(death >= T, T, death)
    sums, totals = (F.pad(x.cumsum(1), (0, 0, 1, 0)) for x in (key, counts[..., None].double()))  # before each token
    rows = torch.arange(before + T, device=k.device)
    held = rows[:before].expand(len(start), -1)
    scale = sharpness.double().repeat(B)[:, None, None]
    factors = []
    for at in range(0, T, _CHUNK):
        now = rows[before + at : before + min(at + _CHUNK, T)]
        candidates = torch.cat([held, now.expand(len(start), -1)], 1)  # [N, X]
        places, match, count = _slots(
            candidates, now, before, start, death, begin, sums, totals, query[:, at : at + _CHUNK], K
        )
        live = places >= 0
        score = (scale * match / count).masked_fill(~live, float("-inf"))
        factors.append((score.softmax(-1) * live.sum(-1, keepdim=True)).to(dtype))
        held = places[:, -1]
    factor = unlanes(torch.cat(factors, 1), B)
    return slot_weights * factor.to(slot_weights.dtype), _sums_after(held, sums, dtype).view(B, H, K, -1)


def _slots(
    candidates: Tensor, now: Tensor, before: int, start: Tensor, death: Tensor, begin: Tensor, sums: Tensor,
    totals: Tensor, query: Tensor, K: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of some tokens `now` [C] and by recency: where each slot begins (-1: none), the product of its sum of keys with
    the query, and its number of tokens (1 where there is none), [N, C, K]. `candidates` [N, X]: where slots may begin,
    -1 for none."""
    known = candidates.clamp(min=0)
    opens = start.gather(1, known) & (candidates >= 0)
    at = now[:, None]
    alive = opens[:, None] & (candidates[:, None] <= at) & (death.gather(1, known)[:, None] > at - before)
    alive &= candidates[:, None] - before >= begin[:, now - before, None]
    found, order = torch.where(alive, candidates[:, None], -1).topk(min(K, candidates.shape[1]), -1)
    missing = K - found.shape[-1]
    product = query @ sums.gather(1, known[..., None].expand(-1, -1, sums.shape[-1])).mT  # [N, C, X]
    low = F.pad(product.gather(-1, order), (0, missing))
    tokens = F.pad(totals[..., 0].gather(1, known)[:, None].expand(-1, len(now), -1).gather(-1, order), (0, missing))
    found = F.pad(found, (0, missing), value=-1)
    end = (query * sums[:, now + 1]).sum(-1, keepdim=True)
    match = torch.cat([end, low[..., :-1]], -1) - low
    count = torch.cat([totals[:, now + 1], tokens[..., :-1]], -1) - tokens
    return found, match, torch.where(found >= 0, count, 1)


def _sums_after(places: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of keys [N, K, Dk], chronological, of the slots that begin at `places` [N, K] (by recency, -1: none)."""
    wide = places.clamp(min=0)[..., None].expand(-1, -1, sums.shape[-1])
    low = sums.gather(1, wide)
    held = (torch.cat([sums[:, -1:], low[:, :-1]], 1) - low) * (places >= 0)[..., None]
    source = (places >= 0).sum(1, keepdim=True) - 1 - torch.arange(places.shape[1], device=places.device)
    chosen = held.gather(1, source.clamp(min=0)[..., None].expand_as(held))
    return (chosen * (source >= 0)[..., None]).to(dtype)
