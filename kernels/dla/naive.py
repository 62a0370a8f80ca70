"""The oracle: the token-by-token recurrence of DLA in float64.

Written to be held against the paper (arXiv 2606.10650, eqs 13-18), not to be fast: explicit lists of slots, Python
loops over batch, head and token, autograd for every gradient. Everything else in this folder is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .cache import EMPTY, FIRST_SCORE, Partition, SlotCache
from .content import unit
from .documents import document_starts
from .rules import FENWICK, INFORMATION, Controls, draw, head_key, pair_of


@dataclass
class _Slot:
    state: Tensor  # [Dk, Dv]
    start: int
    count: int
    info: float
    keys: Tensor | float = 0.0  # [Dk], sum of the unit keys


def information_score(s: Tensor, state: Tensor) -> float:
    """Eq 13 with gain-free RMSNorm over the whole matrix: sqrt(2 - 2 cos(s, state)); sqrt(2) where either is zero."""
    norm = (s.norm() * state.norm()).item()
    cosine = (s * state).sum().item() / norm if norm > 0 else 0.0
    return max(2.0 - 2.0 * cosine, 0.0) ** 0.5


def merge_cost(a: _Slot, b: _Slot, merge: str) -> float:
    """What the capacity rule minimises over neighbours: eq 16 (`density`), the tokens of both (`equal_counts`), or the
    rise in squared error (`ward`)."""
    if merge == "density":
        return (a.info + b.info) / (a.count + b.count)
    if merge == "equal_counts":
        return a.count + b.count
    gap = (a.state / a.count - b.state / b.count).detach().square().sum().item()
    return a.count * b.count / (a.count + b.count) * gap


def _opens(score: float, tau: float, controls: Controls, position: int, head: int) -> bool:
    """Whether a slot opens at a token with `position` tokens of its document before it, the first one apart."""
    if controls.boundary == "every":
        return position % controls.every == 0
    if controls.boundary == "random":
        key = head_key(controls.seed, controls.layer, controls.first_head + head, 0)
        return draw(key, position) < controls.rate * 2**32
    return score >= tau


def _pair(slots: list[_Slot], merge: str, controls: Controls, position: int, head: int) -> int:
    """Which slot of a full list absorbs its younger neighbour."""
    if merge == "oldest":
        return 0
    if merge == "random":
        key = head_key(controls.seed, controls.layer, controls.first_head + head, 1)
        return pair_of(draw(key, position), len(slots))
    costs = [merge_cost(a, b, merge) for a, b in zip(slots, slots[1:], strict=False)]
    return costs.index(min(costs))  # the oldest pair wins a tie


def _level(slots: list[_Slot], i: int, levels: int) -> int:
    """Of slot i in a Fenwick hierarchy: the newest is level 0; level l >= 1 has 2^(l-1) tokens, the last any number."""
    return 0 if i == len(slots) - 1 else min(slots[i].count.bit_length(), levels - 1)


def _cascades(slots: list[_Slot], levels: int) -> bool:
    """Whether the newest two slots merge as another token comes: they are of one level then."""
    if len(slots) < 2:
        return False
    into = min(slots[-1].count.bit_length(), levels - 1)  # the newest one's level when a token has come
    return _level(slots, len(slots) - 2, levels) == into


def _merge(slots: list[_Slot], i: int) -> int:
    """Merge slot i + 1 into slot i (eq 17); returns the start that dies."""
    old, young = slots[i], slots.pop(i + 1)
    slots[i] = _Slot(
        old.state + young.state, old.start, old.count + young.count, old.info + young.info, old.keys + young.keys
    )
    return young.start


def _load(cache: SlotCache, b: int, h: int) -> list[_Slot]:
    return [
        _Slot(
            cache.states[b, h, i].double(),
            -1 - i,
            int(cache.count[b, h, i]),
            float(cache.info[b, h, i]),
            0.0 if cache.keys is None else cache.keys[b, h, i].double(),
        )
        for i in range(int(cache.live[b, h]))
    ]


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int = 30,
    merge: str = "density",
    controls: Controls = INFORMATION,
    partition: Partition | None = None,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    sharpness: Tensor | None = None,
) -> tuple[Tensor, Partition, SlotCache]:
    """DLA as a float64 recurrence; shapes and meaning as `dla_attention`.

    Returns the output [B, T, H, Dv] (float64), the partition (the given one's decisions if one is given: teacher
    forcing) and the final cache (of each row's last document).
    """
    B, T, H, Dv = v.shape
    q, k = (x.double().repeat_interleave(H // x.shape[2], dim=2) for x in (q, k))
    v, g, lam = v.double(), g.double(), slot_weights.double()
    beta = None if beta is None else beta.double()
    tau = torch.as_tensor(tau, dtype=torch.float64).expand(H)
    resets = document_starts(cu_seqlens, B, T, v.device)
    start = torch.zeros(B, T, H, dtype=torch.bool)
    death = torch.full((B, T, H), T, dtype=torch.int32)
    score = torch.zeros(B, T, H, dtype=torch.float32)
    lo = torch.zeros(B, T, H, dtype=torch.int32)
    cache_death = torch.full((B, H, capacity), T, dtype=torch.int32)
    inherited_death = cache_death if partition is None or partition.cache_death is None else partition.cache_death
    final = SlotCache.empty(B, H, capacity, k.shape[-1], Dv, dtype=torch.float64)
    final.position += T if cache is None else T + cache.position
    final_states: dict[tuple[int, int], list[_Slot]] = {}
    out = []
    for b in range(B):
        for h in range(H):
            slots = _load(cache, b, h) if cache is not None else []
            document = 0
            held = 0 if cache is None else sum(slot.count for slot in slots)

            def kill(position: int, at: int, b: int = b, h: int = h) -> None:
                if position >= 0:
                    death[b, position, h] = at
                else:
                    cache_death[b, h, -1 - position] = at

            for t in range(T):
                if resets[b, t]:
                    slots, document, held = [], t, 0
                kt, vt = k[b, t, h], v[b, t, h]
                weight = 1.0 if beta is None else beta[b, t, h]
                s = weight * torch.outer(kt, vt)
                # the paper scores against the most recent state before the token acts on it
                score_t = information_score(s.detach(), slots[-1].state.detach()) if slots else FIRST_SCORE
                full = merge != FENWICK and 1 < len(slots) == capacity  # one slot never merges: nothing opens a second
                position = held + t - document
                pair = _pair(slots, merge, controls, position, h) if full else 0
                lo[b, t, h] = max(slots[pair + 1].start, 0) if full else document
                if partition is None:
                    fires = not slots or _opens(score_t, tau[h].item(), controls, position, h)
                    if fires and full:
                        kill(_merge(slots, pair), t)
                    while merge == FENWICK and _cascades(slots, capacity):
                        kill(_merge(slots, len(slots) - 2), t)
                else:
                    fires = not slots or bool(partition.start[b, t, h])
                    for i in range(len(slots) - 1, 0, -1):
                        where = slots[i].start
                        dies = partition.death[b, where, h] if where >= 0 else inherited_death[b, h, -1 - where]
                        if int(dies) == t:
                            kill(_merge(slots, i - 1), t)
                for slot in slots:  # one shared transition for all slots: merging by summation commutes with it
                    erased = 0.0 if beta is None else weight * torch.outer(kt, kt @ slot.state)
                    slot.state = g[b, t, h].exp() * (slot.state - erased)
                if fires:
                    slots.append(_Slot(s, t, 1, score_t, unit(kt)))
                else:
                    last = slots[-1]
                    slots[-1] = _Slot(
                        last.state + s, last.start, last.count + 1, last.info + score_t, last.keys + unit(kt)
                    )
                start[b, t, h], score[b, t, h] = fires, score_t
                place = list(range(len(slots)))  # of the newest first
                if merge == FENWICK:
                    place = [_level(slots, i, capacity) for i in reversed(place)]
                factor = torch.ones(len(slots), dtype=torch.float64)
                if sharpness is not None:
                    match = torch.stack([unit(q[b, t, h]) @ (slot.keys / slot.count) for slot in reversed(slots)])
                    factor = len(slots) * torch.softmax(sharpness[h].double() * match, 0)
                read = zip(place, factor, reversed(slots), strict=True)
                reads = [lam[b, t, h, r] * f * (q[b, t, h] @ slot.state) for r, f, slot in read]
                out.append(reduce(torch.add, reads))
            final_states[b, h] = slots
    offset = torch.zeros(B, dtype=torch.int64) if cache is None else cache.position
    states, keys = [], []
    for (b, h), slots in final_states.items():
        final.live[b, h] = len(slots)
        for i, slot in enumerate(slots):
            if slot.start < 0:
                assert cache is not None
                final.start[b, h, i] = cache.start[b, h, -1 - slot.start]
            else:
                final.start[b, h, i] = slot.start + offset[b]
            final.count[b, h, i], final.info[b, h, i] = slot.count, slot.info
        empty = [torch.zeros(k.shape[-1], Dv, dtype=torch.float64)] * (capacity - len(slots))
        final.start[b, h, len(slots) :] = EMPTY
        states.append(torch.stack([slot.state for slot in slots] + empty))
        sums = [torch.as_tensor(slot.keys, dtype=torch.float64).expand(k.shape[-1]) for slot in slots]
        keys.append(torch.stack(sums + [x[:, 0] for x in empty]))
    if sharpness is not None:
        final.keys = torch.stack(keys).view(B, H, capacity, k.shape[-1])
    final.states = torch.stack(states).view(B, H, capacity, k.shape[-1], Dv)
    output = torch.stack(out).view(B, H, T, Dv).transpose(1, 2)
    return output, Partition(start, death, score, lo, cache_death, final.info), final


def naive_soft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None = None,
    *,
    score: Tensor,
    tau: Tensor,
    temperature: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Annealed soft gates as a float64 recurrence: [B, T, H, Dv]; arguments as `soft_attention`.

    Every token keeps a state of its own. The gate of a later token moves it back by a part of a slot, and it is read
    with the slot weight there, between those of the two neighbours. `score`: [B, T, H], of the hard rule, detached.
    """
    B, T, H, _ = v.shape
    q, k = (x.double().repeat_interleave(H // x.shape[2], dim=2) for x in (q, k))
    v, g, lam = v.double(), g.double(), slot_weights.double()
    gate = torch.sigmoid((score.detach().double() - tau) / temperature)
    resets, oldest = document_starts(cu_seqlens, B, T, v.device), lam.shape[-1] - 1
    out = []
    for b in range(B):
        for h in range(H):
            tokens: list[tuple[Tensor, Tensor]] = []  # state, slots back
            for t in range(T):
                if resets[b, t]:
                    tokens = []
                kt, weight = k[b, t, h], 1.0 if beta is None else beta[b, t, h].double()
                moved = []
                for state, back in tokens:
                    erased = 0.0 if beta is None else weight * torch.outer(kt, kt @ state)
                    moved.append((g[b, t, h].exp() * (state - erased), back + gate[b, t, h]))
                tokens = [*moved, (weight * torch.outer(kt, v[b, t, h]), gate.new_zeros(()))]
                reads = []
                for state, back in tokens:
                    at = back.clamp(max=oldest)
                    newer = min(int(at), oldest - 1)
                    mix = lam[b, t, h, newer].lerp(lam[b, t, h, newer + 1], at - newer)
                    reads.append(mix * (q[b, t, h] @ state))
                out.append(reduce(torch.add, reads))
    return torch.stack(out).view(B, H, T, -1).transpose(1, 2)
