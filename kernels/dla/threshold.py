"""Straight-through gradient of a learned threshold tau: capacity-aware, prorated toggles, in O(T K).

The forward pass stays hard, so training and inference agree. Firing (or not) at token p moves the tokens before p by
one slot; with a full cache a firing also merges a pair, so only the tokens in [lo_p, p) move. Each slot's gradient is
prorated over its n tokens, so only lam, dlam and the partition are read. With w_p = sigmoid'((I_p - tau) / temperature)
and the score detached, the definition is

    dtau = -1 / temperature * sum_p w_p sum_t sum_{lo_p <= j < p} dlam[t, s] / n[t, s] * step[t, s],   s = slot_t(j)

with t >= p and step = lam[s + 1] - lam[s] for a token that did not fire, t in p's life and step = lam[s] - lam[s - 1]
for one that did. Exchanging the sums, every (t, s) needs one number for each kind, the weighted tokens that move in it:

    moved[t, s] = sum_p w_p |[lo_p, p) & slot s| = H(end of s) - H(start of s),  H(x) = sum_p w_p |[lo_p, p) & [0, x)|

over the toggles that count at t. H at the start x of a live slot begins as a prefix sum over p <= x; each later toggle
adds w_p max(x - lo_p, 0), and a fired one that dies takes its share back. Slots are ranges of tokens and x is fixed
for life, so merges change nothing: H is a cumsum along each start's life, and all lives together are T K at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 1 << 20  # lanes are taken in groups of this many (token, slot) pairs: bounds the memory


@dataclass
class _Segments:
    """Stretches of tokens between boundaries, of every lane; on each the set of slots is constant.

    Attributes:
        of_token: int64 [N, T], segment of each token. first: int64 [N, M + 1], its first token (T: none).
        table: int64 [N, M, K], start of each slot by recency, -1 = no slot.
        dying: int64 [N, M], the start that the capacity rule removes at the segment's first token, or -1.
        owner, step: int64 [P], the lives of all starts one after the other: start (as n * M + segment) and segments
            since it opened. cell: int64 [P], where in `table` each pair of (start, segment) stands.
    """

    of_token: Tensor
    first: Tensor
    table: Tensor
    dying: Tensor
    owner: Tensor
    step: Tensor
    cell: Tensor


def _segments(start: Tensor, death: Tensor, begin: Tensor, capacity: int) -> _Segments:
    """From the partition [N, T]; `begin`, int64, is at least 0 and death int64."""
    N, T = start.shape
    position = torch.arange(T, device=start.device).expand(N, -1)
    resets = position == begin
    opens = start | resets
    of_token = opens.long().cumsum(1) - 1
    M = int(of_token[:, -1].max()) + 1
    first = torch.full((N, M + 1), T, device=start.device)
    first.scatter_(1, torch.where(opens, of_token, M), position)
    first[:, M] = T
    after = F.pad(torch.where(resets, position, T)[:, 1:], (0, 1), value=T)
    document_end = after.flip(1).cummin(1).values.flip(1)
    end = torch.minimum(torch.where(start & (death < T), death, T), document_end)
    death_segment = F.pad(of_token, (0, 1))
    death_segment[:, T] = of_token[:, -1] + 1
    at = first[:, :M].clamp(max=T - 1)
    last = death_segment.gather(1, end.gather(1, at))  # the segment in which the start is no longer live
    segment = torch.arange(M, device=start.device).expand(N, -1)
    length = torch.where(first[:, :M] < T, last - segment, 0)
    dying = torch.full((N, M + 1), -1, device=start.device)
    dies = (length > 0) & (end.gather(1, at) < document_end.gather(1, at))
    dying.scatter_(1, torch.where(dies, last, M), first[:, :M])
    dying = dying[:, :M].contiguous()

    owner = torch.arange(N * M, device=start.device).repeat_interleave(length.flatten())
    offset = (length.flatten().cumsum(0) - length.flatten())[owner]
    step = torch.arange(len(owner), device=start.device) - offset
    row = owner + step  # n * M + segment
    # each later boundary makes a slot one older, unless it also removed a younger one
    older = ((step > 0) & (dying.flatten()[row] < first[:, :M].flatten()[owner])).long().cumsum(0)
    cell = row * capacity + (older - older[offset]).clamp(max=capacity - 1)
    table = torch.full((N * M * capacity,), -1, device=start.device)
    table[cell] = first[:, :M].flatten()[owner]
    return _Segments(of_token, first, table.view(N, M, capacity), dying, owner, step, cell)


def _along_lives(s: _Segments, initial: Tensor, added: Tensor, *, inclusive: bool) -> Tensor:
    """H at each slot's start: `initial` [N, M] + what its life `added` [N, M, K] before (inclusive: in) a segment."""
    gain = added.flatten()[s.cell]
    if inclusive:
        gain = gain * (s.step > 0)  # its own toggle is in `initial`
    total = gain.cumsum(0)
    before = total if inclusive else total - gain
    life = torch.arange(len(gain), device=gain.device) - s.step
    out = torch.zeros_like(added).flatten()
    out[s.cell] = initial.flatten()[s.owner] + before - (total[life] - gain[life])
    return out.view_as(added)


def _fired_moves(s: _Segments, weight: Tensor, lo: Tensor) -> Tensor:
    """moved[t, s] of the live starts, constant over a segment: [N, M, K]. weight (0: not fired), lo: [N, T]."""
    M, T = s.dying.shape[1], weight.shape[1]
    born, died = s.first[:, :M].clamp(max=T - 1), s.dying.clamp(min=0)
    w_born = weight.gather(1, born) * (s.first[:, :M] < T)
    w_died = weight.gather(1, died) * (s.dying >= 0)
    lo_born, lo_died = lo.gather(1, born), lo.gather(1, died)
    spans = w_born * (born - lo_born) - w_died * (died - lo_died)
    x = s.table
    back = torch.minimum(x, died[..., None]) - lo_died[..., None]
    added = w_born[..., None] * (x - lo_born[..., None]).clamp(min=0) - w_died[..., None] * back.clamp(min=0)
    H = _along_lives(s, spans.cumsum(1), added, inclusive=True)
    return F.pad(H[..., :-1] - H[..., 1:], (1, 0))  # no live start's range reaches into the open slot


def _unfired_moves(s: _Segments, weight: Tensor, lo: Tensor, starts: Tensor) -> Tensor:
    """moved[t, s] of the tokens that did not fire: [N, T, K]. weight (0: fired), lo: [N, T]; starts [N, T, K]."""
    N, T, K = starts.shape
    position = torch.arange(T, device=starts.device)
    spans = (weight * (position - lo)).cumsum(1)
    since = F.pad((weight[..., None] * (starts - lo[..., None]).clamp(min=0)).cumsum(1), (0, 0, 1, 0))
    at = s.first[..., None].expand(-1, -1, K)
    edges = since.gather(1, at)  # [N, M + 1, K]
    initial = spans.gather(1, s.first[:, :-1].clamp(max=T - 1))
    H = _along_lives(s, initial, edges.diff(dim=1), inclusive=False) - edges[:, :-1]
    H = H.gather(1, s.of_token[..., None].expand(-1, -1, K)) + since[:, 1:]
    return torch.cat([spans[..., None], H[..., :-1]], -1) - H


def _lanes(
    dlam: Tensor, lam: Tensor, start: Tensor, death: Tensor, lo: Tensor, begin: Tensor, weight: Tensor
) -> Tensor:
    """sum_p w_p dg_p of each lane, [N]; all floats are float64, all integers int64."""
    N, T, K = lam.shape
    begin = begin.clamp(min=0)
    s = _segments(start, death, begin, K)
    expand = s.of_token[..., None].expand(-1, -1, K)
    starts = s.table.gather(1, expand)
    position = torch.arange(T, device=lam.device).expand(N, -1)
    tokens = torch.cat([position[..., None] + 1, starts[..., :-1]], -1) - starts
    share = torch.where(starts >= 0, dlam / tokens.clamp(min=1), 0)
    weight = torch.where(position == begin, 0, weight)  # a document's first token always fires
    unfired = _unfired_moves(s, torch.where(start, 0, weight), lo, starts)
    fired = _fired_moves(s, torch.where(start, weight, 0), lo).gather(1, expand)
    step = lam.diff(dim=-1)
    total = (share * unfired)[..., :-1] * step + (share * fired)[..., 1:] * step
    return total.sum((1, 2))


def threshold_gradient(
    dlam: Tensor,
    lam: Tensor,
    start: Tensor,
    death: Tensor,
    lo: Tensor,
    score: Tensor,
    begin: Tensor,
    tau: Tensor,
    temperature: float,
) -> Tensor:
    """dL/dtau per lane: [N].

    O(T K) work and memory without a loop over tokens, in float64: H runs over whole lanes, moved over one slot.

    Args:
        dlam, lam: [N, T, K], gradient and value of the slot weights. start, death, lo, score: [N, T]; a start dies
            at a boundary, and at most one at each (the capacity rule).
        begin: int64 [N, T], first token of t's document. tau: [N]. temperature: width of the surrogate sigmoid.
    """
    N, T, K = lam.shape
    soft = torch.sigmoid((score.double() - tau.double()[:, None]) / temperature)
    weight = soft * (1 - soft)
    group = max(1, ELEMENTS // (T * K))
    inputs = (dlam, lam, start, death, lo, begin, weight)
    parts = []
    for i in range(0, N, group):
        dl, la, st, de, low, be, we = (x[i : i + group] for x in inputs)
        parts.append(_lanes(dl.double(), la.double(), st, de.long(), low.long(), be.long(), we))
    return (-torch.cat(parts) / temperature).to(lam.dtype)
