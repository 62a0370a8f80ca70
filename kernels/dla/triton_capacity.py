"""The capacity rule on its own: which starts die, from boundaries and summed scores (one warp a segment and head).

A full cache merges, before it opens another slot, the pair of neighbours with the least information a token (eq 16);
only slots already there take part, so detection does not depend on the capacity. Ties go to the oldest pair. Controls
merge the pair with the fewest tokens, or one that is given.

The boundaries are listed first. Then a slot is whole as soon as it opens, for nobody asks for it before the next
boundary: one step a boundary, whatever is between them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_layout import SIZES

NONE = tl.constexpr(1 << 20)  # no pair merges: after every slot


def merge_rule(merge: str, pairs: Tensor | None) -> dict[str, bool]:
    """How a kernel finds the pair that merges: it is given, else it has the fewest tokens (COUNTS), else by density."""
    return {"GIVEN": pairs is not None, "COUNTS": merge == "equal_counts"}


@triton.jit
def shifted(b_x, o_s, KP: tl.constexpr):
    """x[i + 1] (the last one stays)."""
    return tl.gather(b_x, tl.minimum(o_s + 1, KP - 1), 0)


@triton.jit
def pair_cost(b_info, b_count, COUNTS: tl.constexpr):
    """Of slots with that summed score and so many tokens."""
    return b_count if COUNTS else b_info / tl.maximum(b_count, 1.0)


@triton.jit
def merge_and_open(
    pair,  # GIVEN: the older slot of the pair
    full,  # whether a pair merges
    live,  # slots, with the one that opens
    at, tokens, total,  # of the one that opens: first token, tokens, summed scores
    b_cost,  # [KP] of each slot and the next one, infinite where there is none; kept from step to step
    b_start, b_count, b_info, KP: tl.constexpr, GIVEN: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """One step; returns the pair (NONE: nothing merges), the starts before, and the slots after.

    In the order in which results arrive: while a warp finds the cheapest pair it computes what the pairs will cost
    wherever that may be, so that only choices wait for it, and no division.
    """
    o_s = tl.arange(0, KP)
    b_bits = b_cost.to(tl.int32, bitcast=True)  # in the order of the costs, none of which is below zero
    least = tl.min(b_bits, 0)
    b_next, b_next_count = shifted(b_info, o_s, KP), shifted(b_count, o_s, KP)
    b_next_cost, b_next_start = shifted(b_cost, o_s, KP), shifted(b_start, o_s, KP)
    b_both, b_both_count = b_info + b_next, b_count + b_next_count
    # with a slot: the pair that merges before it (`front`), after it (`back`), and the slot that opens (`last`)
    b_front, b_back = shifted(b_next, o_s, KP), shifted(b_both, o_s, KP)
    b_front_count, b_back_count = shifted(b_next_count, o_s, KP), shifted(b_both_count, o_s, KP)
    if not GIVEN:
        pair = tl.min(tl.where(b_bits == least, o_s, KP), 0)
    m_last = o_s == live - 2
    b_last, b_last_count = tl.where(full, b_next, b_info), tl.where(full, b_next_count, b_count)
    b_front, b_front_count = tl.where(m_last, total, b_front), tl.where(m_last, tokens, b_front_count)
    b_back, b_back_count = b_info + b_back, b_count + b_back_count
    b_last, b_last_count = b_last + total, b_last_count + tokens
    b_front, b_front_count = b_both + b_front, b_both_count + b_front_count
    if COUNTS:
        b_back, b_last, b_front = b_back_count, b_last_count, b_front_count
    else:
        b_back_count, b_last_count = tl.maximum(b_back_count, 1.0), tl.maximum(b_last_count, 1.0)
        b_front_count = tl.maximum(b_front_count, 1.0)
        b_back, b_last, b_front = b_back / b_back_count, b_last / b_last_count, b_front / b_front_count
    pair = tl.where(full, pair, NONE)
    m_new, m_pair, m_moved = o_s == live - 1, o_s == pair, o_s > pair
    b_cost = tl.where(m_moved, b_next_cost, b_cost)
    b_after, b_info = tl.where(m_moved, b_next_start, b_start), tl.where(m_moved, b_next, b_info)
    b_cost, b_count = tl.where(m_last, b_last, b_cost), tl.where(m_moved, b_next_count, b_count)
    b_cost, b_info = tl.where(m_pair, b_front, b_cost), tl.where(m_pair, b_both, b_info)
    b_cost, b_count = tl.where(o_s == pair - 1, b_back, b_cost), tl.where(m_pair, b_both_count, b_count)
    b_after, b_info = tl.where(m_new, at, b_after), tl.where(m_new, total, b_info)
    return pair, b_start, b_cost, b_after, tl.where(m_new, tokens, b_count), b_info


@triton.jit
def store_lo(
    lo, sums, b_start, b_count, b_info, live, K, t0, count, first, last, begin, offset, TILE: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """`lo` of the tokens from `first` to `last`; at token t0 the open slot, the last of `live`, had `count` tokens."""
    o_s = tl.arange(0, KP)
    b_cost = (b_info + shifted(b_info, o_s, KP)) / tl.maximum(b_count + shifted(b_count, o_s, KP), 1.0)
    b_cost = tl.where(o_s < live - 2, b_cost, float("inf"))
    closed = tl.argmin(b_cost, 0, tie_break_left=True)
    closed_cost = tl.min(b_cost, 0)
    closed_start = tl.sum(tl.where(o_s == closed + 1, b_start, 0), 0)
    open_start = tl.sum(tl.where(o_s == live - 1, b_start, 0), 0)
    older = tl.sum(tl.where(o_s == live - 2, b_info, 0.0), 0)
    count += tl.sum(tl.where(o_s == live - 2, b_count, 0.0), 0)
    for i_t in range(first, last + 1, TILE):
        o_t = i_t + tl.arange(0, TILE)
        m_t = o_t <= last
        b_before = tl.load(sums + o_t - 1, mask=m_t & (o_t > begin), other=0.0)
        b_tokens = count + (o_t - t0).to(tl.float32)
        b_lo = tl.where((older + b_before) / b_tokens < closed_cost, open_start, closed_start)
        b_lo = tl.where(live == K, tl.maximum(b_lo, begin), begin)
        tl.store(lo + o_t, tl.where(o_t == begin, begin, b_lo) - offset, mask=m_t)


@triton.jit(do_not_specialize=SIZES)
def capacity_kernel(
    starts,  # [H, T] int8
    sums,  # [H, T] fp32, see `triton_detect.py`
    segments,  # [n, 3]: first token, end, first row
    cache_live,  # [n, H] int32, or unused
    cache_count,  # [n, H, K] fp32 chronological, or unused
    cache_info,  # [n, H, K] fp32 chronological, or unused
    listed,  # [H, T] int32 scratch: of each segment, its boundaries
    death,  # [H, T] int32 out: position in the row, ROW for never
    cache_death,  # [n, H, K] int32 out, chronological, likewise; or unused
    lo,  # [H, T] int32 out, or unused: oldest token of the row that moves if the token's decision is toggled
    final_info,  # [T / ROW, H, K] fp32 out, chronological: of the segments that end a row
    pairs,  # [H, T] int32, GIVEN only: the older slot of the pair that a boundary at the token merges
    T, H, K,
    ROW,  # tokens of a row of the batch, which no segment crosses
    HAS_CACHE: tl.constexpr, WANT_LO: tl.constexpr, TILE: tl.constexpr, KP: tl.constexpr, GIVEN: tl.constexpr,
    COUNTS: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(segments + 3 * i_n), tl.load(segments + 3 * i_n + 1)
    row = begin // ROW
    offset = row * ROW
    o_s = tl.arange(0, KP)
    o_table = (i_n.to(tl.int64) * H + i_h) * K
    starts += i_h * T
    sums += i_h * T
    death += i_h * T
    lo += i_h * T
    listed += i_h * T + begin
    n = begin * 0
    for first in range(begin, finish, TILE):
        o_t = first + tl.arange(0, TILE)
        m_t = o_t < finish
        b_open = (tl.load(starts + o_t, mask=m_t, other=0) > 0).to(tl.int32)
        tl.store(listed + n + tl.cumsum(b_open, 0) - 1, o_t, mask=b_open > 0)
        tl.store(death + o_t, ROW + o_t * 0, mask=m_t)
        n += tl.sum(b_open, 0)
    b_start = -1 - o_s
    b_count = tl.zeros([KP], tl.float32)
    b_info = tl.zeros([KP], tl.float32)
    live = begin * 0
    if HAS_CACHE:
        live = tl.load(cache_live + i_n * H + i_h)
        b_count = tl.load(cache_count + o_table + o_s, mask=o_s < live, other=0.0)
        b_info = tl.load(cache_info + o_table + o_s, mask=o_s < live, other=0.0)
        tl.store(cache_death + o_table + o_s, ROW + o_s * 0, mask=o_s < K)
    tl.debug_barrier()  # other threads have listed the boundaries, and others write the deaths
    at = tl.load(listed, mask=n > 0, other=finish)
    end = tl.load(listed + 1, mask=n > 1, other=finish)
    after = tl.load(listed + 2, mask=n > 2, other=finish)
    if WANT_LO:
        count = tl.sum(tl.where(o_s == live - 1, b_count, 0.0), 0)
        last = tl.minimum(at, finish - 1)
        store_lo(lo, sums, b_start, b_count, b_info, live, K, begin, count, begin, last, begin, offset, 64, KP)
    if HAS_CACHE:
        m_joins = (o_s == live - 1) & (at > begin)  # the tokens before the first boundary
        b_count = tl.where(m_joins, b_count + (at - begin).to(tl.float32), b_count)
        b_info = tl.where(m_joins, tl.load(sums + at - 1, mask=at > begin, other=0.0), b_info)
    total = tl.load(sums + end - 1)
    b_cost = pair_cost(b_info + shifted(b_info, o_s, KP), b_count + shifted(b_count, o_s, KP), COUNTS)
    b_cost = tl.where(o_s < live - 1, b_cost, float("inf"))
    for i in range(n):
        # of the next steps: their latency is not this one's
        next_total = tl.load(sums + after - 1)
        later = tl.load(listed + i + 3, mask=i + 3 < n, other=finish)
        tokens = (end - at).to(tl.float32)
        full = live == K
        live = tl.minimum(live + 1, K)
        pair = live
        if GIVEN:
            pair = tl.load(pairs + i_h * T + at)
        pair, b_dying, b_cost, b_start, b_count, b_info = merge_and_open(
            pair, full, live, at, tokens, total, b_cost, b_start, b_count, b_info, KP, GIVEN, COUNTS
        )
        m_dies = o_s == pair + 1
        tl.store(death + b_dying, at - offset + o_s * 0, mask=m_dies & (b_dying >= 0))
        if HAS_CACHE:
            tl.store(cache_death + o_table - 1 - b_dying, at - offset + o_s * 0, mask=m_dies & (b_dying < 0))
        if WANT_LO:
            last = tl.minimum(end, finish - 1)
            store_lo(lo, sums, b_start, b_count, b_info, live, K, at, 0.0, at + 1, last, begin, offset, 64, KP)
        at, end, after, total = end, after, later, next_total
    p_final = final_info + (row.to(tl.int64) * H + i_h) * K + o_s
    tl.store(p_final, tl.where(o_s < live, b_info, 0.0), mask=(o_s < K) & (finish == offset + ROW))
