"""Gated DeltaNet: the arrays of a block of several tiles from those of its tiles, and their gradients.

With Y = Qt of the right half of a block, X = Kh of its left half, and ek = exp(cg) K counted from the start of a half,
one level joins the halves L and R (of one tile each, then of two, ..):

    At[R, L] = Y X^T             Qt[R] = keep_L Y - At[R, L] ek_L
    B[L, R] = X ek_R^T           Kh[L] = keep_R X - B[L, R] Kh[R]

Qt of L and Kh of R stay. A block's R is Kh^T ek again, so that states, outputs and their gradients know blocks only.
B is kept in the upper triangle of At, which nothing else reads. Products are as in fp32, see `triton_local.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import columns_of, decays_of, load_tile, load_tile_t, rows_of


@triton.jit
def tile_in_block(tiles, blocks, i_t, p_g, HALF: tl.constexpr, BT: tl.constexpr):
    """Of a tile: its tokens, place in the block, block, and the block's first token; then, of its own half, the decay
    before it; and of the half beside it: first token, end, decay before it and over it (an empty one: 1)."""
    first, end = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1)
    i_b, place = tl.load(tiles + 4 * i_t + 2), tl.load(tiles + 4 * i_t + 3)
    begin, stop = tl.load(blocks + 4 * i_b), tl.load(blocks + 4 * i_b + 1)
    half = place // HALF
    own = begin + half * HALF * BT
    lo = tl.minimum(begin + (half ^ 1) * HALF * BT, stop)
    hi = tl.minimum(lo + HALF * BT, stop)
    base_own = tl.load(p_g + own - 1, mask=own > begin, other=0.0)
    base = tl.load(p_g + lo - 1, mask=lo > begin, other=0.0)
    keep = tl.exp(tl.load(p_g + tl.maximum(hi, lo) - 1) - base)
    return first, end, place, i_b, begin, base_own, lo, hi, base, keep


@triton.jit
def cross_products(
    x, y, o_x, o_y, end_x, end_y, stride_x, stride_y, D: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """x[o_x] . y[o_y] over all D dims: fp32 [BT, BT]."""
    b_xy = tl.zeros([BT, BT], tl.float32)
    for i_d in range(0, D, BK):
        o_d = i_d + tl.arange(0, BK)
        b_x = rows_of(x, o_x, o_d, end_x, stride_x, D)
        b_y = columns_of(y, o_y, o_d, end_y, stride_y, D)
        b_xy = tl.dot(b_x, b_y, b_xy, input_precision=PREC)  # [BT, BK] @ [BK, BT] -> [BT, BT]
    return b_xy


@triton.jit
def store_rows(p_x, b_x, o_t, o_d, end, stride, D: tl.constexpr):
    """x[o_t, o_d] = b_x."""
    p_cell = p_x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_cell, b_x, mask=(o_t < end)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def compose_kernel(
    k,  # [T, G, DK]
    cg,  # [H, T]: in blocks
    at_tile,  # [T, H, BT] fp32: At of each tile
    qt, kh,  # [T, H, DK] fp32: before this level
    at,  # [T, H, TILES * BT] fp32 out: At of each block, and B above its diagonal
    qt_out, kh_out,  # [T, H, DK] fp32 out
    tiles,  # [n, 4], see `BlockLayout`
    tile_lo,
    blocks,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    HALF: tl.constexpr,  # tiles
    TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = TILES * BT
    i_h = tl.program_id(1).to(tl.int64)
    i_w = i_h - token_lo.to(tl.int64) * H
    p_g, p_k, stride_k = cg + i_h * T, k + i_h // GROUP * DK, (H // GROUP) * DK
    p_at, p_qt, p_kh = at + i_w * W, qt + i_w * DK, kh + i_w * DK
    first, end, place, _, begin, _, lo, hi, base, keep = tile_in_block(
        tiles, blocks, tile_lo + tl.program_id(0), p_g, HALF, BT
    )
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    right = (place // HALF) % 2 == 1
    if HALF == 1:
        b_at = rows_of(at_tile + i_w * BT, o_t, o_i, end, H * BT, BT)
        store_rows(p_at, b_at, o_t, place * BT + o_i, end, H * W, W)
    for i_p in range(lo, hi, BT):
        o_p = i_p + o_i
        if right:
            b_a = cross_products(p_qt, p_kh, o_t, o_p, end, hi, H * DK, H * DK, DK, BK, BT, PREC)
        else:
            b_a = cross_products(p_kh, p_k, o_t, o_p, end, hi, H * DK, stride_k, DK, BK, BT, PREC)
            b_a *= tl.exp(decays_of(p_g, o_p, hi) - base)[None, :]
        store_rows(p_at, b_a, o_t, i_p - begin + o_i, end, H * W, W)
    tl.debug_barrier()
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_q = rows_of(p_qt, o_t, o_k, end, H * DK, DK)
        b_kh = rows_of(p_kh, o_t, o_k, end, H * DK, DK)
        b_x = keep * (b_q if right else b_kh)
        for i_p in range(lo, hi, SLAB):
            o_p = i_p + tl.arange(0, SLAB)
            b_a = rows_of(p_at, o_t, o_p - begin, end, H * W, W)
            if right:
                b_y = rows_of(p_k, o_p, o_k, hi, stride_k, DK) * tl.exp(decays_of(p_g, o_p, hi) - base)[:, None]
            else:
                b_y = rows_of(p_kh, o_p, o_k, hi, H * DK, DK)
            b_x -= tl.dot(b_a, b_y, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
        store_rows(qt_out + i_w * DK, b_x if right else b_q, o_t, o_k, end, H * DK, DK)
        store_rows(kh_out + i_w * DK, b_kh if right else b_x, o_t, o_k, end, H * DK, DK)


@triton.jit(do_not_specialize=SIZES)
def compose_backward_kernel(
    k, cg,
    qt, kh,  # [T, H, DK] fp32: before this level
    at,  # [T, H, TILES * BT] fp32
    dat,  # same shape: dAt of each block
    dqt, dkh,  # [T, H, DK] fp32: gradients after this level
    dqt_out, dkh_out,  # same shape, out: before it
    dke,  # [T, H, DK] fp32 in, out: gradient of k from ek
    sums,  # [2, blocks of the window, TILES, H] fp32 out: <dek, ek> and keep <dY', Y> (or X) of each tile
    dat_tile,  # [T, H, BT] fp32 out: dAt of each tile
    work,  # [T, H, TILES * BT] fp32 scratch
    tiles, tile_lo, blocks, block_lo, token_lo,
    T, H, GROUP,
    N_BLOCKS,  # of the window
    HALF: tl.constexpr, TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = TILES * BT
    i_h = tl.program_id(1).to(tl.int64)
    i_w = i_h - token_lo.to(tl.int64) * H
    p_g, p_k, stride_k = cg + i_h * T, k + i_h // GROUP * DK, (H // GROUP) * DK
    p_at, p_dat, p_work = at + i_w * W, dat + i_w * W, work + i_w * W
    p_qt, p_kh, p_dqt, p_dkh = qt + i_w * DK, kh + i_w * DK, dqt + i_w * DK, dkh + i_w * DK
    p_dke = dke + i_w * DK
    first, end, place, i_b, begin, base_own, lo, hi, base, keep = tile_in_block(
        tiles, blocks, tile_lo + tl.program_id(0), p_g, HALF, BT
    )
    o_i = tl.arange(0, BT)
    o_t, o_own = first + o_i, place * BT + o_i
    half = place // HALF
    right = half % 2 == 1
    shift = half * HALF * BT - (lo - begin)  # from the columns of the other half to those of the own one: scratch too
    b_gain = tl.exp(decays_of(p_g, o_t, end) - base_own)
    if HALF == 1:
        b_at = rows_of(p_dat, o_t, o_own, end, H * W, W)
        store_rows(dat_tile + i_w * BT, b_at, o_t, o_i, end, H * BT, BT)
    for i_p in range(lo, hi, BT):
        o_p = i_p + o_i
        if right:  # gradients of At[R, L], and of B[L, R] transposed
            b_x = -cross_products(p_dqt, p_k, o_t, o_p, end, hi, H * DK, stride_k, DK, BK, BT, PREC)
            b_x *= tl.exp(decays_of(p_g, o_p, hi) - base)[None, :]
            b_x += rows_of(p_dat, o_t, i_p - begin + o_i, end, H * W, W)
        else:  # the other way round
            b_x = -b_gain[:, None] * cross_products(p_k, p_dqt, o_t, o_p, end, hi, stride_k, H * DK, DK, BK, BT, PREC)
            b_x += columns_of(p_dat, o_p, o_own, hi, H * W, W)
        store_rows(p_work, b_x, o_t, i_p - begin + o_i, end, H * W, W)
        if right:
            b_x = -cross_products(p_kh, p_dkh, o_t, o_p, end, hi, H * DK, H * DK, DK, BK, BT, PREC)
        else:
            b_x = -cross_products(p_dkh, p_kh, o_t, o_p, end, hi, H * DK, H * DK, DK, BK, BT, PREC)
        store_rows(p_work, b_x, o_t, i_p - begin + shift + o_i, end, H * W, W)
    tl.debug_barrier()
    b_from_ek, b_kept = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_dq, b_dkh = rows_of(p_dqt, o_t, o_k, end, H * DK, DK), rows_of(p_dkh, o_t, o_k, end, H * DK, DK)
        if right:
            b_kept += keep * tl.sum(b_dq * rows_of(p_qt, o_t, o_k, end, H * DK, DK), 1)
            b_dq *= keep
        else:
            b_kept += keep * tl.sum(b_dkh * rows_of(p_kh, o_t, o_k, end, H * DK, DK), 1)
            b_dkh *= keep
        b_dek = tl.zeros([BT, BK], tl.float32)
        # one product after the other: together, their operands do not fit in registers
        if right:
            for i_p in range(lo, hi, SLAB):  # all products here [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = rows_of(p_work, o_t, o_p - begin, end, H * W, W)
                b_dq += tl.dot(b_pair, rows_of(p_kh, o_p, o_k, hi, H * DK, DK), input_precision=PREC)
            for i_p in range(lo, hi, SLAB):
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = columns_of(p_at, o_p, o_own, hi, H * W, W)  # B[L, R] transposed
                b_dkh -= tl.dot(b_pair, rows_of(p_dkh, o_p, o_k, hi, H * DK, DK), input_precision=PREC)
            for i_p in range(lo, hi, SLAB):
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = rows_of(p_work, o_t, o_p - begin + shift, end, H * W, W)
                b_dek += tl.dot(b_pair, rows_of(p_kh, o_p, o_k, hi, H * DK, DK), input_precision=PREC)
        else:
            for i_p in range(lo, hi, SLAB):
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = rows_of(p_work, o_t, o_p - begin, end, H * W, W)
                b_dkh += tl.dot(b_pair, rows_of(p_qt, o_p, o_k, hi, H * DK, DK), input_precision=PREC)
            for i_p in range(lo, hi, SLAB):
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = rows_of(p_work, o_t, o_p - begin + shift, end, H * W, W)
                b_ek = rows_of(p_k, o_p, o_k, hi, stride_k, DK) * tl.exp(decays_of(p_g, o_p, hi) - base)[:, None]
                b_dkh += tl.dot(b_pair, b_ek, input_precision=PREC)
            for i_p in range(lo, hi, SLAB):
                o_p = i_p + tl.arange(0, SLAB)
                b_pair = columns_of(p_at, o_p, o_own, hi, H * W, W)  # At[R, L] transposed
                b_dek -= tl.dot(b_pair, rows_of(p_dqt, o_p, o_k, hi, H * DK, DK), input_precision=PREC)
        store_rows(dqt_out + i_w * DK, b_dq, o_t, o_k, end, H * DK, DK)
        store_rows(dkh_out + i_w * DK, b_dkh, o_t, o_k, end, H * DK, DK)
        b_dke = b_gain[:, None] * b_dek
        b_from_ek += tl.sum(b_dke * rows_of(p_k, o_t, o_k, end, stride_k, DK), 1)
        store_rows(p_dke, b_dke + rows_of(p_dke, o_t, o_k, end, H * DK, DK), o_t, o_k, end, H * DK, DK)
    p_sum = sums + ((i_b - block_lo).to(tl.int64) * TILES + place) * H + i_h
    tl.store(p_sum, tl.sum(b_from_ek, 0))
    tl.store(p_sum + N_BLOCKS.to(tl.int64) * TILES * H, tl.sum(b_kept, 0))


@triton.jit(do_not_specialize=SIZES)
def transition_kernel(
    k,
    kh,  # [T, H, DK]
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK] out: R = Kh^T ek
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    kh -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + i_b)), tl.load(blocks + 4 * (block_lo + i_b) + 1)
    o_a = tl.program_id(2) // NK * BK + tl.arange(0, BK)
    o_b = tl.program_id(2) % NK * BK + tl.arange(0, BK)
    b_r = tl.zeros([BK, BK], tl.float32)
    for i_t in range(first, end, BT):
        o_t = i_t + tl.arange(0, BT)
        b_g = decays_of(cg + i_h * T, o_t, end)
        b_k = tl.exp(b_g)[:, None] * rows_of(k + i_h // GROUP * DK, o_t, o_b, end, (H // GROUP) * DK, DK)
        b_kh = columns_of(kh + i_h * DK, o_t, o_a, end, H * DK, DK)
        b_r = tl.dot(b_kh, b_k, b_r, input_precision=PREC)  # [BK, BT] @ [BT, BK] -> [BK, BK]
    p_r = r_matrix + (i_b.to(tl.int64) * H + i_h) * DK * DK + o_a[:, None] * DK + o_b[None, :]
    tl.store(p_r, b_r.to(r_matrix.dtype.element_ty), mask=(o_a < DK)[:, None] & (o_b < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def transition_backward_kernel(
    k, cg,
    kh,  # [T, H, DK] fp32: of blocks
    dphi,  # [blocks of the window, H, DK, DK]
    dkh,  # [T, H, DK] fp32, in place: dKh - ek dPhi^T
    dke,  # [T, H, DK] fp32 out: gradient of k from ek
    sums,  # [NK, blocks of the window, TILES, H] fp32 out: <dek, ek> of each tile
    tiles, tile_lo, block_lo, token_lo,
    T, H, GROUP,
    N_BLOCKS,  # of the window
    TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Through Phi = exp(cg_C) I - Kh^T ek of a block, but for exp(cg_C)."""
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_w = i_h - token_lo.to(tl.int64) * H
    first, end = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1)
    i_b, place = (tl.load(tiles + 4 * i_t + 2) - block_lo).to(tl.int64), tl.load(tiles + 4 * i_t + 3)
    o_t = first + tl.arange(0, BT)
    o_a = tl.program_id(2) * BK + tl.arange(0, BK)
    p_k, stride_k = k + i_h // GROUP * DK, (H // GROUP) * DK
    b_gain = tl.exp(decays_of(cg + i_h * T, o_t, end))[:, None]
    p_dphi = dphi + (i_b * H + i_h) * DK * DK
    b_dkh = rows_of(dkh + i_w * DK, o_t, o_a, end, H * DK, DK)
    b_dek = tl.zeros([BT, BK], tl.float32)
    for i_k in range(0, DK, BK):  # products [BT, BK] @ [BK, BK] -> [BT, BK]
        o_b = i_k + tl.arange(0, BK)
        b_k = b_gain * rows_of(p_k, o_t, o_b, end, stride_k, DK)
        b_dkh -= tl.dot(b_k, load_tile_t(p_dphi, o_a, o_b, DK, DK), input_precision=PREC)
        b_kh = rows_of(kh + i_w * DK, o_t, o_b, end, H * DK, DK)
        b_dek -= tl.dot(b_kh, load_tile(p_dphi, o_b, o_a, DK, DK), input_precision=PREC)
    store_rows(dkh + i_w * DK, b_dkh, o_t, o_a, end, H * DK, DK)
    b_dek *= b_gain
    store_rows(dke + i_w * DK, b_dek, o_t, o_a, end, H * DK, DK)
    total = tl.sum(tl.sum(b_dek * rows_of(p_k, o_t, o_a, end, stride_k, DK), 1), 0)
    tl.store(sums + ((tl.program_id(2) * N_BLOCKS.to(tl.int64) + i_b) * TILES + place) * H + i_h, total)


@triton.jit(do_not_specialize=SIZES)
def tile_decay_kernel(
    cg,  # [H, T]: in blocks
    dphi,  # [blocks of the window, H, DK, DK] fp32
    block_sums,  # [PARTS, blocks of the window, TILES, H] fp32, see `transition_backward_kernel`
    sums,  # [LEVELS, 2, blocks of the window, TILES, H] fp32, see `compose_backward_kernel`
    dkeep,  # [tiles of the window, H] fp32 out: gradient of the log of a tile's whole decay
    tiles, tile_lo, blocks, block_lo, T, H, N_BLOCKS,
    PARTS: tl.constexpr, LEVELS: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, DK: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """What a tile's decay gets: from its block's, from halves joined with its own, and from ek of later tiles."""
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1)
    i_b, place = tl.load(tiles + 4 * i_t + 2), tl.load(tiles + 4 * i_t + 3)
    begin, stop = tl.load(blocks + 4 * i_b), tl.load(blocks + 4 * i_b + 1)
    i_b -= block_lo
    size = N_BLOCKS.to(tl.int64) * TILES * H
    o_x = tl.arange(0, TILES)
    there = begin + o_x * BT < stop  # nothing was written for tiles without tokens
    o_sum = (i_b.to(tl.int64) * TILES + o_x) * H + i_h
    o_k = tl.arange(0, BK)
    p_diagonal = dphi + (i_b.to(tl.int64) * H + i_h) * DK * DK + o_k * (DK + 1)
    total = tl.sum(tl.load(p_diagonal, mask=o_k < DK, other=0.0), 0) * tl.exp(
        tl.load(cg + i_h.to(tl.int64) * T + stop - 1)
    )
    for part in tl.static_range(PARTS):
        total += tl.sum(tl.load(block_sums + part * size + o_sum, mask=there & (o_x > place), other=0.0), 0)
    for level in tl.static_range(LEVELS):
        b_half, mine = o_x >> level, place >> level
        p_sum = sums + 2 * level * size + o_sum
        total += tl.sum(tl.load(p_sum, mask=there & (b_half == mine) & (o_x > place), other=0.0), 0)
        total += tl.sum(tl.load(p_sum + size, mask=there & (b_half == (mine ^ 1)), other=0.0), 0)
    tl.store(dkeep + tl.program_id(0) * H + i_h, total)
