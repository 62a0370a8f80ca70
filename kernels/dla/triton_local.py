"""Chunk-local stage of Gated DeltaNet: slot-independent arrays of each tile of C tokens, and their gradient.

With D[t,j] = exp(cg_t - cg_j), gram = stril(K K^T .* D), inv = (I + diag(beta) gram)^-1, B = inv diag(beta),
QK = tril(Q K^T .* D), ek = exp(cg) K, ck = exp(cg_C - cg) K:

    At = QK B    Qt = exp(cg) Q - At ek    Kh = B^T ck    Phi = exp(cg_C) I - R,  R = Kh^T ek

`triton_compose.py` makes those of a block of several tiles from them. `blocks` is here the table of tiles.

This stage is a few percent of the FLOPs and everything else builds on it, so it is computed as in fp32. Where the
gradient needs a transposed product it is formed transposed from the start: storing the transpose of a matrix-unit
result is miscompiled on Hopper by Triton 3.4 - 3.6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_scan import slots_opened
from .triton_tiles import columns_of, decays_of, load_tile, load_tile_t, products, rows_of


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
    o_inv = o_i.to(tl.int64)[:, None] * H * BT + o_i[None, :]
    m_inv = (o_t < end)[:, None] & (o_i >= 0)[None, :]
    # diagonal blocks [BT / SUB, SUB, SUB] through memory: registers hold them in the wrong arrangement
    tl.store(p_inv + o_inv, b_lower, mask=m_inv)
    tl.debug_barrier()
    o_s = tl.arange(0, BT // SUB)
    o_r = tl.arange(0, SUB)
    o_row = o_s[:, None, None] * SUB + o_r[None, :, None]
    o_small = o_row.to(tl.int64) * H * BT + o_s[:, None, None] * SUB + o_r[None, None, :]
    m_small = (first + o_row < end) & (o_r >= 0)[None, None, :]
    b_x = tl.load(p_inv + o_small, mask=m_small, other=0.0)
    b_solved = tl.where(o_r[None, :, None] == o_r[None, None, :], 1.0, 0.0)
    b_solved = b_solved + tl.zeros([BT // SUB, SUB, SUB], tl.float32)
    for n in range(1, SUB):
        b_row = tl.sum(tl.where(o_r[None, :, None] == n, b_x, 0.0), 1)  # row n of every block: [BT / SUB, SUB]
        b_change = tl.sum(b_row[:, :, None] * b_solved, 1)
        b_solved = tl.where(o_r[None, :, None] == n, b_solved - b_change[:, None, :], b_solved)
    tl.debug_barrier()
    tl.store(p_inv + o_small, b_solved, mask=m_small)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        eliminate(p_inv, end - first, H * BT, SUB << level, BT, PREC)


@triton.jit(do_not_specialize=SIZES)
def local_forward_kernel(
    q,  # [T, G, DK]
    k,
    beta,  # [T, H]
    cg,  # [H, T]
    inv,  # [T, H, BT]
    at,  # [T, H, BT] fp32 out
    qt,  # [T, H, DK] out
    kh,  # [T, H, DK] out
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_t, i_h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * BT
    at -= skip * BT
    qt -= skip * DK
    kh -= skip * DK
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    i_g = i_h // GROUP
    stride = (H // GROUP) * DK
    b_g = decays_of(cg + i_h * T, o_t, end)
    g_end = tl.load(cg + i_h * T + end - 1)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_qk = products(q + i_g * DK, k + i_g * DK, o_t, end, stride, DK, BK, BT, PREC)
    b_qk = b_qk * decay_tile(b_g, b_g, o_t, o_t, False)
    o_at = o_t.to(tl.int64)[:, None] * H * BT + i_h * BT + o_i[None, :]
    m_at = (o_t < end)[:, None] & (o_i >= 0)[None, :]
    p_at, p_inv = at + i_h * BT, inv + i_h * BT
    tl.store(at + o_at, b_qk, mask=m_at)
    tl.debug_barrier()
    b_at = tl.zeros([BT, BT], tl.float32)
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_b = rows_of(p_inv, first + o_j, o_i, end, H * BT, BT) * b_beta[None, :]
        b_a = rows_of(p_at, o_t, o_j, end, H * BT, BT)
        b_at = tl.dot(b_a, b_b, b_at, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BT] -> [BT, BT]
    tl.debug_barrier()
    tl.store(at + o_at, b_at, mask=m_at)
    tl.debug_barrier()
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        o_cell = o_t.to(tl.int64)[:, None] * H * DK + i_h * DK + o_k[None, :]
        m_k = (o_t < end)[:, None] & (o_k < DK)[None, :]
        b_q = tl.exp(b_g)[:, None] * rows_of(q + i_g * DK, o_t, o_k, end, stride, DK)
        for i_y in range(0, BT, SLAB):
            o_j = i_y + tl.arange(0, SLAB)
            b_k = rows_of(k + i_g * DK, first + o_j, o_k, end, stride, DK)
            b_k *= tl.exp(decays_of(cg + i_h * T, first + o_j, end))[:, None]
            b_a = rows_of(p_at, o_t, o_j, end, H * BT, BT)
            b_q -= tl.dot(b_a, b_k, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
        tl.store(qt + o_cell, b_q.to(qt.dtype.element_ty), mask=m_k)
        b_kh = tl.zeros([BT, BK], tl.float32)
        for i_y in range(0, BT, SLAB):
            o_j = i_y + tl.arange(0, SLAB)
            b_k = rows_of(k + i_g * DK, first + o_j, o_k, end, stride, DK)
            b_k *= tl.exp(g_end - decays_of(cg + i_h * T, first + o_j, end))[:, None]
            b_inv = columns_of(p_inv, first + o_j, o_i, end, H * BT, BT)
            b_kh = tl.dot(b_inv, b_k, b_kh, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
        tl.store(kh + o_cell, (b_beta[:, None] * b_kh).to(kh.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=SIZES)
def dphi_kernel(
    snap,  # [rows of the window, H, K, DK, DV]
    grad,  # same shape: D at each row
    live_pos, live_death, live_count, blocks,
    dphi,  # [blocks of the window, H, DK, DK] fp32 out
    H, K, block_lo, row_lo,
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
    for i_s in range(m):
        for i_v in range(0, DV, BV):
            o_v = i_v + tl.arange(0, BV)
            b_ds = load_tile(p_ds + tl.minimum(i_to, K - 1).to(tl.int64) * DK * DV, o_a, o_v, DK, DV)
            b_s = load_tile_t(p_s + tl.cast(i_s, tl.int64) * DK * DV, o_b, o_v, DK, DV)
            b_dphi = tl.dot(b_ds, b_s, b_dphi, input_precision=PREC)  # [BK, BV] @ [BV, BK] -> [BK, BK]
        i_to += (tl.load(live_death + o_death + i_s) >= end).to(tl.int32)
    p_dphi = dphi + (i_b.to(tl.int64) * H + i_h) * DK * DK
    tl.store(p_dphi + o_a[:, None] * DK + o_b[None, :], b_dphi, mask=(o_a < DK)[:, None] & (o_b < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def local_pairs_kernel(
    q, k, beta, cg,
    inv,  # [T, H, BT]
    dat,  # [T, H, BT] fp32 in: dAt; out: (dQK .* D)^T, row = key
    dqt,  # [T, H, DK] fp32
    dkh,  # [T, H, DK] fp32
    db,  # [T, H, BT] fp32 out: dB^T
    dcg,  # [H, T] fp32 out: part of the decay gradient
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dQK and dB from dAt, dQt and dKh."""
    i_t, i_h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * BT
    dat -= skip * BT
    dqt -= skip * DK
    dkh -= skip * DK
    db -= skip * BT
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    i_g = i_h // GROUP
    stride = (H // GROUP) * DK
    b_g = decays_of(cg + i_h * T, o_t, end)
    g_end = tl.load(cg + i_h * T + end - 1)
    upper = (o_i[:, None] <= o_i[None, :]) & (o_t < end)[None, :]
    b_to_end = tl.where(o_t < end, tl.exp(g_end - b_g), 0.0)
    o_cell = o_t.to(tl.int64)[:, None] * H * BT + i_h * BT + o_i[None, :]
    m_cell = (o_t < end)[:, None] & (o_i >= 0)[None, :]
    b_dat = columns_of(dat + i_h * BT, o_t, o_i, end, H * BT, BT)  # [l, s]
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = tl.exp(b_g)[:, None] * rows_of(k + i_g * DK, o_t, o_k, end, stride, DK)
        b_dqt = columns_of(dqt + i_h * DK, o_t, o_k, end, H * DK, DK)
        b_dat -= tl.dot(b_k, b_dqt, input_precision=PREC)  # [BT, BK] @ [BK, BT] -> [BT, BT]
    tl.debug_barrier()  # every thread has read dAt
    tl.store(dat + o_cell, tl.where(upper, b_dat, 0.0), mask=m_cell)
    b_qk = products(q + i_g * DK, k + i_g * DK, o_t, end, stride, DK, BK, BT, PREC)
    b_qk = b_qk * decay_tile(b_g, b_g, o_t, o_t, False)
    tl.store(db + o_cell, b_qk, mask=m_cell)  # both are read again, a slab at a time
    tl.debug_barrier()
    b_db = tl.zeros([BT, BT], tl.float32)  # [l, t]
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_part = rows_of(db + i_h * BT, first + o_j, o_i, end, H * BT, BT)
        b_slab = rows_of(dat + i_h * BT, o_t, o_j, end, H * BT, BT)
        b_db = tl.dot(b_slab, b_part, b_db, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BT] -> [BT, BT]
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_kt = columns_of(k + i_g * DK, o_t, o_k, end, stride, DK) * b_to_end[None, :]
        b_dkh = rows_of(dkh + i_h * DK, o_t, o_k, end, H * DK, DK)
        b_db += tl.dot(b_dkh, b_kt, input_precision=PREC)  # [BT, BK] @ [BK, BT] -> [BT, BT]
    tl.debug_barrier()
    tl.store(db + o_cell, tl.where(upper, b_db, 0.0), mask=m_cell)
    b_dqk = tl.zeros([BT, BT], tl.float32)
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_beta = tl.load(beta + (first + o_j).to(tl.int64) * H + i_h, mask=first + o_j < end, other=0.0).to(tl.float32)
        b_b = rows_of(inv + i_h * BT, o_t, o_j, end, H * BT, BT) * b_beta[None, :]
        b_slab = rows_of(dat + i_h * BT, first + o_j, o_i, end, H * BT, BT)
        b_dqk = tl.dot(b_b, b_slab, b_dqk, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BT] -> [BT, BT]
    # decays of the transposed pair (row = key, column = query)
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_dqk *= tl.exp(tl.where(o_i[:, None] <= o_i[None, :], b_g[None, :] - b_g[:, None], float("-inf")))
    tl.debug_barrier()
    tl.store(dat + o_cell, b_dqk, mask=m_cell)
    b_pairs = b_dqk * products(k + i_g * DK, q + i_g * DK, o_t, end, stride, DK, BK, BT, PREC)
    tl.store(dcg + i_h * T + o_t, tl.sum(b_pairs, 0) - tl.sum(b_pairs, 1), mask=o_t < end)


@triton.jit(do_not_specialize=SIZES)
def local_inverse_backward_kernel(
    k, beta, cg,
    inv,  # [T, H, BT]
    db,  # [T, H, BT] fp32 in: dB^T; out: dgram^T, row = key
    dcg,  # [H, T] fp32 out: part of the decay gradient
    dbeta,  # [T, H] out
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Through B = inv diag(beta): dL = -stril(inv^T (dB diag(beta)) inv^T), transposed throughout."""
    i_t, i_h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * BT
    db -= skip * BT
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    i_g = i_h // GROUP
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_beta = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_db = rows_of(db + i_h * BT, o_t, o_i, end, H * BT, BT)
    b_dbeta = tl.sum(b_db * columns_of(inv + i_h * BT, o_t, o_i, end, H * BT, BT), 1)
    b_step = tl.zeros([BT, BT], tl.float32)
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_w = tl.load(beta + (first + o_j).to(tl.int64) * H + i_h, mask=first + o_j < end, other=0.0).to(tl.float32)
        b_scaled = b_w[:, None] * rows_of(db + i_h * BT, first + o_j, o_i, end, H * BT, BT)
        b_inv = rows_of(inv + i_h * BT, o_t, o_j, end, H * BT, BT)
        b_step = tl.dot(b_inv, b_scaled, b_step, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BT] -> [BT, BT]
    o_cell = o_t.to(tl.int64)[:, None] * H * BT + i_h * BT + o_i[None, :]
    m_cell = (o_t < end)[:, None] & (o_i >= 0)[None, :]
    tl.debug_barrier()  # every thread has read dB
    tl.store(db + o_cell, b_step, mask=m_cell)
    tl.debug_barrier()
    b_dl = tl.zeros([BT, BT], tl.float32)
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_inv = rows_of(inv + i_h * BT, first + o_j, o_i, end, H * BT, BT)
        b_slab = rows_of(db + i_h * BT, o_t, o_j, end, H * BT, BT)
        b_dl = tl.dot(b_slab, b_inv, b_dl, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BT] -> [BT, BT]
    b_decay = tl.exp(tl.where(o_i[:, None] < o_i[None, :], b_g[None, :] - b_g[:, None], float("-inf")))
    b_dl = tl.where((o_t < end)[:, None] & (o_t < end)[None, :], -b_dl * b_decay, 0.0)
    b_pairs = b_dl * products(k + i_g * DK, k + i_g * DK, o_t, end, (H // GROUP) * DK, DK, BK, BT, PREC)
    b_dbeta += tl.sum(b_pairs, 0)
    b_pairs *= b_beta[None, :]
    tl.debug_barrier()
    tl.store(db + o_cell, b_dl * b_beta[None, :], mask=m_cell)
    tl.store(dcg + i_h * T + o_t, tl.sum(b_pairs, 0) - tl.sum(b_pairs, 1), mask=o_t < end)
    tl.store(dbeta + o_t.to(tl.int64) * H + i_h, b_dbeta.to(dbeta.dtype.element_ty), mask=o_t < end)


@triton.jit(do_not_specialize=SIZES)
def local_query_kernel(
    q, k, cg,
    dqk,  # [T, H, BT]: (dQK .* D)^T
    dqt,  # [T, H, DK] fp32
    dq,  # [T, H, DK] out
    dcg,  # [NK, H, T] fp32 out: part of the decay gradient
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    skip = token_lo.to(tl.int64) * H
    dqk -= skip * BT
    dqt -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + i_b)), tl.load(blocks + 4 * (block_lo + i_b) + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    i_g = i_h // GROUP
    stride = (H // GROUP) * DK
    o_k = i_k * BK + tl.arange(0, BK)
    b_dq = tl.exp(decays_of(cg + i_h * T, o_t, end))[:, None] * rows_of(dqt + i_h * DK, o_t, o_k, end, H * DK, DK)
    b_dg = tl.sum(b_dq * rows_of(q + i_g * DK, o_t, o_k, end, stride, DK), 1)
    tl.store(dcg + (i_k * H + i_h) * T + o_t, b_dg, mask=o_t < end)
    b_dqk = columns_of(dqk + i_h * BT, o_t, o_i, end, H * BT, BT)
    b_k = rows_of(k + i_g * DK, o_t, o_k, end, stride, DK)
    b_dq += tl.dot(b_dqk, b_k, input_precision=PREC)  # [BT, BT] @ [BT, BK] -> [BT, BK]
    o_cell = o_t.to(tl.int64)[:, None] * H * DK + i_h * DK + o_k[None, :]
    tl.store(dq + o_cell, b_dq.to(dq.dtype.element_ty), mask=(o_t < end)[:, None] & (o_k < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def local_key_kernel(
    q, k, beta, cg, inv,
    at,  # [T, H, BT]
    dqk,  # [T, H, BT]: (dQK .* D)^T
    dgram,  # [T, H, BT]: dgram^T
    dqt,  # [T, H, DK] fp32
    dkh,  # [T, H, DK] fp32
    dke,  # [T, H, DK] fp32: gradient of k from ek, but for At and Qt
    dk,  # [T, H, DK] out
    dcg,  # [NK, H, T] fp32 out: part of the decay gradient
    ends,  # [NK, H, T] fp32 out: what the block's last decay gets and the token's own loses
    blocks, block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T, H, GROUP,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, SLAB: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    i_b, i_h, i_k = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * BT
    at -= skip * BT
    dke -= skip * DK
    dqk -= skip * BT
    dgram -= skip * BT
    dqt -= skip * DK
    dkh -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + i_b)), tl.load(blocks + 4 * (block_lo + i_b) + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    i_g = i_h // GROUP
    stride = (H // GROUP) * DK
    o_k = i_k * BK + tl.arange(0, BK)
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_to_end = tl.where(o_t < end, tl.exp(tl.load(cg + i_h * T + end - 1) - b_g), 0.0)[:, None]
    b_dk = tl.zeros([BT, BK], tl.float32)  # of ck
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_beta = tl.load(beta + (first + o_j).to(tl.int64) * H + i_h, mask=first + o_j < end, other=0.0).to(tl.float32)
        b_b = rows_of(inv + i_h * BT, o_t, o_j, end, H * BT, BT) * b_beta[None, :]
        b_dkh = rows_of(dkh + i_h * DK, first + o_j, o_k, end, H * DK, DK)
        b_dk = tl.dot(b_b, b_dkh, b_dk, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
    b_dk *= b_to_end
    b_last = tl.sum(b_dk * rows_of(k + i_g * DK, o_t, o_k, end, stride, DK), 1)
    b_dek = tl.zeros([BT, BK], tl.float32)
    for i_y in range(0, BT, SLAB):
        o_s = first + i_y + tl.arange(0, SLAB)
        b_at = columns_of(at + i_h * BT, o_s, o_i, end, H * BT, BT)
        b_dqt = rows_of(dqt + i_h * DK, o_s, o_k, end, H * DK, DK)
        b_dek = tl.dot(b_at, b_dqt, b_dek, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
    b_dek = rows_of(dke + i_h * DK, o_t, o_k, end, H * DK, DK) - tl.exp(b_g)[:, None] * b_dek
    o_dg = (i_k * H + i_h) * T + o_t
    tl.store(ends + o_dg, b_last, mask=o_t < end)
    tl.store(dcg + o_dg, tl.sum(b_dek * rows_of(k + i_g * DK, o_t, o_k, end, stride, DK), 1), mask=o_t < end)
    b_dk += b_dek
    for i_y in range(0, BT, SLAB):
        o_j = i_y + tl.arange(0, SLAB)
        b_dqk = rows_of(dqk + i_h * BT, o_t, o_j, end, H * BT, BT)
        b_q = rows_of(q + i_g * DK, first + o_j, o_k, end, stride, DK)
        b_dk = tl.dot(b_dqk, b_q, b_dk, input_precision=PREC)  # [BT, SLAB] @ [SLAB, BK] -> [BT, BK]
        b_pair = rows_of(dgram + i_h * BT, o_t, o_j, end, H * BT, BT)
        b_pair = b_pair + columns_of(dgram + i_h * BT, first + o_j, o_i, end, H * BT, BT)
        b_k = rows_of(k + i_g * DK, first + o_j, o_k, end, stride, DK)
        b_dk = tl.dot(b_pair, b_k, b_dk, input_precision=PREC)
    o_cell = o_t.to(tl.int64)[:, None] * H * DK + i_h * DK + o_k[None, :]
    tl.store(dk + o_cell, b_dk.to(dk.dtype.element_ty), mask=(o_t < end)[:, None] & (o_k < DK)[None, :])
