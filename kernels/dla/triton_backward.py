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

from .triton_forward import pair_tile, slot_weights_tile, token_products
from .triton_layout import SIZES
from .triton_tiles import load_tile, load_tile_t, raw_columns, raw_rows


@triton.jit
def pair_weight_gradient(b_dlam, b_x, p_life, b_newer, b_alive, o_p, end, K, KP: tl.constexpr):
    """b_dlam [BT, KP] += sums of b_x [BT, BT] over the keys of each slot.

    Tokens between two starts of the tile share a slot: one masked row sum each.
    """
    o_s = tl.arange(0, KP)
    b_piece = tl.cumsum((tl.load(p_life + o_p, mask=o_p < end, other=0) > 0).to(tl.int32), 0)
    for n in range(tl.max(b_piece, 0) + 1):
        b_share = tl.sum(tl.where(b_piece[None, :] == n, b_x, 0.0), 1)
        b_slot = b_newer + tl.sum(tl.where(b_piece[None, :] > n, b_alive, 0), 1)
        b_slot = tl.minimum(b_slot, K - 1)
        b_dlam += tl.where(o_s[None, :] == b_slot[:, None], b_share[:, None], 0.0)
    return b_dlam


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
    dq,  # [tokens of the window, H, DK] fp32 out: dq of each head (Mamba-2), or dQt
    dlam,  # [NK, tokens of the window, H, K] fp32 out
    dcg,  # [NK, H, T] fp32 out: the queries' part of the decay gradient (Mamba-2 only)
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    N_TOKENS,  # of the window
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    KP: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What reading the slots before the block adds to dQ, dlam and the decay gradient."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_k = tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    skip = token_lo.to(tl.int64) * H
    if first + i_c * BT < end:
        i_h = tl.program_id(1).to(tl.int64)  # in the branch: read before it, sm_80 spills with one head
        o_t = first + i_c * BT + tl.arange(0, BT)
        o_s, o_k = tl.arange(0, KP), i_k * BK + tl.arange(0, BK)
        p_lam = lam + (o_t.to(tl.int64) * H + i_h) * K
        p_death = live_death + (row.to(tl.int64) * H + i_h) * K
        p_s = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        b_scale = tl.full([BT], 1.0, tl.float32)
        if not GDN:
            b_scale = tl.exp(tl.load(cg + i_h * T + o_t, mask=o_t < end, other=0.0))
        b_newer = newer_starts(counts + i_h * TILES * T, o_t, end, T, 0, i_c + 1)
        b_slot = tl.minimum(b_newer, K - 1)
        b_lam = tl.load(p_lam + b_slot, mask=o_t < end, other=0.0).to(tl.float32)
        i_g = i_h - skip if GDN else i_h // GROUP
        b_q = raw_rows(q + i_g * DK, o_t, o_k, end, (H if GDN else H // GROUP) * DK, DK)
        p_do = do + i_h * DV
        b_do = raw_rows(p_do, o_t, tl.arange(0, BV), end, H * DV, DV)
        b_dq = tl.zeros([BT, BK], tl.float32)
        b_dlam = tl.zeros([BT, KP], tl.float32)
        b_dg = tl.zeros([BT], tl.float32)
        for i_s in range(tl.load(live_count + row * H + i_h)):
            b_newer += (tl.load(p_death + i_s) > o_t).to(tl.int32)
            b_next = tl.minimum(b_newer, K - 1)
            b_lam_next = tl.load(p_lam + b_next, mask=o_t < end, other=0.0).to(tl.float32)  # early, for its latency
            b_y = tl.zeros([BT, BK], tl.float32)
            for i_v in range(0, DV, BV):
                o_v = i_v + tl.arange(0, BV)
                if DV > BV:
                    b_do = raw_rows(p_do, o_t, o_v, end, H * DV, DV)
                b_s = load_tile_t(p_s + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
                b_y = tl.dot(b_do.to(DOT), b_s, b_y, input_precision=PREC)  # [BT, BV] @ [BV, BK] -> [BT, BK]
            b_dw = b_scale * tl.sum(b_y * b_q.to(tl.float32), 1)
            b_dg += b_lam * b_dw
            b_dq += (b_lam * b_scale)[:, None] * b_y
            b_dlam += tl.where(o_s[None, :] == b_slot[:, None], b_dw[:, None], 0.0)
            b_slot, b_lam = b_next, b_lam_next
        o_w = i_k.to(tl.int64) * N_TOKENS + o_t.to(tl.int64) - token_lo
        p_dlam = dlam + (o_w[:, None] * H + i_h) * K + o_s[None, :]
        tl.store(p_dlam, b_dlam, mask=(o_t < end)[:, None] & (o_s < K)[None, :])
        if not GDN:
            tl.store(dcg + (i_k * H + i_h) * T + o_t, b_dg, mask=o_t < end)
        p_dq = dq + (o_t.to(tl.int64) * H + i_h - skip)[:, None] * DK + o_k[None, :]
        tl.store(p_dq, b_dq, mask=(o_t < end)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q,  # [T, G, DK] (Mamba-2 only)
    k,
    v,  # [T, H, DV]
    do,  # [T, H, DV]
    cg,
    at,  # [T, H, TILES * BT] (Gated DeltaNet only)
    lam,  # [T, H, K]
    life,
    counts,
    blocks,
    read_dlam,  # [PARTS, tokens of the window, H, K] fp32: what `slot_query_gradient_kernel` found
    dq,  # [tokens of the window, H, DK] fp32 in, out: dq of each head (Mamba-2 only)
    dat,  # [T, H, TILES * BT] fp32 out: dAt (Gated DeltaNet only)
    dlam,  # [tokens of the window, H, K] out
    dcg,  # [H, T] fp32 out: the queries' part of the decay gradient (Mamba-2 only)
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    N_TOKENS,  # of the window
    PARTS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    KP: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The pairs inside the block: dAt or their part of dQ, and all of dlam."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_k = tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    skip = token_lo.to(tl.int64) * H
    if first + i_c * BT < end:
        i_h = tl.program_id(1).to(tl.int64)  # in the branch: read before it, sm_80 spills with one head
        o_t = first + i_c * BT + tl.arange(0, BT)
        o_s, o_k = tl.arange(0, KP), i_k * BK + tl.arange(0, BK)
        stride_q, stride_v = H // GROUP * DK, H * DV
        i_g = i_h // GROUP
        p_q, p_k, p_v, p_do = q + i_g * DK, k + i_g * DK, v + i_h * DV, do + i_h * DV
        p_at, p_lam = at + (i_h - skip) * TILES * BT, lam + i_h * K
        p_g, p_counts, p_life = cg + i_h * T, counts + i_h * TILES * T, life + i_h * T
        b_dq = tl.zeros([BT, BK], tl.float32)
        b_dlam = tl.zeros([BT, KP], tl.float32)
        b_dg = tl.zeros([BT], tl.float32)
        b_newer = tl.zeros([BT], tl.int32)
        for back in range(i_c + 1):
            i_x = i_c - back
            o_p = first + i_x * BT + tl.arange(0, BT)
            b_x = token_products(p_do, p_v, o_t, o_p, end, stride_v, DV, BV, BT, DOT, PREC)
            if not GDN:
                b_at, b_decay = pair_tile(
                    p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_q, H * TILES * BT, DK, BK, BT, GDN, DOT, PREC
                )
            b_count = tl.load(p_counts + i_x.to(tl.int64) * T + o_t, mask=o_t < end, other=0)
            b_lam, b_alive = slot_weights_tile(p_lam, p_life, b_newer, b_count, o_t, o_p, end, H * K, K)
            b_dat = b_x * b_lam
            if GDN:
                m_dat = (o_t < end)[:, None] & (o_p >= first)[None, :]
                p_dat = dat + (o_t.to(tl.int64)[:, None] * H + i_h - skip) * TILES * BT + (o_p - first)[None, :]
                tl.store(p_dat, b_dat, mask=m_dat)
                b_at, _ = pair_tile(  # as late as this, or registers do not suffice
                    p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_q, H * TILES * BT, DK, BK, BT, GDN, DOT, PREC
                )
            if i_k == 0:
                b_dlam = pair_weight_gradient(b_dlam, b_x * b_at, p_life, b_newer, b_alive, o_p, end, K, KP)
            if not GDN:
                b_dg += tl.sum(b_dat * b_at, 1)
                b_k = raw_rows(p_k, o_p, o_k, end, stride_q, DK)
                # [BT, BT] @ [BT, BK] -> [BT, BK]
                b_dq = tl.dot((b_dat * b_decay).to(DOT), b_k.to(DOT), b_dq, input_precision=PREC)
            b_newer += b_count
        m_dq = (o_t < end)[:, None] & (o_k < DK)[None, :]
        o_w = o_t.to(tl.int64) - token_lo
        if i_k == 0:
            m_dlam = (o_t < end)[:, None] & (o_s < K)[None, :]
            o_dlam = (o_w[:, None] * H + i_h) * K + o_s[None, :]
            for part in tl.static_range(PARTS):
                p_read = read_dlam + part * N_TOKENS.to(tl.int64) * H * K
                b_dlam += tl.load(p_read + o_dlam, mask=m_dlam, other=0.0)
            tl.store(dlam + o_dlam, b_dlam.to(dlam.dtype.element_ty), mask=m_dlam)
        if not GDN:
            if i_k == 0:
                tl.store(dcg + i_h * T + o_t, b_dg, mask=o_t < end)
            p_dq = dq + (o_w * H + i_h)[:, None] * DK + o_k[None, :]
            tl.store(p_dq, b_dq + tl.load(p_dq, mask=m_dq, other=0.0), mask=m_dq)


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
def newer_starts(p_counts, o_t, end, T, lo, hi):
    """Live starts at t in the tiles lo .. hi - 1 of the block: int32 [BT]."""
    b_newer = tl.zeros_like(o_t)
    for i_x in range(lo, hi):
        b_newer += tl.load(p_counts + tl.cast(i_x, tl.int64) * T + o_t, mask=o_t < end, other=0)
    return b_newer


@triton.jit
def decay_tile_t(p_g, o_t, o_p, end):
    """Decay from key p to query t as [keys, queries], at most 1 where p > t, whose slot weight is 0 (Mamba-2)."""
    b_gt, b_gp = tl.load(p_g + o_t, mask=o_t < end, other=0.0), tl.load(p_g + o_p, mask=o_p < end, other=0.0)
    return tl.exp(tl.minimum(b_gt[None, :] - b_gp[:, None], 0.0))


@triton.jit
def pair_tile_t(
    p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_q, stride_at,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`pair_tile` transposed, [keys, queries], computed in this order and not by tl.trans (see `triton_local.py`)."""
    if GDN:
        causal = (o_p[:, None] <= o_t[None, :]) & (o_t < end)[None, :]
        p_pair = p_at + o_t.to(tl.int64)[None, :] * stride_at + (o_p - first)[:, None]
        b_at = tl.load(p_pair, mask=causal, other=0.0).to(tl.float32)
    else:
        b_at = token_products(p_k, p_q, o_p, o_t, end, stride_q, DK, BK, BT, DOT, PREC)
        b_at *= decay_tile_t(p_g, o_t, o_p, end)
    return b_at


@triton.jit
def slot_weights_tile_t(p_lam, p_life, b_newer, b_count, o_t, o_p, first, end, stride_lam, K):
    """`slot_weights_tile` transposed: M[t, p] as [keys, queries]."""
    b_death = tl.load(p_life + o_p, mask=o_p < end, other=0)
    causal = (o_p[:, None] <= o_t[None, :]) & (o_t < end)[None, :]
    b_alive = ((b_death[:, None] > o_t[None, :]) & causal).to(tl.int32)
    b_slot = b_newer[None, :] + b_count[None, :] - tl.cumsum(b_alive, 0)
    b_slot = tl.minimum(tl.maximum(b_slot, 0), K - 1)
    p_block = p_lam + first.to(tl.int64) * stride_lam  # and 32-bit offsets: half the registers of pointers
    b_lam = tl.load(p_block + (((o_t - first) * stride_lam)[None, :] + b_slot), mask=causal, other=0.0)
    return b_lam.to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def value_gradient_kernel(
    q,  # [T, G, DK] (Mamba-2 only)
    k,  # [T, G, DK] or Kh [T, H, DK]
    do,
    cg,
    at,
    lam,
    life,
    counts,
    blocks,
    grad_states,  # [rows of the window, H, K, DK, DV]: D
    dv,  # [T, H, DV] out
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h = tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    skip = token_lo.to(tl.int64) * H
    if first + i_c * BT < end:
        o_p = first + i_c * BT + tl.arange(0, BT)
        o_v = tl.program_id(2) * BV + tl.arange(0, BV)
        stride_k, stride_v = (H if GDN else H // GROUP) * DK, H * DV
        p_k = k + (i_h - skip if GDN else i_h // GROUP) * DK
        p_q, p_at, p_lam = q + i_h // GROUP * DK, at + (i_h - skip) * TILES * BT, lam + i_h * K
        p_g, p_counts, p_life = cg + i_h * T, counts + i_h * TILES * T, life + i_h * T
        b_dv = tl.zeros([BT, BV], tl.float32)
        for i_x in range(i_c, TILES):
            o_t = first + i_x * BT + tl.arange(0, BT)
            if first + i_x * BT < end:
                b_at = pair_tile_t(
                    p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_k if not GDN else DK, H * TILES * BT, DK, BK, BT,
                    GDN, DOT, PREC,
                )  # fmt: skip
                b_newer = newer_starts(p_counts, o_t, end, T, i_c + 1, i_x + 1)
                b_count = tl.load(p_counts + i_c.to(tl.int64) * T + o_t, mask=o_t < end, other=0)
                b_lam = slot_weights_tile_t(p_lam, p_life, b_newer, b_count, o_t, o_p, first, end, H * K, K)
                m_do = (o_t < end)[:, None] & (o_v < DV)[None, :]
                # with `do + i_h * DV` computed before the loop, sm_80 spills with one head
                p_do = do + o_t.to(tl.int64)[:, None] * stride_v + i_h * DV + o_v[None, :]
                b_do = tl.load(p_do, mask=m_do, other=0.0)
                # [BT, BT] @ [BT, BV] -> [BT, BV]
                b_dv = tl.dot((b_at * b_lam).to(DOT), b_do.to(DOT), b_dv, input_precision=PREC)
        b_slot, newest, oldest = slots_at_end(p_life, first, end, i_c, BT, TILES)
        b_scale = tl.full([BT], 1.0, tl.float32)
        if not GDN:
            b_scale = tl.exp(tl.load(p_g + end - 1) - tl.load(p_g + o_p, mask=o_p < end, other=0.0))
        p_ds = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        for i_s in range(newest, tl.minimum(oldest, K - 1) + 1):
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


@triton.jit
def key_pair_gradient(
    b_dk, p_q, p_k, p_v, p_do, p_g, p_lam, p_life, p_counts, o_p, o_k, first, end, i_c, stride_q, stride_v, stride_lam,
    T, K, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK [BT, BK] and the decay gradient [BT] of the pairs of the tile's keys with queries of the block (Mamba-2)."""
    b_dg = tl.zeros([BT], tl.float32)
    for i_x in range(i_c, (end - first + BT - 1) // BT):
        o_t = first + i_x * BT + tl.arange(0, BT)
        b_x = token_products(p_v, p_do, o_p, o_t, end, stride_v, DV, BV, BT, DOT, PREC)
        b_newer = newer_starts(p_counts, o_t, end, T, i_c + 1, i_x + 1)
        b_count = tl.load(p_counts + i_c.to(tl.int64) * T + o_t, mask=o_t < end, other=0)
        b_x *= slot_weights_tile_t(p_lam, p_life, b_newer, b_count, o_t, o_p, first, end, stride_lam, K)
        b_x *= decay_tile_t(p_g, o_t, o_p, end)
        b_dg -= tl.sum(b_x * token_products(p_k, p_q, o_p, o_t, end, stride_q, DK, BK, BT, DOT, PREC), 1)
        b_q = raw_rows(p_q, o_t, o_k, end, stride_q, DK)
        # [BT, BT] @ [BT, BK] -> [BT, BK]
        b_dk = tl.dot(b_x.to(DOT), b_q.to(DOT), b_dk, input_precision=PREC)
    return b_dk, b_dg


@triton.jit
def key_state_gradient(
    b_dk, p_k, p_v, p_g, p_life, p_ds, o_p, o_k, first, end, i_c, stride_q, stride_v, K,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK [BT, BK] from the gradients of the states at the block's end; each key's part of the last decay's [BT]."""
    b_slot, newest, oldest = slots_at_end(p_life, first, end, i_c, BT, TILES)
    b_scale = tl.full([BT], 1.0, tl.float32)
    if not GDN:
        b_scale = tl.exp(tl.load(p_g + end - 1) - tl.load(p_g + o_p, mask=o_p < end, other=0.0))
    b_scale = tl.where(o_p < end, b_scale, 0.0)
    b_last = tl.zeros([BT], tl.float32)
    o_p64 = o_p.to(tl.int64)
    for i_s in range(newest, tl.minimum(oldest, K - 1) + 1):
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
            b_k = tl.load(p_k + o_p64[:, None] * stride_q + o_k[None, :], mask=m_k, other=0.0)
            b_last += b_scale * tl.sum(b_y * b_k.to(tl.float32), 1)
        b_dk += b_y * b_scale[:, None]
    return b_dk, b_last


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q,  # [T, G, DK] (Mamba-2 only)
    k,  # [T, G, DK] (Mamba-2 only)
    v,
    do,
    cg,
    lam,
    life,
    counts,
    blocks,
    grad_states,
    dk,  # [T, H / HEADS, DK] out: dk (Mamba-2), or dKh [T, H, DK] fp32
    dcg,  # [NK, H, T] fp32 out: the keys' part of the decay gradient (Mamba-2 only)
    ends,  # [NK, H, T] fp32 out: what the block's last decay gets (Mamba-2 only)
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    TILES: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_k = tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    if first + i_c * BT < end:
        o_p = first + i_c * BT + tl.arange(0, BT)
        o_k = i_k * BK + tl.arange(0, BK)
        stride_q, stride_v = H // GROUP * DK, H * DV
        b_dk = tl.zeros([BT, BK], tl.float32)
        for head in range(HEADS):
            i_h = tl.program_id(1).to(tl.int64) * HEADS + head
            p_q, p_k = q + i_h // GROUP * DK, k + i_h // GROUP * DK
            p_v, p_do, p_lam = v + i_h * DV, do + i_h * DV, lam + i_h * K
            p_g, p_counts, p_life = cg + i_h * T, counts + i_h * TILES * T, life + i_h * T
            b_dg = tl.zeros([BT], tl.float32)
            if not GDN:
                b_dk, b_dg = key_pair_gradient(
                    b_dk, p_q, p_k, p_v, p_do, p_g, p_lam, p_life, p_counts, o_p, o_k, first, end, i_c, stride_q,
                    stride_v, H * K, T, K, DK, DV, BK, BV, BT, TILES, DOT, PREC,
                )  # fmt: skip
                if i_k > 0:
                    b_dg = tl.zeros([BT], tl.float32)
            p_ds = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
            b_dk, b_last = key_state_gradient(
                b_dk, p_k, p_v, p_g, p_life, p_ds, o_p, o_k, first, end, i_c, stride_q, stride_v, K, DK, DV, BK, BV, BT,
                TILES, GDN, DOT, PREC,
            )  # fmt: skip
            if not GDN:
                o_g = (i_k * H + i_h) * T + o_p
                tl.store(dcg + o_g, b_dg - b_last, mask=o_p < end)
                tl.store(ends + o_g, b_last, mask=o_p < end)
        o_line = o_p.to(tl.int64) * (H // HEADS) + tl.program_id(1)
        if GDN:
            o_line -= token_lo.to(tl.int64) * H
        p_dk = dk + o_line[:, None] * DK + o_k[None, :]
        tl.store(p_dk, b_dk.to(dk.dtype.element_ty), mask=(o_p < end)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def state_gradient_kernel(
    q,  # [T, G, DK] or Qt [T, H, DK]
    do,
    cg,
    lam,
    counts,
    blocks,
    live_death,
    live_count,
    grad_states,  # [rows of the window, H, K, DK, DV] out: the block's own part of D
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    KP: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """(lam_i Qt)^T dO of one block and slot, one tile of [DK, DV] a program."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_b, i_h, i_s = tl.program_id(0), (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    i_t = block_lo + i_b
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    if i_s < tl.load(live_count + row * H + i_h):
        o_k = tl.program_id(2) // NV * BK + tl.arange(0, BK)
        o_v = tl.program_id(2) % NV * BV + tl.arange(0, BV)
        stride_q = (H if GDN else H // GROUP) * DK
        p_q = q + (i_h - token_lo.to(tl.int64) * H if GDN else i_h // GROUP) * DK
        p_do, p_g, p_counts = do + i_h * DV, cg + i_h * T, counts + i_h * TILES * T
        o_s = tl.arange(0, KP)
        b_death = tl.load(live_death + (row.to(tl.int64) * H + i_h) * K + o_s, mask=o_s < i_s, other=0)
        b_ds = tl.zeros([BK, BV], tl.float32)
        for i_c in range((end - first + BT - 1) // BT):
            o_t = first + i_c * BT + tl.arange(0, BT)
            b_slot = newer_starts(p_counts, o_t, end, T, 0, i_c + 1)
            b_slot += tl.sum((b_death[None, :] > o_t[:, None]).to(tl.int32), 1)
            b_slot = tl.minimum(b_slot, K - 1)
            b_w = tl.load(lam + (o_t.to(tl.int64) * H + i_h) * K + b_slot, mask=o_t < end, other=0.0).to(tl.float32)
            if not GDN:
                b_w *= tl.exp(tl.load(p_g + o_t, mask=o_t < end, other=0.0))
            b_q = raw_columns(p_q, o_t, o_k, end, stride_q, DK)
            b_do = raw_rows(p_do, o_t, o_v, end, H * DV, DV)
            b_q = (b_w[None, :] * b_q.to(tl.float32)).to(DOT)
            b_ds = tl.dot(b_q, b_do.to(DOT), b_ds, input_precision=PREC)  # [BK, BT] @ [BT, BV] -> [BK, BV]
        p_ds = grad_states + (((row - row_lo).to(tl.int64) * H + i_h) * K + i_s) * DK * DV
        tl.store(p_ds + o_k[:, None] * DV + o_v[None, :], b_ds.to(DOT), mask=(o_k < DK)[:, None] & (o_v < DV)[None, :])


@triton.jit(do_not_specialize=SIZES)
def decay_gradient_kernel(
    rows,  # [PARTS, H, T] fp32: gradient of cg, part of the queries
    cols,  # [PARTS, H, T] fp32: part of the keys
    ends,  # [PARTS, H, T] fp32: summed into the block's last decay
    dkeep,  # [blocks of the window, H, KEEPS] fp32: parts of the gradient of the last cg from the transition
    dg,  # [T, H] out
    blocks, block_lo, T, H,
    KEEPS: tl.constexpr,
    KP: tl.constexpr,  # KEEPS rounded up to a power of two
    ROWS: tl.constexpr,  # parts of `rows`
    PARTS: tl.constexpr,  # parts of `cols` and `ends`
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
    for part in tl.static_range(PARTS):
        b_dg += tl.load(cols + (part * H + i_h) * T + o_t, mask=o_t < end, other=0.0)
        b_last += tl.load(ends + (part * H + i_h) * T + o_t, mask=o_t < end, other=0.0)
    o_p = tl.arange(0, KP)
    b_keep = tl.load(dkeep + (i_b * H + i_h) * KEEPS + o_p, mask=o_p < KEEPS, other=0.0)
    last = tl.sum(b_last, 0) + tl.sum(b_keep, 0)
    b_dg += tl.where(o_t == end - 1, last, 0.0)
    b_dg = tl.cumsum(b_dg, 0, reverse=True)
    tl.store(dg + o_t.to(tl.int64) * H + i_h, b_dg.to(dg.dtype.element_ty), mask=o_t < end)
