"""One token of DLA on a `SlotCache`, in place; and the token-by-token partition that the `ward` criterion needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arrays import compute_dtype
from .cache import FIRST_SCORE, Partition, SlotCache
from .documents import document_starts


@dataclass
class _Token:
    """What one token decided, per (batch, head): [B, H]."""

    fired: Tensor
    score: Tensor
    dying: Tensor  # absolute position of the start that died, -1 = none


def _score(cache: SlotCache, k: Tensor, v: Tensor, write: Tensor) -> Tensor:
    """Eq 13 against the open state before the token acts on it; k, v: [B, H, D]; write: [B, H]."""
    open_slot = (cache.live - 1).clamp(min=0)[..., None, None, None]
    state = cache.states.gather(2, open_slot.expand(-1, -1, 1, *cache.states.shape[3:])).squeeze(2)
    inner = write * torch.einsum("bhd,bhde,bhe->bh", k, state, v)
    norm = write.abs() * k.norm(dim=-1) * v.norm(dim=-1) * state.flatten(2).norm(dim=-1)
    cosine = torch.where(norm > 0, inner / norm, 0)
    score = (2 - 2 * cosine).clamp_(min=0).sqrt_()
    return torch.where(cache.live == 0, FIRST_SCORE, score)


def _pair_costs(states: Tensor, count: Tensor, info: Tensor, merge: str) -> Tensor:
    """Cost of merging each pair of neighbours: [L, K - 1]."""
    n, m = count[:, :-1].to(info.dtype), count[:, 1:].to(info.dtype)
    if merge == "density":
        return (info[:, :-1] + info[:, 1:]) / (n + m)
    mean = states / count[..., None, None].to(states.dtype)
    return n * m / (n + m) * (mean[:, :-1] - mean[:, 1:]).square().sum((-1, -2))


def _merge_cheapest(cache: SlotCache, full: Tensor, merge: str) -> Tensor:
    """Merge the cheapest pair (eqs 16-17) where `full` [B, H]; returns the starts that died, -1 elsewhere."""
    dying = torch.full_like(cache.live, -1)
    if not bool(full.any()):
        return dying
    states, start, count, info = (getattr(cache, x)[full] for x in ("states", "start", "count", "info"))
    pair = _pair_costs(states, count, info, merge).argmin(1)  # the oldest pair wins a tie
    row = torch.arange(len(pair), device=pair.device)
    dying[full] = start[row, pair + 1]
    for x in (states, count, info):
        x[row, pair] += x[row, pair + 1]
    index = torch.arange(cache.capacity, device=pair.device)
    source = (index + (index > pair[:, None])).clamp(max=cache.capacity - 1)
    states = states[row[:, None], source]
    states[:, -1] = 0  # the freed slot; its scalars are overwritten when the next slot opens
    cache.states[full] = states
    for name, x in (("start", start), ("count", count), ("info", info)):
        getattr(cache, name)[full] = x.gather(1, source)
    cache.live -= full.long()
    return dying


def _advance(cache: SlotCache, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, tau: Tensor, merge: str) -> _Token:
    """Score, decide, merge, transform all slots, write; k, v: [B, H, D]; g, beta: [B, H]; tau: [H]."""
    write = torch.ones_like(g) if beta is None else beta
    score = _score(cache, k, v, write)
    fired = (cache.live == 0) | (score >= tau)
    dying = _merge_cheapest(cache, fired & (cache.live == cache.capacity), merge)
    decay = g.exp()[..., None, None, None]
    if beta is None:
        cache.states *= decay
    else:
        read = torch.einsum("bhd,bhkde->bhke", k, cache.states)
        cache.states -= beta[..., None, None, None] * k[:, :, None, :, None] * read[..., None, :]
        cache.states *= decay
    slot = cache.live - (~fired).long()  # a new slot at index `live`, or the open one
    hot = torch.arange(cache.capacity, device=slot.device) == slot[..., None]
    s = write[..., None, None] * k[..., :, None] * v[..., None, :]
    cache.states += hot[..., None, None] * s[:, :, None]
    cache.start.copy_(torch.where(hot & fired[..., None], cache.position[:, None, None], cache.start))
    cache.count.copy_(torch.where(hot, torch.where(fired[..., None], 1, cache.count + 1), cache.count))
    fresh = torch.where(fired[..., None], 0, cache.info)
    cache.info.copy_(torch.where(hot, fresh + score[..., None], cache.info))
    cache.live += fired.long()
    cache.position += 1
    return _Token(fired, score, dying)


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, G, ...] -> [B, H, ...]."""
    x = x.squeeze(1).to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


@torch.no_grad()
def decode_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    cache: SlotCache,
    beta: Tensor | None,
    *,
    tau: float | Tensor,
    merge: str,
) -> Tensor:
    """Advance `cache` by one token and read it: [B, 1, H, Dv]; arguments as `decode_step`, which checks them."""
    H, dtype = v.shape[2], cache.states.dtype
    q, k, v_, g, lam = (_heads(x, H, dtype) for x in (q, k, v, g, slot_weights))
    beta = None if beta is None else _heads(beta, H, dtype)
    tau = torch.as_tensor(tau, dtype=dtype, device=v.device).expand(H)
    _advance(cache, k, v_, g, beta, tau, merge)
    recency = cache.live[..., None] - 1 - torch.arange(cache.capacity, device=v.device)
    weight = lam.gather(-1, recency.clamp(min=0)) * (recency >= 0)
    mixed = torch.einsum("bhk,bhkde->bhde", weight, cache.states)
    return torch.einsum("bhd,bhde->bhe", q, mixed)[:, None].to(v.dtype)


@torch.no_grad()
def recurrent_partition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    *,
    tau: float | Tensor,
    capacity: int,
    merge: str,
    cu_seqlens: Tensor | None,
    cache: SlotCache | None,
) -> Partition:
    """Partition by running the recurrence on all K states: O(T K Dk Dv), the only exact way for `ward`."""
    B, T, H, Dv = v.shape
    dtype = compute_dtype(v)
    resets = document_starts(cu_seqlens, B, T, v.device)
    work = SlotCache.empty(B, H, capacity, k.shape[-1], Dv, dtype=dtype, device=v.device)
    if cache is not None:
        for name in ("states", "count", "info", "live"):
            getattr(work, name).copy_(getattr(cache, name))
        work.start.copy_(-2 - torch.arange(capacity, device=v.device).expand_as(work.start))  # slot i is -2 - i
    tau = torch.as_tensor(tau, dtype=dtype, device=v.device).expand(H)
    death = torch.full((B, T + 1, H), T, dtype=torch.int32, device=v.device)
    cache_death = torch.full((B, H, capacity + 1), T, dtype=torch.int32, device=v.device)
    fired, score = [], []
    for t in range(T):
        work.live *= (~resets[:, t, None]).long()
        work.states *= (~resets[:, t, None, None, None, None]).to(dtype)
        k_t, v_t, g_t = (_heads(x[:, t : t + 1], H, dtype) for x in (k, v, g))
        beta_t = None if beta is None else _heads(beta[:, t : t + 1], H, dtype)
        token = _advance(work, k_t, v_t, g_t, beta_t, tau, merge)
        fired.append(token.fired)
        score.append(token.score)
        in_row, in_cache = token.dying >= 0, token.dying <= -2
        death.scatter_(1, torch.where(in_row, token.dying, T)[:, None], t)
        slot = torch.where(in_cache, -2 - token.dying, capacity)
        cache_death.scatter_(2, slot[..., None], t)
    return Partition(
        torch.stack(fired, 1), death[:, :T], torch.stack(score, 1).float(), cache_death=cache_death[..., :capacity],
        final_info=work.info,
    )  # fmt: skip
