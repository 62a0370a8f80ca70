"""The capacity rule on its own: which starts die, from boundaries and summed scores (one warp a segment and head).

A full cache merges, before it opens another slot, the pair of neighbours with the least information a token (eq 16);
only slots already there take part, so detection does not depend on the capacity. Ties go to the oldest pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES


@triton.jit
def shifted(x, lane, KP: tl.constexpr):
    """x[i + 1] (the last one stays)."""
    return tl.gather(x, tl.minimum(lane + 1, KP - 1), 0)


@triton.jit(do_not_specialize=SIZES)
def capacity_kernel(
    starts,  # [H, T] int8
    sums,  # [H, T] fp32, see `triton_detect.py`
    segments,  # [n, 2]: first token, end
    cache_live,  # [n, H] int32, or unused
    cache_count,  # [n, H, K] fp32 chronological, or unused
    cache_info,  # [n, H, K] fp32 chronological, or unused
    life,  # [H, T] int32: in, a large number at starts and 0 elsewhere; out, deaths too
    cache_death,  # [n, H, K] int32 chronological: in, a large number; out, deaths too
    lo,  # [H, T] int32 out, or unused: oldest token that moves if the token's decision is toggled
    final_info,  # [n, H, K] fp32 out, chronological
    T,
    H,
    K,
    HAS_CACHE: tl.constexpr,
    WANT_LO: tl.constexpr,
    TILE: tl.constexpr,
    KP: tl.constexpr,
):
    segment, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)
    lane = tl.arange(0, KP)
    i = tl.arange(0, TILE)
    table = (segment.to(tl.int64) * H + h) * K
    starts += h * T
    sums += h * T
    life += h * T
    lo += h * T
    position = -1 - lane
    count = tl.zeros([KP], tl.float32)
    info = tl.zeros([KP], tl.float32)
    live = begin * 0
    if HAS_CACHE:
        live = tl.load(cache_live + segment * H + h)
        count = tl.load(cache_count + table + lane, mask=lane < live, other=0.0)
        info = tl.load(cache_info + table + lane, mask=lane < live, other=0.0)
    last_sum = tl.sum(tl.where(lane == live - 1, info, 0.0), 0)
    first = begin
    while first < finish:
        t = first + i
        n = tl.minimum(finish - first, TILE)
        opens = tl.load(starts + t, mask=t < finish, other=0) > 0
        total = tl.load(sums + t, mask=t < finish, other=0.0)
        before = tl.load(sums + t - 1, mask=(t < finish) & (i > 0), other=0.0)
        before = tl.where(i == 0, last_sum, before)
        at = n * 0
        while at < n:
            e = tl.min(tl.where(opens & (i >= at), i, TILE), 0)
            upto = tl.minimum(e, n)
            is_open = lane == live - 1
            if WANT_LO:
                cost = (info + shifted(info, lane, KP)) / tl.maximum(count + shifted(count, lane, KP), 1.0)
                cost = tl.where(lane < live - 2, cost, float("inf"))
                closed = tl.argmin(cost, 0, tie_break_left=True)
                closed_cost = tl.min(cost, 0)
                closed_start = tl.sum(tl.where(lane == closed + 1, position, 0), 0)
                open_start = tl.sum(tl.where(is_open, position, 0), 0)
                older = tl.sum(tl.where(lane == live - 2, info, 0.0), 0)
                tokens = tl.sum(tl.where((lane == live - 2) | is_open, count, 0.0), 0) + (i - at).to(tl.float32)
                low = tl.where((older + before) / tokens < closed_cost, open_start, closed_start)
                low = tl.where(live == K, tl.maximum(low, begin), begin)
                low = tl.where(t == begin, begin, low)
                tl.store(lo + t, low, mask=(i >= at) & (i <= e) & (t < finish))
            if upto > at:  # tokens that joined the open slot
                count = tl.where(is_open, count + (upto - at).to(tl.float32), count)
                joined = tl.sum(tl.where(i == upto - 1, total, 0.0), 0)
                info = tl.where(is_open, joined, info)
            if e < TILE:
                if live == K:
                    cost = (info + shifted(info, lane, KP)) / tl.maximum(count + shifted(count, lane, KP), 1.0)
                    pair = tl.argmin(tl.where(lane < K - 1, cost, float("inf")), 0, tie_break_left=True)
                    dying = tl.sum(tl.where(lane == pair + 1, position, 0), 0)
                    merged, added = info + shifted(info, lane, KP), count + shifted(count, lane, KP)
                    moved = lane > pair
                    info = tl.where(lane == pair, merged, tl.where(moved, shifted(info, lane, KP), info))
                    count = tl.where(lane == pair, added, tl.where(moved, shifted(count, lane, KP), count))
                    position = tl.where(moved, shifted(position, lane, KP), position)
                    live -= 1
                    if dying >= 0:
                        tl.store(life + dying, first + e)
                    else:
                        tl.store(cache_death + table - 1 - dying, first + e)
                opened = lane == live
                position = tl.where(opened, first + e, position)
                count = tl.where(opened, 1.0, count)
                info = tl.where(opened, tl.sum(tl.where(i == e, total, 0.0), 0), info)
                live += 1
                at = e + 1
            else:
                at = n
        last_sum = tl.sum(tl.where(i == n - 1, total, 0.0), 0)
        first += TILE
    tl.store(final_info + table + lane, tl.where(lane < live, info, 0.0), mask=lane < K)
