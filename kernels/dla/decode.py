"""One token of DLA on a `SlotCache`, in place; and the token-by-token partition that the `ward` criterion needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .arrays import compute_dtype, lanes
from .cache import FIRST_SCORE, Partition, SlotCache
from .documents import document_starts


def _pair_costs(states: Tensor, count: Tensor, info: Tensor, merge: str) -> Tensor:
    """Cost of merging each pair of neighbours: [L, K - 1]; states [L, K, Dk * Dv], count and info [L, K]."""
    if merge == "equal_counts":
        return count[:, :-1] + count[:, 1:]
    n, m = count[:, :-1].to(info.dtype), count[:, 1:].to(info.dtype)
    if merge == "density":
        return (info[:, :-1] + info[:, 1:]) / (n + m)
    mean = states / count[..., None].to(states.dtype)
    return n * m / (n + m) * (mean[:, :-1] - mean[:, 1:]).square().sum(-1)


class _Memory:
    """The memory of all L = B * H lanes, changed in place: views of a cache's fields with the lanes in front."""

    def __init__(self, cache: SlotCache) -> None:
        self.capacity, L = cache.capacity, cache.live.numel()
        self.states = cache.states.view(L, self.capacity, *cache.states.shape[3:])
        self.live, self.position = cache.live.view(L), cache.position
        # by slot: row n * K + i is slot i of lane n
        self.rows = self.states.view(L * self.capacity, -1)
        self.start, self.count, self.info = (x.view(-1) for x in (cache.start, cache.count, cache.info))
        self.index = torch.arange(self.capacity, device=self.live.device)
        self.first = torch.arange(0, len(self.rows), self.capacity, device=self.live.device)

    def score(self, k: Tensor, v: Tensor, write: Tensor | None) -> Tensor:
        """Eq 13 against the open state before the token acts on it; k, v: [L, D]; write: [L] or None (1)."""
        state = self.rows.index_select(0, self.first + (self.live - 1).clamp_(min=0))
        read = torch.bmm(k[:, None], state.view(-1, *self.states.shape[2:])).squeeze(1)
        inner = (read * v).sum(-1)
        norm = vector_norm(k, dim=-1) * vector_norm(v, dim=-1) * vector_norm(state, dim=-1)
        if write is not None:
            inner, norm = inner * write, norm * write.abs()
        cosine = torch.where(norm > 0, inner / norm, 0)
        score = (2 - 2 * cosine).clamp_(min=0).sqrt_()
        return score.masked_fill_(self.live == 0, FIRST_SCORE)

    def merge_pair(self, full: Tensor, merge: str, pair: Tensor | None) -> Tensor | None:
        """Merge `pair` [L], else the cheapest one (eqs 16-17), where `full` [L]; returns the starts that died, -1
        elsewhere."""
        if self.capacity == 1:  # no second slot opens
            return None
        if torch.compiler.is_compiling():
            return self._merge_masked(full, merge, pair)
        lane = full.nonzero().squeeze(1)
        if not len(lane):
            return None
        K = self.capacity
        if pair is None:
            count, info = (x.view(-1, K).index_select(0, lane) for x in (self.count, self.info))
            states = self.states.flatten(2)[lane] if merge == "ward" else self.states
            pair = _pair_costs(states, count, info, merge).argmin(1, keepdim=True)  # the oldest pair wins a tie
        else:
            pair = pair[lane, None]
        row = (lane * K)[:, None] + self.index
        old = row.gather(1, pair).squeeze(1)
        young = old + 1
        dying = torch.full_like(self.live, -1).index_copy_(0, lane, self.start.index_select(0, young))
        moved = row[:, :-1].masked_select(self.index[:-1] > pair)
        after = moved + 1
        for x in (self.rows, self.count, self.info):
            x.index_add_(0, old, x.index_select(0, young))
        for x in (self.rows, self.start, self.count, self.info):
            x.index_copy_(0, moved, x.index_select(0, after))
        self.rows.index_fill_(0, row[:, -1], 0)  # the freed slot; its scalars are overwritten when the next slot opens
        self.live -= full.long()
        return dying

    def _merge_masked(self, full: Tensor, merge: str, pair: Tensor | None) -> Tensor:
        """The same without shapes that depend on data: every lane moves all its slots."""
        states, start = self.states.flatten(2), self.start.view(-1, self.capacity)
        count, info = self.count.view_as(start), self.info.view_as(start)
        if pair is None:
            pair = _pair_costs(states, count, info, merge).argmin(1)
        pair = pair[:, None]
        dying = torch.where(full, start.gather(1, pair + 1).squeeze(1), -1)
        source = (self.index + (full[:, None] & (self.index > pair))).clamp(max=self.capacity - 1)
        joined = full[:, None] & (self.index == pair)
        freed = full[:, None] & (self.index == self.capacity - 1)
        lane = torch.arange(len(full), device=full.device)[:, None]
        for x in (states, start, count, info):
            wide = [y.view(*y.shape, *[1] * (x.ndim - 2)) for y in (joined, freed)]
            young = x.roll(-1, 1) if x is not start else torch.zeros_like(x)
            x.copy_((x + torch.where(wide[0], young, 0))[lane, source].masked_fill(wide[1], 0))
        self.live -= full.long()
        return dying

    def advance(
        self, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, tau: Tensor, merge: str, pair: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Score, decide, merge, transform all slots, write; k, v: [L, D]; g, beta, tau, pair (to merge): [L].

        Returns fired bool [L], score [L] and dying [L]: absolute position of the start that died, -1 or None = none.
        """
        score = self.score(k, v, beta)
        fired = (self.live == 0) | (score >= tau)
        dying = self.merge_pair(fired & (self.live == self.capacity), merge, pair)
        kept = ~fired
        self.live += fired
        slot = self.first + (self.live - 1)  # the new slot, or the open one
        decay = g.exp()
        lanes = self.rows.view(len(slot), -1)
        if beta is None:
            lanes.mul_(decay[:, None])
            self.rows.index_add_(0, slot, (k[:, :, None] * v[:, None]).flatten(1))
        else:
            read = torch.matmul(k[:, None, None], self.states).squeeze(2)  # [L, K, Dv]
            change = (read * (-decay * beta)[:, None, None]).flatten(0, 1)
            change.index_add_(0, slot, beta[:, None] * v)
            lanes.mul_(decay[:, None])
            self.states.addcmul_(k[:, None, :, None], change.view_as(read)[:, :, None])
        position = self.position.repeat_interleave(len(slot) // len(self.position))
        self.start.index_copy_(0, slot, torch.where(fired, position, self.start.index_select(0, slot)))
        self.count.index_copy_(0, slot, torch.addcmul(fired.long(), self.count.index_select(0, slot) + 1, kept))
        self.info.index_copy_(0, slot, torch.addcmul(score, self.info.index_select(0, slot), kept))
        self.position += 1
        return fired, score, dying

    def read(self, q: Tensor, weight: Tensor) -> Tensor:
        """[L, Dv] from q [L, Dk] and the weight of each slot by recency [L, K]."""
        recency = self.live[:, None] - 1 - self.index
        weight = weight.gather(1, recency.clamp(min=0)) * (recency >= 0)
        mixed = torch.bmm(weight[:, None], self.states.flatten(2)).view(-1, *self.states.shape[2:])
        return torch.bmm(q[:, None], mixed).squeeze(1)


def _lanes(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, G, ...] -> [B * H, ...]."""
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.to(dtype).flatten(0, 2)


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
    pairs: Tensor | None = None,
) -> Tensor:
    """Advance `cache` by one token and read it: [B, 1, H, Dv]; arguments as `decode_step`, which checks them.

    `tau`: also [B, 1, H]. `pairs`: int64 [B, 1, H], see `Controls.pairs`.
    """
    (B, _, H, _), dtype = v.shape, cache.states.dtype
    q, k, v_, g, lam = (_lanes(x, H, dtype) for x in (q, k, v, g, slot_weights))
    beta = None if beta is None else _lanes(beta, H, dtype)
    tau = torch.as_tensor(tau, dtype=dtype, device=v.device).expand(B, 1, H).flatten()
    memory = _Memory(cache)
    memory.advance(k, v_, g, beta, tau, merge, None if pairs is None else pairs.flatten())
    return memory.read(q, lam).view(B, 1, H, -1).to(v.dtype)


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
    """Partition by running the recurrence on all K states: O(T K Dk Dv), the only exact way for `ward`.

    `tau`: also [B, T, H], for each token its own.
    """
    B, T, H, Dv = v.shape
    dtype = compute_dtype(v)
    resets = document_starts(cu_seqlens, B, T, v.device)
    work = SlotCache.empty(B, H, capacity, k.shape[-1], Dv, dtype=dtype, device=v.device)
    if cache is not None:
        for name in ("states", "count", "info", "live"):
            getattr(work, name).copy_(getattr(cache, name))
        work.start.copy_(-2 - torch.arange(capacity, device=v.device).expand_as(work.start))  # slot i is -2 - i
    taus = torch.as_tensor(tau, dtype=dtype, device=v.device).expand(B, T, H).unbind(1)
    death = torch.full((B, T + 1, H), T, dtype=torch.int32, device=v.device)
    cache_death = torch.full((B, H, capacity + 1), T, dtype=torch.int32, device=v.device)
    inputs = [lanes(x, H, dtype) for x in (k, v, g, *([] if beta is None else [beta]))]
    memory = _Memory(work)
    fired, score = [], []
    for t in range(T):
        work.live *= (~resets[:, t, None]).long()
        work.states *= (~resets[:, t, None, None, None, None]).to(dtype)
        k_t, v_t, g_t, *beta_t = (x[:, t] for x in inputs)
        strength = beta_t[0] if beta_t else None
        fires, value, dying = memory.advance(k_t, v_t, g_t, strength, taus[t].flatten(), merge, None)
        fired.append(fires.view(B, H))
        score.append(value.view(B, H))
        if dying is None:
            continue
        dying = dying.view(B, H)
        death.scatter_(1, torch.where(dying >= 0, dying, T)[:, None], t)
        slot = torch.where(dying <= -2, -2 - dying, capacity)
        cache_death.scatter_(2, slot[..., None], t)
    return Partition(
        torch.stack(fired, 1), death[:, :T], torch.stack(score, 1).float(), cache_death=cache_death[..., :capacity],
        final_info=work.info,
    )  # fmt: skip
