"""Index tables from the partition, and cumulative decays: what the other kernels look up instead of recomputing.

Everything is a count of live starts: a start p is live at t iff p <= t < death[p].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES

FORGOTTEN = tl.constexpr(-104.0)  # exp of this and of anything below is 0 in fp32


@triton.jit(do_not_specialize=SIZES)
def decay_cumsum_kernel(
    g,  # [T, H] log decay
    cg,  # [H, T] fp32 out: inclusive cumsum inside each block
    blocks,  # [n, 4]
    T,
    H,
    BLOCK: tl.constexpr,
):
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_t = first + tl.arange(0, BLOCK)
    b_g = tl.load(g + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_g = tl.maximum(b_g, FORGOTTEN)  # a larger sum would only have coarser differences
    tl.store(cg + i_h.to(tl.int64) * T + o_t, tl.cumsum(b_g, 0), mask=o_t < end)


@triton.jit(do_not_specialize=SIZES)
def live_table_kernel(
    life,  # [H, T] int32: death of the start at each token, 0 = no start
    rows,  # [n, 3]: token, first token of the segment, segment
    cache_live,  # [segments, H] int32, or unused
    cache_death,  # [segments, H, K] int32 by recency, or unused
    live_pos,  # [n, H, K] int32 out: start of each live slot by recency; slot r of an incoming cache is -1 - r
    live_death,  # [n, H, K] int32 out: its death
    live_count,  # [n, H] int32 out
    T,
    H,
    K,
    HAS_CACHE: tl.constexpr,
    TILE: tl.constexpr,
    KP: tl.constexpr,  # K rounded up to a power of two
):
    """The live slots at each row, newest first: the search goes back until K are found or the segment began."""
    i_row, i_h = tl.program_id(0), tl.program_id(1)
    at, begin, segment = tl.load(rows + 3 * i_row), tl.load(rows + 3 * i_row + 1), tl.load(rows + 3 * i_row + 2)
    out = (i_row.to(tl.int64) * H + i_h) * K
    o_h = i_h.to(tl.int64) * T
    count = 0
    upto = at
    while (upto > begin) & (count < K):
        o_p = upto - TILE + tl.arange(0, TILE)
        b_death = tl.load(life + o_h + o_p, mask=o_p >= begin, other=0)
        m_alive = b_death >= at
        found = tl.sum(m_alive.to(tl.int32), 0)
        b_rank = count + found - tl.cumsum(m_alive.to(tl.int32), 0)
        m_keep = m_alive & (b_rank < K)
        tl.store(live_pos + out + b_rank, o_p, mask=m_keep)
        tl.store(live_death + out + b_rank, b_death, mask=m_keep)
        count += found
        upto -= TILE
    if HAS_CACHE:
        o_r = tl.arange(0, KP)
        live = tl.load(cache_live + segment * H + i_h)
        o_cache = (segment.to(tl.int64) * H + i_h) * K + o_r
        b_death = tl.load(cache_death + o_cache, mask=o_r < live, other=0)
        m_alive = (o_r < live) & (b_death >= at)
        b_rank = count + tl.cumsum(m_alive.to(tl.int32), 0) - 1
        m_keep = m_alive & (b_rank < K)
        tl.store(live_pos + out + b_rank, -1 - o_r, mask=m_keep)
        tl.store(live_death + out + b_rank, b_death, mask=m_keep)
        count += tl.sum(m_alive.to(tl.int32), 0)
    tl.store(live_count + i_row * H + i_h, tl.minimum(count, K))


@triton.jit(do_not_specialize=SIZES)
def tile_counts_kernel(
    life,  # [H, T]
    blocks,  # [n, 4]
    counts,  # [H, TILES, T] int32 out: live starts at t in each tile of its block up to its own
    T,
    BT: tl.constexpr,  # tokens a tile
    TILES: tl.constexpr,  # tiles a block
):
    i_t, i_h = tl.program_id(0) // TILES, tl.program_id(1)
    i_c = tl.program_id(0) % TILES
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_t = first + i_c * BT + tl.arange(0, BT)
    o_h = i_h.to(tl.int64) * T
    for i_x in range(i_c + 1):
        o_p = first + i_x * BT + tl.arange(0, BT)
        b_death = tl.load(life + o_h + o_p, mask=o_p < end, other=0)
        m_alive = (b_death[None, :] > o_t[:, None]) & (o_p[None, :] <= o_t[:, None])
        p_counts = counts + (o_h * TILES + tl.cast(i_x, tl.int64) * T) + o_t
        tl.store(p_counts, tl.sum(m_alive.to(tl.int32), 1), mask=o_t < end)
