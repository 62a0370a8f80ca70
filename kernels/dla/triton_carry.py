"""States over the blocks of a segment: each block's own sums in parallel, then Mamba-2's scan, without products.

`block_states_kernel` writes what the tokens of each block add to each slot where the snapshot after the block belongs,
also for Gated DeltaNet's scan (`triton_slots.py`). Mamba-2's transition is a number a head, so a state's elements do
not mix: `carry_states_kernel` goes over the blocks with a few elements of every slot in registers, [KP, BV], adds what
it finds there, and replaces it by the state. The gradient goes the same way back (`state_gradient_kernel`,
`carry_gradients_kernel`). Slots keep their rows of registers as they keep their columns in `triton_slots.py`, whose
`slot_columns_kernel` decides who sits where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import raw_rows, slots_wanted


@triton.jit(do_not_specialize=SIZES)
def block_states_kernel(
    k,  # [T, G, DK]; Gated DeltaNet: Kh [tokens of the window, H, DK], which has the decay
    v,  # [T, H, DV]
    cg,  # [H, T]
    blocks,  # [n, 4]
    live_pos,  # [rows, H, K]
    live_count,  # [rows, H]
    moves,  # [blocks, H, 4], see `slot_columns_kernel`
    snap,  # [rows of the window, H, K, DK, DV] out: at the row after a block, what it adds to its newest slots
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    WANTS_FINAL: tl.constexpr,  # else nothing of a segment's last block
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One tile of [DK, DV] a program, of every slot that the block opened and of the one that was open before."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_t, i_h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_k = tl.program_id(2) // NV * BK + tl.arange(0, BK)
    o_v = tl.program_id(2) % NV * BV + tl.arange(0, BV)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = (tl.load(blocks + 4 * i_t + 2) + 1).to(tl.int64)
    p_k, p_v, p_g = k + i_h // GROUP * DK, v + i_h * DV, cg + i_h * T
    stride_k = H // GROUP * DK
    if GDN:
        p_k, stride_k = k + (i_h - token_lo.to(tl.int64) * H) * DK, H * DK
    p_pos = live_pos + (row * H + i_h) * K
    p_snap = snap + ((row - row_lo) * H + i_h) * K * DK * DV + o_k[:, None] * DV + o_v[None, :]
    m_tile = (o_k < DK)[:, None] & (o_v < DV)[None, :]
    g_end = tl.load(p_g + end - 1)
    fresh = tl.load(moves + (i_t * H + i_h) * 4 + 1)
    slots = tl.minimum(fresh + 1, tl.load(live_count + row * H + i_h))
    hi = end
    for i_s in range(slots_wanted(blocks, i_t, slots, WANTS_FINAL)):
        lo = first  # the tokens before the first live start belong to the slot that was open
        if i_s < fresh:
            lo = tl.load(p_pos + i_s)
        b_s = tl.zeros([BK, BV], tl.float32)
        for i_c in range((hi - lo + BT - 1) // BT):
            o_t = lo + i_c * BT + tl.arange(0, BT)
            m_k = (o_t < hi)[None, :] & (o_k < DK)[:, None]
            p_t = p_k + o_t.to(tl.int64)[None, :] * stride_k + o_k[:, None]
            b_k = tl.load(p_t, mask=m_k, other=0.0).to(tl.float32)
            if not GDN:
                b_decay = tl.exp(g_end - tl.load(p_g + o_t, mask=o_t < hi, other=0.0))
                b_k *= tl.where(o_t < hi, b_decay, 0.0)[None, :]
            b_v = raw_rows(p_v, o_t, o_v, hi, H * DV, DV)
            b_s = tl.dot(b_k.to(DOT), b_v.to(DOT), b_s, input_precision=PREC)  # [BK, BT] @ [BT, BV] -> [BK, BV]
        tl.store(p_snap + tl.cast(i_s, tl.int64) * DK * DV, b_s.to(DOT), mask=m_tile)
        hi = lo


@triton.jit
def add_merged(b_s, p_c, merges, b_after, KP: tl.constexpr, REVERSE: tl.constexpr):
    """b_s [KP, BV] with the slots that died in a block added to those that they were merged into; reverse, the other
    way round. `p_c`: the block's `columns`, of which `b_after` [KP] is the second row."""
    o_s = tl.arange(0, KP)
    died, into = tl.load(p_c + 3 * KP), tl.load(p_c + 4 * KP)
    for i_m in range(merges):
        m_from, m_to = o_s == died.to(tl.int32), b_after == into.to(tl.int32)
        if REVERSE:
            m_from, m_to = m_to, m_from
        more = i_m + 1 < merges  # one ahead: the load's latency is the loop's
        died = tl.load(p_c + 3 * KP + i_m + 1, mask=more, other=0)
        into = tl.load(p_c + 4 * KP + i_m + 1, mask=more, other=0)
        b_one = tl.sum(tl.where(m_from[:, None], b_s, 0.0), 0)
        b_s += tl.where(m_to[:, None], b_one[None, :], 0.0)
    return b_s


@triton.jit(do_not_specialize=SIZES)
def carry_states_kernel(
    cg,  # [H, T]
    blocks,  # [n, 4]
    segments,  # [n, 4]: the window's
    columns, moves,  # see `slot_columns_kernel`
    incoming,  # [segments of the window, H, K, D] fp32
    snap,  # [rows of the window, H, K, D]: in, the blocks' own sums; out, states at each row before a block
    final,  # [segments of the window, H, K, D] fp32 out: states after the last block
    T, H, K, row_lo,
    HAS_INCOMING: tl.constexpr,  # else no slots
    WANTS_FINAL: tl.constexpr,
    D: tl.constexpr,  # elements of a state
    BV: tl.constexpr,  # of them, a program's
    KP: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_s, o_d = tl.arange(0, KP), tl.program_id(1) * BV + tl.arange(0, BV)
    m_d = (o_d < D)[None, :]
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_out = (i_n.to(tl.int64) * H + i_h) * K * D
    row = (tl.load(blocks + 4 * first_block + 2) - row_lo).to(tl.int64)  # a segment's rows follow each other
    i_bh = first_block.to(tl.int64) * H + i_h
    b_before = tl.load(columns + i_bh * 5 * KP + o_s).to(tl.int32)
    b_after = tl.load(columns + (i_bh * 5 + 1) * KP + o_s).to(tl.int32)
    live, fresh, kept = tl.load(moves + i_bh * 4), tl.load(moves + i_bh * 4 + 1), tl.load(moves + i_bh * 4 + 2)
    if HAS_INCOMING:
        m_in = m_d & (o_s < live)[:, None]
        b_s = tl.load(incoming + o_out + o_s[:, None] * D + o_d[None, :], mask=m_in, other=0.0)
    else:  # after the first block are the slots that it opened
        p_new = snap + ((row + 1) * H + i_h) * K * D + (b_after[:, None] * D + o_d[None, :])
        m_new = m_d & (b_after < tl.minimum(kept, K))[:, None]
        b_s = tl.load(p_new, mask=m_new, other=0.0).to(tl.float32)
        b_before = b_after
        if n_blocks > 1:
            i_bh = (first_block + 1).to(tl.int64) * H + i_h
            b_after = tl.load(columns + (i_bh * 5 + 1) * KP + o_s).to(tl.int32)
            live, fresh, kept = tl.load(moves + i_bh * 4), tl.load(moves + i_bh * 4 + 1), tl.load(moves + i_bh * 4 + 2)
    for i_b in range(0 if HAS_INCOMING else 1, n_blocks if WANTS_FINAL else n_blocks - 1):
        i_t = first_block + i_b
        i_bh = i_t.to(tl.int64) * H + i_h
        p_snap = snap + ((row + i_b) * H + i_h) * K * D
        m_new = m_d & ((b_after <= fresh) & (b_after < tl.minimum(kept, K)))[:, None]
        b_new = tl.load(p_snap + H * K * D + (b_after[:, None] * D + o_d[None, :]), mask=m_new, other=0.0)
        m_old = m_d & (b_before < live)[:, None]
        tl.store(p_snap + (b_before[:, None] * D + o_d[None, :]), b_s.to(snap.dtype.element_ty), mask=m_old)
        b_s *= tl.exp(tl.load(cg + i_h * T + tl.load(blocks + 4 * i_t + 1) - 1))
        b_s = add_merged(b_s, columns + i_bh * 5 * KP, tl.load(moves + i_bh * 4 + 3), b_after, KP, False)
        m_kept = (b_after >= fresh) & (b_after < kept)
        b_s = tl.where(m_kept[:, None], b_s, 0.0) + b_new.to(tl.float32)
        b_before = b_after
        if i_b + 1 < n_blocks:
            i_bh = (i_t + 1).to(tl.int64) * H + i_h
            b_after = tl.load(columns + (i_bh * 5 + 1) * KP + o_s).to(tl.int32)
            live, fresh, kept = tl.load(moves + i_bh * 4), tl.load(moves + i_bh * 4 + 1), tl.load(moves + i_bh * 4 + 2)
    if WANTS_FINAL:
        m_out = m_d & (b_before < tl.minimum(kept, K))[:, None]
        tl.store(final + o_out + (b_before[:, None] * D + o_d[None, :]), b_s, mask=m_out)
    else:
        p_snap = snap + ((row + n_blocks - 1) * H + i_h) * K * D
        m_old = m_d & (b_before < live)[:, None]
        tl.store(p_snap + (b_before[:, None] * D + o_d[None, :]), b_s.to(snap.dtype.element_ty), mask=m_old)


@triton.jit(do_not_specialize=SIZES)
def carry_gradients_kernel(
    cg,
    blocks,
    segments,  # [n, 4]: the window's
    columns, moves,
    snap,  # [rows of the window, H, K, D]
    grad_states,  # same shape: in, the blocks' own parts; out, D at every row
    incoming,  # [segments of the window, H, K, D] fp32: gradient of the states at the end
    initial,  # same shape, out: gradient of the states at the start
    dkeep,  # [blocks of the window, H, programs] fp32 out: parts of keep <gradient, state>
    T, H, K, block_lo, row_lo,
    HAS_INCOMING: tl.constexpr,  # else zero
    WANTS_INITIAL: tl.constexpr,
    D: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    o_s, o_d = tl.arange(0, KP), tl.program_id(1) * BV + tl.arange(0, BV)
    m_d = (o_d < D)[None, :]
    first_block, n_blocks = tl.load(segments + 4 * i_n), tl.load(segments + 4 * i_n + 1)
    o_out = (i_n.to(tl.int64) * H + i_h) * K * D
    last = first_block + n_blocks - 1
    row = (tl.load(blocks + 4 * last + 2) - row_lo).to(tl.int64)  # a segment's rows follow each other
    i_bh = last.to(tl.int64) * H + i_h
    b_after = tl.load(columns + (i_bh * 5 + 1) * KP + o_s).to(tl.int32)
    p_keep = dkeep + ((last - block_lo).to(tl.int64) * H + i_h) * tl.num_programs(1) + tl.program_id(1)
    if HAS_INCOMING:
        m_end = m_d & (b_after < tl.minimum(tl.load(moves + i_bh * 4 + 2), K))[:, None]
        o_end = b_after[:, None] * D + o_d[None, :]
        b_ds = tl.load(incoming + o_out + o_end, mask=m_end, other=0.0)
        tl.store(grad_states + ((row + 1) * H + i_h) * K * D + o_end, b_ds.to(grad_states.dtype.element_ty), mask=m_end)
    else:  # before the last block are its own parts
        b_after = tl.load(columns + i_bh * 5 * KP + o_s).to(tl.int32)
        m_own = m_d & (b_after < tl.load(moves + i_bh * 4))[:, None]
        p_own = grad_states + (row * H + i_h) * K * D + (b_after[:, None] * D + o_d[None, :])
        b_ds = tl.load(p_own, mask=m_own, other=0.0).to(tl.float32)
        tl.store(p_keep, 0.0)
    if not WANTS_INITIAL:  # no segment began with slots
        tl.store(p_keep - (n_blocks - 1) * H * tl.num_programs(1), 0.0)
    for i_b in range(0 if HAS_INCOMING else 1, n_blocks if WANTS_INITIAL else n_blocks - 1):
        i_t = last - i_b
        i_bh = i_t.to(tl.int64) * H + i_h
        b_before = tl.load(columns + i_bh * 5 * KP + o_s).to(tl.int32)
        live, fresh, kept = tl.load(moves + i_bh * 4), tl.load(moves + i_bh * 4 + 1), tl.load(moves + i_bh * 4 + 2)
        o_row = ((row - i_b) * H + i_h) * K * D
        m_row = m_d & (b_before < live)[:, None]
        b_own = tl.load(grad_states + o_row + (b_before[:, None] * D + o_d[None, :]), mask=m_row, other=0.0)
        m_kept = (b_after >= fresh) & (b_after < kept)
        b_ds = tl.where(m_kept[:, None], b_ds, 0.0)
        b_ds = add_merged(b_ds, columns + i_bh * 5 * KP, tl.load(moves + i_bh * 4 + 3), b_after, KP, True)
        b_s = tl.load(snap + o_row + (b_before[:, None] * D + o_d[None, :]), mask=m_row, other=0.0)
        keep = tl.exp(tl.load(cg + i_h * T + tl.load(blocks + 4 * i_t + 1) - 1))
        part = keep * tl.sum(tl.sum(b_s.to(tl.float32) * b_ds, 1), 0)
        p_keep = dkeep + ((i_t - block_lo).to(tl.int64) * H + i_h) * tl.num_programs(1) + tl.program_id(1)
        tl.store(p_keep, part)
        b_ds = b_ds * keep + b_own.to(tl.float32)
        p_row = grad_states + o_row + (b_before[:, None] * D + o_d[None, :])
        tl.store(p_row, b_ds.to(grad_states.dtype.element_ty), mask=m_row)
        b_after = b_before
    if WANTS_INITIAL:
        m_start = m_d & (b_after < tl.load(moves + (first_block.to(tl.int64) * H + i_h) * 4))[:, None]
        tl.store(initial + o_out + (b_after[:, None] * D + o_d[None, :]), b_ds, mask=m_start)
