"""Index tables from the partition, and cumulative decays: what the other kernels look up instead of recomputing.

Everything is a count of live starts: a start p is live at t iff p <= t < death[p].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import ceil_div
from .triton_layout import NEVER, SIZES

LIVE_SPAN = 1024  # tokens that a table of live slots looks back at, before it goes on from an earlier row's
EVER = tl.constexpr(NEVER)
FORGOTTEN = tl.constexpr(-104.0)  # exp of this and of anything below is 0 in fp32


@triton.jit(do_not_specialize=["T", "death_b", "death_h", "start_b", "start_h"])
def line_kernel(
    death, start,  # [B, T, H], any strides
    line,  # [H, B * T] out
    T, death_b, death_t, death_h, start_b, start_t, start_h,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `to_line`."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    b_death = tl.load(death + i_b * death_b + o_t * death_t + i_h * death_h, mask=m_t, other=0)
    b_start = tl.load(start + i_b * start_b + o_t * start_t + i_h * start_h, mask=m_t, other=0)
    b_line = tl.where(b_death >= T, EVER, b_death + i_b.to(tl.int32) * T)
    p_line = line + (i_h * tl.num_programs(0) + i_b) * T + o_t
    tl.store(p_line, tl.where(b_start != 0, b_line, 0).to(tl.int32), mask=m_t)


def to_line(death: Tensor, start: Tensor) -> Tensor:
    """Partition -> int32 [H, B * T]: death in line coordinates, NEVER, or 0 where no slot starts.

    Args:
        death: int32 [B, T, H], position in the row, >= T for never. start: bool [B, T, H].
    """
    B, T, H = death.shape
    line = torch.empty(H, B * T, dtype=torch.int32, device=death.device)
    block = 1024
    line_kernel[(B, ceil_div(T, block), H)](
        death, start.view(torch.uint8), line, T, *death.stride(), *start.stride(), H=H, BLOCK=block, num_warps=4
    )
    return line


@triton.jit(do_not_specialize=SIZES)
def decay_cumsum_kernel(
    g,  # [T, H] log decay
    cg,  # [H, T] fp32 out: inclusive cumsum inside each block
    cg_tile,  # [H, T] fp32 out: inside each of its TILES tiles, if there are several
    blocks,  # [n, 4]
    T,
    H,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_t = first + tl.arange(0, BLOCK)
    b_g = tl.load(g + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_g = tl.maximum(b_g, FORGOTTEN)  # a larger sum would only have coarser differences
    tl.store(cg + i_h.to(tl.int64) * T + o_t, tl.cumsum(b_g, 0), mask=o_t < end)
    if TILES > 1:
        b_tile = tl.cumsum(tl.reshape(b_g, [TILES, BLOCK // TILES]), 1)
        tl.store(cg_tile + i_h.to(tl.int64) * T + o_t, tl.reshape(b_tile, [BLOCK]), mask=o_t < end)


@triton.jit
def extend_live(
    p_life, live_pos, live_death, live_count, lo, at, row_from, row_to, i_h, H, K, SPAN: tl.constexpr, KP: tl.constexpr
):
    """The live slots at row `row_to` (token `at`): starts among the tokens [lo, at), then those of `row_from`.

    `row_from` is the row of token `lo`, at most SPAN tokens earlier.
    """
    o_p = lo + tl.arange(0, SPAN)
    b_death = tl.load(p_life + o_p, mask=o_p < at, other=0)
    m_new = b_death >= at
    found = tl.sum(m_new.to(tl.int32), 0)
    b_rank = found - tl.cumsum(m_new.to(tl.int32), 0)
    m_keep = m_new & (b_rank < K)
    out = (row_to.to(tl.int64) * H + i_h) * K
    tl.store(live_pos + out + b_rank, o_p, mask=m_keep)
    tl.store(live_death + out + b_rank, b_death, mask=m_keep)
    o_r = tl.arange(0, KP)
    o_from = (row_from.to(tl.int64) * H + i_h) * K + o_r
    m_from = o_r < tl.load(live_count + row_from.to(tl.int64) * H + i_h)
    b_pos = tl.load(live_pos + o_from, mask=m_from, other=0)
    b_death = tl.load(live_death + o_from, mask=m_from, other=0)
    m_old = m_from & (b_death >= at)
    b_rank = found + tl.cumsum(m_old.to(tl.int32), 0) - 1
    m_keep = m_old & (b_rank < K)
    tl.store(live_pos + out + b_rank, b_pos, mask=m_keep)
    tl.store(live_death + out + b_rank, b_death, mask=m_keep)
    count = found + tl.sum(m_old.to(tl.int32), 0)
    tl.store(live_count + row_to.to(tl.int64) * H + i_h, tl.minimum(count, K))


@triton.jit(do_not_specialize=SIZES)
def live_anchor_kernel(
    life,  # [H, T] int32: death of the start at each token, 0 = no start
    segments,  # [n, 3]: first token, end, first row
    cache_live,  # [n, H] int32, or unused
    cache_death,  # [n, H, K] int32 by recency, or unused
    live_pos,  # [rows, H, K] int32 out: start of each live slot by recency; slot r of an incoming cache is -1 - r
    live_death,  # [rows, H, K] int32 out: its death
    live_count,  # [rows, H] int32 out
    T,
    H,
    K,
    HAS_CACHE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,  # tokens from one of these rows to the next, a multiple of BLOCK
    KP: tl.constexpr,  # K rounded up to a power of two
):
    """The live slots at a segment's first row and at every SPAN tokens, each from the one before."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(segments + 3 * i_n), tl.load(segments + 3 * i_n + 1)
    row = tl.load(segments + 3 * i_n + 2)
    live = begin * 0
    if HAS_CACHE:
        live = tl.load(cache_live + i_n * H + i_h)
        o_r = tl.arange(0, KP)
        out = (row.to(tl.int64) * H + i_h) * K + o_r
        b_death = tl.load(cache_death + (i_n.to(tl.int64) * H + i_h) * K + o_r, mask=o_r < live, other=0)
        tl.store(live_pos + out, -1 - o_r, mask=o_r < live)
        tl.store(live_death + out, b_death, mask=o_r < live)
    tl.store(live_count + row.to(tl.int64) * H + i_h, live)
    for i_x in range((finish - begin) // SPAN):
        tl.debug_barrier()  # this row was written by other threads
        lo = begin + i_x * SPAN
        extend_live(
            life + i_h * T, live_pos, live_death, live_count, lo, lo + SPAN, row, row + SPAN // BLOCK, i_h, H, K, SPAN,
            KP,
        )  # fmt: skip
        row += SPAN // BLOCK


@triton.jit(do_not_specialize=SIZES)
def live_table_kernel(
    life,
    rows,  # [n, 3]: token, first token of the segment, segment
    live_pos,
    live_death,
    live_count,  # out, see `live_anchor_kernel`
    T,
    H,
    K,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    KP: tl.constexpr,
):
    """The live slots at the other rows, each from the nearest row that `live_anchor_kernel` wrote."""
    i_row, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, begin = tl.load(rows + 3 * i_row), tl.load(rows + 3 * i_row + 1)
    anchor = begin + (at - begin) // SPAN * SPAN
    if at > anchor:
        back = (at - anchor + BLOCK - 1) // BLOCK
        extend_live(
            life + i_h * T, live_pos, live_death, live_count, anchor, at, i_row - back, i_row, i_h, H, K, SPAN, KP
        )


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
