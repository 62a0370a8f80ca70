"""Gated DeltaNet's scans over the blocks of a segment with all slots of a head in one program: states forward,
gradients backward.

A program carries all key dims and a few value dims of every slot, [BK, KP * BV] fp32 in registers: the block's
transition is one product with a matrix BK wide, the block's tokens are another, whatever the number of slots. A slot
keeps its columns while it lives: one that dies is added to its neighbour's columns, one that opens takes columns that
are free, and nothing else moves. `slot_columns_kernel` decides who sits where, here and in `triton_carry.py`; outside
of a program slots are in order of recency. `triton_scan.py` has shapes that do not fit.
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
    columns,  # [blocks, H, 6, KP] int16 out, see below
    moves,  # [blocks, H, 4] int32 out: live slots before, slots opened, slots opened or kept, slots merged
    H, K,
    KP: tl.constexpr,  # K rounded up to a power of two
):  # fmt: skip
    """Which slot is in which columns, before and after each block of a window's segment.

    `columns`, by column: the slot there before the block and after it (recency; free ones count from the number of live
    slots on), and the first of the block's tokens that are the slot's, and their end. By merge: the columns of the slot
    that dies, and the slot (after the block) that it is added to.
    """
    i_n, i_h = tl.program_id(0), tl.program_id(1)
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_s = tl.arange(0, KP)
    b_place = o_s
    for i_b in range(n_blocks):
        i_t = first_block + i_b
        row, first, end, m, m_next, fresh = slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP)
        b_death = tl.load(live_death + (row.to(tl.int64) * H + i_h) * K + o_s, mask=o_s < m, other=0)
        stays = ((o_s < m) & ((b_death >= end) | (o_s == m - 1))).to(tl.int32)
        dies = ((o_s < m) & (stays == 0)).to(tl.int32)
        kept = fresh + tl.sum(stays, 0)
        b_into = fresh + tl.cumsum(stays, 0) - stays  # the slot that each one becomes or joins
        b_free = tl.cumsum(1 - stays, 0) - (1 - stays)
        b_next = tl.where(stays > 0, b_into, tl.where(b_free < fresh, b_free, kept - fresh + b_free))
        b_next = tl.minimum(b_next, KP - 1)  # in case of a partition with more than K live slots
        p_pos = live_pos + ((row + 1).to(tl.int64) * H + i_h) * K + o_s
        b_lo = tl.load(p_pos, mask=o_s < m_next, other=2**30)
        b_hi = tl.load(p_pos - 1, mask=(o_s > 0) & (o_s < m_next), other=2**30)
        b_lo, b_hi = tl.maximum(tl.minimum(b_lo, end), first) - first, tl.maximum(tl.minimum(b_hi, end), first) - first
        b_after = tl.gather(b_next, b_place, 0)
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 6 * KP + o_s
        tl.store(p_c, b_place.to(tl.int16))
        tl.store(p_c + KP, b_after.to(tl.int16))
        tl.store(p_c + 2 * KP, tl.gather(b_lo, b_after, 0).to(tl.int16))
        tl.store(p_c + 3 * KP, tl.gather(b_hi, b_after, 0).to(tl.int16))
        b_merge = tl.gather(tl.cumsum(dies, 0) - dies, b_place, 0)
        m_merge = tl.gather(dies, b_place, 0) > 0
        tl.store(p_c - o_s + 4 * KP + b_merge, o_s.to(tl.int16), mask=m_merge)
        tl.store(p_c - o_s + 5 * KP + b_merge, tl.gather(b_into, b_place, 0).to(tl.int16), mask=m_merge)
        p_m = moves + (i_t.to(tl.int64) * H + i_h) * 4
        tl.store(p_m, m)
        tl.store(p_m + 1, fresh)
        tl.store(p_m + 2, kept)
        tl.store(p_m + 3, tl.sum(dies, 0))
        b_place = b_after


@triton.jit
def move_columns(b_s, m_from, m_to, BK: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr):
    """The columns of the slot `m_from` [KP], at those of `m_to`: [BK, KP * BV], zero elsewhere."""
    b_slots = tl.reshape(b_s, [BK, KP, BV])
    b_one = tl.sum(tl.where(m_from[None, :, None], b_slots, 0.0), 1)
    return tl.reshape(tl.where(m_to[None, :, None], b_one[:, None, :], 0.0), [BK, KP * BV])


@triton.jit(do_not_specialize=SIZES)
def slot_scan_kernel(
    kh,  # [T, H, DK]
    v,  # [T, H, DV]
    cg,  # [H, T]
    r_matrix,  # [blocks of the window, H, DK, DK]
    blocks,  # [n, 4]
    segments,  # [n, 4]: the window's
    columns, moves,  # see `slot_columns_kernel`
    incoming,  # [segments of the window, H, K, DK, DV] fp32
    snap,  # [rows of the window, H, K, DK, DV] out: states at each row before a block
    final,  # [segments of the window, H, K, DK, DV] fp32 out: states after the last block
    T, H, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_s, o_c = tl.arange(0, KP), tl.arange(0, KP * BV) // BV
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)  # of one program: with this zero known, sm_90 spills
    o_v = tl.program_id(2) * BV + tl.arange(0, KP * BV) % BV
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    stride_k, stride_v = H * DK, H * DV
    p_k, p_v, p_g = kh + (i_h - token_lo.to(tl.int64) * H) * DK, v + i_h * DV, cg + i_h * T
    o_tile = o_k[:, None] * DV + o_v[None, :]
    m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
    o_out = (i_n.to(tl.int64) * H + i_h) * K * DK * DV
    live = tl.load(moves + (first_block.to(tl.int64) * H + i_h) * 4)
    p_in = incoming + o_out + (o_c * (DK * DV))[None, :] + o_tile
    b_s = tl.load(p_in, mask=m_tile & (o_c < live)[None, :], other=0.0)
    for i_b in range(n_blocks):
        i_t = first_block + i_b
        first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
        row = tl.load(blocks + 4 * i_t + 2)
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 6 * KP
        p_m = moves + (i_t.to(tl.int64) * H + i_h) * 4
        b_before = tl.load(p_c + o_c).to(tl.int32)
        p_snap = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        if BK <= 128:
            b_r = load_tile(p_r, o_k, o_k, DK, DK)  # early: its latency is the chain's
        b_dot = b_s.to(DOT)
        live = tl.load(p_m)
        m_snap = m_tile & (b_before < live)[None, :]
        tl.store(p_snap + (b_before * (DK * DV))[None, :] + o_tile, b_dot, mask=m_snap)
        keep = tl.exp(tl.load(p_g + end - 1))
        b_s *= -keep
        if BK <= 128:
            b_s = -tl.dot(b_r, b_dot, b_s, input_precision=PREC)  # [BK, BK] @ [BK, KP * BV]
        else:  # R does not fit in registers beside the columns: go over it with the snapshot just stored
            tl.debug_barrier()
            for i_x in range(0, DK, 32):
                o_x = i_x + tl.arange(0, 32)
                m_x = (o_x < DK)[:, None] & ((o_v < DV) & (b_before < live))[None, :]
                p_x = p_snap + (b_before * (DK * DV) + o_v)[None, :] + o_x[:, None] * DV
                b_x = tl.load(p_x, mask=m_x, other=0.0)
                # [BK, 32] @ [32, KP * BV]
                b_s = tl.dot(load_tile(p_r, o_k, o_x, DK, DK), b_x, b_s, input_precision=PREC)
            b_s = -b_s
        b_after = tl.load(p_c + KP + o_s).to(tl.int32)
        for i_m in range(tl.load(p_m + 3)):
            m_from = o_s == tl.load(p_c + 4 * KP + i_m).to(tl.int32)
            b_s += move_columns(b_s, m_from, b_after == tl.load(p_c + 5 * KP + i_m).to(tl.int32), BK, KP, BV)
        b_there = tl.load(p_c + KP + o_c).to(tl.int32)
        m_kept = (b_there >= tl.load(p_m + 1)) & (b_there < tl.load(p_m + 2))
        b_s = tl.where(m_kept[None, :], b_s, 0.0)
        b_lo, b_hi = tl.load(p_c + 2 * KP + o_c).to(tl.int32), tl.load(p_c + 3 * KP + o_c).to(tl.int32)
        for i_c in range((end - first + BT - 1) // BT):
            o_i = i_c * BT + tl.arange(0, BT)
            o_t = (first + o_i).to(tl.int64)
            m_t = first + o_i < end
            b_k = tl.load(
                p_k + o_t[None, :] * stride_k + o_k[:, None], mask=m_t[None, :] & (o_k < DK)[:, None], other=0.0
            )
            m_v = (o_i[:, None] >= b_lo[None, :]) & (o_i[:, None] < b_hi[None, :]) & (o_v < DV)[None, :]
            b_v = tl.load(p_v + o_t[:, None] * stride_v + o_v[None, :], mask=m_v, other=0.0)
            b_s = tl.dot(b_k.to(DOT), b_v.to(DOT), b_s, input_precision=PREC)  # [BK, BT] @ [BT, KP * BV]
    last = first_block + n_blocks - 1
    p_m = moves + (last.to(tl.int64) * H + i_h) * 4
    b_there = tl.load(columns + ((last.to(tl.int64) * H + i_h) * 6 + 1) * KP + o_c).to(tl.int32)
    p_out = final + o_out + (b_there * (DK * DV))[None, :] + o_tile
    tl.store(p_out, b_s, mask=m_tile & (b_there < tl.minimum(tl.load(p_m + 2), K))[None, :])


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
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    BX: tl.constexpr = 32 if DK < 256 else 16  # key dims at a time where BK > 128: more do not fit in registers
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_k, o_s, o_c = tl.arange(0, BK), tl.arange(0, KP), tl.arange(0, KP * BV) // BV
    o_v = tl.program_id(2) * BV + tl.arange(0, KP * BV) % BV
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_tile = o_k[:, None] * DV + o_v[None, :]
    m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
    o_out = (i_n.to(tl.int64) * H + i_h) * K * DK * DV
    last = first_block + n_blocks - 1
    kept = tl.load(moves + (last.to(tl.int64) * H + i_h) * 4 + 2)
    b_there = tl.load(columns + ((last.to(tl.int64) * H + i_h) * 6 + 1) * KP + o_c).to(tl.int32)
    m_there = m_tile & (b_there < tl.minimum(kept, K))[None, :]
    o_there = (b_there * (DK * DV))[None, :] + o_tile
    b_ds = tl.load(incoming + o_out + o_there, mask=m_there, other=0.0)
    row = tl.load(blocks + 4 * last + 2) + 1
    tl.store(grad_states + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV + o_there, b_ds.to(DOT), mask=m_there)
    for i_b in range(n_blocks):
        i_t = last - i_b
        end, row = tl.load(blocks + 4 * i_t + 1), tl.load(blocks + 4 * i_t + 2)
        p_c = columns + (i_t.to(tl.int64) * H + i_h) * 6 * KP
        p_m = moves + (i_t.to(tl.int64) * H + i_h) * 4
        m = tl.load(p_m)
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        if BK <= 128:
            b_r = load_tile_t(p_r, o_k, o_k, DK, DK)  # early: its latency is the chain's
        b_after = tl.load(p_c + KP + o_s).to(tl.int32)
        b_before = tl.load(p_c + o_c).to(tl.int32)
        b_from = tl.load(p_c + KP + o_c).to(tl.int32)
        m_kept = (b_from >= tl.load(p_m + 1)) & (b_from < tl.load(p_m + 2))
        b_ds = tl.where(m_kept[None, :], b_ds, 0.0)
        b_into = b_from  # the slot that a column's becomes
        for i_m in range(tl.load(p_m + 3)):  # a slot that died has the gradient of the one that it was added to
            column, into = tl.load(p_c + 4 * KP + i_m).to(tl.int32), tl.load(p_c + 5 * KP + i_m).to(tl.int32)
            b_ds += move_columns(b_ds, b_after == into, o_s == column, BK, KP, BV)
            b_into = tl.where(o_c == column, into, b_into)
        m_row = m_tile & (b_before < m)[None, :]
        o_row = ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        o_slots = (b_before * (DK * DV))[None, :] + o_tile
        keep = tl.exp(tl.load(cg + i_h * T + end - 1))
        b_dot = b_ds.to(DOT)
        b_ds *= -keep
        if BK <= 128:
            b_ds = -tl.dot(b_r, b_dot, b_ds, input_precision=PREC)  # [BK, BK] @ [BK, KP * BV]
        else:  # as in the forward scan, with D of the row after
            tl.debug_barrier()
            p_after = grad_states + o_row + H * K * DK * DV
            for i_x in range(0, DK, BX):
                o_x = i_x + tl.arange(0, BX)
                m_x = (o_x < DK)[:, None] & ((o_v < DV) & (b_before < m))[None, :]
                p_x = p_after + (b_into * (DK * DV) + o_v)[None, :] + o_x[:, None] * DV
                b_x = tl.load(p_x, mask=m_x, other=0.0)
                b_r = tl.trans(load_tile(p_r, o_x, o_k, DK, DK))  # not loaded transposed: sm_80 spills
                b_ds = tl.dot(b_r, b_x, b_ds, input_precision=PREC)  # [BK, BX] @ [BX, KP * BV]
            b_ds = -b_ds
        b_ds += tl.load(grad_states + o_row + o_slots, mask=m_row, other=0.0).to(tl.float32)
        tl.store(grad_states + o_row + o_slots, b_ds.to(DOT), mask=m_row)
    b_there = tl.load(columns + (first_block.to(tl.int64) * H + i_h) * 6 * KP + o_c).to(tl.int32)
    m_there = m_tile & (b_there < tl.load(moves + (first_block.to(tl.int64) * H + i_h) * 4))[None, :]
    tl.store(initial + o_out + (b_there * (DK * DV))[None, :] + o_tile, b_ds, mask=m_there)
