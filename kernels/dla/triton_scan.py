"""Scans over the blocks of a segment, slot by slot: states forward, their gradients backward (Gated DeltaNet).

For shapes whose slots do not fit in one program (`triton_slots.py`): Phi mixes key dims, so a program has all of them,
and goes over tiles of states in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import load_tile, load_tile_t


@triton.jit
def add_tokens(
    b_s,  # [BK, BV] fp32
    p_k,  # Kh [T, H, DK], at the head
    p_v,  # [T, H, DV], at the head
    stride_k, stride_v, first, lo, hi, o_k, o_v,
    DK: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """b_s += Kh[lo:hi]^T V[lo:hi] for tokens of the block that begins at `first`."""
    for i_c in range((lo - first) // BT, (hi - first + BT - 1) // BT):
        o_t = first + i_c * BT + tl.arange(0, BT)
        m_t = (o_t >= lo) & (o_t < hi)
        m_k, m_v = m_t[None, :] & (o_k < DK)[:, None], m_t[:, None] & (o_v < DV)[None, :]
        b_k = tl.load(p_k + o_t.to(tl.int64)[None, :] * stride_k + o_k[:, None], mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_t.to(tl.int64)[:, None] * stride_v + o_v[None, :], mask=m_v, other=0.0)
        b_s = tl.dot(b_k.to(DOT), b_v.to(DOT), b_s, input_precision=PREC)  # [BK, BT] @ [BT, BV] -> [BK, BV]
    return b_s


@triton.jit
def through(
    p_s, p_r, o_k, o_v, keep, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows o_k of (keep - R) S (or its transpose), S [DK, DV] fp32 in memory: fp32 [BK, BV]."""
    b_o = keep * load_tile(p_s, o_k, o_v, DK, DV)
    for i_x in range(0, DK, BK):
        o_x = i_x + tl.arange(0, BK)
        b_s = load_tile(p_s, o_x, o_v, DK, DV)
        b_r = load_tile_t(p_r, o_x, o_k, DK, DK) if TRANSPOSED else load_tile(p_r, o_k, o_x, DK, DK)
        b_o -= tl.dot(b_r.to(DOT), b_s.to(DOT), input_precision=PREC)  # [BK, BK] @ [BK, BV] -> [BK, BV]
    return b_o


@triton.jit
def slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP: tl.constexpr):
    """Of one block: row, first token, end, slots before and after it, slots that it opened."""
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    before, after = tl.load(live_count + row * H + i_h), tl.load(live_count + (row + 1) * H + i_h)
    o_s = tl.arange(0, KP)
    p_pos = live_pos + ((row + 1).to(tl.int64) * H + i_h) * K
    b_pos = tl.load(p_pos + o_s, mask=o_s < K, other=-1)  # not waiting for `after`
    fresh = tl.sum(((b_pos >= first) & (o_s < after)).to(tl.int32), 0)
    return row, first, end, before, after, fresh


@triton.jit
def merge_slots(
    p_from, p_to, p_snap, p_death, end, m, fresh, K, o_k, o_v, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Key dims o_k of the m slots that a block inherits: snapshots, and the sums that they are at the block's end.

    Slots are read newest first from `p_from`; one that dies in the block is added to the next older one.
    """
    o_tile = o_k[:, None] * DV + o_v[None, :]
    m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
    i_to = fresh
    b_s = tl.zeros([BK, BV], tl.float32)
    for i_s in range(m):
        b_old = tl.load(p_from + tl.cast(i_s, tl.int64) * DK * DV + o_tile, mask=m_tile, other=0.0)
        tl.store(p_snap + tl.cast(i_s, tl.int64) * DK * DV + o_tile, b_old.to(DOT), mask=m_tile)
        b_s += b_old
        if (tl.load(p_death + i_s) >= end) | (i_s == m - 1):  # the next older slot is not merged into this one
            tl.store(p_to + i_to.to(tl.int64) * DK * DV + o_tile, b_s, mask=m_tile & (i_to < K))
            i_to += 1
            b_s = tl.zeros([BK, BV], tl.float32)


@triton.jit(do_not_specialize=SIZES)
def state_scan_kernel(
    kh,  # [T, H, DK]
    v,  # [T, H, DV]
    cg,  # [H, T]
    r_matrix,  # [blocks of the window, H, DK, DK]
    blocks,  # [n, 4]
    segments,  # [n, 4]: the window's
    live_pos,
    live_death,
    live_count,  # [rows, H(, K)]
    carry,  # [segments of the window, 2, H, K, DK, DV] fp32: [:, 0] = incoming states; scratch
    snap,  # [rows of the window, H, K, DK, DV] out: states at each row before a block
    final,  # [segments of the window, H, K, DK, DV] fp32 out: states after the last block
    T, H, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    stride_k, stride_v = H * DK, H * DV
    p_k, p_v, p_g = kh + (i_h - token_lo.to(tl.int64) * H) * DK, v + i_h * DV, cg + i_h * T
    size = K * DK * DV
    p_from = carry + (i_n.to(tl.int64) * 2 * H + i_h) * size
    p_merged = p_from + (i_h * 0 + H) * size
    for i_b in range(n_blocks):
        i_t = first_block + i_b
        row, first, end, m, m_next, fresh = slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP)
        p_death = live_death + (row.to(tl.int64) * H + i_h) * K
        p_pos = live_pos + ((row + 1).to(tl.int64) * H + i_h) * K
        p_snap = snap + ((row - row_lo).to(tl.int64) * H + i_h) * size
        keep = tl.exp(tl.load(p_g + end - 1))
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        hi = end  # the tokens before the block's first live start belong to the slot that was open
        if fresh > 0:
            hi = tl.load(p_pos + fresh - 1)
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            merge_slots(p_from, p_merged, p_snap, p_death, end, m, fresh, K, o_k, o_v, DK, DV, BK, BV, DOT)
        tl.debug_barrier()
        advance_slots(
            p_merged, p_from, p_r, p_k, p_v, stride_k, stride_v, first, hi, fresh, m_next, keep, o_v, DK, DV, BK, BT,
            DOT, PREC,
        )  # fmt: skip
        open_slots(p_from, p_pos, p_k, p_v, stride_k, stride_v, first, end, fresh, o_v, DK, DV, BK, BV, BT, DOT, PREC)
        tl.debug_barrier()  # the next block reads what other threads wrote
    last = tl.load(blocks + 4 * (first_block + n_blocks - 1) + 2) + 1
    p_out = final + (i_n.to(tl.int64) * H + i_h) * size
    copy_slots(p_from, p_out, tl.load(live_count + last * H + i_h), o_v, DK, DV, BK)


@triton.jit
def advance_slots(
    p_from, p_to, p_r, p_k, p_v, stride_k, stride_v, first, hi, fresh, m_next, keep, o_v,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The block's transition of the slots from `fresh` on; the newest of them gets the tokens up to `hi`."""
    for i_s in range(fresh, m_next):
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            at = tl.cast(i_s, tl.int64) * DK * DV
            b_s = through(p_from + at, p_r, o_k, o_v, keep, DK, DV, BK, False, DOT, PREC)
            if i_s == fresh:
                b_s = add_tokens(b_s, p_k, p_v, stride_k, stride_v, first, first, hi, o_k, o_v, DK, DV, BT, DOT, PREC)
            m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            tl.store(p_to + at + o_k[:, None] * DV + o_v[None, :], b_s, mask=m_tile)


@triton.jit
def open_slots(
    p_s, p_pos, p_k, p_v, stride_k, stride_v, first, end, fresh, o_v,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """The `fresh` slots that the block opened: the tokens from their start to the next younger one's."""
    for i_s in range(fresh):
        lo = tl.load(p_pos + i_s)
        hi = end
        if i_s > 0:
            hi = tl.load(p_pos + i_s - 1)
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            b_s = tl.zeros([BK, BV], tl.float32)
            b_s = add_tokens(b_s, p_k, p_v, stride_k, stride_v, first, lo, hi, o_k, o_v, DK, DV, BT, DOT, PREC)
            o_tile = o_k[:, None] * DV + o_v[None, :]
            m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            tl.store(p_s + tl.cast(i_s, tl.int64) * DK * DV + o_tile, b_s, mask=m_tile)


@triton.jit
def copy_slots(p_from, p_to, m, o_v, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr):
    """The first m slots, in the type of `p_to`."""
    for i_s in range(m):
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            o_tile = tl.cast(i_s, tl.int64) * DK * DV + o_k[:, None] * DV + o_v[None, :]
            m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            b_s = tl.load(p_from + o_tile, mask=m_tile, other=0.0)
            tl.store(p_to + o_tile, b_s.to(p_to.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=SIZES)
def reverse_scan_kernel(
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK]
    blocks,
    segments,  # [n, 4]: the window's
    live_pos,
    live_death,
    live_count,
    grad_states,  # [rows of the window, H, K, DK, DV]: in, the blocks' own parts; out, D at every row
    carry,  # [segments of the window, 2, H, K, DK, DV] fp32: [:, 0] = gradient of the states at the end; scratch
    initial,  # [segments of the window, H, K, DK, DV] fp32 out: gradient of the states at the start
    T, H, K, block_lo, row_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr, DOT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_v = tl.program_id(2) * BV + tl.arange(0, BV)
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    size = K * DK * DV
    p_from = carry + (i_n.to(tl.int64) * 2 * H + i_h) * size
    p_to = p_from + (i_h * 0 + H) * size
    last = tl.load(blocks + 4 * (first_block + n_blocks - 1) + 2) + 1
    p_out = grad_states + ((last - row_lo).to(tl.int64) * H + i_h) * size
    copy_slots(p_from, p_out, tl.load(live_count + last * H + i_h), o_v, DK, DV, BK)
    for i_b in range(n_blocks):
        i_t = first_block + n_blocks - 1 - i_b
        row, first, end, m, m_next, fresh = slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP)
        p_death = live_death + (row.to(tl.int64) * H + i_h) * K
        p_ds = grad_states + ((row - row_lo).to(tl.int64) * H + i_h) * size
        keep = tl.exp(tl.load(cg + i_h * T + end - 1))
        p_r = r_matrix + ((i_t - block_lo).to(tl.int64) * H + i_h) * DK * DK
        i_to = fresh
        for i_s in range(m):
            p_next = p_from + tl.minimum(i_to, K - 1).to(tl.int64) * DK * DV  # the slot that this one becomes
            for i_k in range(0, DK, BK):
                o_k = i_k + tl.arange(0, BK)
                m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
                o_slot = tl.cast(i_s, tl.int64) * DK * DV + o_k[:, None] * DV + o_v[None, :]
                b_ds = tl.load(p_ds + o_slot, mask=m_tile, other=0.0).to(tl.float32)
                b_ds += through(p_next, p_r, o_k, o_v, keep, DK, DV, BK, True, DOT, PREC)
                tl.store(p_to + o_slot, b_ds, mask=m_tile)
                tl.store(p_ds + o_slot, b_ds.to(DOT), mask=m_tile)
            i_to += (tl.load(p_death + i_s) >= end).to(tl.int32)
        p_from, p_to = p_to, p_from
        tl.debug_barrier()  # the next block reads what other threads wrote
    row = tl.load(blocks + 4 * first_block + 2)
    p_out = initial + (i_n.to(tl.int64) * H + i_h) * size
    copy_slots(p_from, p_out, tl.load(live_count + row * H + i_h), o_v, DK, DV, BK)
