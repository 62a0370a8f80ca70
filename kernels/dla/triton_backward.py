"""Backward kernels. With y_i = dO S_i^T and D the gradient of the states (all of them rebuilt window by window):

    X = tril(dO V^T)   dAt = X .* M   dlam[t, slot] += X .* At   dV = (At .* M)^T dO + Kh_j D_end[slot_end(j)]
    dQt = sum_i lam_i y_i   dlam[t, idx_i] += rowsum(y_i .* Qt)   dKh_j = D_end[slot_end(j)] v_j
    D_i = (lam_i Qt)^T dO + Phi^T D_end[map(i)]                 dPhi = sum_i D_end[map(i)] S_i^T

A program owns what it writes, so there are no atomics and two runs agree bit for bit. For Mamba-2 dq, dk and the decay
gradient are finished here; for Gated DeltaNet `triton_local.py` computes them from dAt, dQt, dKh and dPhi.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compose import load_near, through_transition
from .triton_forward import pair_tile, slot_weights_tile, starts_in_block, token_products
from .triton_layout import SIZES
from .triton_tiles import (
    decays_of,
    load_tile,
    load_tile_t,
    raw_columns,
    raw_rows,
    rows_of,
    slots_wanted,
    store_rows,
)


@triton.jit
def pair_weight_gradient(p_dlam, stride, b_x, b_sum, b_last, b_death, b_newer, o_t, o_p, end, K):
    """Sums of b_x [BT, BP] over the keys of each slot, each stored at `p_dlam` [BT] + slot * stride.

    From new keys to old ones: tokens between two starts of the tile share a slot, one masked row sum each, and starts
    that are dead at t share theirs with older ones. b_sum, b_last: the last slot's sum and index, which this one or the
    next tile may go on with.
    """
    b_piece = tl.cumsum((b_death > 0).to(tl.int32), 0)
    m_alive = (b_death[None, :] > o_t[:, None]) & (o_p[None, :] <= o_t[:, None])
    pieces = tl.max(b_piece, 0) + 1
    for i in range(pieces):
        n = pieces - 1 - i
        b_slot = b_newer + tl.sum((m_alive & (b_piece[None, :] > n)).to(tl.int32), 1)
        b_slot = tl.minimum(b_slot, K - 1)
        b_share = tl.sum(tl.where(b_piece[None, :] == n, b_x, 0.0), 1)
        b_sum = tl.where(b_slot == b_last, b_sum, 0.0) + b_share
        tl.store(p_dlam + b_slot * stride, b_sum, mask=o_t < end)
        b_last = b_slot
    return b_sum, b_last


@triton.jit(do_not_specialize=SIZES)
def slot_query_gradient_kernel(
    q,  # [T, G, DK] (Mamba-2) or Qt [T, H, DK]
    do,  # [T, H, DV]
    cg,
    lam,  # [T, H, K]
    counts,
    blocks,
    live_death,
    live_count,
    snap,  # [rows of the window, H, K, DK, DV]
    dq,  # [tokens of the window, H / HEADS, DK] fp32 out: dq (Mamba-2) or dQt
    dlam,  # [NK, K, H, tokens of the window] fp32 out: of the slots up to `oldest` that are not the block's own
    oldest,  # [H, tokens of the window] int32 out: the oldest slot at t, or the newest own one less one
    weights,  # [K, H, tokens of the window] fp32 out: of each slot before the block, lam and decay
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    N_TOKENS,  # of the window
    HEADS,  # whose dq a program adds up
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BQ: tl.constexpr,  # queries of a program: one tile or two
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What reading the slots before the block adds to dQ and dlam."""
    PARTS: tl.constexpr = TILES * BT // BQ
    i_t, i_q = block_lo + tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_k = tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    if first + i_q * BQ < end:
        o_t, o_k = first + i_q * BQ + tl.arange(0, BQ), i_k * BK + tl.arange(0, BK)
        stride = (H * N_TOKENS).to(tl.int64)  # from a slot to the next
        o_row = (o_t - first) * (H * K)
        i_g = tl.program_id(1).to(tl.int64)
        stride_q = (H if GDN else H // GROUP) * DK
        p_q = q + (i_g - token_lo.to(tl.int64) * H if GDN else i_g * HEADS // GROUP) * DK
        b_dq = tl.zeros([BQ, BK], tl.float32)
        for head in range(HEADS):
            i_h = i_g * HEADS + head
            p_lam = lam + i_h * K + first.to(tl.int64) * H * K
            p_death = live_death + (row.to(tl.int64) * H + i_h) * K
            p_s = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
            b_scale = tl.full([BQ], 1.0, tl.float32)
            if not GDN:
                b_scale = tl.exp(tl.load(cg + i_h * T + o_t, mask=o_t < end, other=0.0))
            b_newer = starts_in_block(counts + i_h * TILES * T, o_t, first, end, T, (i_q + 1) * BQ // BT, BT)
            b_slot = tl.minimum(b_newer, K - 1)
            p_do = do + (first.to(tl.int64) * H + i_h) * DV
            b_do = load_near(p_do, o_t - first, tl.arange(0, BV), end - first, H * DV, DV)
            # again for each head: kept over the loop it would take registers
            b_q = load_near(p_q + first.to(tl.int64) * stride_q, o_t - first, o_k, end - first, stride_q, DK)
            b_dlam = tl.zeros([BQ], tl.float32)
            p_dlam, p_w = dlam + (i_k * K * H + i_h) * N_TOKENS - token_lo, weights + i_h * N_TOKENS - token_lo
            m = tl.load(live_count + row * H + i_h)
            death = tl.load(p_death, mask=m > 0, other=0)
            for i_s in range(m):
                b_newer += (death > o_t).to(tl.int32)
                death = tl.load(p_death + i_s + 1, mask=i_s + 1 < m, other=0)  # one ahead, for its latency
                b_next = tl.minimum(b_newer, K - 1)
                b_lam = tl.load(p_lam + (o_row + b_slot), mask=o_t < end, other=0.0).to(tl.float32)
                b_y = tl.zeros([BQ, BK], tl.float32)
                for i_v in range(0, DV, BV):
                    o_v = i_v + tl.arange(0, BV)
                    if DV > BV:
                        b_do = load_near(p_do, o_t - first, o_v, end - first, H * DV, DV)
                    b_s = load_tile_t(p_s + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
                    b_y = tl.dot(b_do.to(DOT), b_s, b_y, input_precision=PREC)  # [BQ, BV] @ [BV, BK] -> [BQ, BK]
                tl.store(p_w + (i_s * stride + o_t), b_lam * b_scale, mask=(o_t < end) & (i_k == 0))
                # in fp32 here only: for the whole loop it would take too many registers
                b_wide = tl.where(i_s < m, b_q, 0.0).to(tl.float32)
                b_dlam += b_scale * tl.sum(b_y * b_wide, 1)
                tl.store(p_dlam + (b_slot * stride + o_t), b_dlam, mask=o_t < end)
                b_dq += (b_lam * b_scale)[:, None] * b_y
                # slots that have been merged at t are one there: the last one's store has the sum. (Compared now, as
                # a loop that hands a value on over two iterations is not pipelined.)
                b_dlam = tl.where(b_next == b_slot, b_dlam, 0.0)
                b_slot = b_next
            if i_k == 0:
                last = tl.load(p_death + m - 1, mask=m > 0, other=-1)
                b_oldest = tl.where(m > 0, tl.minimum(b_newer - (last > o_t).to(tl.int32), K - 1), b_newer - 1)
                tl.store(oldest + (i_h * N_TOKENS - token_lo + o_t), b_oldest, mask=o_t < end)
        p_dq = dq + ((o_t - token_lo).to(tl.int64) * (H // HEADS) + i_g)[:, None] * DK + o_k[None, :]
        tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=(o_t < end)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def pairs_backward_kernel(
    q,  # [T, G, DK] (Mamba-2 only)
    k,
    v,  # [T, H, DV]
    do,  # [T, H, DV]
    cg,
    at,  # [T, H, TILES * BT] (Gated DeltaNet only)
    lam,  # [T, H, K]
    life,
    blocks,
    read_dlam, oldest,  # what `slot_query_gradient_kernel` found, in PARTS parts
    own_dlam,  # [K, H, tokens of the window] fp32 scratch: of the slots up to the oldest that has a token of the block
    weighted,  # [tokens of the window, H, TILES * BT] out: At .* M
    dat,  # same shape, out: dAt (Mamba-2: times the decay)
    dat_tile,  # [tokens of the window, H, BT] fp32 out: inside each tile, and not in `dat` (Gated DeltaNet only)
    dlam,  # [tokens of the window, H, K] out
    rows,  # [H, T] fp32 out: the queries' part of the decay gradient (Mamba-2 only)
    cols,  # [TILES, H, T] fp32 out: the keys' part, by the tile of the queries (Mamba-2 only)
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    N_TOKENS,  # of the window
    PARTS: tl.constexpr,
    BP: tl.constexpr,  # keys at a time
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    KP: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The pairs inside the block: At .* M, dAt, and all of dlam."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    W: tl.constexpr = TILES * BT
    if first + i_c * BT < end:
        i_h = tl.program_id(1).to(tl.int64)
        o_t = first + i_c * BT + tl.arange(0, BT)
        o_w, o_s = o_t - token_lo, tl.arange(0, KP)
        stride_q, stride_v = H // GROUP * DK, H * DV
        i_g = i_h // GROUP
        p_q, p_k, p_v, p_do = q + i_g * DK, k + i_g * DK, v + i_h * DV, do + i_h * DV
        p_at, p_lam = at + (i_h - token_lo.to(tl.int64) * H) * W, lam + i_h * K
        p_g, p_life = cg + i_h * T, life + i_h * T
        p_block = ((first - token_lo).to(tl.int64) * H + i_h) * W
        o_pair = (i_c * BT + tl.arange(0, BT))[:, None] * (H * W)  # 32-bit offsets: half the registers of pointers
        stride = (H * N_TOKENS).to(tl.int64)  # from a slot to the next
        p_own = own_dlam + i_h * N_TOKENS + o_w
        b_newer, b_sum, b_last = tl.zeros([BT], tl.int32), tl.zeros([BT], tl.float32), tl.full([BT], -1, tl.int32)
        steps = (i_c + 1) * (BT // BP)
        for back in range(steps):
            o_c = (steps - 1 - back) * BP + tl.arange(0, BP)  # and not o_p - first: known to be aligned
            o_p = first + o_c
            b_x = token_products(p_do, p_v, o_t, o_p, end, stride_v, DV, BV, BT, DOT, PREC)
            b_death = tl.load(p_life + o_p, mask=o_p < end, other=0)
            b_lam, b_from = slot_weights_tile(p_lam, b_death, b_newer, o_t, o_p, first, end, H * K, K)
            b_at, b_decay = pair_tile(
                p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_q, H * W, DK, BK, BT, GDN, DOT, PREC
            )
            b_dat = b_x * b_lam
            o_tile = o_pair + o_c[None, :]
            tl.store(weighted + p_block + o_tile, (b_at * b_lam).to(DOT), mask=(o_t < end)[:, None])
            if not GDN:
                p_cols = cols + (i_c * H + i_h) * T + o_p
                tl.store(p_cols, -tl.sum(b_dat * b_at, 0), mask=o_p < end)
                b_dat *= b_decay
            if GDN and back < BT // BP:
                p_own_dat = dat_tile + ((first - token_lo).to(tl.int64) * H + i_h) * BT
                o_own = (o_pair // TILES) + (o_c - i_c * BT)[None, :]
                tl.store(p_own_dat + o_own, b_dat, mask=(o_t < end)[:, None])
            else:
                tl.store(dat + p_block + o_tile, b_dat.to(dat.dtype.element_ty), mask=(o_t < end)[:, None])
            b_sum, b_last = pair_weight_gradient(
                p_own, stride, b_x * b_at, b_sum, b_last, b_death, b_newer, o_t, o_p, end, K
            )
            b_newer = b_from
        tl.debug_barrier()  # what follows reads what other threads wrote
        b_oldest = tl.load(oldest + i_h * N_TOKENS + o_w, mask=o_t < end, other=0)
        o_all = o_w[:, None] + (o_s * stride)[None, :]
        m_own = (o_s[None, :] <= b_last[:, None]) & (o_t < end)[:, None]
        m_read = (o_s[None, :] >= b_newer[:, None]) & (o_s[None, :] <= b_oldest[:, None]) & (o_t < end)[:, None]
        b_dlam = tl.load(own_dlam + i_h * N_TOKENS + o_all, mask=m_own, other=0.0)
        for part in tl.static_range(PARTS):
            b_dlam += tl.load(read_dlam + (part * K * H + i_h) * N_TOKENS + o_all, mask=m_read, other=0.0)
        m_dlam = (o_t < end)[:, None] & (o_s < K)[None, :]
        o_dlam = (o_w.to(tl.int64)[:, None] * H + i_h) * K + o_s[None, :]
        tl.store(dlam + o_dlam, b_dlam.to(dlam.dtype.element_ty), mask=m_dlam)
        if not GDN:  # every term of it has its slot's weight
            b_lam = tl.load(p_lam + o_t.to(tl.int64)[:, None] * (H * K) + o_s[None, :], mask=m_dlam, other=0.0)
            tl.store(rows + i_h * T + o_t, tl.sum(b_lam.to(tl.float32) * b_dlam, 1), mask=o_t < end)


@triton.jit
def slots_at_end(p_life, first, end, i_c, BT: tl.constexpr, TILES: tl.constexpr):
    """Slot at the block's end of each token of tile i_c [BT]; of the newest, and of the tile's oldest token."""
    newer = tl.zeros([], tl.int32)
    for i_x in range(i_c + 1, TILES):
        o_p = first + i_x * BT + tl.arange(0, BT)
        newer += tl.sum((tl.load(p_life + o_p, mask=o_p < end, other=0) >= end).to(tl.int32), 0)
    o_p = first + i_c * BT + tl.arange(0, BT)
    b_alive = (tl.load(p_life + o_p, mask=o_p < end, other=0) >= end).to(tl.int32)
    total = tl.sum(b_alive, 0)
    b_slot = newer + total - tl.cumsum(b_alive, 0)
    return b_slot, newer, tl.max(b_slot, 0)


@triton.jit
def pair_values(
    p_pair,  # [tokens, H, TILES * BT], at the head
    p_do,  # [T, H, DV], at the head
    first, end, i_c, o_v, stride_pair, stride_v,
    DV: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(At .* M)^T dO [BT, len(o_v)] of the keys in tile i_c of a block: what its queries from there on give dV."""
    b_dv = tl.zeros([BT, o_v.shape[0]], tl.float32)
    p_pair += (i_c * BT + tl.arange(0, BT))[:, None]
    for i_x in range(i_c, (end - first + BT - 1) // BT):
        o_t = first + i_x * BT + tl.arange(0, BT)
        b_pair = tl.load(p_pair + (o_t.to(tl.int64) * stride_pair)[None, :], mask=(o_t < end)[None, :], other=0.0)
        b_do = raw_rows(p_do, o_t, o_v, end, stride_v, DV)
        b_dv = tl.dot(b_pair, b_do.to(DOT), b_dv, input_precision=PREC)  # [BT, BT] @ [BT, BV] -> [BT, BV]
    return b_dv


@triton.jit(do_not_specialize=SIZES)
def value_gradient_kernel(
    k,  # [T, G, DK] or Kh [T, H, DK]
    do,
    cg,
    life,
    blocks,
    weighted,  # [tokens of the window, H, TILES * BT], see `pairs_backward_kernel`
    grad_states,  # [rows of the window, H, K, DK, DV]: D
    dv,  # [T, H, DV] out
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    HAS_INCOMING: tl.constexpr,  # else D is zero after a segment's last block, and not there
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h = tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    W: tl.constexpr = TILES * BT
    skip = token_lo.to(tl.int64) * H
    if first + i_c * BT < end:
        o_p = first + i_c * BT + tl.arange(0, BT)
        o_v = tl.program_id(2) * BV + tl.arange(0, BV)
        stride_k, stride_v = (H if GDN else H // GROUP) * DK, H * DV
        p_k = k + (i_h - skip if GDN else i_h // GROUP) * DK
        p_g, p_life = cg + i_h * T, life + i_h * T
        p_pair = weighted + (i_h - skip) * W
        b_dv = pair_values(p_pair, do + i_h * DV, first, end, i_c, o_v, H * W, stride_v, DV, BT, DOT, PREC)
        b_slot, newest, oldest = slots_at_end(p_life, first, end, i_c, BT, TILES)
        b_scale = tl.full([BT], 1.0, tl.float32)
        if not GDN:
            b_scale = tl.exp(tl.load(p_g + end - 1) - tl.load(p_g + o_p, mask=o_p < end, other=0.0))
        p_ds = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        slots = slots_wanted(blocks, i_t, tl.minimum(oldest, K - 1) + 1, HAS_INCOMING)
        for i_s in range(newest, slots):
            mine = (b_slot == i_s) & (o_p < end)
            for i_k in range(0, DK, BK):
                o_k = i_k + tl.arange(0, BK)
                m_k = mine[:, None] & (o_k < DK)[None, :]
                b_k = tl.load(p_k + o_p.to(tl.int64)[:, None] * stride_k + o_k[None, :], mask=m_k, other=0.0)
                b_k = tl.where(mine, b_scale, 0.0)[:, None] * b_k.to(tl.float32)
                b_ds = load_tile(p_ds + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
                b_dv = tl.dot(b_k.to(DOT), b_ds, b_dv, input_precision=PREC)  # [BT, BK] @ [BK, BV] -> [BT, BV]
        p_dv = dv + o_p.to(tl.int64)[:, None] * stride_v + i_h * DV + o_v[None, :]
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=(o_p < end)[:, None] & (o_v < DV)[None, :])


@triton.jit(do_not_specialize=SIZES)
def token_gradient_kernel(
    k,  # [T, G, DK]
    kh,  # [T, H, DK]
    v,  # [T, H, DV]
    do, cg,
    life,
    blocks,
    weighted,  # [tokens of the window, H, TILES * BT], see `pairs_backward_kernel`
    grad_states,  # [rows of the window, H, K, DK, DV]: D
    dphi,  # [blocks of the window, H, DK, DK]
    dkh,  # [tokens of the window, H, DK] fp32 out
    dke,  # [tokens of the window, H, DK] out: gradient of k from ek
    dv,  # [T, H, DV] out
    sums,  # [1, blocks of the window, TILES, H] fp32 out: <dek, ek> of each tile
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    HAS_INCOMING: tl.constexpr,  # else D is zero after a segment's last block, and not there
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dKh, dek and dV of Gated DeltaNet from one reading of D, for head dims that are one tile."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h = tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    W: tl.constexpr = TILES * BT
    skip = token_lo.to(tl.int64) * H
    if first + i_c * BT < end:
        o_i = tl.arange(0, BT)
        o_p = first + i_c * BT + o_i
        o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
        p_life = life + i_h * T
        p_pair = weighted + (i_h - skip) * W
        b_dv = pair_values(p_pair, do + i_h * DV, first, end, i_c, o_v, H * W, H * DV, DV, BT, DOT, PREC)
        b_slot, newest, oldest = slots_at_end(p_life, first, end, i_c, BT, TILES)
        b_dkh = tl.zeros([BT, BK], tl.float32)
        p_ds = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        p_kh = kh + ((first - token_lo).to(tl.int64) * H + i_h) * DK
        p_v = v + (first.to(tl.int64) * H + i_h) * DV
        o_r = i_c * BT + o_i
        for i_s in range(newest, slots_wanted(blocks, i_t, tl.minimum(oldest, K - 1) + 1, HAS_INCOMING)):
            mine = ((b_slot == i_s) & (o_p < end))[:, None]
            b_ds = load_tile(p_ds + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
            b_k = tl.load(p_kh + ((o_r * (H * DK))[:, None] + o_k[None, :]), mask=mine & (o_k < DK)[None, :], other=0.0)
            b_dv = tl.dot(b_k.to(DOT), b_ds, b_dv, input_precision=PREC)  # [BT, BK] @ [BK, BV] -> [BT, BV]
            b_v = tl.load(p_v + ((o_r * (H * DV))[:, None] + o_v[None, :]), mask=mine & (o_v < DV)[None, :], other=0.0)
            b_dkh = tl.dot(b_v.to(DOT), tl.trans(b_ds), b_dkh, input_precision=PREC)  # [BT, BV] @ [BV, BK] -> [BT, BK]
        p_dv = dv + o_p.to(tl.int64)[:, None] * (H * DV) + i_h * DV + o_v[None, :]
        tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=(o_p < end)[:, None] & (o_v < DV)[None, :])
        b_gain, i_b = tl.exp(decays_of(cg + i_h * T, o_p, end))[:, None], (i_t - block_lo).to(tl.int64)
        p_k, stride_k = k + i_h // GROUP * DK, (H // GROUP) * DK
        b_back, b_dek = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
        b_back, b_dek = through_transition(
            b_back, b_dek, p_k, kh + (i_h - skip) * DK, dphi + (i_b * H + i_h) * DK * DK, b_gain, o_p, o_k, 0, end,
            stride_k, H * DK, DK, BK, DOT, PREC,
        )  # fmt: skip
        store_rows(dkh + (i_h - skip) * DK, b_dkh + b_back, o_p, o_k, end, H * DK, DK)
        b_dek *= b_gain
        store_rows(dke + (i_h - skip) * DK, b_dek, o_p, o_k, end, H * DK, DK)
        # over both axes at once: one after the other, Triton 3.6 fails to compile it for sm_100
        total = tl.sum(b_dek * rows_of(p_k, o_p, o_k, end, stride_k, DK))
        tl.store(sums + (i_b * TILES + i_c) * H + i_h, total)


@triton.jit
def add_tiles(p_x, m_x, n, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum of `n` tiles [ROWS, COLS] that lie STRIDE elements apart: fp32."""
    b_x = tl.zeros([ROWS, COLS], tl.float32)
    for i in tl.range(0, n, num_stages=3):
        b_x += tl.load(p_x + i * STRIDE, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=SIZES)
def group_gradient_kernel(
    q, k,  # [T, G, DK]
    dat,  # [tokens of the window, H, TILES * BT], see `pairs_backward_kernel`
    blocks,
    dq_parts,  # [tokens of the window, G, DQ, DK] fp32: what reading slots adds to dq
    dk_parts,  # [tokens of the window, G, DKS, DK] fp32: what writing slots adds to dk
    dq, dk,  # [T, G, DK] out
    H, GROUP, DQ, DKS, block_lo, token_lo,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq and dk of Mamba-2: a group's heads have q and k in common, so their dAt are added first.

    One of the two, for one tile of tokens, as the last axis of the grid says.
    """
    W: tl.constexpr = TILES * BT
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_g, i_k = tl.program_id(1).to(tl.int64), tl.program_id(2) // 2
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    if first + i_c * BT < end:
        o_own, o_k = first + i_c * BT + tl.arange(0, BT), i_k * BK + tl.arange(0, BK)
        o_w = (o_own - token_lo).to(tl.int64)
        G = H // GROUP
        m_own = (o_own < end)[:, None] & (o_k < DK)[None, :]
        o_out = (o_own.to(tl.int64) * G + i_g)[:, None] * DK + o_k[None, :]
        p_pair = dat + i_g * GROUP * W
        if tl.program_id(2) % 2 == 0:
            p_part = dq_parts + (o_w * G + i_g)[:, None] * (DQ * DK) + o_k[None, :]
            b_dx = add_tiles(p_part, m_own, DQ, DK, BT, BK)
            for i_x in range(i_c + 1):
                o_p = first + i_x * BT + tl.arange(0, BT)
                p_tile = p_pair + (o_w * (H * W))[:, None] + (o_p - first)[None, :]
                b_pair = add_tiles(p_tile, (o_own < end)[:, None], GROUP, W, BT, BT)
                b_k = raw_rows(k + i_g * DK, o_p, o_k, end, G * DK, DK)
                b_dx = tl.dot(b_pair.to(DOT), b_k.to(DOT), b_dx, input_precision=PREC)  # [BT, BT] @ [BT, BK]
            tl.store(dq + o_out, b_dx.to(dq.dtype.element_ty), mask=m_own)
        else:
            p_part = dk_parts + (o_w * G + i_g)[:, None] * (DKS * DK) + o_k[None, :]
            b_dx = add_tiles(p_part, m_own, DKS, DK, BT, BK)
            for i_x in range(i_c, (end - first + BT - 1) // BT):
                o_t = first + i_x * BT + tl.arange(0, BT)
                p_tile = p_pair + ((o_t - token_lo).to(tl.int64) * (H * W))[None, :] + (o_own - first)[:, None]
                b_pair = add_tiles(p_tile, (o_t < end)[None, :], GROUP, W, BT, BT)
                b_q = raw_rows(q + i_g * DK, o_t, o_k, end, G * DK, DK)
                b_dx = tl.dot(b_pair.to(DOT), b_q.to(DOT), b_dx, input_precision=PREC)  # [BT, BT] @ [BT, BK]
            tl.store(dk + o_out, b_dx.to(dk.dtype.element_ty), mask=m_own)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    k,  # [T, G, DK] (Mamba-2 only)
    v,
    cg,
    life,
    blocks,
    grad_states,
    dk,  # [tokens of the window, H / HEADS, DK] fp32 out: dk (Mamba-2) or dKh
    ends,  # [NK, H, T] fp32 out: what the block's last decay gets and the key's own loses (Mamba-2 only)
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    HEADS,  # whose dk a program adds up
    HAS_INCOMING: tl.constexpr,  # else D is zero after a segment's last block, and not there
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK from the gradients of the states at the block's end."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_k = tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    if first + i_c * BT < end:
        o_p = first + i_c * BT + tl.arange(0, BT)
        o_k, o_p64 = i_k * BK + tl.arange(0, BK), o_p.to(tl.int64)
        stride_k, stride_v = H // GROUP * DK, H * DV
        b_dk = tl.zeros([BT, BK], tl.float32)
        for head in range(HEADS):
            i_h = tl.program_id(1).to(tl.int64) * HEADS + head
            p_v, p_g = v + i_h * DV, cg + i_h * T
            p_ds = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
            b_slot, newest, oldest = slots_at_end(life + i_h * T, first, end, i_c, BT, TILES)
            b_scale = tl.full([BT], 1.0, tl.float32)
            if not GDN:
                b_scale = tl.exp(tl.load(p_g + end - 1) - tl.load(p_g + o_p, mask=o_p < end, other=0.0))
            b_scale = tl.where(o_p < end, b_scale, 0.0)
            b_last = tl.zeros([BT], tl.float32)
            for i_s in range(newest, slots_wanted(blocks, i_t, tl.minimum(oldest, K - 1) + 1, HAS_INCOMING)):
                mine = (b_slot == i_s) & (o_p < end)
                b_y = tl.zeros([BT, BK], tl.float32)
                for i_v in range(0, DV, BV):
                    o_v = i_v + tl.arange(0, BV)
                    m_v = mine[:, None] & (o_v < DV)[None, :]
                    b_v = tl.load(p_v + o_p64[:, None] * stride_v + o_v[None, :], mask=m_v, other=0.0)
                    b_ds = load_tile_t(p_ds + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
                    b_y = tl.dot(b_v.to(DOT), b_ds, b_y, input_precision=PREC)  # [BT, BV] @ [BV, BK] -> [BT, BK]
                if not GDN:
                    m_k = mine[:, None] & (o_k < DK)[None, :]
                    p_k = k + i_h // GROUP * DK + o_p64[:, None] * stride_k + o_k[None, :]
                    b_last += b_scale * tl.sum(b_y * tl.load(p_k, mask=m_k, other=0.0).to(tl.float32), 1)
                b_dk += b_y * b_scale[:, None]
            if not GDN:
                tl.store(ends + (i_k * H + i_h) * T + o_p, b_last, mask=o_p < end)
        o_line = (o_p64 - token_lo) * (H // HEADS) + tl.program_id(1)
        p_dk = dk + o_line[:, None] * DK + o_k[None, :]
        tl.store(p_dk, b_dk, mask=(o_p < end)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def state_gradient_kernel(
    q,  # [T, G, DK] or Qt [T, H, DK]
    do,
    weights,  # [K, H, tokens of the window], see `slot_query_gradient_kernel`
    blocks,
    live_count,
    grad_states,  # [rows of the window, H, K, DK, DV] out: the block's own part of D
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    N_TOKENS,  # of the window
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    SLOTS: tl.constexpr,  # of a program, side by side: q and dO are read once for all of them
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Qt^T (lam_i dO) of one block and a few slots, one tile of [DK, DV] a program."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    NS = (K + SLOTS - 1) // SLOTS
    i_h, i_s = (tl.program_id(1) // NS).to(tl.int64), tl.program_id(1) % NS * SLOTS
    i_t, i_v = block_lo + tl.program_id(0), tl.program_id(2) % NV * BV
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    live = tl.load(live_count + row * H + i_h)
    if i_s < live:
        o_k, o_v, o_n = tl.program_id(2) // NV * BK + tl.arange(0, BK), i_v + tl.arange(0, BV), tl.arange(0, SLOTS * BV)
        o_s = i_s + tl.arange(0, SLOTS)
        stride_q = (H if GDN else H // GROUP) * DK
        p_q = q + (i_h - token_lo.to(tl.int64) * H if GDN else i_h // GROUP) * DK
        p_w = weights + i_h * N_TOKENS - token_lo + (o_s * (H * N_TOKENS).to(tl.int64))[None, :]
        b_ds = tl.zeros([BK, SLOTS * BV], tl.float32)
        for i_c in range((end - first + BT - 1) // BT):
            o_t = first + i_c * BT + tl.arange(0, BT)
            b_w = tl.load(p_w + o_t[:, None], mask=(o_t < end)[:, None] & (o_s < live)[None, :], other=0.0)
            b_q = raw_columns(p_q, o_t, o_k, end, stride_q, DK)
            b_do = raw_rows(do + i_h * DV, o_t, o_v, end, H * DV, DV).to(tl.float32)
            b_do = tl.reshape(b_w[:, :, None] * b_do[:, None, :], [BT, SLOTS * BV]).to(DOT)
            # [BK, BT] @ [BT, SLOTS * BV] -> [BK, SLOTS * BV]
            b_ds = tl.dot(b_q.to(DOT), b_do, b_ds, input_precision=PREC)
        o_slot, o_col = i_s + o_n // BV, i_v + o_n % BV
        p_ds = grad_states + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV + o_slot * (DK * DV) + o_col
        m_ds = (o_k < DK)[:, None] & ((o_slot < live) & (o_col < DV))[None, :]
        tl.store(p_ds[None, :] + o_k[:, None] * DV, b_ds.to(DOT), mask=m_ds)


@triton.jit(do_not_specialize=SIZES)
def decay_gradient_kernel(
    rows,  # [ROWS, H, T] fp32: gradient of cg, part of the queries
    cols,  # [COLS, H, T] fp32: part of the keys
    ends,  # [PARTS, H, T] fp32: what the block's last decay gets and the token's own loses
    dkeep,  # [blocks of the window, H, KEEPS] fp32: parts of the gradient of the last cg from the transition
    dg,  # [T, H] out
    blocks, block_lo, T, H,
    KEEPS: tl.constexpr,
    KP: tl.constexpr,  # KEEPS rounded up to a power of two
    ROWS: tl.constexpr,
    COLS: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr,  # of queries, each with a part of `cols` for the keys up to its end; 0: parts are of all keys
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reverse cumsum inside each block: no sum over T of terms that cancel."""
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * (block_lo + i_b)), tl.load(blocks + 4 * (block_lo + i_b) + 1)
    o_t = first + tl.arange(0, BLOCK)
    b_dg = tl.zeros([BLOCK], tl.float32)
    b_last = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(ROWS):
        b_dg += tl.load(rows + (part * H + i_h) * T + o_t, mask=o_t < end, other=0.0)
    for part in tl.static_range(COLS):
        m_cols = o_t < end
        if TILE > 0:
            m_cols = m_cols & (o_t < first + (part + 1) * TILE) & (first + part * TILE < end)
        b_dg += tl.load(cols + (part * H + i_h) * T + o_t, mask=m_cols, other=0.0)
    for part in tl.static_range(PARTS):
        b_last += tl.load(ends + (part * H + i_h) * T + o_t, mask=o_t < end, other=0.0)
    b_dg -= b_last
    o_p = tl.arange(0, KP)
    b_keep = tl.load(dkeep + (i_b * H + i_h) * KEEPS + o_p, mask=o_p < KEEPS, other=0.0)
    last = tl.sum(b_last, 0) + tl.sum(b_keep, 0)
    b_dg += tl.where(o_t == end - 1, last, 0.0)
    b_dg = tl.cumsum(b_dg, 0, reverse=True)
    tl.store(dg + o_t.to(tl.int64) * H + i_h, b_dg.to(dg.dtype.element_ty), mask=o_t < end)
