"""Chunk-local stage of Gated DeltaNet: slot-independent arrays of each tile of C tokens, and their gradient.

With D[t,j] = exp(cg_t - cg_j), gram = stril(K K^T .* D), inv = (I + diag(beta) gram)^-1, B = inv diag(beta),
QK = tril(Q K^T .* D), ek = exp(cg) K, ck = exp(cg_C - cg) K:

    At = QK B    Qt = exp(cg) Q - At ek    Kh = B^T ck    Phi = exp(cg_C) I - R,  R = Kh^T ek

`triton_compose.py` makes those of a block of several tiles from them.

This stage is a few percent of the FLOPs and everything else builds on it, so it is computed as in fp32; what leaves it,
At, Qt and Kh, has the dtype of the operands that it becomes. Where the gradient needs a transposed product it is formed
transposed from the start: storing the transpose of a matrix-unit result is miscompiled on Hopper by Triton 3.4 - 3.6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_scan import slots_opened
from .triton_tiles import (
    columns_of,
    decays_of,
    exact_dot,
    load_tile,
    load_tile_t,
    products,
    raw_columns,
    raw_rows,
    rows_of,
    slots_wanted,
    store_rows,
)


@triton.jit
def decay_tile(b_gt, b_gp, o_t, o_p, STRICT: tl.constexpr):
    """exp(b_gt[t] - b_gp[p]) where p <= t (p < t if STRICT), else 0; masked before exp, which could overflow."""
    causal = (o_p[None, :] < o_t[:, None]) if STRICT else (o_p[None, :] <= o_t[:, None])
    return tl.exp(tl.where(causal, b_gt[:, None] - b_gp[None, :], float("-inf")))


@triton.jit
def eliminate(p_x, n, stride, HALF: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr):
    """Diagonal blocks of twice HALF rows, in place: [[A, 0], [L, D]]^-1 = [[A', 0], [-D' L A', D']]."""
    o_m = tl.arange(0, HALF)
    for i_p in range(BT // (2 * HALF)):
        o_a = 2 * i_p * HALF + o_m
        o_d = o_a + HALF
        b_d, b_l = rows_of(p_x, o_d, o_d, n, stride, BT), rows_of(p_x, o_d, o_a, n, stride, BT)
        b_step = tl.dot(b_d, b_l, input_precision=PREC)  # all products here [HALF, HALF] @ [HALF, HALF]
        b_step = tl.dot(b_step, rows_of(p_x, o_a, o_a, n, stride, BT), input_precision=PREC)
        tl.debug_barrier()  # every thread has read L
        p_l = p_x + o_d.to(tl.int64)[:, None] * stride + o_a[None, :]
        tl.store(p_l, -b_step, mask=(o_d < n)[:, None] & (o_m >= 0)[None, :])
    tl.debug_barrier()


@triton.jit
def invert(p_inv, b_lower, n, stride, BT: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr, PREC: tl.constexpr):
    """(I + b_lower)^-1 of a strictly lower triangular [BT, BT], to memory: of n rows, `stride` apart."""
    o_i = tl.arange(0, BT)
    # diagonal blocks [BT / SUB, SUB, SUB] through memory: registers hold them in the wrong arrangement
    store_rows(p_inv, b_lower, o_i, o_i, n, stride, BT)
    tl.debug_barrier()
    o_r = tl.arange(0, SUB)
    o_row = (tl.arange(0, BT // SUB) * SUB)[:, None, None] + o_r[None, :, None]
    o_small = o_row.to(tl.int64) * stride + (tl.arange(0, BT // SUB) * SUB)[:, None, None] + o_r[None, None, :]
    m_small = (o_row < n) & (o_r >= 0)[None, None, :]
    b_x = tl.load(p_inv + o_small, mask=m_small, other=0.0)
    b_solved = tl.where(o_r[None, :, None] == o_r[None, None, :], 1.0, 0.0)
    b_solved = b_solved + tl.zeros([BT // SUB, SUB, SUB], tl.float32)
    for i_r in range(1, SUB):
        b_row = tl.sum(tl.where(o_r[None, :, None] == i_r, b_x, 0.0), 1)  # this row of every block: [BT / SUB, SUB]
        b_change = tl.sum(b_row[:, :, None] * b_solved, 1)
        b_solved = tl.where(o_r[None, :, None] == i_r, b_solved - b_change[:, None, :], b_solved)
    tl.debug_barrier()
    tl.store(p_inv + o_small, b_solved, mask=m_small)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        eliminate(p_inv, n, stride, SUB << level, BT, PREC)


@triton.jit(do_not_specialize=SIZES)
def inverse_kernel(
    k,  # [T, G, DK]
    beta,  # [T, H]
    cg,  # [H, T]
    inv,  # [T, H, BT] fp32 out (scratch on the way)
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    SUB: tl.constexpr,  # rows inverted by substitution
    LEVELS: tl.constexpr,  # log2(BT / SUB), block elimination from there
    PREC: tl.constexpr,
):  # fmt: skip
    i_t, i_h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * BT
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_gram = products(k + i_h // GROUP * DK, k + i_h // GROUP * DK, o_t, end, (H // GROUP) * DK, DK, BK, BT, PREC)
    b_lower = b_beta[:, None] * b_gram * decay_tile(b_g, b_g, o_t, o_t, True)
    b_lower = tl.where((o_t < end)[:, None], b_lower, 0.0)
    p_inv = inv + (first.to(tl.int64) * H + i_h) * BT
    invert(p_inv, b_lower, end - first, H * BT, BT, SUB, LEVELS, PREC)


@triton.jit(do_not_specialize=SIZES)
def local_forward_kernel(
    q,  # [T, G, DK]
    k,
    beta,  # [T, H]
    cg,  # [H, T]
    inv,  # [T, H, BT]
    at,  # [T, H, TILES * BT] out: At of each tile, on the diagonal of its block's
    qt,  # [T, H, DK] out
    kh,  # [T, H, DK] out
    tiles, tile_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = TILES * BT
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_w, i_g, stride = i_h - token_lo.to(tl.int64) * H, i_h // GROUP, (H // GROUP) * DK
    p_q, p_k, p_inv = q + i_g * DK, k + i_g * DK, inv + i_w * BT
    first, end, place = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1), tl.load(tiles + 4 * i_t + 3)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_gain = tl.exp(b_g)
    b_to_end = tl.where(o_t < end, tl.exp(tl.load(cg + i_h * T + end - 1) - b_g), 0.0)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_qk = products(p_q, p_k, o_t, end, stride, DK, BK, BT, PREC) * decay_tile(b_g, b_g, o_t, o_t, False)
    b_b = rows_of(p_inv, o_t, o_i, end, H * BT, BT) * b_beta[None, :]
    b_at = tl.dot(b_qk, b_b, input_precision=PREC)  # [BT, BT] @ [BT, BT] -> [BT, BT]
    store_rows(at + i_w * W, b_at, o_t, place * BT + o_i, end, H * W, W)
    b_at *= -b_gain[None, :]
    b_inv = columns_of(p_inv, o_t, o_i, end, H * BT, BT) * b_to_end[None, :]
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = raw_rows(p_k, o_t, o_k, end, stride, DK).to(DOT)
        b_kh = exact_dot(b_inv, b_k, tl.zeros([BT, BK], tl.float32), PREC)  # [BT, BT] @ [BT, BK] -> [BT, BK]
        store_rows(kh + i_w * DK, b_beta[:, None] * b_kh, o_t, o_k, end, H * DK, DK)
        b_q = b_gain[:, None] * rows_of(p_q, o_t, o_k, end, stride, DK)
        b_q = exact_dot(b_at, b_k, b_q, PREC)  # [BT, BT] @ [BT, BK] -> [BT, BK]
        store_rows(qt + i_w * DK, b_q, o_t, o_k, end, H * DK, DK)


@triton.jit(do_not_specialize=SIZES)
def dphi_kernel(
    snap,  # [rows of the window, H, K, DK, DV]
    grad,  # same shape: D at each row
    live_pos, live_death, live_count, blocks,
    dphi,  # [blocks of the window, H, DK, DK] out
    trace,  # [NK, blocks of the window, H] fp32 out: parts of tr dPhi
    H, K, block_lo, row_lo,
    N_BLOCKS,  # of the window
    HAS_INCOMING: tl.constexpr,  # else D is zero after a segment's last block, and not there
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dPhi = sum_i D_{map(i)} S_i^T over the slots inherited by the block."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_b, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_t = block_lo + i_b
    row, _, end, m, _, i_to = slots_opened(live_pos, live_count, blocks, i_t, i_h, H, K, KP)
    o_a = tl.program_id(2) // NK * BK + tl.arange(0, BK)
    o_b = tl.program_id(2) % NK * BK + tl.arange(0, BK)
    o_death = (row.to(tl.int64) * H + i_h) * K
    p_s = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
    p_ds = grad + ((row + 1 - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
    b_dphi = tl.zeros([BK, BK], tl.float32)
    for i_s in range(slots_wanted(blocks, i_t, m, HAS_INCOMING)):
        for i_v in range(0, DV, BV):
            o_v = i_v + tl.arange(0, BV)
            b_ds = load_tile(p_ds + tl.minimum(i_to, K - 1).to(tl.int64) * DK * DV, o_a, o_v, DK, DV)
            b_s = load_tile_t(p_s + tl.cast(i_s, tl.int64) * DK * DV, o_b, o_v, DK, DV)
            b_dphi = tl.dot(b_ds, b_s, b_dphi, input_precision=PREC)  # [BK, BV] @ [BV, BK] -> [BK, BK]
        i_to += (tl.load(live_death + o_death + i_s) >= end).to(tl.int32)
    p_dphi = dphi + (i_b.to(tl.int64) * H + i_h) * DK * DK
    m_dphi = (o_a < DK)[:, None] & (o_b < DK)[None, :]
    tl.store(p_dphi + o_a[:, None] * DK + o_b[None, :], b_dphi.to(dphi.dtype.element_ty), mask=m_dphi)
    if tl.program_id(2) // NK == tl.program_id(2) % NK:
        diagonal = tl.sum(tl.sum(tl.where(o_a[:, None] == o_b[None, :], b_dphi, 0.0), 1), 0)
        tl.store(trace + (tl.program_id(2) % NK * N_BLOCKS.to(tl.int64) + i_b) * H + i_h, diagonal)


@triton.jit(do_not_specialize=SIZES)
def local_pairs_kernel(
    q, k, beta, cg,
    inv,  # [T, H, BT]
    dat,  # [T, H, BT] fp32: dAt of each tile
    dqt,  # [T, H, DK]
    dkh,  # [T, H, DK] fp32
    dqk,  # [T, H, BT] fp32 out: (dQK .* D)^T, row = key
    db,  # [T, H, BT] fp32 out: dB^T
    dcg,  # [H, T] fp32 out: part of the decay gradient
    tiles, tile_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dQK and dB from dAt, dQt and dKh, transposed."""
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_w, i_g, stride = i_h - token_lo.to(tl.int64) * H, i_h // GROUP, (H // GROUP) * DK
    p_q, p_k = q + i_g * DK, k + i_g * DK
    first, end = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_to_end = tl.where(o_t < end, tl.exp(tl.load(cg + i_h * T + end - 1) - b_g), 0.0)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    upper = (o_i[:, None] <= o_i[None, :]) & (o_t < end)[None, :]
    b_dat, b_db = tl.zeros([BT, BT], tl.float32), tl.zeros([BT, BT], tl.float32)  # [l, s], [l, t]
    for i_k in range(0, DK, BK):  # [BT, BK] @ [BK, BT] -> [BT, BT]
        o_k = i_k + tl.arange(0, BK)
        b_k = raw_rows(p_k, o_t, o_k, end, stride, DK).to(DOT)
        b_dqt = raw_columns(dqt + i_w * DK, o_t, o_k, end, H * DK, DK)
        b_dat = tl.dot(b_k, b_dqt, b_dat, input_precision=PREC)
        b_k = raw_columns(p_k, o_t, o_k, end, stride, DK).to(DOT)
        b_db = exact_dot(raw_rows(dkh + i_w * DK, o_t, o_k, end, H * DK, DK), b_k, b_db, PREC)
    b_dat = columns_of(dat + i_w * BT, o_t, o_i, end, H * BT, BT) - tl.exp(b_g)[:, None] * b_dat
    b_dat = tl.where(upper, b_dat, 0.0)
    b_qk = products(p_q, p_k, o_t, end, stride, DK, BK, BT, PREC) * decay_tile(b_g, b_g, o_t, o_t, False)
    # [BT, BT] @ [BT, BT] -> [BT, BT], here and below
    b_db = tl.dot(b_dat, b_qk, b_db * b_to_end[None, :], input_precision=PREC)
    store_rows(db + i_w * BT, tl.where(upper, b_db, 0.0), o_t, o_i, end, H * BT, BT)
    b_b = rows_of(inv + i_w * BT, o_t, o_i, end, H * BT, BT) * b_beta[None, :]
    b_dqk = tl.dot(b_b, b_dat, input_precision=PREC)
    b_dqk *= tl.exp(tl.where(upper, b_g[None, :] - b_g[:, None], float("-inf")))  # the transposed pair's decay
    store_rows(dqk + i_w * BT, b_dqk, o_t, o_i, end, H * BT, BT)
    b_pairs = b_dqk * products(p_k, p_q, o_t, end, stride, DK, BK, BT, PREC)
    tl.store(dcg + i_h * T + o_t, tl.sum(b_pairs, 0) - tl.sum(b_pairs, 1), mask=o_t < end)


@triton.jit(do_not_specialize=SIZES)
def local_inverse_backward_kernel(
    k, beta, cg,
    inv,  # [T, H, BT]
    db,  # [T, H, BT] fp32 in: dB^T; out: dgram^T, row = key
    dcg,  # [H, T] fp32 out: part of the decay gradient
    dbeta,  # [T, H] out
    tiles, tile_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Through B = inv diag(beta): dL = -stril(inv^T (dB diag(beta)) inv^T), transposed throughout."""
    i_t, i_h = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_w, stride = i_h - token_lo.to(tl.int64) * H, (H // GROUP) * DK
    p_k, p_inv, p_db = k + i_h // GROUP * DK, inv + i_w * BT, db + i_w * BT
    first, end = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_db = rows_of(p_db, o_t, o_i, end, H * BT, BT)
    b_dbeta = tl.sum(b_db * columns_of(p_inv, o_t, o_i, end, H * BT, BT), 1)
    b_inv = rows_of(p_inv, o_t, o_i, end, H * BT, BT)
    b_step = tl.dot(b_inv, b_beta[:, None] * b_db, input_precision=PREC)  # [BT, BT] @ [BT, BT] -> [BT, BT]
    b_dl = -tl.dot(b_step, b_inv, input_precision=PREC)  # [BT, BT] @ [BT, BT] -> [BT, BT]
    later = (o_i[:, None] < o_i[None, :]) & (o_t < end)[None, :]
    b_dl *= tl.exp(tl.where(later, b_g[None, :] - b_g[:, None], float("-inf")))
    b_pairs = b_dl * products(p_k, p_k, o_t, end, stride, DK, BK, BT, PREC)
    b_dbeta += tl.sum(b_pairs, 0)
    b_pairs *= b_beta[None, :]
    tl.debug_barrier()  # every thread has read dB
    store_rows(p_db, b_dl * b_beta[None, :], o_t, o_i, end, H * BT, BT)
    tl.store(dcg + i_h * T + o_t, tl.sum(b_pairs, 0) - tl.sum(b_pairs, 1), mask=o_t < end)
    tl.store(dbeta + o_t.to(tl.int64) * H + i_h, b_dbeta.to(dbeta.dtype.element_ty), mask=o_t < end)


@triton.jit(do_not_specialize=SIZES)
def local_gradient_kernel(
    q, k, beta, cg, inv,
    at,  # [T, H, TILES * BT]
    dqk, dgram,  # [T, H, BT] fp32, see the kernels before
    dqt,  # [T, H, DK]
    dkh,  # [T, H, DK] fp32
    dke,  # [T, H, DK]: gradient of k from ek, but for At and Qt
    dq, dk,  # [T, H, DK] out
    dcg,  # [NK, H, T] fp32 out: part of the decay gradient
    ends,  # [NK, H, T] fp32 out: what the tile's last decay gets and the token's own loses
    tiles, tile_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    TILES: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq and dk of each head, BK key dims a program. All products [BT, BT] @ [BT, BK] -> [BT, BK]."""
    W: tl.constexpr = TILES * BT
    i_t, i_h, i_k = tile_lo + tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_w, stride = i_h - token_lo.to(tl.int64) * H, (H // GROUP) * DK
    p_dqk, p_dgram = dqk + i_w * BT, dgram + i_w * BT
    first, end, place = tl.load(tiles + 4 * i_t), tl.load(tiles + 4 * i_t + 1), tl.load(tiles + 4 * i_t + 3)
    o_i = tl.arange(0, BT)
    o_t, o_k = first + o_i, i_k * BK + tl.arange(0, BK)
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_gain = tl.exp(b_g)[:, None]
    b_to_end = tl.where(o_t < end, tl.exp(tl.load(cg + i_h * T + end - 1) - b_g), 0.0)[:, None]
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_q = raw_rows(q + i_h // GROUP * DK, o_t, o_k, end, stride, DK).to(DOT)
    b_k = raw_rows(k + i_h // GROUP * DK, o_t, o_k, end, stride, DK).to(DOT)
    b_dqt = raw_rows(dqt + i_w * DK, o_t, o_k, end, H * DK, DK)
    b_dq = b_gain * b_dqt.to(tl.float32)
    b_dcg = tl.sum(b_dq * b_q.to(tl.float32), 1)
    b_dq = exact_dot(raw_columns(p_dqk, o_t, o_i, end, H * BT, BT), b_k, b_dq, PREC)
    store_rows(dq + i_h * DK, b_dq, o_t, o_k, end, H * DK, DK)
    b_b = rows_of(inv + i_w * BT, o_t, o_i, end, H * BT, BT) * b_beta[None, :]
    b_dkh = raw_rows(dkh + i_w * DK, o_t, o_k, end, H * DK, DK)
    b_dk = b_to_end * tl.dot(b_b, b_dkh, input_precision=PREC)
    o_dg = (i_k * H + i_h) * T + o_t
    tl.store(ends + o_dg, tl.sum(b_dk * b_k.to(tl.float32), 1), mask=o_t < end)
    b_at = raw_columns(at + i_w * W + place * BT, o_t, o_i, end, H * W, BT)
    b_dek = rows_of(dke + i_w * DK, o_t, o_k, end, H * DK, DK) - b_gain * tl.dot(b_at, b_dqt, input_precision=PREC)
    tl.store(dcg + o_dg, b_dcg + tl.sum(b_dek * b_k.to(tl.float32), 1), mask=o_t < end)
    b_dk = exact_dot(raw_rows(p_dqk, o_t, o_i, end, H * BT, BT), b_q, b_dk + b_dek, PREC)
    b_pair = raw_rows(p_dgram, o_t, o_i, end, H * BT, BT) + raw_columns(p_dgram, o_t, o_i, end, H * BT, BT)
    b_dk = exact_dot(b_pair, b_k, b_dk, PREC)
    store_rows(dk + i_h * DK, b_dk, o_t, o_k, end, H * DK, DK)
