"""Chunk-local stage of Gated DeltaNet: slot-independent arrays of each block of C tokens, and their gradient.

With D[t,j] = exp(cg_t - cg_j), gram = stril(K K^T .* D), inv = (I + diag(beta) gram)^-1, B = inv diag(beta),
QK = tril(Q K^T .* D), ek = exp(cg) K, ck = exp(cg_C - cg) K:

    At = QK B    Qt = exp(cg) Q - At ek    Kh = B^T ck    Phi = exp(cg_C) I - R,  R = Kh^T ek

This stage is a few percent of the FLOPs and everything else builds on it, so it is computed as in fp32. Where the
gradient needs a transposed product it is formed transposed from the start: storing the transpose of a matrix-unit
result is miscompiled on Hopper by Triton 3.4 - 3.6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_scan import slots_opened


@triton.jit
def rows_of(x, t, a, end, stride, D: tl.constexpr):
    """x[t, a] as fp32 [len(t), len(a)], zero outside."""
    return raw_rows(x, t, a, end, stride, D).to(tl.float32)


@triton.jit
def columns_of(x, t, a, end, stride, D: tl.constexpr):
    """x[t, a] transposed: fp32 [len(a), len(t)]."""
    return raw_columns(x, t, a, end, stride, D).to(tl.float32)


@triton.jit
def raw_rows(x, t, a, end, stride, D: tl.constexpr):
    """`rows_of` in x's dtype: 16-bit operands multiply exactly into fp32."""
    return tl.load(
        x + t.to(tl.int64)[:, None] * stride + a[None, :], mask=(t < end)[:, None] & (a < D)[None, :], other=0.0
    )


@triton.jit
def raw_columns(x, t, a, end, stride, D: tl.constexpr):
    """`columns_of` in x's dtype."""
    return tl.load(
        x + t.to(tl.int64)[None, :] * stride + a[:, None], mask=(t < end)[None, :] & (a < D)[:, None], other=0.0
    )


@triton.jit
def products(x, y, t, end, stride, D: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """x[t] . y[p] over all dims: fp32 [C, C]."""
    acc = tl.zeros([C, C], tl.float32)
    for at in range(0, D, BK):
        a = at + tl.arange(0, BK)
        acc = tl.dot(raw_rows(x, t, a, end, stride, D), raw_columns(y, t, a, end, stride, D), acc, input_precision=PREC)
    return acc


@triton.jit
def decays_of(cg, t, end):
    """cg[t]; past the block's end its last value, so that no exponent is positive there."""
    return tl.load(cg + tl.minimum(t, end - 1))


@triton.jit
def decay_tile(cg_row, cg_col, t, p, STRICT: tl.constexpr):
    """exp(cg_row[t] - cg_col[p]) where p <= t (p < t if STRICT), else 0; masked before exp, which could overflow."""
    causal = (p[None, :] < t[:, None]) if STRICT else (p[None, :] <= t[:, None])
    return tl.exp(tl.where(causal, cg_row[:, None] - cg_col[None, :], float("-inf")))


@triton.jit
def eliminate(out, n, stride, HALF: tl.constexpr, C: tl.constexpr, PREC: tl.constexpr):
    """Diagonal blocks of twice HALF rows, in place: [[A, 0], [L, D]]^-1 = [[A', 0], [-D' L A', D']]."""
    m = tl.arange(0, HALF)
    for pair in range(C // (2 * HALF)):
        a = 2 * pair * HALF + m
        d = a + HALF
        step = tl.dot(rows_of(out, d, d, n, stride, C), rows_of(out, d, a, n, stride, C), input_precision=PREC)
        step = tl.dot(step, rows_of(out, a, a, n, stride, C), input_precision=PREC)
        tl.debug_barrier()  # every thread has read L
        tl.store(out + d.to(tl.int64)[:, None] * stride + a[None, :], -step, mask=(d < n)[:, None] & (m >= 0)[None, :])
    tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def inverse_kernel(
    k,  # [T, G, DK]
    beta,  # [T, H]
    cg,  # [H, T]
    inv,  # [T, H, C] fp32 out (scratch on the way)
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SUB: tl.constexpr,  # rows inverted by substitution
    LEVELS: tl.constexpr,  # log2(C / SUB), block elimination from there
    PREC: tl.constexpr,
):
    block, h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * C
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    i = tl.arange(0, C)
    t = first + i
    decays = decays_of(cg + h * T, t, end)
    write = tl.load(beta + t.to(tl.int64) * H + h, mask=t < end, other=0.0).to(tl.float32)
    gram = products(k + h // GROUP * DK, k + h // GROUP * DK, t, end, (H // GROUP) * DK, DK, BK, C, PREC)
    lower = write[:, None] * gram * decay_tile(decays, decays, t, t, True)
    lower = tl.where((t < end)[:, None], lower, 0.0)
    out = inv + (first.to(tl.int64) * H + h) * C
    cell = i.to(tl.int64)[:, None] * H * C + i[None, :]
    inside = (t < end)[:, None] & (i >= 0)[None, :]
    # diagonal blocks [C / SUB, SUB, SUB] through memory: registers hold them in the wrong arrangement
    tl.store(out + cell, lower, mask=inside)
    tl.debug_barrier()
    s = tl.arange(0, C // SUB)
    r = tl.arange(0, SUB)
    row = s[:, None, None] * SUB + r[None, :, None]
    small = row.to(tl.int64) * H * C + s[:, None, None] * SUB + r[None, None, :]
    inner = (first + row < end) & (r >= 0)[None, None, :]
    x = tl.load(out + small, mask=inner, other=0.0)
    solved = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros([C // SUB, SUB, SUB], tl.float32)
    for n in range(1, SUB):
        taken = tl.sum(tl.where(r[None, :, None] == n, x, 0.0), 1)  # row n of every block: [C / SUB, SUB]
        change = tl.sum(taken[:, :, None] * solved, 1)
        solved = tl.where(r[None, :, None] == n, solved - change[:, None, :], solved)
    tl.debug_barrier()
    tl.store(out + small, solved, mask=inner)
    tl.debug_barrier()
    for level in tl.static_range(LEVELS):
        eliminate(out, end - first, H * C, SUB << level, C, PREC)


@triton.jit(do_not_specialize=SIZES)
def local_forward_kernel(
    q,  # [T, G, DK]
    k,
    beta,  # [T, H]
    cg,  # [H, T]
    inv,  # [T, H, C]
    at,  # [T, H, C] fp32 out
    qt,  # [T, H, DK] out
    kh,  # [T, H, DK] out
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    block, h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * C
    at -= skip * C
    qt -= skip * DK
    kh -= skip * DK
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    i = tl.arange(0, C)
    t = first + i
    g = h // GROUP
    stride = (H // GROUP) * DK
    decays = decays_of(cg + h * T, t, end)
    g_end = tl.load(cg + h * T + end - 1)
    write = tl.load(beta + t.to(tl.int64) * H + h, mask=t < end, other=0.0).to(tl.float32)
    score = products(q + g * DK, k + g * DK, t, end, stride, DK, BK, C, PREC) * decay_tile(decays, decays, t, t, False)
    cell = t.to(tl.int64)[:, None] * H * C + h * C + i[None, :]
    there = (t < end)[:, None] & (i >= 0)[None, :]
    at_h, inv_h = at + h * C, inv + h * C
    tl.store(at + cell, score, mask=there)
    tl.debug_barrier()
    acc = tl.zeros([C, C], tl.float32)
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        part = rows_of(inv_h, first + j, i, end, H * C, C) * write[None, :]
        acc = tl.dot(rows_of(at_h, t, j, end, H * C, C), part, acc, input_precision=PREC)
    tl.debug_barrier()
    tl.store(at + cell, acc, mask=there)
    tl.debug_barrier()
    for x in range(0, DK, BK):
        a = x + tl.arange(0, BK)
        to = t.to(tl.int64)[:, None] * H * DK + h * DK + a[None, :]
        valid = (t < end)[:, None] & (a < DK)[None, :]
        query = tl.exp(decays)[:, None] * rows_of(q + g * DK, t, a, end, stride, DK)
        for y in range(0, C, SLAB):
            j = y + tl.arange(0, SLAB)
            key = rows_of(k + g * DK, first + j, a, end, stride, DK)
            key *= tl.exp(decays_of(cg + h * T, first + j, end))[:, None]
            query -= tl.dot(rows_of(at_h, t, j, end, H * C, C), key, input_precision=PREC)
        tl.store(qt + to, query.to(qt.dtype.element_ty), mask=valid)
        keys = tl.zeros([C, BK], tl.float32)
        for y in range(0, C, SLAB):
            j = y + tl.arange(0, SLAB)
            key = rows_of(k + g * DK, first + j, a, end, stride, DK)
            key *= tl.exp(g_end - decays_of(cg + h * T, first + j, end))[:, None]
            keys = tl.dot(columns_of(inv_h, first + j, i, end, H * C, C), key, keys, input_precision=PREC)
        tl.store(kh + to, (write[:, None] * keys).to(kh.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def transition_kernel(
    k,
    kh,  # [T, H, DK]
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK] out: R = Kh^T ek
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    NK: tl.constexpr = (DK + BK - 1) // BK
    n, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    kh -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + n)), tl.load(blocks + 4 * (block_lo + n) + 1)
    t = first + tl.arange(0, C)
    a = tl.program_id(2) // NK * BK + tl.arange(0, BK)
    b = tl.program_id(2) % NK * BK + tl.arange(0, BK)
    decays = decays_of(cg + h * T, t, end)
    key = tl.exp(decays)[:, None] * rows_of(k + h // GROUP * DK, t, b, end, (H // GROUP) * DK, DK)
    r = tl.dot(columns_of(kh + h * DK, t, a, end, H * DK, DK), key, input_precision=PREC)
    out = r_matrix + (n.to(tl.int64) * H + h) * DK * DK
    tl.store(
        out + a[:, None] * DK + b[None, :], r.to(r_matrix.dtype.element_ty), mask=(a < DK)[:, None] & (b < DK)[None, :]
    )


@triton.jit(do_not_specialize=SIZES)
def dphi_kernel(
    snap,  # [rows of the window, H, K, DK, DV]
    grad,  # same shape: D at each row
    live_pos,
    live_death,
    live_count,
    blocks,
    dphi,  # [blocks of the window, H, DK, DK] fp32 out
    H,
    K,
    block_lo,
    row_lo,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KP: tl.constexpr,
    PREC: tl.constexpr,
):
    """dPhi = sum_i D_{map(i)} S_i^T over the slots inherited by the block."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    n, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = block_lo + n
    row, _, end, m, _, to = slots_opened(live_pos, live_count, blocks, block, h, H, K, KP)
    a = tl.program_id(2) // NK * BK + tl.arange(0, BK)
    b = tl.program_id(2) % NK * BK + tl.arange(0, BK)
    here = (row.to(tl.int64) * H + h) * K
    states = snap + ((row - row_lo).to(tl.int64) * H + h) * K * DK * DV
    grads = grad + ((row + 1 - row_lo).to(tl.int64) * H + h) * K * DK * DV
    acc = tl.zeros([BK, BK], tl.float32)
    for i in range(m):
        for x in range(0, DV, BV):
            v = x + tl.arange(0, BV)
            d = tl.load(
                grads + tl.minimum(to, K - 1).to(tl.int64) * DK * DV + a[:, None] * DV + v[None, :],
                mask=(a < DK)[:, None] & (v < DV)[None, :],
                other=0.0,
            )
            s = tl.load(
                states + tl.cast(i, tl.int64) * DK * DV + b[None, :] * DV + v[:, None],
                mask=(b < DK)[None, :] & (v < DV)[:, None],
                other=0.0,
            )
            acc = tl.dot(d, s, acc, input_precision=PREC)
        to += (tl.load(live_death + here + i) >= end).to(tl.int32)
    out = dphi + (n.to(tl.int64) * H + h) * DK * DK
    tl.store(out + a[:, None] * DK + b[None, :], acc, mask=(a < DK)[:, None] & (b < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def local_dkh_kernel(
    k,
    cg,
    dphi,  # [blocks of the window, H, DK, DK]
    dkh,  # [T, H, DK] fp32, in place: dKh - ek dPhi^T
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    n, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    dkh -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + n)), tl.load(blocks + 4 * (block_lo + n) + 1)
    t = first + tl.arange(0, C)
    a = tl.program_id(2) * BK + tl.arange(0, BK)
    decays = decays_of(cg + h * T, t, end)
    matrix = dphi + (n.to(tl.int64) * H + h) * DK * DK
    acc = rows_of(dkh + h * DK, t, a, end, H * DK, DK)
    for x in range(0, DK, BK):
        b = x + tl.arange(0, BK)
        key = tl.exp(decays)[:, None] * rows_of(k + h // GROUP * DK, t, b, end, (H // GROUP) * DK, DK)
        part = tl.load(matrix + a[None, :] * DK + b[:, None], mask=(a < DK)[None, :] & (b < DK)[:, None], other=0.0)
        acc -= tl.dot(key, part, input_precision=PREC)
    cell = t.to(tl.int64)[:, None] * H * DK + h * DK + a[None, :]
    tl.store(dkh + cell, acc, mask=(t < end)[:, None] & (a < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def local_pairs_kernel(
    q,
    k,
    beta,
    cg,
    inv,  # [T, H, C]
    dat,  # [T, H, C] fp32 in: dAt; out: (dQK .* D)^T, row = key
    dqt,  # [T, H, DK] fp32
    dkh,  # [T, H, DK] fp32, after `local_dkh_kernel`
    db,  # [T, H, C] fp32 out: dB^T
    dcg,  # [H, T] fp32 out: part of the decay gradient
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    """dQK and dB from dAt, dQt and dKh."""
    block, h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * C
    dat -= skip * C
    dqt -= skip * DK
    dkh -= skip * DK
    db -= skip * C
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    i = tl.arange(0, C)
    t = first + i
    g = h // GROUP
    stride = (H // GROUP) * DK
    decays = decays_of(cg + h * T, t, end)
    g_end = tl.load(cg + h * T + end - 1)
    upper = (i[:, None] <= i[None, :]) & (t < end)[None, :]
    to_end = tl.where(t < end, tl.exp(g_end - decays), 0.0)
    cell = t.to(tl.int64)[:, None] * H * C + h * C + i[None, :]
    there = (t < end)[:, None] & (i >= 0)[None, :]
    dat_t = columns_of(dat + h * C, t, i, end, H * C, C)  # [l, s]
    for x in range(0, DK, BK):
        a = x + tl.arange(0, BK)
        key = tl.exp(decays)[:, None] * rows_of(k + g * DK, t, a, end, stride, DK)
        dat_t -= tl.dot(key, columns_of(dqt + h * DK, t, a, end, H * DK, DK), input_precision=PREC)
    tl.debug_barrier()  # every thread has read dAt
    tl.store(dat + cell, tl.where(upper, dat_t, 0.0), mask=there)
    score = products(q + g * DK, k + g * DK, t, end, stride, DK, BK, C, PREC) * decay_tile(decays, decays, t, t, False)
    tl.store(db + cell, score, mask=there)  # both are read again, a slab at a time
    tl.debug_barrier()
    db_t = tl.zeros([C, C], tl.float32)  # [l, t]
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        part = rows_of(db + h * C, first + j, i, end, H * C, C)
        db_t = tl.dot(rows_of(dat + h * C, t, j, end, H * C, C), part, db_t, input_precision=PREC)
    for x in range(0, DK, BK):
        a = x + tl.arange(0, BK)
        key_t = columns_of(k + g * DK, t, a, end, stride, DK) * to_end[None, :]
        db_t += tl.dot(rows_of(dkh + h * DK, t, a, end, H * DK, DK), key_t, input_precision=PREC)
    tl.debug_barrier()
    tl.store(db + cell, tl.where(upper, db_t, 0.0), mask=there)
    dqk_t = tl.zeros([C, C], tl.float32)
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        write = tl.load(beta + (first + j).to(tl.int64) * H + h, mask=first + j < end, other=0.0).to(tl.float32)
        inverse = rows_of(inv + h * C, t, j, end, H * C, C) * write[None, :]
        dqk_t = tl.dot(inverse, rows_of(dat + h * C, first + j, i, end, H * C, C), dqk_t, input_precision=PREC)
    # decays of the transposed pair (row = key, column = query)
    decays = decays_of(cg + h * T, t, end)
    dqk_t *= tl.exp(tl.where(i[:, None] <= i[None, :], decays[None, :] - decays[:, None], float("-inf")))
    tl.debug_barrier()
    tl.store(dat + cell, dqk_t, mask=there)
    pairs = dqk_t * products(k + g * DK, q + g * DK, t, end, stride, DK, BK, C, PREC)
    tl.store(dcg + h * T + t, tl.sum(pairs, 0) - tl.sum(pairs, 1), mask=t < end)


@triton.jit(do_not_specialize=SIZES)
def local_inverse_backward_kernel(
    k,
    beta,
    cg,
    inv,  # [T, H, C]
    db,  # [T, H, C] fp32 in: dB^T; out: dgram^T, row = key
    dcg,  # [H, T] fp32 out: part of the decay gradient
    dbeta,  # [T, H] out
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    """Through B = inv diag(beta): dL = -stril(inv^T (dB diag(beta)) inv^T), transposed throughout."""
    block, h = block_lo + tl.program_id(0), tl.program_id(1).to(tl.int64)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * C
    db -= skip * C
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    i = tl.arange(0, C)
    t = first + i
    g = h // GROUP
    decays = decays_of(cg + h * T, t, end)
    write = tl.load(beta + t.to(tl.int64) * H + h, mask=t < end, other=0.0).to(tl.float32)
    db_t = rows_of(db + h * C, t, i, end, H * C, C)
    dbeta_t = tl.sum(db_t * columns_of(inv + h * C, t, i, end, H * C, C), 1)
    step = tl.zeros([C, C], tl.float32)
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        part = tl.load(beta + (first + j).to(tl.int64) * H + h, mask=first + j < end, other=0.0).to(tl.float32)
        scaled = part[:, None] * rows_of(db + h * C, first + j, i, end, H * C, C)
        step = tl.dot(rows_of(inv + h * C, t, j, end, H * C, C), scaled, step, input_precision=PREC)
    cell = t.to(tl.int64)[:, None] * H * C + h * C + i[None, :]
    there = (t < end)[:, None] & (i >= 0)[None, :]
    tl.debug_barrier()  # every thread has read dB
    tl.store(db + cell, step, mask=there)
    tl.debug_barrier()
    dl_t = tl.zeros([C, C], tl.float32)
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        part = rows_of(inv + h * C, first + j, i, end, H * C, C)
        dl_t = tl.dot(rows_of(db + h * C, t, j, end, H * C, C), part, dl_t, input_precision=PREC)
    d_t = tl.exp(tl.where(i[:, None] < i[None, :], decays[None, :] - decays[:, None], float("-inf")))
    dl_t = tl.where((t < end)[:, None] & (t < end)[None, :], -dl_t * d_t, 0.0)
    pairs = dl_t * products(k + g * DK, k + g * DK, t, end, (H // GROUP) * DK, DK, BK, C, PREC)
    dbeta_t += tl.sum(pairs, 0)
    pairs *= write[None, :]
    tl.debug_barrier()
    tl.store(db + cell, dl_t * write[None, :], mask=there)
    tl.store(dcg + h * T + t, tl.sum(pairs, 0) - tl.sum(pairs, 1), mask=t < end)
    tl.store(dbeta + t.to(tl.int64) * H + h, dbeta_t.to(dbeta.dtype.element_ty), mask=t < end)


@triton.jit(do_not_specialize=SIZES)
def local_query_kernel(
    q,
    k,
    cg,
    dqk,  # [T, H, C]: (dQK .* D)^T
    dqt,  # [T, H, DK] fp32
    dq,  # [T, H, DK] out
    dcg,  # [NK, H, T] fp32 out: part of the decay gradient
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    n, h, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    skip = token_lo.to(tl.int64) * H
    dqk -= skip * C
    dqt -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + n)), tl.load(blocks + 4 * (block_lo + n) + 1)
    i = tl.arange(0, C)
    t = first + i
    g = h // GROUP
    stride = (H // GROUP) * DK
    a = part * BK + tl.arange(0, BK)
    grad = tl.exp(decays_of(cg + h * T, t, end))[:, None] * rows_of(dqt + h * DK, t, a, end, H * DK, DK)
    row = tl.sum(grad * rows_of(q + g * DK, t, a, end, stride, DK), 1)
    tl.store(dcg + (part * H + h) * T + t, row, mask=t < end)
    pair = columns_of(dqk + h * C, t, i, end, H * C, C)
    grad += tl.dot(pair, rows_of(k + g * DK, t, a, end, stride, DK), input_precision=PREC)
    cell = t.to(tl.int64)[:, None] * H * DK + h * DK + a[None, :]
    tl.store(dq + cell, grad.to(dq.dtype.element_ty), mask=(t < end)[:, None] & (a < DK)[None, :])


@triton.jit(do_not_specialize=SIZES)
def local_key_kernel(
    q,
    k,
    beta,
    cg,
    inv,
    at,  # [T, H, C]
    kh,  # [T, H, DK]
    dqk,  # [T, H, C]: (dQK .* D)^T
    dgram,  # [T, H, C]: dgram^T
    dqt,  # [T, H, DK] fp32
    dkh,  # [T, H, DK] fp32
    dphi,  # [blocks of the window, H, DK, DK]
    dk,  # [T, H, DK] out
    dcg,  # [NK, H, T] fp32 out: part of the decay gradient
    ends,  # [NK, H, T] fp32 out: what the block's last decay gets
    blocks,
    block_lo,
    token_lo,  # first token of the window: window-local arrays begin there
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    PREC: tl.constexpr,
):
    n, h, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    skip = token_lo.to(tl.int64) * H
    inv -= skip * C
    at -= skip * C
    kh -= skip * DK
    dqk -= skip * C
    dgram -= skip * C
    dqt -= skip * DK
    dkh -= skip * DK
    first, end = tl.load(blocks + 4 * (block_lo + n)), tl.load(blocks + 4 * (block_lo + n) + 1)
    i = tl.arange(0, C)
    t = first + i
    g = h // GROUP
    stride = (H // GROUP) * DK
    a = part * BK + tl.arange(0, BK)
    decays = decays_of(cg + h * T, t, end)
    to_end = tl.where(t < end, tl.exp(tl.load(cg + h * T + end - 1) - decays), 0.0)[:, None]
    matrix = dphi + (n.to(tl.int64) * H + h) * DK * DK
    grad = tl.zeros([C, BK], tl.float32)  # of ck
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        write = tl.load(beta + (first + j).to(tl.int64) * H + h, mask=first + j < end, other=0.0).to(tl.float32)
        inverse = rows_of(inv + h * C, t, j, end, H * C, C) * write[None, :]
        grad = tl.dot(inverse, rows_of(dkh + h * DK, first + j, a, end, H * DK, DK), grad, input_precision=PREC)
    grad *= to_end
    last = tl.sum(grad * rows_of(k + g * DK, t, a, end, stride, DK), 1)
    dek = tl.zeros([C, BK], tl.float32)
    for y in range(0, C, SLAB):
        s = first + y + tl.arange(0, SLAB)
        part_at = columns_of(at + h * C, s, i, end, H * C, C)
        dek = tl.dot(part_at, rows_of(dqt + h * DK, s, a, end, H * DK, DK), dek, input_precision=PREC)
    for x in range(0, DK, BK):
        b = x + tl.arange(0, BK)
        piece = tl.load(matrix + b[:, None] * DK + a[None, :], mask=(b < DK)[:, None] & (a < DK)[None, :], other=0.0)
        dek += tl.dot(rows_of(kh + h * DK, t, b, end, H * DK, DK), piece, input_precision=PREC)
    dek = -tl.exp(decays)[:, None] * dek
    out = (part * H + h) * T + t
    tl.store(ends + out, last, mask=t < end)
    tl.store(dcg + out, tl.sum(dek * rows_of(k + g * DK, t, a, end, stride, DK), 1) - last, mask=t < end)
    grad += dek
    for y in range(0, C, SLAB):
        j = y + tl.arange(0, SLAB)
        pair = rows_of(dqk + h * C, t, j, end, H * C, C)
        grad = tl.dot(pair, rows_of(q + g * DK, first + j, a, end, stride, DK), grad, input_precision=PREC)
        pair = rows_of(dgram + h * C, t, j, end, H * C, C) + columns_of(dgram + h * C, first + j, i, end, H * C, C)
        grad = tl.dot(pair, rows_of(k + g * DK, first + j, a, end, stride, DK), grad, input_precision=PREC)
    cell = t.to(tl.int64)[:, None] * H * DK + h * DK + a[None, :]
    tl.store(dk + cell, grad.to(dk.dtype.element_ty), mask=(t < end)[:, None] & (a < DK)[None, :])
