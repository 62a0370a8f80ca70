"""The capacity rule on its own: which starts die, from boundaries and summed scores (one warp a segment and head).

A full cache merges, before it opens another slot, the pair of neighbours with the least information a token (eq 16);
only slots already there take part, so detection does not depend on the capacity. Ties go to the oldest pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES


@triton.jit
def shifted(b_x, o_s, KP: tl.constexpr):
    """x[i + 1] (the last one stays)."""
    return tl.gather(b_x, tl.minimum(o_s + 1, KP - 1), 0)


@triton.jit(do_not_specialize=SIZES)
def capacity_kernel(
    starts,  # [H, T] int8
    sums,  # [H, T] fp32, see `triton_detect.py`
    segments,  # [n, 3]: first token, end, first row
    cache_live,  # [n, H] int32, or unused
    cache_count,  # [n, H, K] fp32 chronological, or unused
    cache_info,  # [n, H, K] fp32 chronological, or unused
    death,  # [H, T] int32 out: position in the row, ROW for never
    cache_death,  # [n, H, K] int32 out, chronological, likewise; or unused
    lo,  # [H, T] int32 out, or unused: oldest token of the row that moves if the token's decision is toggled
    final_info,  # [T / ROW, H, K] fp32 out, chronological: of the segments that end a row
    T, H, K,
    ROW,  # tokens of a row of the batch, which no segment crosses
    HAS_CACHE: tl.constexpr, WANT_LO: tl.constexpr, TILE: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(segments + 3 * i_n), tl.load(segments + 3 * i_n + 1)
    o_s = tl.arange(0, KP)
    o_i = tl.arange(0, TILE)
    o_table = (i_n.to(tl.int64) * H + i_h) * K
    starts += i_h * T
    sums += i_h * T
    death += i_h * T
    lo += i_h * T
    row = begin // ROW
    offset = row * ROW
    b_start = -1 - o_s
    b_count = tl.zeros([KP], tl.float32)
    b_info = tl.zeros([KP], tl.float32)
    live = begin * 0
    if HAS_CACHE:
        live = tl.load(cache_live + i_n * H + i_h)
        b_count = tl.load(cache_count + o_table + o_s, mask=o_s < live, other=0.0)
        b_info = tl.load(cache_info + o_table + o_s, mask=o_s < live, other=0.0)
        tl.store(cache_death + o_table + o_s, ROW + o_s * 0, mask=o_s < K)
    last_sum = tl.sum(tl.where(o_s == live - 1, b_info, 0.0), 0)
    first = begin
    while first < finish:
        o_t = first + o_i
        n = tl.minimum(finish - first, TILE)
        m_open = tl.load(starts + o_t, mask=o_t < finish, other=0) > 0
        b_total = tl.load(sums + o_t, mask=o_t < finish, other=0.0)
        b_before = tl.load(sums + o_t - 1, mask=(o_t < finish) & (o_i > 0), other=0.0)
        b_before = tl.where(o_i == 0, last_sum, b_before)
        tl.store(death + o_t, ROW + o_i * 0, mask=o_t < finish)
        tl.debug_barrier()  # another thread writes the deaths
        at = n * 0
        while at < n:
            e = tl.min(tl.where(m_open & (o_i >= at), o_i, TILE), 0)
            upto = tl.minimum(e, n)
            m_last = o_s == live - 1
            if WANT_LO:
                b_cost = (b_info + shifted(b_info, o_s, KP)) / tl.maximum(b_count + shifted(b_count, o_s, KP), 1.0)
                b_cost = tl.where(o_s < live - 2, b_cost, float("inf"))
                closed = tl.argmin(b_cost, 0, tie_break_left=True)
                closed_cost = tl.min(b_cost, 0)
                closed_start = tl.sum(tl.where(o_s == closed + 1, b_start, 0), 0)
                open_start = tl.sum(tl.where(m_last, b_start, 0), 0)
                older = tl.sum(tl.where(o_s == live - 2, b_info, 0.0), 0)
                b_tokens = tl.sum(tl.where((o_s == live - 2) | m_last, b_count, 0.0), 0) + (o_i - at).to(tl.float32)
                b_lo = tl.where((older + b_before) / b_tokens < closed_cost, open_start, closed_start)
                b_lo = tl.where(live == K, tl.maximum(b_lo, begin), begin)
                b_lo = tl.where(o_t == begin, begin, b_lo)
                tl.store(lo + o_t, b_lo - offset, mask=(o_i >= at) & (o_i <= e) & (o_t < finish))
            if upto > at:  # tokens that joined the open slot
                b_count = tl.where(m_last, b_count + (upto - at).to(tl.float32), b_count)
                joined = tl.sum(tl.where(o_i == upto - 1, b_total, 0.0), 0)
                b_info = tl.where(m_last, joined, b_info)
            if e < TILE:
                if live == K:
                    b_cost = (b_info + shifted(b_info, o_s, KP)) / tl.maximum(b_count + shifted(b_count, o_s, KP), 1.0)
                    pair = tl.argmin(tl.where(o_s < K - 1, b_cost, float("inf")), 0, tie_break_left=True)
                    dying = tl.sum(tl.where(o_s == pair + 1, b_start, 0), 0)
                    b_merged, b_added = b_info + shifted(b_info, o_s, KP), b_count + shifted(b_count, o_s, KP)
                    m_moved = o_s > pair
                    b_info = tl.where(o_s == pair, b_merged, tl.where(m_moved, shifted(b_info, o_s, KP), b_info))
                    b_count = tl.where(o_s == pair, b_added, tl.where(m_moved, shifted(b_count, o_s, KP), b_count))
                    b_start = tl.where(m_moved, shifted(b_start, o_s, KP), b_start)
                    live -= 1
                    if dying >= 0:
                        tl.store(death + dying, first + e - offset)
                    else:
                        tl.store(cache_death + o_table - 1 - dying, first + e - offset)
                m_new = o_s == live
                b_start = tl.where(m_new, first + e, b_start)
                b_count = tl.where(m_new, 1.0, b_count)
                b_info = tl.where(m_new, tl.sum(tl.where(o_i == e, b_total, 0.0), 0), b_info)
                live += 1
                at = e + 1
            else:
                at = n
        last_sum = tl.sum(tl.where(o_i == n - 1, b_total, 0.0), 0)
        first += TILE
    p_final = final_info + (row.to(tl.int64) * H + i_h) * K + o_s
    tl.store(p_final, tl.where(o_s < live, b_info, 0.0), mask=(o_s < K) & (finish == offset + ROW))
