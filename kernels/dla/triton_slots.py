"""Gated DeltaNet's scans over the blocks of a segment with all slots of a head in one program: states forward,
gradients backward.

A program carries all key dims and a few value dims of every slot, [DK, KP * BV] fp32 in registers: the block's
transition is one product with a matrix DK wide, whatever the number of slots; what the block's tokens add is there
already (`triton_carry.py`). A slot keeps its columns while it lives: one that dies is added to its neighbour's columns,
one that opens takes columns that are free, and nothing else moves. `slot_columns_kernel` decides who sits where, here
and in `triton_carry.py`; outside of a program slots are in order of recency. Shapes that do not fit: `triton_scan.py`.

More than 128 key dims: the forward scan multiplies slabs of R with the snapshots that it just stored; the reverse one
has the first BK dims and the other BH in tiles of their own, and four products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_scan import slots_opened
from .triton_tiles import load_tile, load_tile_t


@triton.jit(do_not_specialize=SIZES)
def slot_columns_kernel(
    blocks,  # [n, 4]
    segments,  # [n, 4]: of all windows
    live_pos,
    live_death,
    live_count,  # [rows, H(, K)]
    columns,  # [blocks, H, 5, KP] int16 out, see below
    moves,  # [blocks, H, 4] int32 out: live slots before, slots opened, slots opened or kept, slots merged
    H, K,
    KP: tl.constexpr,  # K rounded up to a power of two
):  # fmt: skip
    """Which slot is in which columns, before and after each block of a window's segment.

    `columns`, by column: the slot there before the block and after it (recency; free ones count from the number of live
    slots on), and the columns that have the slot's sums after the block: others where it dies in the block. By merge:
    the columns of the slot that dies, and the slot (after the block) that it is added to.
    """
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_s = tl.arange(0, KP)
    b_place = o_s
    for i_b in range(n_blocks):
        i_t = first_block + i_b
        row = tl.load(blocks + 4 * i_t + 2)
        b_death = tl.load(live_death + (row.to(tl.int64) * H + i_h) * K + o_s, mask=o_s < K, other=0)
        _, _, end, m, _, fresh = slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP)
        stays = ((o_s < m) & ((b_death >= end) | (o_s == m - 1))).to(tl.int32)
        dies = ((o_s < m) & (stays == 0)).to(tl.int32)
        kept = fresh + tl.sum(stays, 0)
        b_into = fresh + tl.cumsum(stays, 0) - stays  # the slot that each one becomes or joins
        b_free = tl.cumsum(1 - stays, 0) - (1 - stays)
        b_next = tl.where(stays > 0, b_into, tl.where(b_free < fresh, b_free, kept - fresh + b_free))
        b_next = tl.minimum(b_next, KP - 1)  # in case of a partition with more than K live slots
        b_after = tl.gather(b_next, b_place, 0)
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 5 * KP + o_s
        tl.store(p_c, b_place.to(tl.int16))
        tl.store(p_c + KP, b_after.to(tl.int16))
        b_mine = tl.gather(b_into, b_place, 0)[:, None] == b_after[None, :]
        tl.store(p_c + 2 * KP, tl.sum(tl.where(b_mine, o_s[None, :], 0), 1).to(tl.int16))
        b_merge = tl.gather(tl.cumsum(dies, 0) - dies, b_place, 0)
        m_merge = tl.gather(dies, b_place, 0) > 0
        tl.store(p_c - o_s + 3 * KP + b_merge, o_s.to(tl.int16), mask=m_merge)
        tl.store(p_c - o_s + 4 * KP + b_merge, tl.gather(b_into, b_place, 0).to(tl.int16), mask=m_merge)
        p_m = moves + (i_t.to(tl.int64) * H + i_h) * 4
        tl.store(p_m, m)
        tl.store(p_m + 1, fresh)
        tl.store(p_m + 2, kept)
        tl.store(p_m + 3, tl.sum(dies, 0))
        b_place = b_after


@triton.jit
def take_columns(b_s, b_source, ROWS: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr):
    """b_s [ROWS, KP * BV] with, for each slot, the columns of the slot b_source [KP]."""
    b_index = tl.broadcast_to(b_source[None, :, None], [ROWS, KP, BV])
    return tl.reshape(tl.gather(tl.reshape(b_s, [ROWS, KP, BV]), b_index, 1), [ROWS, KP * BV])


@triton.jit
def add_merged_columns(
    b_s, p_c, b_after, died, into, merges, ROWS: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """b_s [ROWS, KP * BV] with the columns of each slot that dies in a block added to those of the slot that it is
    merged into. `p_c`: the block's `columns`; `died`, `into`: of the first merge."""
    o_s = tl.arange(0, KP)
    b_after = b_after.to(tl.int32)
    for i_m in range(merges):
        m_from, m_to = o_s == died.to(tl.int32), b_after == into.to(tl.int32)
        more = i_m + 1 < merges  # one ahead: the load's latency is the loop's
        died = tl.load(p_c + 3 * KP + i_m + 1, mask=more, other=0)
        into = tl.load(p_c + 4 * KP + i_m + 1, mask=more, other=0)
        b_one = tl.sum(tl.where(m_from[None, :, None], tl.reshape(b_s, [ROWS, KP, BV]), 0.0), 1)
        b_s += tl.reshape(tl.where(m_to[None, :, None], b_one[:, None, :], 0.0), [ROWS, KP * BV])
    return b_s


@triton.jit
def slot_tile(p_x, b_slot, o_k, o_v, live, DK: tl.constexpr, DV: tl.constexpr):
    """Key dims o_k of the first `live` slots in the order of `b_slot`: pointers into [K, DK, DV], and their mask."""
    m_x = (o_k < DK)[:, None] & ((o_v < DV) & (b_slot < live))[None, :]
    return p_x + (b_slot * (DK * DV) + o_v)[None, :] + o_k[:, None] * DV, m_x


@triton.jit(do_not_specialize=SIZES)
def slot_scan_kernel(
    cg,  # [H, T]
    r_matrix,  # [blocks of the window, H, DK, DK]
    blocks,  # [n, 4]
    segments,  # [n, 4]: the window's
    columns, moves,  # see `slot_columns_kernel`
    incoming,  # [segments of the window, H, K, DK, DV] fp32
    snap,  # [rows of the window, H, K, DK, DV]: in, the blocks' own sums; out, states at each row before a block
    final,  # [segments of the window, H, K, DK, DV] fp32 out: states after the last block
    T, H, K, block_lo, row_lo,
    HAS_INCOMING: tl.constexpr,  # else no slots
    WANTS_FINAL: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr,
    BX: tl.constexpr,  # columns of R at a time, with more than 128 key dims
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_s, o_c = tl.arange(0, KP), tl.arange(0, KP * BV) // BV
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)  # of one program: with this zero known, sm_90 spills
    o_v = tl.program_id(2) * BV + tl.arange(0, KP * BV) % BV
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_out = (i_n.to(tl.int64) * H + i_h) * K * DK * DV
    i_bh = first_block.to(tl.int64) * H + i_h
    if HAS_INCOMING:
        p_in, m_in = slot_tile(incoming + o_out, o_c, o_k, o_v, tl.load(moves + i_bh * 4), DK, DV)
        b_s = tl.load(p_in, mask=m_in, other=0.0)
    else:  # after the first block are the slots that it opened
        row = tl.load(blocks + 4 * first_block + 2) + 1
        b_there = tl.load(columns + (i_bh * 5 + 1) * KP + o_c).to(tl.int32)
        p_new = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        p_new, m_new = slot_tile(p_new, b_there, o_k, o_v, tl.minimum(tl.load(moves + i_bh * 4 + 2), K), DK, DV)
        b_s = tl.load(p_new, mask=m_new, other=0.0).to(tl.float32)
    for i_b in range(0 if HAS_INCOMING else 1, n_blocks if WANTS_FINAL else n_blocks - 1):
        i_t = first_block + i_b
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 5 * KP
        p_m = moves + (i_t.to(tl.int64) * H + i_h) * 4
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        # all loads before anything waits for one: their latency is the chain's
        end, row = tl.load(blocks + 4 * i_t + 1), tl.load(blocks + 4 * i_t + 2)
        b_before, b_there = tl.load(p_c + o_c), tl.load(p_c + KP + o_c)
        live, fresh, kept, merges = tl.load(p_m), tl.load(p_m + 1), tl.load(p_m + 2), tl.load(p_m + 3)
        if BK <= 128:
            b_after, died, into = tl.load(p_c + KP + o_s), tl.load(p_c + 3 * KP), tl.load(p_c + 4 * KP)
            b_r = load_tile(p_r, o_k, o_k, DK, DK)
        p_snap = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        decay = tl.load(cg + i_h * T + end - 1)
        b_before, b_there = b_before.to(tl.int32), b_there.to(tl.int32)
        newest = tl.minimum(fresh + 1, tl.minimum(kept, K))  # those that have tokens of the block
        p_new, m_new = slot_tile(p_snap + H * K * DK * DV, b_there, o_k, o_v, newest, DK, DV)
        b_new = tl.load(p_new, mask=m_new, other=0.0)
        b_dot = b_s.to(DOT)
        p_old, m_old = slot_tile(p_snap, b_before, o_k, o_v, live, DK, DV)
        tl.store(p_old, b_dot, mask=m_old)
        b_s *= -tl.exp(decay)
        if BK <= 128:
            b_s = tl.dot(b_r, b_dot, b_s, input_precision=PREC)  # [BK, BK] @ [BK, KP * BV]
        else:  # R does not fit in registers beside the columns: go over it with the snapshot just stored
            tl.debug_barrier()
            for i_x in range(0, DK, BX):
                o_x = i_x + tl.arange(0, BX)
                p_x, m_x = slot_tile(p_snap, b_before, o_x, o_v, live, DK, DV)
                b_x = tl.load(p_x, mask=m_x, other=0.0)
                # [BK, BX] @ [BX, KP * BV]
                b_s = tl.dot(load_tile(p_r, o_k, o_x, DK, DK), b_x, b_s, input_precision=PREC)
            b_after, died, into = tl.load(p_c + KP + o_s), tl.load(p_c + 3 * KP), tl.load(p_c + 4 * KP)
        b_s = add_merged_columns(-b_s, p_c, b_after, died, into, merges, BK, KP, BV)
        b_s = tl.where(((b_there >= fresh) & (b_there < kept))[None, :], b_s, 0.0) + b_new.to(tl.float32)
    last = first_block + n_blocks - 1
    if WANTS_FINAL:
        live = tl.minimum(tl.load(moves + (last.to(tl.int64) * H + i_h) * 4 + 2), K)
        b_there = tl.load(columns + ((last.to(tl.int64) * H + i_h) * 5 + 1) * KP + o_c).to(tl.int32)
        p_out, m_out = slot_tile(final + o_out, b_there, o_k, o_v, live, DK, DV)
        tl.store(p_out, b_s, mask=m_out)
    else:
        i_bh = last.to(tl.int64) * H + i_h
        b_before = tl.load(columns + i_bh * 5 * KP + o_c).to(tl.int32)
        p_snap = snap + ((tl.load(blocks + 4 * last + 2) - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        p_old, m_old = slot_tile(p_snap, b_before, o_k, o_v, tl.load(moves + i_bh * 4), DK, DV)
        tl.store(p_old, b_s.to(DOT), mask=m_old)


@triton.jit
def end_gradient(
    p_in, p_row, b_slot, o_k, o_v, live, HAS_INCOMING: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Key dims o_k of the gradient that a reverse scan begins with: `p_in`, stored at `p_row`; or what is there."""
    p_from, m_from = slot_tile(p_in if HAS_INCOMING else p_row, b_slot, o_k, o_v, live, DK, DV)
    b_ds = tl.load(p_from, mask=m_from, other=0.0).to(tl.float32)
    if HAS_INCOMING:
        p_to, m_to = slot_tile(p_row, b_slot, o_k, o_v, live, DK, DV)
        tl.store(p_to, b_ds.to(DOT), mask=m_to)
    return b_ds


@triton.jit(do_not_specialize=SIZES)
def slot_reverse_kernel(
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK]
    blocks,
    segments,  # [n, 4]: the window's
    columns, moves,
    grad_states,  # [rows of the window, H, K, DK, DV]: in, the blocks' own parts; out, D at every row
    incoming,  # [segments of the window, H, K, DK, DV] fp32: gradient of the states at the end
    initial,  # same shape, out: gradient of the states at the start
    T, H, K, block_lo, row_lo,
    HAS_INCOMING: tl.constexpr,  # else zero
    WANTS_INITIAL: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_k, o_s, o_c = tl.arange(0, BK), tl.arange(0, KP), tl.arange(0, KP * BV) // BV
    o_v = tl.program_id(2) * BV + tl.arange(0, KP * BV) % BV
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_out = (i_n.to(tl.int64) * H + i_h) * K * DK * DV
    last = first_block + n_blocks - 1
    i_bh, row = last.to(tl.int64) * H + i_h, tl.load(blocks + 4 * last + 2)
    p_c = columns + i_bh * 5 * KP
    if HAS_INCOMING:
        row, p_c, live = row + 1, p_c + KP, tl.minimum(tl.load(moves + i_bh * 4 + 2), K)
    else:  # before the last block are its own parts
        live = tl.load(moves + i_bh * 4)
    b_slot = tl.load(p_c + o_c).to(tl.int32)
    p_in, p_last = incoming + o_out, grad_states + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
    b_ds = end_gradient(p_in, p_last, b_slot, o_k, o_v, live, HAS_INCOMING, DK, DV, DOT)
    if BH > 0:
        o_h = BK + tl.arange(0, BH)
        b_dh = end_gradient(p_in, p_last, b_slot, o_h, o_v, live, HAS_INCOMING, DK, DV, DOT)
    for i_b in range(0 if HAS_INCOMING else 1, n_blocks if WANTS_INITIAL else n_blocks - 1):
        i_t = last - i_b
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 5 * KP
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        # all loads before anything waits for one: their latency is the chain's
        end, row = tl.load(blocks + 4 * i_t + 1), tl.load(blocks + 4 * i_t + 2)
        live = tl.load(moves + (i_t.to(tl.int64) * H + i_h) * 4)
        b_before, b_source = tl.load(p_c + o_c), tl.load(p_c + 2 * KP + o_s)
        b_r = load_tile_t(p_r, o_k, o_k, DK, DK)
        keep = tl.exp(tl.load(cg + i_h * T + end - 1))
        b_before, p_own = b_before.to(tl.int32), grad_states + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        # a slot's gradient is that of the slot that it became or joined; columns of no slot have what nothing reads
        b_ds = take_columns(b_ds, b_source.to(tl.int32), BK, KP, BV)
        b_dot = b_ds.to(DOT)
        p_row, m_row = slot_tile(p_own, b_before, o_k, o_v, live, DK, DV)
        b_ds = tl.dot(b_r, b_dot, -keep * b_ds, input_precision=PREC)  # [BK, BK] @ [BK, KP * BV]
        if BH > 0:
            b_dh = take_columns(b_dh, b_source.to(tl.int32), BH, KP, BV)
            b_dot_h = b_dh.to(DOT)
            b_ds = tl.dot(load_tile_t(p_r, o_h, o_k, DK, DK), b_dot_h, b_ds, input_precision=PREC)  # [BK, BH]
            b_dh = tl.dot(load_tile_t(p_r, o_k, o_h, DK, DK), b_dot, -keep * b_dh, input_precision=PREC)  # [BH, BK]
            b_dh = -tl.dot(load_tile_t(p_r, o_h, o_h, DK, DK), b_dot_h, b_dh, input_precision=PREC)  # [BH, BH]
            p_row_h, m_row_h = slot_tile(p_own, b_before, o_h, o_v, live, DK, DV)
            b_dh += tl.load(p_row_h, mask=m_row_h, other=0.0).to(tl.float32)
            tl.store(p_row_h, b_dh.to(DOT), mask=m_row_h)
        b_ds = tl.load(p_row, mask=m_row, other=0.0).to(tl.float32) - b_ds
        tl.store(p_row, b_ds.to(DOT), mask=m_row)
    if WANTS_INITIAL:
        i_bh = first_block.to(tl.int64) * H + i_h
        live, b_there = tl.load(moves + i_bh * 4), tl.load(columns + i_bh * 5 * KP + o_c).to(tl.int32)
        p_out, m_out = slot_tile(initial + o_out, b_there, o_k, o_v, live, DK, DV)
        tl.store(p_out, b_ds, mask=m_out)
        if BH > 0:
            p_out, m_out = slot_tile(initial + o_out, b_there, o_h, o_v, live, DK, DV)
            tl.store(p_out, b_dh, mask=m_out)
