"""Context parallelism by a chain of slot states: each rank keeps its tokens of every head and sends its slots on.

Exact, and not bound by the number of heads. The traffic does not grow with the context: K states of Dk x Dv a head and
hop. Ranks wait for each other, so the heads are pipelined in pieces: while a rank computes one, the rank before it
computes the next.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_dla.kernels.dla import Partition, SlotCache
from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.kernels.dla.rules import SlotRule
from megatron_dla.mixers.recurrence import Inputs, attend, decide
from megatron_dla.parallel.neighbours import Neighbours, halo, receive_states, send_states

GetPartition = Callable[[Callable[[], Partition]], Partition]


def number_of_pieces(heads: int, groups: int, ranks: int) -> int:
    """Number of pipelined pieces of the heads: at most two a rank, each of whole groups or of heads of one group."""
    fits = (n for n in range(1, min(heads, 2 * ranks) + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0))
    return max(fits)


def rows_from(cache: SlotCache, row: int) -> SlotCache:
    return SlotCache(**{name: getattr(cache, name)[row : row + 1] for name in SlotCache.FIELDS})


class Chain:
    """The exchanges of one mixer. T is this rank's part of the rows, S = T * ranks."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.ranks = Neighbours(group)

    def documents(self, cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
        """Document starts of whole rows, bool [B, S]."""
        return None if cu_seqlens is None else document_starts(cu_seqlens, batch, length * self.ranks.size, device)

    def with_halo(
        self, part: dict[str, Tensor], width: int, starts: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None, int]:
        """The projections with `width` tokens of the rank before in front of value, query and key [B, T, C], which one
        exchange brings; the document starts of these tokens, bool [B, width + T]; and `width`.
        """
        names = ("value", "query", "key")
        xs = [part[name] for name in names]
        x = torch.cat(xs, -1)
        x = torch.cat([halo(x, width, self.ranks), x], 1)
        if starts is not None:
            first = self.ranks.rank * xs[0].shape[1]
            starts = torch.nn.functional.pad(starts, (width, 0))[:, first : first + x.shape[1]]
        return part | dict(zip(names, x.split([x.shape[-1] for x in xs], -1), strict=True)), starts, width

    def attend(
        self,
        inputs: Inputs,
        rule: SlotRule,
        starts: Tensor | None,
        get: Callable[[int, Callable[[], Partition]], Partition],
    ) -> Tensor:
        """[B, T, H, Dv] of this rank's tokens.

        Args:
            get: takes the first head of a piece and the computation of its partition, and returns that partition.
        """
        heads, groups = inputs.v.shape[2], inputs.q.shape[2]
        pieces = number_of_pieces(heads, groups, self.ranks.size)
        outs = []
        for i in range(pieces):
            cut = inputs.map(lambda x, i=i: _piece(x, i, pieces))  # type: ignore[misc]
            first = i * heads // pieces
            own = rule.of_heads(first, heads // pieces)
            outs.append(self._attend_piece(cut, own, starts, partial(get, first)))
        return torch.cat(outs, 2)

    def _attend_piece(self, inputs: Inputs, rule: SlotRule, starts: Tensor | None, get: GetPartition) -> Tensor:
        k, v = inputs.k, inputs.v
        B, T, H, Dv = v.shape
        dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
        cache = None
        if self.ranks.before is not None:
            cache = SlotCache.empty(B, H, rule.capacity, k.shape[-1], Dv, dtype=dtype, device=v.device)
            with torch.no_grad():
                for name in SlotCache.FIELDS[1:]:
                    setattr(cache, name, self.ranks.receive(getattr(cache, name), self.ranks.before))
            cache.states = receive_states(v, cache.states, self.ranks)
        out, after = self._rows(inputs, rule, starts, cache, get)
        assert after is not None  # the last segment of a rank is asked for it
        if self.ranks.after is not None:
            for name in SlotCache.FIELDS[1:]:
                self.ranks.send(getattr(after, name).detach(), self.ranks.after)
        return send_states(out, after.states, None if cache is None else cache.states, self.ranks)

    def _rows(
        self, inputs: Inputs, rule: SlotRule, starts: Tensor | None, cache: SlotCache | None, get: GetPartition
    ) -> tuple[Tensor, SlotCache | None]:
        """The recurrence over this rank's tokens: (outputs, slots after the last token)."""
        T, first = inputs.v.shape[1], self.ranks.rank * inputs.v.shape[1]
        borders = None if starts is None else starts[:, first : first + T]
        if borders is None or not bool(borders[:, 1 if cache is None else 0 :].any()):
            return _attend(inputs, rule, None, cache, get, keep=True)
        outs, caches = [], []
        for row, ends in enumerate(borders):
            one = inputs.map(lambda x, row=row: x[row : row + 1])  # type: ignore[misc]
            carried = None if cache is None else rows_from(cache, row)
            out, after = _attend_row(one, rule, ends.nonzero().flatten().tolist(), carried, get)
            assert after is not None
            outs.append(out)
            caches.append(after)
        return torch.cat(outs), SlotCache.concatenate(caches)


def _piece(x: Tensor, i: int, pieces: int) -> Tensor:
    """Piece i of the heads [B, T, H, ...], or of the groups [B, T, G, Dk] that they read."""
    units = x.shape[2]
    if units % pieces:  # fewer groups than pieces
        return x[:, :, i * units // pieces : i * units // pieces + 1]
    return x[:, :, i * (units // pieces) : (i + 1) * (units // pieces)]


def _attend(
    inputs: Inputs, rule: SlotRule, cu_seqlens: Tensor | None, cache: SlotCache | None, get: GetPartition, *, keep: bool
) -> tuple[Tensor, SlotCache | None]:
    decided = get(lambda: decide(inputs, rule, cu_seqlens, cache))
    return attend(inputs, rule, decided, cu_seqlens, cache, return_cache=keep)


def _attend_row(
    inputs: Inputs, rule: SlotRule, borders: list[int], cache: SlotCache | None, get: GetPartition
) -> tuple[Tensor, SlotCache | None]:
    """One row: the document continued from the rank before, whole ones, and one that may continue at the next rank."""
    T = inputs.v.shape[1]
    first, last = (borders[0], borders[-1]) if borders else (T, T)
    outs, after = [], cache

    def run(a: int, b: int, cu_seqlens: Tensor | None, incoming: SlotCache | None, keep: bool):
        return _attend(inputs.map(lambda x: x[:, a:b]), rule, cu_seqlens, incoming, get, keep=keep)

    if first > 0:
        out, after = run(0, first, None, cache, not borders)
        outs.append(out)
    if last > first:
        ends = torch.tensor([b - first for b in borders], dtype=torch.int32, device=inputs.v.device)
        outs.append(run(first, last, ends, None, False)[0])
    if borders:
        out, after = run(last, T, None, None, True)
        outs.append(out)
    return torch.cat(outs, 1), after
