"""The capacity rule: which starts die (eq 16, or controls). A scalar walk over each lane's boundaries, on the host.

A boundary changes two or three numbers of a list of at most K slots: tensor operations would be all overhead, and on a
GPU one transfer is cheaper than launching them.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import SlotCache


class _Slots:
    """The live slots of one lane, chronological: start, tokens, summed score, and the cost of merging with the next.

    `cell` holds one number of the compute dtype. Every sum and quotient passes through it (float64 rounded to fp32 is
    the correctly rounded fp32 operation), so that ties are those of decoding.
    """

    def __init__(self, cell: array, starts: list[int], counts: list[int], infos: list[float]) -> None:
        self.cell, self.starts, self.counts, self.infos = cell, starts, counts, infos
        self.costs = [self._cost(i) for i in range(len(starts) - 1)]

    def _cost(self, i: int) -> float:
        cell, infos, counts = self.cell, self.infos, self.counts
        cell[0] = infos[i] + infos[i + 1]
        cell[0] /= counts[i] + counts[i + 1]
        return cell[0]

    def clear(self) -> None:
        for x in (self.starts, self.counts, self.infos, self.costs):
            x.clear()

    def grow(self, scores: list[float]) -> None:
        """Give tokens with these scores to the open slot."""
        cell, infos = self.cell, self.infos
        cell[0] = infos[-1]
        for x in scores:
            cell[0] += x
        infos[-1] = cell[0]
        self.counts[-1] += len(scores)
        if self.costs:
            self.costs[-1] = self._cost(len(self.costs) - 1)

    def walk_control(
        self, boundaries: Iterable[tuple[int, int, bool]], scores: list[float], capacity: int, died: array,
        pairs: list[int] | None,
    ) -> None:  # fmt: skip
        """`walk` by another rule: the pair that `pairs` has for a boundary's token merges, or the one with the fewest
        tokens."""
        for at, end, reset in boundaries:
            starts, counts, infos = self.starts, self.counts, self.infos
            if reset:
                self.clear()
            if len(starts) == capacity:
                if pairs is None:
                    tokens = [a + b for a, b in zip(counts, counts[1:], strict=False)]
                    i = tokens.index(min(tokens))  # the oldest pair wins a tie
                else:
                    i = pairs[at]
                counts[i] += counts.pop(i + 1)
                self.cell[0] = infos[i] + infos.pop(i + 1)
                infos[i] = self.cell[0]
                died.append(starts.pop(i + 1))
                died.append(at)
            self.cell[0] = scores[at]
            for x in scores[at + 1 : end]:
                self.cell[0] += x
            starts.append(at)
            counts.append(end - at)
            infos.append(self.cell[0])

    def walk(
        self, boundaries: Iterable[tuple[int, int, bool]], scores: list[float], capacity: int, died: array,
        record: Callable[[_Slots, int, int], None] | None,
    ) -> None:  # fmt: skip
        """Open a slot at each boundary (position, next one, whether a document starts).

        In a full list the cheapest pair merges first: the start that dies and the time are added to `died`. A slot's
        scores are summed one by one, as decoding does. One function without calls: it runs at every boundary.
        """
        cell, starts, counts, infos, costs = self.cell, self.starts, self.counts, self.infos, self.costs
        live, document = len(starts), 0
        for at, end, reset in boundaries:
            if reset:
                self.clear()
                live, document = 0, at
            if live == capacity:
                i = costs.index(min(costs))  # the oldest pair wins a tie
                tokens = counts[i] + counts.pop(i + 1)
                cell[0] = infos[i] + infos.pop(i + 1)
                counts[i], infos[i] = tokens, cell[0]
                died.append(starts.pop(i + 1))
                died.append(at)
                del costs[i]
                if i < len(costs):
                    cell[0] = infos[i] + infos[i + 1]
                    cell[0] /= tokens + counts[i + 1]
                    costs[i] = cell[0]
                if i:
                    cell[0] = infos[i - 1] + infos[i]
                    cell[0] /= counts[i - 1] + tokens
                    costs[i - 1] = cell[0]
                live -= 1
            tokens, info = end - at, scores[at]
            if tokens > 1:
                cell[0] = info
                for x in scores[at + 1 : end]:
                    cell[0] += x
                info = cell[0]
            if live:
                cell[0] = infos[-1] + info
                cell[0] /= counts[-1] + tokens
                costs.append(cell[0])
            starts.append(at)
            counts.append(tokens)
            infos.append(info)
            live += 1
            if record is not None:
                record(self, end, document)


class _LowestMoved:
    """`Partition.lo`: with a full cache, toggling token p moves only the tokens from the start that would die to p.

    Between two boundaries only the pair with the open slot changes its cost: a few numbers a stretch are enough.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.starts: list[tuple[int, int]] = []  # that would die: of the cheapest closed pair, of the open pair
        self.tokens: list[int] = []  # of the pair with the open slot, less the position where its stretch ends
        self.sums: list[tuple[float, float]] = []  # cost of the closed pair, summed score of the slot before the open

    def record(self, slots: _Slots, until: int, document: int) -> None:
        """The tokens that the newest slot holds up to `until`, but for its first, and `until` itself."""
        if not 1 < len(slots.starts) == self.capacity:
            self.starts.append((document, 0))
            self.tokens.append(1)
            self.sums.append((float("-inf"), 0.0))
            return
        closed = slots.costs[:-1]
        cost = min(closed, default=float("inf"))
        young = closed.index(cost) + 1 if closed else -1
        self.starts.append((max(slots.starts[young], 0), max(slots.starts[-1], 0)))
        self.tokens.append(slots.counts[-2] + slots.counts[-1] - until)
        self.sums.append((cost, slots.infos[-2]))

    def values(self, opens: Tensor, resets: Tensor, running: Tensor) -> Tensor:
        """int32 [N, T]."""
        device, position = opens.device, torch.arange(opens.shape[1], device=opens.device)
        boundaries = opens.long().cumsum(1)
        first = F.pad((boundaries[:, -1:] + 1).cumsum(0), (0, 0, 1, 0))[:-1]  # stretch of each lane
        stretch = boundaries - opens.long() + first
        closed, open_ = torch.tensor(self.starts, device=device)[stretch].unbind(-1)
        cost, older = torch.tensor(self.sums, dtype=running.dtype, device=device)[stretch].unbind(-1)
        count = torch.tensor(self.tokens, device=device)[stretch] + position
        density = (older + F.pad(running[:, :-1], (1, 0))) / count
        return torch.where(resets, position, torch.where(density < cost, open_, closed)).int()


def apply_capacity(
    start: Tensor,
    score: Tensor,
    resets: Tensor,
    capacity: int,
    cache: SlotCache | None = None,
    *,
    merge: str = "density",
    pairs: Tensor | None = None,
    want_lo: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Which starts die, by the density rule (eq 16), by the fewest tokens (`equal_counts`), or the `pairs` given.

    Args:
        start, resets: bool [N, T]; score: [N, T], see `detect`; cache: slots already there, lanes as [B * H].
        pairs: int64 [N, T] or None, see `Controls.pairs`. want_lo: with `density` only.

    Returns:
        death int32 [N, T], cache_death int32 [N, K], lo int32 [N, T] or None, and the slots' final sums [N, K].
    """
    N, T = start.shape
    opens = start | resets
    lane, position = opens.nonzero(as_tuple=True)
    until = F.pad(position[1:], (0, 1), value=T).masked_fill(F.pad(lane[1:] != lane[:-1], (0, 1)), T)
    columns = [x.tolist() for x in (position, until, resets[lane, position])]
    ends = opens.sum(1).cumsum(0).tolist()
    first = torch.where(opens.any(1), opens.int().argmax(1), T)  # tokens of the cache's open slot
    lo = _LowestMoved(capacity) if want_lo else None
    chosen = itertools.repeat(None) if pairs is None else pairs.tolist()
    died, deaths = array("q"), [0]  # start and time of each, and how many there are before each lane
    final = []
    begin = 0
    lanes = zip(_slots(cache, N, score.dtype), first.tolist(), score.tolist(), ends, chosen, strict=False)
    for slots, tokens, scores, end, of_lane in lanes:
        if slots.starts:
            slots.grow(scores[:tokens])
        if lo is not None:
            lo.record(slots, tokens, 0)
        boundaries = zip(*(x[begin:end] for x in columns), strict=True)
        if merge == "density":
            slots.walk(boundaries, scores, capacity, died, None if lo is None else lo.record)
        else:
            slots.walk_control(boundaries, scores, capacity, died, of_lane)
        begin = end
        deaths.append(len(died) // 2)
        final.append(slots.infos + [0.0] * (capacity - len(slots.infos)))
    if lo is not None:
        before = None if cache is None else cache.info.gather(2, (cache.live - 1).clamp(min=0)[..., None]).flatten()
        moved = lo.values(opens, resets, running_sums(opens, score, before))
    death, cache_death = _deaths(died, deaths, N, T, capacity, start.device)
    final_info = torch.tensor(final, dtype=score.dtype, device=start.device)
    return death, cache_death, moved if lo is not None else None, final_info


def running_sums(start: Tensor, score: Tensor, before: Tensor | None = None) -> Tensor:
    """Sum of the scores since the last boundary: [N, T].

    Token by token, like the recurrence's: differences of one long cumsum would break exact ties, lose digits with T,
    and carry one document's rounding into the next.

    Args:
        before: [N], of the slot that is open before the first token, or None.
    """
    kept, scores = (~start).to(score.dtype).T.contiguous(), score.T.contiguous()
    sums = torch.empty_like(scores)
    total = torch.zeros_like(score[:, 0]) if before is None else before.to(score.dtype)
    for x, keep, out in zip(scores.unbind(), kept.unbind(), sums.unbind(), strict=True):
        total = torch.addcmul(x, total, keep, out=out)
    return sums.T


def _slots(cache: SlotCache | None, lanes: int, dtype: torch.dtype) -> list[_Slots]:
    """Of every lane; those of the cache start at -1 - their index."""
    cell = array("d" if dtype == torch.float64 else "f", [0.0])
    if cache is None:
        return [_Slots(cell, [], [], []) for _ in range(lanes)]
    counts, infos = (x.flatten(0, 1).tolist() for x in (cache.count, cache.info))
    live = cache.live.flatten().tolist()
    return [_Slots(cell, [-1 - i for i in range(m)], n[:m], x[:m]) for m, n, x in zip(live, counts, infos, strict=True)]


def _deaths(
    died: array, before: list[int], N: int, T: int, capacity: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Deaths of the row's starts, int32 [N, T], and of the cache's slots, int32 [N, K]; T = never."""
    row = torch.full((N, T), T, dtype=torch.int32, device=device)
    cached = torch.full((N, capacity), T, dtype=torch.int32, device=device)
    if died:
        start, time = torch.frombuffer(died, dtype=torch.int64).view(-1, 2).to(device).unbind(1)
        lane = torch.arange(N).repeat_interleave(torch.tensor(before).diff()).to(device)
        own, time = start >= 0, time.int()
        row[lane[own], start[own]] = time[own]
        cached[lane[~own], -1 - start[~own]] = time[~own]
    return row, cached
