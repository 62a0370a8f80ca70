"""Writes by message (SSW), in streaming form: a message is written, as the mean of its tokens, when it is over.

A message is a run of tokens with the same id >= 0. It is over when a valid token with another id (or one that may not
write) follows, in this call or a later one; until then its sum is pending. The result does not depend on where calls
are cut. Because every projection is linear, the mean of the projections is the projection of the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Pending:
    """The open message of every row: sum of its raw write features [B, C], token count [B] and id [B] (-1: none)."""

    total: Tensor
    count: Tensor
    message: Tensor

    @classmethod
    def empty(cls, batch: int, channels: int, like: Tensor) -> Pending:
        count = torch.zeros(batch, dtype=torch.long, device=like.device)
        return cls(like.new_zeros(batch, channels), count, torch.full_like(count, -1))

    @property
    def mean(self) -> Tensor:
        return self.total / self.count.clamp_min(1).to(self.total.dtype)[:, None]


@dataclass
class Runs:
    """Messages of one call. All [B, T] unless noted."""

    index: Tensor
    """Run number of each valid token, from 0."""
    member: Tensor
    """The token belongs to a message (valid, may write, id >= 0)."""
    last: Tensor
    """Last valid token of its run."""
    final: Tensor
    """Belongs to the row's last run."""
    continues: Tensor
    """[B]: run 0 continues the pending message."""
    nonempty: Tensor
    """[B]: the row has a valid token."""


def find_runs(ids: Tensor, valid: Tensor, reset: Tensor, open_message: Tensor) -> Runs:
    """Cut rows into messages.

    Args:
        ids: int64 [B, T], -1 where a token belongs to no message. valid: bool [B, T]. reset: bool [B, T].
        open_message: int64 [B], id of the pending message, -1: none.
    """
    B, T = ids.shape
    at = torch.arange(T, device=ids.device).expand(B, T)
    before = torch.cummax(torch.where(valid, at, -1), 1).values  # last valid token up to here
    before = torch.cat([torch.full_like(before[:, :1], -1), before[:, :-1]], 1)
    previous = torch.where(before >= 0, ids.gather(1, before.clamp_min(0)), open_message[:, None])
    # a reset at an invalid token cuts as well: count resets up to each token
    resets = reset.long().cumsum(1)
    seen = torch.where(before >= 0, resets.gather(1, before.clamp_min(0)), 0)
    cut = valid & ((ids != previous) | (resets != seen))
    first = valid & (before < 0)
    index = (cut & ~first).long().cumsum(1)
    after = torch.where(valid, at, T).flip(1).cummin(1).values.flip(1)  # next valid token from here on
    after = torch.cat([after[:, 1:], torch.full_like(after[:, :1], T)], 1)
    last = valid & ((after == T) | cut.gather(1, after.clamp_max(T - 1)))
    nonempty = valid.any(1)
    opening = torch.where(nonempty, (first & ~cut).any(1), False)
    return Runs(
        index=index,
        member=valid & (ids >= 0),
        last=last,
        final=valid & (index == index[:, -1:]),
        continues=opening & (open_message >= 0),
        nonempty=nonempty,
    )


def message_writes(raw: Tensor, runs: Runs, ids: Tensor, pending: Pending) -> tuple[Tensor, Tensor, Tensor, Pending]:
    """Raw write features by token -> by message.

    Args:
        raw: [B, T, C] projections before any activation. ids: as given to `find_runs`.

    Returns:
        rows: [B, T, C], at each token the mean over its message. write: bool [B, T], tokens at which a message is over
        and written. commit: bool [B], rows whose pending message must be written before the first token. The new
        pending message of every row.
    """
    B, T, C = raw.shape
    member = runs.member
    weights = member.to(raw.dtype)
    carried = torch.where(runs.continues[:, None], pending.total, 0.0)
    start = torch.zeros_like(raw)
    start[:, 0] = carried
    sums = start.scatter_add(1, runs.index[..., None].expand(B, T, C), raw * weights[..., None])
    counts = torch.zeros_like(runs.index)
    counts[:, 0] = torch.where(runs.continues, pending.count, 0)
    counts = counts.scatter_add(1, runs.index, member.long())
    rows = (sums / counts.clamp_min(1).to(raw.dtype)[..., None]).gather(1, runs.index[..., None].expand(B, T, C))
    write = member & runs.last & ~runs.final
    commit = runs.nonempty & ~runs.continues & (pending.count > 0)
    still_open = (runs.final & member).any(1)
    end = runs.index[:, -1]
    rows_at = torch.arange(B, device=raw.device)
    total = torch.where(still_open[:, None], sums[rows_at, end], 0.0)
    count = torch.where(still_open, counts[rows_at, end], 0)
    message = torch.where(still_open, torch.where(runs.final, ids, -1).amax(1), -1)
    keep = ~runs.nonempty  # a row of padding changes nothing
    new = Pending(
        torch.where(keep[:, None], pending.total, total),
        torch.where(keep, pending.count, count),
        torch.where(keep, pending.message, message),
    )
    return rows, write, commit, new
