"""Forced replay: follow a partition's own decisions in float64 and list the ones that are wrong beyond rounding.

Two implementations may legitimately part after a near tie, so partitions are not compared element by element. A
decision is wrong if, given all earlier ones of the same partition, float64 would have decided otherwise by a margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dla.kernels.dla import Partition, SlotCache
from megatron_dla.kernels.dla.cache import FIRST_SCORE
from megatron_dla.kernels.dla.naive import document_starts


class Violation(NamedTuple):
    """One wrong decision of lane (batch, head); `numbers` are what was found, then what float64 says."""

    batch: int
    head: int
    position: int
    kind: str
    numbers: tuple[float, ...]


def open_scores(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, start: Tensor, resets: Tensor, cache: SlotCache | None
) -> Tensor:
    """Float64 information scores [B, T, H] along the boundaries `start`; `resets` bool [B, T].

    Only the open slot is scored against, and it depends on the boundaries alone: merges do not matter here.
    """
    B, T, H, Dv = v.shape
    k = k.double().repeat_interleave(H // k.shape[2], dim=2)
    v, decay = v.double(), g.double().exp()
    weight = torch.ones_like(decay) if beta is None else beta.double()
    state, empty = v.new_zeros(B, H, k.shape[-1], Dv), torch.ones(B, H, dtype=torch.bool, device=v.device)
    if cache is not None:
        last = (cache.live - 1).clamp(min=0)[..., None, None, None].expand(B, H, 1, *state.shape[2:])
        state, empty = cache.states.double().gather(2, last).squeeze(2), cache.live == 0
        state = state * ~empty[..., None, None]
    scores = []
    for t in range(T):
        kt, vt, wt = k[:, t], v[:, t], weight[:, t]
        empty = empty | resets[:, t, None]
        state = state * ~resets[:, t, None, None, None]
        read = torch.einsum("bhd,bhde->bhe", kt, state)
        norm = wt.abs() * kt.norm(dim=-1) * vt.norm(dim=-1) * state.flatten(2).norm(dim=-1)
        cosine = torch.where(norm > 0, wt * (read * vt).sum(-1) / norm, 0)
        scores.append(torch.where(empty, FIRST_SCORE, (2 - 2 * cosine).clamp(min=0).sqrt()))
        if beta is not None:
            state = state - (wt[..., None] * kt)[..., None] * read[..., None, :]
        kept = decay[:, t] * ~(start[:, t] | empty)
        state = kept[..., None, None] * state + (wt[..., None] * kt)[..., None] * vt[..., None, :]
        empty = torch.zeros_like(empty)
    return torch.stack(scores, 1)


@dataclass
class _Slot:
    start: int  # position in the row; -1 - i for slot i of the cache
    count: int
    info: float


@dataclass
class _Lane:
    """What one lane was told (lists over T) and the float64 scores; `death` also has the cache's slots, by -1 - i."""

    batch: int
    head: int
    start: list[bool]
    death: dict[int, int]
    score: list[float]
    lo: list[int] | None
    exact: list[float]
    resets: list[bool]
    tau: float
    capacity: int
    margins: tuple[float, float]

    def follow(self, slots: list[_Slot]) -> tuple[list[Violation], list[_Slot]]:
        """Walk the lane; returns what is wrong and the slots after the last token."""
        self.found: list[Violation] = []
        self.ends: dict[int, list[int]] = {}
        T, document = len(self.start), 0
        for position, at in self.death.items():
            if at != T:
                self.ends.setdefault(at, []).append(position)
            if at != T and not (max(position, -1) < at < T):
                self.report(max(position, 0), "death out of range", at)
            if at != T and position >= 0 and not self.start[position]:
                self.report(position, "death of a token that is not a start", at)
        for t in range(T):
            if self.resets[t]:
                slots, document = [], t
            self.check_score(t, first=not slots)
            self.check_lo(t, slots, document)
            fires = self.start[t] or not slots
            self.merge(t, slots, due=fires and len(slots) >= self.capacity)
            if fires:
                slots.append(_Slot(t, 1, self.exact[t]))
            else:
                slots[-1].count += 1
                slots[-1].info += self.exact[t]
        return self.found, slots

    def report(self, position: int, kind: str, *numbers: float) -> None:
        self.found.append(Violation(self.batch, self.head, position, kind, numbers))

    def check_score(self, t: int, first: bool) -> None:
        margin = 1e-6 if first else self.margins[0]
        if not abs(self.score[t] - self.exact[t]) < margin:  # also where it is NaN
            self.report(t, "score", self.score[t], self.exact[t])
        if first and not self.start[t]:
            self.report(t, "first token is not a start")
        wrong = not first and self.start[t] != (self.exact[t] >= self.tau)
        if wrong and not abs(self.exact[t] - self.tau) < self.margins[0]:
            self.report(t, "start" if self.start[t] else "no start", self.exact[t], self.tau)

    def cheapest(self, slots: list[_Slot]) -> tuple[dict[int, float], float]:
        """Density of each pair by the start of its younger member, and the least."""
        costs = {b.start: (a.info + b.info) / (a.count + b.count) for a, b in zip(slots, slots[1:], strict=False)}
        return costs, min(costs.values(), default=0.0)

    def check_lo(self, t: int, slots: list[_Slot], document: int) -> None:
        if self.lo is None:
            return
        allowed = {document}
        if len(slots) >= self.capacity:
            costs, least = self.cheapest(slots)
            allowed = {max(start, 0) for start, cost in costs.items() if cost - least < self.margins[1]}
        if self.lo[t] not in allowed:
            self.report(t, "lo", self.lo[t], *sorted(allowed))

    def merge(self, t: int, slots: list[_Slot], due: bool) -> None:
        """Apply the deaths at t: exactly one if a merge is due, of the younger member of a cheapest pair, else none."""
        dying = self.ends.get(t, [])
        if len(dying) != due:
            self.report(t, "deaths", len(dying), int(due))
        costs, least = self.cheapest(slots)
        for start in dying:
            i = next((i for i, slot in enumerate(slots) if slot.start == start), 0)
            if i == 0:  # not live, in another document, or the oldest, which has nothing to merge into
                self.report(t, "death of a slot that cannot merge", start)
                continue
            if not costs[start] - least < self.margins[1]:
                self.report(t, "victim", start, costs[start], least)
            young = slots.pop(i)
            slots[i - 1].count += young.count
            slots[i - 1].info += young.info


def forced_replay(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    partition: Partition,
    *,
    tau: float | Tensor,
    capacity: int,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    score_margin: float = 1e-3,
    density_margin: float = 1e-3,
) -> list[Violation]:
    """What is wrong with a density-rule partition; arguments as `partition`, inputs of any dtype (taken as exact)."""
    B, T, H, _ = v.shape
    resets = document_starts(cu_seqlens, B, T, v.device)
    exact = open_scores(k, v, g, beta, partition.start, resets, cache).cpu()
    taus = torch.as_tensor(tau, dtype=torch.float64).detach().cpu().expand(H).tolist()
    found: list[Violation] = []
    for b in range(B):
        for h in range(H):
            death = dict(enumerate(partition.death[b, :, h].tolist()))
            slots = []
            if partition.cache_death is not None:
                death |= {-1 - i: at for i, at in enumerate(partition.cache_death[b, h].tolist())}
            if cache is not None:
                counts, infos = cache.count[b, h].tolist(), cache.info[b, h].tolist()
                slots = [_Slot(-1 - i, counts[i], infos[i]) for i in range(int(cache.live[b, h]))]
            lane = _Lane(
                b, h, partition.start[b, :, h].tolist(), death, partition.score[b, :, h].tolist(),
                None if partition.lo is None else partition.lo[b, :, h].tolist(), exact[b, :, h].tolist(),
                resets[b].tolist(), taus[h], capacity, (score_margin, density_margin),
            )  # fmt: skip
            wrong, slots = lane.follow(slots)
            found += wrong
            if partition.final_info is not None:
                found += _check_final(b, h, partition.final_info[b, h].tolist(), slots, score_margin, T)
    return found


def _check_final(b: int, h: int, info: list[float], slots: list[_Slot], margin: float, T: int) -> list[Violation]:
    """Sums of scores after the last token: as close as their scores are, per token."""
    pairs = list(zip(info, slots, strict=False))
    wrong = [i for i, (got, slot) in enumerate(pairs) if not abs(got - slot.info) < margin * slot.count]
    return [Violation(b, h, T, "final_info", (i, info[i], slots[i].info)) for i in wrong]
