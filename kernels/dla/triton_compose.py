"""Gated DeltaNet: the arrays of a block of several tiles from those of its tiles, and their gradients.

With Kh, ek = exp(cg) K and keep = exp(cg_C) of each tile p, Qt of a tile passes the tiles before its own, the nearest
first, and Kh of a tile those after it:

    At[c, p] = Qt Kh_p^T    Qt <- keep_p Qt - At[c, p] ek_p        B[c, p] = Kh ek_p^T    Kh <- keep_p Kh - B[c, p] Kh_p

A block's R is Kh^T ek again, so that states, outputs and their gradients know blocks only. B is kept in the upper
triangle of At, which nothing else reads. Operands are rounded to `DOT` once for each product, as everywhere; Qt and Kh
are carried in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import decays_of, load_tile, load_tile_t, raw_columns, raw_rows, rows_of, store_rows


@triton.jit
def near(p_x, o_t, o_d, n, stride, D: tl.constexpr):
    """x[o_t, o_d], rows counted from a block's first token: pointers by 32-bit offsets take half the registers."""
    m_x = (o_t < n)[:, None]
    if tl.constexpr(D) % o_d.shape[0] > 0:
        m_x = m_x & (o_d < D)[None, :]
    return p_x + ((o_t * stride)[:, None] + o_d[None, :]), m_x


@triton.jit
def near_t(p_x, o_t, o_d, n, stride, D: tl.constexpr):
    """`near`, transposed."""
    m_x = (o_t < n)[None, :]
    if tl.constexpr(D) % o_d.shape[0] > 0:
        m_x = m_x & (o_d < D)[:, None]
    return p_x + (o_d[:, None] + (o_t * stride)[None, :]), m_x


@triton.jit
def load_near(p_x, o_t, o_d, n, stride, D: tl.constexpr):
    p_cell, m_cell = near(p_x, o_t, o_d, n, stride, D)
    return tl.load(p_cell, mask=m_cell, other=0.0)


@triton.jit
def load_near_t(p_x, o_t, o_d, n, stride, D: tl.constexpr):
    p_cell, m_cell = near_t(p_x, o_t, o_d, n, stride, D)
    return tl.load(p_cell, mask=m_cell, other=0.0)


@triton.jit
def store_near(p_x, b_x, o_t, o_d, n, stride, D: tl.constexpr):
    p_cell, m_cell = near(p_x, o_t, o_d, n, stride, D)
    tl.store(p_cell, b_x.to(p_x.dtype.element_ty), mask=m_cell)


@triton.jit(do_not_specialize=SIZES)
def compose_kernel(
    k,  # [T, G, DK]
    cg,  # [H, T]: in tiles
    x,  # [T, H, DK]: Qt of each tile (KEYS: Kh)
    kh,  # [T, H, DK]: Kh of each tile
    at,  # [T, H, TILES * BT] out: At of each block below its diagonal (KEYS: B, above it)
    x_out,  # [T, H, DK] out: Qt (KEYS: Kh) of each block
    passing,  # [T, H, TILES - 2, DK] out: x where it comes to each tile but the next one (SAVE)
    tiles,  # [n, 4], see `BlockLayout`
    tile_lo,
    blocks,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    KEYS: tl.constexpr, SAVE: tl.constexpr, TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr,
    BH: tl.constexpr,  # key dims after the first BK, in tiles of their own; 0: none
    BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = TILES * BT
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, place = tl.load(tiles + 4 * i_t + 2), tl.load(tiles + 4 * i_t + 3)
    begin, stop = tl.load(blocks + 4 * i_b), tl.load(blocks + 4 * i_b + 1)
    n, stride_k = stop - begin, (H // GROUP) * DK
    i_w = (begin - token_lo).to(tl.int64) * H + i_h  # all pointers are to the block's first token
    p_g, p_k = cg + i_h * T + begin, k + begin.to(tl.int64) * stride_k + i_h // GROUP * DK
    p_at, p_kh = at + i_w * W, kh + i_w * DK
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    o_t, stride = place * BT + o_i, H * DK
    b_x = load_near(x + i_w * DK, o_t, o_k, n, stride, DK).to(tl.float32)
    if BH > 0:
        o_h = BK + tl.arange(0, BH)
        b_h = load_near(x + i_w * DK, o_t, o_h, n, stride, DK).to(tl.float32)
    p_y, p_z, stride_y, stride_z = (p_k, p_kh, stride_k, stride) if KEYS else (p_kh, p_k, stride, stride_k)
    steps = (n + BT - 1) // BT - 1 - place if KEYS else place
    for i in range(steps):
        i_p = place + 1 + i if KEYS else place - 1 - i
        o_p = i_p * BT + o_i
        last = tl.minimum((i_p + 1) * BT, n) - 1
        b_gain, keep = tl.exp(tl.load(p_g + tl.minimum(o_p, last))), tl.exp(tl.load(p_g + last))
        b_dot = b_x.to(DOT)
        p_x = passing + (i_w * (TILES - 2) + (i_p - 2 if KEYS else i_p)) * DK
        if SAVE and i > 0:  # to the next tile comes `x` itself
            store_near(p_x, b_dot, o_t, o_k, n, stride * (TILES - 2), DK)
        # [BT, BK] @ [BK, BT] -> [BT, BT]
        b_pair = tl.dot(b_dot, load_near_t(p_y, o_p, o_k, n, stride_y, DK).to(DOT), input_precision=PREC)
        if BH > 0:
            b_dot_h = b_h.to(DOT)
            if SAVE and i > 0:
                store_near(p_x, b_dot_h, o_t, o_h, n, stride * (TILES - 2), DK)
            b_y = load_near_t(p_y, o_p, o_h, n, stride_y, DK)
            b_pair = tl.dot(b_dot_h, b_y.to(DOT), b_pair, input_precision=PREC)  # [BT, BH] @ [BH, BT] -> [BT, BT]
        b_scaled = b_pair * b_gain[None, :]
        store_near(p_at, b_scaled if KEYS else b_pair, o_t, o_p, n, H * W, W)
        b_step = -b_scaled.to(DOT)
        b_z = load_near(p_z, o_p, o_k, n, stride_z, DK)
        b_x = tl.dot(b_step, b_z.to(DOT), keep * b_x, input_precision=PREC)  # [BT, BT] @ [BT, BK] -> [BT, BK]
        if BH > 0:
            b_z = load_near(p_z, o_p, o_h, n, stride_z, DK)
            b_h = tl.dot(b_step, b_z.to(DOT), keep * b_h, input_precision=PREC)  # [BT, BT] @ [BT, BH] -> [BT, BH]
    store_near(x_out + i_w * DK, b_x, o_t, o_k, n, stride, DK)
    if BH > 0:
        store_near(x_out + i_w * DK, b_h, o_t, o_h, n, stride, DK)


@triton.jit(do_not_specialize=SIZES)
def compose_backward_kernel(
    k, cg,
    kh,  # [T, H, DK]: Kh of each tile
    at,  # [T, H, TILES * BT]
    dat,  # same shape: dAt of each block below its diagonal (not KEYS)
    pairs,  # [T, H, BT] scratch: gradient of At[c, p] (KEYS: of Kh k_p^T) for each c that passes a tile
    x, passing,  # [T, H, DK] and [T, H, TILES - 2, DK], see `compose_kernel`
    dx,  # [T, H, DK], in place: from dQt (KEYS: dKh) of each block to that of each tile
    dkh, dke,  # [T, H, DK], in place: with what the others passing a tile add; dke: gradient of k from ek
    sums,  # [blocks of the window, TILES, H] fp32 out: <dx after a tile, x before it> of all that pass
    blocks, block_lo, token_lo,
    T, H, GROUP,
    KEYS: tl.constexpr, TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Back from the last tile passed to the first; a program has all that pass, so it adds up what a tile gets."""
    W: tl.constexpr = TILES * BT
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, stop = tl.load(blocks + 4 * (block_lo + i_b)), tl.load(blocks + 4 * (block_lo + i_b) + 1)
    n, stride_k = stop - begin, (H // GROUP) * DK
    i_w = (begin - token_lo).to(tl.int64) * H + i_h  # all pointers are to the block's first token
    p_g, p_k = cg + i_h * T + begin, k + begin.to(tl.int64) * stride_k + i_h // GROUP * DK
    p_at, p_dat, p_pairs = at + i_w * W, dat + i_w * W, pairs + i_w * BT
    p_kh, p_dx = kh + i_w * DK, dx + i_w * DK
    p_dkh, p_dke, stride = dkh + i_w * DK, dke + i_w * DK, H * DK
    p_y, p_z, stride_y, stride_z = (p_kh, p_k, stride, stride_k) if KEYS else (p_k, p_kh, stride_k, stride)
    o_i = tl.arange(0, BT)
    n_tiles = (n + BT - 1) // BT
    for step in range(n_tiles):
        passers = n_tiles - 1 - step
        i_p = passers if KEYS else step
        o_p = i_p * BT + o_i
        last = tl.minimum((i_p + 1) * BT, n) - 1
        b_gain, keep = tl.exp(tl.load(p_g + tl.minimum(o_p, last))), tl.exp(tl.load(p_g + last))
        for i in range(passers):
            o_c = (i if KEYS else i_p + 1 + i) * BT + o_i
            b_pair = tl.zeros([BT, BT], tl.float32)
            for i_k in range(0, DK, BK):
                o_k = i_k + tl.arange(0, BK)
                b_dx = load_near(p_dx, o_c, o_k, n, stride, DK)
                b_y = load_near_t(p_y, o_p, o_k, n, stride_y, DK)
                # [BT, BK] @ [BK, BT] -> [BT, BT]
                b_pair = tl.dot(b_dx.to(DOT), b_y.to(DOT), b_pair, input_precision=PREC)
            b_pair *= -b_gain[None, :]
            if not KEYS:
                b_pair += load_near(p_dat, o_c, o_p, n, H * W, W).to(tl.float32)
            store_near(p_pairs, b_pair, o_c, o_i, n, H * BT, BT)
        tl.debug_barrier()  # what follows reads what other threads wrote
        p_x = passing + (i_w * (TILES - 2) + (i_p - 2 if KEYS else i_p)) * DK
        kept = tl.zeros([], tl.float32)  # a number: [BT] of them would take more registers
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            b_z = load_near(p_z, o_p, o_k, n, stride_z, DK).to(DOT)
            b_through, b_past = tl.zeros([BT, BK], tl.float32), tl.zeros([BT, BK], tl.float32)
            for i in range(passers):  # all products here [BT, BT] @ [BT, BK] -> [BT, BK]
                o_c = (i if KEYS else i_p + 1 + i) * BT + o_i
                own = (i == passers - 1) if KEYS else (i == 0)  # it comes from the tile beside this one
                p_from, every = tl.where(own, x + i_w * DK, p_x), tl.where(own, stride, stride * (TILES - 2))
                b_x = load_near(p_from, o_c, o_k, n, every, DK)
                b_pair = load_near_t(p_pairs, o_c, o_i, n, H * BT, BT)
                if KEYS:  # its dx has four bytes: in the other order both would spill
                    b_through = tl.dot(b_pair, b_x, b_through, input_precision=PREC)
                b_dx = load_near(p_dx, o_c, o_k, n, stride, DK)
                kept += tl.sum(tl.sum(b_dx.to(tl.float32) * b_x.to(tl.float32), 1), 0)
                b_at = load_near_t(p_at, o_c, o_p, n, H * W, W)
                b_past = tl.dot(b_at, b_dx.to(DOT), b_past, input_precision=PREC)
                if not KEYS:
                    b_through = tl.dot(b_pair, b_x, b_through, input_precision=PREC)
                b_pair = load_near(p_pairs, o_c, o_i, n, H * BT, BT)
                b_dx = tl.dot(b_pair, b_z, keep * b_dx.to(tl.float32), input_precision=PREC)
                store_near(p_dx, b_dx, o_c, o_k, n, stride, DK)
            b_dkh = -b_past if KEYS else b_through
            b_dke = b_through if KEYS else -b_gain[:, None] * b_past
            tl.debug_barrier()  # dKh may be dx, which other threads wrote
            b_dkh += load_near(p_dkh, o_p, o_k, n, stride, DK).to(tl.float32)
            store_near(p_dkh, b_dkh, o_p, o_k, n, stride, DK)
            b_dke += load_near(p_dke, o_p, o_k, n, stride, DK).to(tl.float32)
            store_near(p_dke, b_dke, o_p, o_k, n, stride, DK)
        tl.store(sums + (i_b.to(tl.int64) * TILES + i_p) * H + i_h, keep * kept)
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def transition_kernel(
    k,
    kh,  # [T, H, DK]
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK] out: R = Kh^T ek
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
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
        b_kh = raw_columns(kh + i_h * DK, o_t, o_a, end, H * DK, DK)
        b_r = tl.dot(b_kh, b_k.to(DOT), b_r, input_precision=PREC)  # [BK, BT] @ [BT, BK] -> [BK, BK]
    p_r = r_matrix + (i_b.to(tl.int64) * H + i_h) * DK * DK + o_a[:, None] * DK + o_b[None, :]
    tl.store(p_r, b_r.to(r_matrix.dtype.element_ty), mask=(o_a < DK)[:, None] & (o_b < DK)[None, :])


@triton.jit
def through_transition(
    b_dkh, b_dek,  # [BT, len(o_a)], in: what other key dims gave
    p_k,  # [T, G, DK], at the head, as all pointers are
    p_kh,  # [T, H, DK]: of blocks
    p_dphi,  # [DK, DK], of the block
    b_gain,  # exp(cg) [BT, 1], in the block
    o_t, o_a, low, end, stride_k, stride_kh, DK: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What the BK key dims from `low` on give dKh and dek through Phi = exp(cg_C) I - Kh^T ek of a block."""
    o_b = low + tl.arange(0, BK)
    b_k = b_gain * rows_of(p_k, o_t, o_b, end, stride_k, DK)
    # products [BT, BK] @ [BK, len(o_a)] -> [BT, len(o_a)]
    b_dkh -= tl.dot(b_k.to(DOT), load_tile_t(p_dphi, o_a, o_b, DK, DK), input_precision=PREC)
    b_kh = raw_rows(p_kh, o_t, o_b, end, stride_kh, DK)
    b_dek -= tl.dot(b_kh, load_tile(p_dphi, o_b, o_a, DK, DK), input_precision=PREC)
    return b_dkh, b_dek


@triton.jit(do_not_specialize=SIZES)
def transition_backward_kernel(
    k, cg,
    kh,  # [T, H, DK]: of blocks
    dphi,  # [blocks of the window, H, DK, DK]
    dkh,  # [T, H, DK] fp32, in place: dKh - ek dPhi^T
    dke,  # [T, H, DK] fp32 out: gradient of k from ek
    sums,  # [NK, blocks of the window, TILES, H] fp32 out: <dek, ek> of each tile
    tiles, tile_lo, block_lo, token_lo,
    T, H, GROUP,
    N_BLOCKS,  # of the window
    TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dKh and dek through a block's Phi, where `token_gradient_kernel` does not do it: BK dims of them a program."""
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
    for i_k in range(0, DK, BK):
        b_dkh, b_dek = through_transition(
            b_dkh, b_dek, p_k, kh + i_w * DK, p_dphi, b_gain, o_t, o_a, i_k, end, stride_k, H * DK, DK, BK, DOT, PREC
        )
    store_rows(dkh + i_w * DK, b_dkh, o_t, o_a, end, H * DK, DK)
    b_dek *= b_gain
    store_rows(dke + i_w * DK, b_dek, o_t, o_a, end, H * DK, DK)
    # over both axes at once, as in `token_gradient_kernel`
    total = tl.sum(b_dek * rows_of(p_k, o_t, o_a, end, stride_k, DK))
    tl.store(sums + ((tl.program_id(2) * N_BLOCKS.to(tl.int64) + i_b) * TILES + place) * H + i_h, total)


@triton.jit(do_not_specialize=SIZES)
def tile_decay_kernel(
    cg,  # [H, T]: in blocks
    trace,  # [TRACES, blocks of the window, H] fp32: parts of tr dPhi
    block_sums,  # [PARTS, blocks of the window, TILES, H] fp32, see `transition_backward_kernel`
    sums,  # [2, blocks of the window, TILES, H] fp32, see `compose_backward_kernel`
    dkeep,  # [tiles of the window, H] fp32 out: gradient of the log of a tile's whole decay
    tiles, tile_lo, blocks, block_lo, T, H, N_BLOCKS,
    PARTS: tl.constexpr, TRACES: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """What a tile's decay gets: from its block's, from what passes it, and from the block's ek of later tiles."""
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1)
    i_b, place = tl.load(tiles + 4 * i_t + 2), tl.load(tiles + 4 * i_t + 3)
    begin, stop = tl.load(blocks + 4 * i_b), tl.load(blocks + 4 * i_b + 1)
    i_b -= block_lo
    size = N_BLOCKS.to(tl.int64) * TILES * H
    o_x = tl.arange(0, TILES)
    there = begin + o_x * BT < stop  # nothing was written for tiles without tokens
    o_sum = (i_b.to(tl.int64) * TILES + o_x) * H + i_h
    total = tl.zeros([], tl.float32)
    for part in tl.static_range(TRACES):
        total += tl.load(trace + (part * N_BLOCKS.to(tl.int64) + i_b) * H + i_h)
    total *= tl.exp(tl.load(cg + i_h.to(tl.int64) * T + stop - 1))
    for part in tl.static_range(PARTS):
        total += tl.sum(tl.load(block_sums + part * size + o_sum, mask=there & (o_x > place), other=0.0), 0)
    p_sum = sums + (i_b.to(tl.int64) * TILES + place) * H + i_h
    total += tl.load(p_sum) + tl.load(p_sum + size)
    tl.store(dkeep + tl.program_id(0) * H + i_h, total)
