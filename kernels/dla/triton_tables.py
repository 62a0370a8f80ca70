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
    block, h = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    t = first + tl.arange(0, BLOCK)
    x = tl.load(g + t.to(tl.int64) * H + h, mask=t < end, other=0.0).to(tl.float32)
    x = tl.maximum(x, FORGOTTEN)  # a larger sum would only have coarser differences
    tl.store(cg + h.to(tl.int64) * T + t, tl.cumsum(x, 0), mask=t < end)


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
    """The live slots at each row, newest first: walks back from the row until K are found or the segment began."""
    row, h = tl.program_id(0), tl.program_id(1)
    at, begin, segment = tl.load(rows + 3 * row), tl.load(rows + 3 * row + 1), tl.load(rows + 3 * row + 2)
    out = (row.to(tl.int64) * H + h) * K
    lane = h.to(tl.int64) * T
    count = 0
    upto = at
    while (upto > begin) & (count < K):
        p = upto - TILE + tl.arange(0, TILE)
        death = tl.load(life + lane + p, mask=p >= begin, other=0)
        alive = death >= at
        found = tl.sum(alive.to(tl.int32), 0)
        rank = count + found - tl.cumsum(alive.to(tl.int32), 0)
        keep = alive & (rank < K)
        tl.store(live_pos + out + rank, p, mask=keep)
        tl.store(live_death + out + rank, death, mask=keep)
        count += found
        upto -= TILE
    if HAS_CACHE:
        r = tl.arange(0, KP)
        there = tl.load(cache_live + segment * H + h)
        source = (segment.to(tl.int64) * H + h) * K + r
        death = tl.load(cache_death + source, mask=r < there, other=0)
        alive = (r < there) & (death >= at)
        rank = count + tl.cumsum(alive.to(tl.int32), 0) - 1
        keep = alive & (rank < K)
        tl.store(live_pos + out + rank, -1 - r, mask=keep)
        tl.store(live_death + out + rank, death, mask=keep)
        count += tl.sum(alive.to(tl.int32), 0)
    tl.store(live_count + row * H + h, tl.minimum(count, K))


@triton.jit(do_not_specialize=SIZES)
def tile_counts_kernel(
    life,  # [H, T]
    blocks,  # [n, 4]
    counts,  # [H, TILES, T] int32 out: live starts at t in each tile of its block up to its own
    T,
    C: tl.constexpr,  # tokens a tile
    TILES: tl.constexpr,  # tiles a block
):
    block, h = tl.program_id(0) // TILES, tl.program_id(1)
    own = tl.program_id(0) % TILES
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    t = first + own * C + tl.arange(0, C)
    lane = h.to(tl.int64) * T
    for tile in range(own + 1):
        p = first + tile * C + tl.arange(0, C)
        death = tl.load(life + lane + p, mask=p < end, other=0)
        alive = (death[None, :] > t[:, None]) & (p[None, :] <= t[:, None])
        tl.store(counts + (lane * TILES + tl.cast(tile, tl.int64) * T) + t, tl.sum(alive.to(tl.int32), 1), mask=t < end)
