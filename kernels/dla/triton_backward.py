"""Backward kernels. With y_i = dO S_i^T and D the gradient of the states (all of them rebuilt window by window):

    X = tril(dO V^T)   dAt = X .* M   dlam[t, slot] += X .* At   dV = (At .* M)^T dO + Kh_j D_end[slot_end(j)]
    dQt = sum_i lam_i y_i   dlam[t, idx_i] += rowsum(y_i .* Qt)   dKh_j = D_end[slot_end(j)] v_j
    D_i = (lam_i Qt)^T dO + Phi^T D_end[map(i)]                 dPhi = sum_i D_end[map(i)] S_i^T

A program owns what it writes, so there are no atomics and two runs agree bit for bit. For Mamba-2 dq, dk and the decay
gradient are finished here; for Gated DeltaNet `triton_local.py` goes on from dAt, dQt, dKh and dPhi.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import pair_tile, slot_weights_tile
from .triton_layout import SIZES


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q,  # [T, G, DK] (Mamba-2) or Qt [T, H, DK]
    k,
    v,  # [T, H, DV]
    do,  # [T, H, DV]
    cg,
    at,  # [T, H, C] (Gated DeltaNet only)
    lam,  # [T, H, K]
    life,
    counts,
    blocks,
    live_death,
    live_count,
    snap,  # [rows of the window, H, K, DK, DV]
    dq,  # [tokens of the window, H, DK] fp32 out: dq of each head (Mamba-2), or dQt
    dat,  # [T, H, C] fp32 out: dAt (Gated DeltaNet only)
    dlam,  # [NK, tokens of the window, H, K] out
    dcg,  # [NK, H, T] fp32 out: the queries' part of the decay gradient (Mamba-2 only)
    T,
    H,
    GROUP,
    K,
    block_lo,
    row_lo,
    token_lo,
    N_TOKENS,  # of the window
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    KP: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    block, own = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    part = tl.program_id(2)
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    skip = token_lo.to(tl.int64) * H
    if first + own * C < end:
        i = tl.arange(0, C)
        t = first + own * C + i
        t64 = t.to(tl.int64)
        slots = tl.arange(0, KP)
        a = part * BK + tl.arange(0, BK)
        stride_q = (H if GDN else H // GROUP) * DK
        dquery = tl.zeros([C, BK], tl.float32)
        h = tl.program_id(1).to(tl.int64)
        g = h - skip if GDN else h // GROUP
        q_h, k_h, v_h, do_h = q + g * DK, k + g * DK, v + h * DV, do + h * DV
        at_h, lam_h = at + (h - skip) * C, lam + h * K
        cg_h, counts_h, life_h = cg + h * T, counts + h * TILES * T, life + h * T
        dweight = tl.zeros([C, KP], tl.float32)
        decay_row = tl.zeros([C], tl.float32)
        base = tl.zeros([C], tl.int32)
        for back in range(own + 1):
            tile = own - back
            p = first + tile * C + i
            x = tl.zeros([C, C], tl.float32)
            for at_v in range(0, DV, BV):
                b = at_v + tl.arange(0, BV)
                grad = tl.load(
                    do_h + t64[:, None] * H * DV + b[None, :],
                    mask=(t < end)[:, None] & (b < DV)[None, :],
                    other=0.0,
                )
                value = tl.load(
                    v_h + p.to(tl.int64)[None, :] * H * DV + b[:, None],
                    mask=(p < end)[None, :] & (b < DV)[:, None],
                    other=0.0,
                )
                x = tl.dot(grad.to(DOT), value.to(DOT), x, input_precision=PREC)
            score, decay = pair_tile(q_h, k_h, cg_h, at_h, t, p, end, first, stride_q, H * C, DK, BK, C, GDN, DOT, PREC)
            count = tl.load(counts_h + tile.to(tl.int64) * T + t, mask=t < end, other=0)
            weight, alive = slot_weights_tile(lam_h, life_h, base, count, t, p, end, H * K, K)
            dscore = x * weight
            if part == 0:
                # tokens between two starts of the tile share a slot: one masked row sum each
                both = x * score
                piece = tl.cumsum((tl.load(life_h + p, mask=p < end, other=0) > 0).to(tl.int32), 0)
                for n in range(tl.max(piece, 0) + 1):
                    share = tl.sum(tl.where(piece[None, :] == n, both, 0.0), 1)
                    slot = base + tl.sum(tl.where(piece[None, :] > n, alive, 0), 1)
                    slot = tl.minimum(slot, K - 1)
                    dweight += tl.where(slots[None, :] == slot[:, None], share[:, None], 0.0)
            if GDN:
                if part == 0:
                    tl.store(
                        dat + (t64[:, None] * H + h - skip) * C + (p - first)[None, :],
                        dscore,
                        mask=(t < end)[:, None] & (p >= first)[None, :],
                    )
            else:
                decay_row += tl.sum(dscore * score, 1)
                key = tl.load(
                    k_h + p.to(tl.int64)[:, None] * stride_q + a[None, :],
                    mask=(p < end)[:, None] & (a < DK)[None, :],
                    other=0.0,
                )
                dquery = tl.dot((dscore * decay).to(DOT), key.to(DOT), dquery, input_precision=PREC)
            base += count
        if part > 0:
            decay_row = tl.zeros([C], tl.float32)
        m = tl.load(live_count + row * H + h)
        deaths = live_death + (row.to(tl.int64) * H + h) * K
        states = snap + ((row - row_lo).to(tl.int64) * H + h) * K * DK * DV
        scale = tl.full([C], 1.0, tl.float32)
        if not GDN:
            scale = tl.exp(tl.load(cg_h + t, mask=t < end, other=0.0))
        for n in range(m):
            index = tl.minimum(base, K - 1)
            w = tl.load(lam_h + t64 * H * K + index, mask=t < end, other=0.0).to(tl.float32)
            y = tl.zeros([C, BK], tl.float32)
            for at_v in range(0, DV, BV):
                b = at_v + tl.arange(0, BV)
                grad = tl.load(
                    do_h + t64[:, None] * H * DV + b[None, :],
                    mask=(t < end)[:, None] & (b < DV)[None, :],
                    other=0.0,
                )
                state = tl.load(
                    states + tl.cast(n, tl.int64) * DK * DV + a[None, :] * DV + b[:, None],
                    mask=(a < DK)[None, :] & (b < DV)[:, None],
                    other=0.0,
                )
                y = tl.dot(grad.to(DOT), state, y, input_precision=PREC)
            query = tl.load(
                q_h + t64[:, None] * stride_q + a[None, :], mask=(t < end)[:, None] & (a < DK)[None, :], other=0.0
            )
            dw = scale * tl.sum(y * query.to(tl.float32), 1)
            decay_row += w * dw
            dquery += (w * scale)[:, None] * y
            dweight += tl.where(slots[None, :] == index[:, None], dw[:, None], 0.0)
            base += (tl.load(deaths + n) > t).to(tl.int32)
        out = dlam + ((part.to(tl.int64) * N_TOKENS + t64 - token_lo)[:, None] * H + h) * K + slots[None, :]
        tl.store(out, dweight.to(dlam.dtype.element_ty), mask=(t < end)[:, None] & (slots < K)[None, :])
        if not GDN:
            tl.store(dcg + (part * H + h) * T + t, decay_row, mask=t < end)
        line = t64 * H + tl.program_id(1) - skip
        tl.store(
            dq + line[:, None] * DK + a[None, :],
            dquery.to(dq.dtype.element_ty),
            mask=(t < end)[:, None] & (a < DK)[None, :],
        )


@triton.jit
def slots_at_end(life, first, end, own, C: tl.constexpr, TILES: tl.constexpr):
    """Slot at the block's end of each token of tile `own` [C]; of the newest, and of the tile's oldest token."""
    newer = tl.zeros([], tl.int32)
    for tile in range(own + 1, TILES):
        p = first + tile * C + tl.arange(0, C)
        newer += tl.sum((tl.load(life + p, mask=p < end, other=0) >= end).to(tl.int32), 0)
    p = first + own * C + tl.arange(0, C)
    alive = (tl.load(life + p, mask=p < end, other=0) >= end).to(tl.int32)
    total = tl.sum(alive, 0)
    slot = newer + total - tl.cumsum(alive, 0)
    return slot, newer, tl.max(slot, 0)


@triton.jit
def newer_starts(counts, t, end, T, lo, hi):
    """Live starts at t in the tiles lo .. hi - 1 of the block: int32 [C]."""
    base = tl.zeros_like(t)
    for tile in range(lo, hi):
        base += tl.load(counts + tl.cast(tile, tl.int64) * T + t, mask=t < end, other=0)
    return base


@triton.jit
def pair_tile_t(
    q,
    k,
    cg,
    at,
    t,
    p,
    end,
    first,
    stride_q,
    stride_at,
    DK: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """`pair_tile` transposed, [keys, queries], formed so from the start (see `triton_local.py`)."""
    causal = (p[:, None] <= t[None, :]) & (t < end)[None, :]
    if GDN:
        score = tl.load(at + t.to(tl.int64)[None, :] * stride_at + (p - first)[:, None], mask=causal, other=0.0).to(
            tl.float32
        )
        decay = tl.where(causal, 1.0, 0.0)
    else:
        score = tl.zeros([C, C], tl.float32)
        for x in range(0, DK, BK):
            a = x + tl.arange(0, BK)
            kt = tl.load(
                k + p.to(tl.int64)[:, None] * stride_q + a[None, :],
                mask=(p < end)[:, None] & (a < DK)[None, :],
                other=0.0,
            )
            qt = tl.load(
                q + t.to(tl.int64)[None, :] * stride_q + a[:, None],
                mask=(t < end)[None, :] & (a < DK)[:, None],
                other=0.0,
            )
            score = tl.dot(kt.to(DOT), qt.to(DOT), score, input_precision=PREC)
        gap = tl.load(cg + t, mask=t < end, other=0.0)[None, :] - tl.load(cg + p, mask=p < end, other=0.0)[:, None]
        decay = tl.exp(tl.where(causal, gap, float("-inf")))
        score = score * decay
    return score, decay


@triton.jit
def slot_weights_tile_t(lam, life, base, count, t, p, end, stride_lam, K):
    """`slot_weights_tile` transposed: M[t, p] as [keys, queries]."""
    death = tl.load(life + p, mask=p < end, other=0)
    causal = (p[:, None] <= t[None, :]) & (t < end)[None, :]
    alive = ((death[:, None] > t[None, :]) & causal).to(tl.int32)
    slot = base[None, :] + count[None, :] - tl.cumsum(alive, 0)
    slot = tl.minimum(tl.maximum(slot, 0), K - 1)
    return tl.load(lam + t.to(tl.int64)[None, :] * stride_lam + slot, mask=causal, other=0.0).to(tl.float32)


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
    T,
    H,
    GROUP,
    K,
    block_lo,
    row_lo,
    token_lo,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    block, own = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    h = tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    skip = token_lo.to(tl.int64) * H
    if first + own * C < end:
        i = tl.arange(0, C)
        p = first + own * C + i
        b = tl.program_id(2) * BV + tl.arange(0, BV)
        stride_k = (H if GDN else H // GROUP) * DK
        k += (h - skip if GDN else h // GROUP) * DK
        q += h // GROUP * DK
        at += (h - skip) * C
        lam += h * K
        cg += h * T
        life += h * T
        counts += h * TILES * T
        acc = tl.zeros([C, BV], tl.float32)
        for tile in range(own, TILES):
            t = first + tile * C + i
            if first + tile * C < end:
                score, _ = pair_tile_t(
                    q, k, cg, at, t, p, end, first, stride_k if not GDN else DK, H * C, DK, BK, C, GDN, DOT, PREC
                )
                base = newer_starts(counts, t, end, T, own + 1, tile + 1)
                count = tl.load(counts + own.to(tl.int64) * T + t, mask=t < end, other=0)
                weight = slot_weights_tile_t(lam, life, base, count, t, p, end, H * K, K)
                grad = tl.load(
                    do + t.to(tl.int64)[:, None] * H * DV + h * DV + b[None, :],
                    mask=(t < end)[:, None] & (b < DV)[None, :],
                    other=0.0,
                )
                acc = tl.dot((score * weight).to(DOT), grad.to(DOT), acc, input_precision=PREC)
        slot, newest, oldest = slots_at_end(life, first, end, own, C, TILES)
        scale = tl.full([C], 1.0, tl.float32)
        if not GDN:
            scale = tl.exp(tl.load(cg + end - 1) - tl.load(cg + p, mask=p < end, other=0.0))
        grads = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + h) * K * DK * DV
        for n in range(newest, tl.minimum(oldest, K - 1) + 1):
            mine = (slot == n) & (p < end)
            for x in range(0, DK, BK):
                a = x + tl.arange(0, BK)
                key = tl.load(
                    k + p.to(tl.int64)[:, None] * stride_k + a[None, :],
                    mask=mine[:, None] & (a < DK)[None, :],
                    other=0.0,
                )
                state = tl.load(
                    grads + tl.cast(n, tl.int64) * DK * DV + a[:, None] * DV + b[None, :],
                    mask=(a < DK)[:, None] & (b < DV)[None, :],
                    other=0.0,
                )
                key = tl.where(mine, scale, 0.0)[:, None] * key.to(tl.float32)
                acc = tl.dot(key.to(DOT), state, acc, input_precision=PREC)
        tl.store(
            dv + p.to(tl.int64)[:, None] * H * DV + h * DV + b[None, :],
            acc.to(dv.dtype.element_ty),
            mask=(p < end)[:, None] & (b < DV)[None, :],
        )


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
    T,
    H,
    GROUP,
    K,
    block_lo,
    row_lo,
    token_lo,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    block, own = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    part = tl.program_id(2)
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    if first + own * C < end:
        i = tl.arange(0, C)
        p = first + own * C + i
        p64 = p.to(tl.int64)
        a = part * BK + tl.arange(0, BK)
        stride_q = H // GROUP * DK
        dkey = tl.zeros([C, BK], tl.float32)
        for head in range(HEADS):
            h = tl.program_id(1).to(tl.int64) * HEADS + head
            q_h, k_h = q + h // GROUP * DK, k + h // GROUP * DK
            cg_h, counts_h, life_h = cg + h * T, counts + h * TILES * T, life + h * T
            decay_col = tl.zeros([C], tl.float32)
            if not GDN:
                for tile in range(own, TILES):
                    t = first + tile * C + i
                    if first + tile * C < end:
                        x = tl.zeros([C, C], tl.float32)
                        for at_v in range(0, DV, BV):
                            b = at_v + tl.arange(0, BV)
                            value = tl.load(
                                v + p64[:, None] * H * DV + h * DV + b[None, :],
                                mask=(p < end)[:, None] & (b < DV)[None, :],
                                other=0.0,
                            )
                            grad = tl.load(
                                do + t.to(tl.int64)[None, :] * H * DV + h * DV + b[:, None],
                                mask=(t < end)[None, :] & (b < DV)[:, None],
                                other=0.0,
                            )
                            x = tl.dot(value.to(DOT), grad.to(DOT), x, input_precision=PREC)
                        score, decay = pair_tile_t(
                            q_h, k_h, cg_h, cg_h, t, p, end, first, stride_q, 0, DK, BK, C, GDN, DOT, PREC
                        )
                        base = newer_starts(counts_h, t, end, T, own + 1, tile + 1)
                        count = tl.load(counts_h + own.to(tl.int64) * T + t, mask=t < end, other=0)
                        x *= slot_weights_tile_t(lam + h * K, life_h, base, count, t, p, end, H * K, K)
                        decay_col -= tl.sum(x * score, 1)
                        query = tl.load(
                            q_h + t.to(tl.int64)[:, None] * stride_q + a[None, :],
                            mask=(t < end)[:, None] & (a < DK)[None, :],
                            other=0.0,
                        )
                        dkey = tl.dot((x * decay).to(DOT), query.to(DOT), dkey, input_precision=PREC)
                if part > 0:
                    decay_col = tl.zeros([C], tl.float32)
            slot, newest, oldest = slots_at_end(life_h, first, end, own, C, TILES)
            scale = tl.full([C], 1.0, tl.float32)
            if not GDN:
                scale = tl.exp(tl.load(cg_h + end - 1) - tl.load(cg_h + p, mask=p < end, other=0.0))
            scale = tl.where(p < end, scale, 0.0)
            grads = grad_states + ((row + 1 - row_lo).to(tl.int64) * H + h) * K * DK * DV
            last = tl.zeros([C], tl.float32)
            for n in range(newest, tl.minimum(oldest, K - 1) + 1):
                mine = (slot == n) & (p < end)
                y = tl.zeros([C, BK], tl.float32)
                for at_v in range(0, DV, BV):
                    b = at_v + tl.arange(0, BV)
                    value = tl.load(
                        v + p64[:, None] * H * DV + h * DV + b[None, :],
                        mask=mine[:, None] & (b < DV)[None, :],
                        other=0.0,
                    )
                    state = tl.load(
                        grads + tl.cast(n, tl.int64) * DK * DV + a[None, :] * DV + b[:, None],
                        mask=(a < DK)[None, :] & (b < DV)[:, None],
                        other=0.0,
                    )
                    y = tl.dot(value.to(DOT), state, y, input_precision=PREC)
                y *= scale[:, None]
                dkey += y
                if not GDN:
                    key = tl.load(
                        k_h + p64[:, None] * stride_q + a[None, :], mask=mine[:, None] & (a < DK)[None, :], other=0.0
                    )
                    last += tl.sum(y * key.to(tl.float32), 1)
            if not GDN:
                out = (part * H + h) * T + p
                tl.store(dcg + out, decay_col - last, mask=p < end)
                tl.store(ends + out, last, mask=p < end)
        line = p64 * (H // HEADS) + tl.program_id(1)
        if GDN:
            line -= token_lo.to(tl.int64) * H
        tl.store(
            dk + line[:, None] * DK + a[None, :],
            dkey.to(dk.dtype.element_ty),
            mask=(p < end)[:, None] & (a < DK)[None, :],
        )


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
    T,
    H,
    GROUP,
    K,
    block_lo,
    row_lo,
    token_lo,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """(lam_i Qt)^T dO of one block and slot, one tile of [DK, DV] a program."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    n, h = tl.program_id(0), (tl.program_id(1) // K).to(tl.int64)
    i = tl.program_id(1) % K
    block = block_lo + n
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    if i < tl.load(live_count + row * H + h):
        a = tl.program_id(2) // NV * BK + tl.arange(0, BK)
        b = tl.program_id(2) % NV * BV + tl.arange(0, BV)
        stride_q = (H if GDN else H // GROUP) * DK
        q += (h - token_lo.to(tl.int64) * H if GDN else h // GROUP) * DK
        deaths = live_death + (row.to(tl.int64) * H + h) * K
        acc = tl.zeros([BK, BV], tl.float32)
        for tile in range((end - first + C - 1) // C):
            t = first + tile * C + tl.arange(0, C)
            t64 = t.to(tl.int64)
            index = newer_starts(counts + h * TILES * T, t, end, T, 0, tile + 1)
            for newer in range(i):
                index += (tl.load(deaths + newer) > t).to(tl.int32)
            index = tl.minimum(index, K - 1)
            w = tl.load(lam + (t64 * H + h) * K + index, mask=t < end, other=0.0).to(tl.float32)
            if not GDN:
                w *= tl.exp(tl.load(cg + h * T + t, mask=t < end, other=0.0))
            query = tl.load(
                q + t64[None, :] * stride_q + a[:, None], mask=(t < end)[None, :] & (a < DK)[:, None], other=0.0
            )
            grad = tl.load(
                do + (t64[:, None] * H + h) * DV + b[None, :], mask=(t < end)[:, None] & (b < DV)[None, :], other=0.0
            )
            acc = tl.dot((w[None, :] * query.to(tl.float32)).to(DOT), grad.to(DOT), acc, input_precision=PREC)
        out = grad_states + (((row - row_lo).to(tl.int64) * H + h) * K + i) * DK * DV
        tl.store(out + a[:, None] * DV + b[None, :], acc.to(DOT), mask=(a < DK)[:, None] & (b < DV)[None, :])


@triton.jit(do_not_specialize=SIZES)
def decay_gradient_kernel(
    cg,
    rows,  # [PARTS, H, T] fp32: gradient of cg, part of the queries
    cols,  # [PARTS, H, T] fp32: part of the keys
    ends,  # [PARTS, H, T] fp32: summed into the block's last decay
    dkeep,  # [blocks of the window, H] fp32: gradient of exp(cg_C) from the transition
    dg,  # [T, H] out
    blocks,
    block_lo,
    T,
    H,
    ROWS: tl.constexpr,  # parts of `rows`
    PARTS: tl.constexpr,  # parts of `cols` and `ends`
    BLOCK: tl.constexpr,
):
    """Reverse cumsum inside each block: no sum over T of terms that cancel."""
    n, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * (block_lo + n)), tl.load(blocks + 4 * (block_lo + n) + 1)
    t = first + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(ROWS):
        x += tl.load(rows + (part * H + h) * T + t, mask=t < end, other=0.0)
    for part in tl.static_range(PARTS):
        x += tl.load(cols + (part * H + h) * T + t, mask=t < end, other=0.0)
        total += tl.load(ends + (part * H + h) * T + t, mask=t < end, other=0.0)
    last = tl.sum(total, 0) + tl.load(dkeep + n * H + h) * tl.exp(tl.load(cg + h * T + end - 1))
    x += tl.where(t == end - 1, last, 0.0)
    x = tl.cumsum(x, 0, reverse=True)
    tl.store(dg + t.to(tl.int64) * H + h, x.to(dg.dtype.element_ty), mask=t < end)
