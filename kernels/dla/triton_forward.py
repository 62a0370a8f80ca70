"""The output kernel, parallel over query tiles, and the tiles that the backward kernels share with it.

With blocks of tokens, slots by recency and the backbone's transition Phi (see README.md):

    O    = (At .* M) V + sum_i diag(lam[t, idx_t(i)]) Qt S_i
    S'_m = Phi sum_{i -> m} S_i + Kh[j in m]^T V[j in m]

Mamba-2 forms At, Qt and Kh from q, k and the decay on the fly; Gated DeltaNet (blocks of one tile) reads what the
chunk-local stage wrote (`triton_local.py`), with Phi = keep * I - R. States are carried in fp32; what the matrix units
read is rounded to `DOT` once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES


@triton.jit
def pair_tile(
    q,  # at the head
    k,
    cg,
    at,  # At of the chunk-local stage, at the head
    t,  # [C] queries
    p,  # [C] keys
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
    """At[t, p] fp32 [C, C], zero where p > t or outside the block; and the decay D[t, p] (Mamba-2, else ones)."""
    causal = (p[None, :] <= t[:, None]) & (t < end)[:, None]
    if GDN:
        score = tl.load((at + t.to(tl.int64) * stride_at)[:, None] + (p - first)[None, :], mask=causal, other=0.0).to(
            tl.float32
        )
        decay = tl.where(causal, 1.0, 0.0)
    else:
        score = tl.zeros([C, C], tl.float32)
        for x in range(0, DK, BK):
            a = x + tl.arange(0, BK)
            qt = tl.load(
                (q + t.to(tl.int64) * stride_q)[:, None] + a[None, :],
                mask=(t < end)[:, None] & (a < DK)[None, :],
                other=0.0,
            )
            kt = tl.load(
                (k + p.to(tl.int64) * stride_q)[None, :] + a[:, None],
                mask=(p < end)[None, :] & (a < DK)[:, None],
                other=0.0,
            )
            score = tl.dot(qt.to(DOT), kt.to(DOT), score, input_precision=PREC)
        gap = tl.load(cg + t, mask=t < end, other=0.0)[:, None] - tl.load(cg + p, mask=p < end, other=0.0)[None, :]
        decay = tl.exp(tl.where(causal, gap, float("-inf")))
        score = score * decay
    return score, decay


@triton.jit
def slot_weights_tile(
    lam,  # [T, H, K], at the head
    life,  # [H, T], at the head
    base,  # [C] live starts newer than the tile at each query
    count,  # [C] live starts in the tile at each query
    t,
    p,
    end,
    stride_lam,
    K,
):
    """M[t, p] = lam[t, slot_t(p)] (zero where p > t), and Z[t, p] (int32): is p a start that lives at t?"""
    death = tl.load(life + p, mask=p < end, other=0)
    causal = (p[None, :] <= t[:, None]) & (t < end)[:, None]
    alive = ((death[None, :] > t[:, None]) & causal).to(tl.int32)
    slot = base[:, None] + count[:, None] - tl.cumsum(alive, 1)
    slot = tl.minimum(tl.maximum(slot, 0), K - 1)
    weight = tl.load((lam + t.to(tl.int64) * stride_lam)[:, None] + slot, mask=causal, other=0.0)
    return weight.to(tl.float32), alive


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q,  # [T, G, DK] (Mamba-2) or Qt [T, H, DK]
    k,  # [T, G, DK] (Mamba-2 only)
    v,  # [T, H, DV]
    cg,  # [H, T]
    at,  # [T, H, C] (Gated DeltaNet only)
    lam,  # [T, H, K]
    life,  # [H, T]
    counts,  # [H, TILES, T]
    blocks,  # [n, 4]
    live_death,
    live_count,  # [rows, H(, K)]
    snap,  # [rows of the window, H, K, DK, DV]
    o,  # [T, H, DV] out
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
    h, v_at = tl.program_id(1).to(tl.int64), tl.program_id(2) * BV
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    if first + own * C < end:
        t = first + own * C + tl.arange(0, C)
        b = v_at + tl.arange(0, BV)
        skip = token_lo.to(tl.int64) * H
        g = h - skip if GDN else h // GROUP
        stride_q, stride_v, stride_lam = (H if GDN else H // GROUP) * DK, H * DV, H * K
        q += g * DK
        k += g * DK
        v += h * DV
        at += (h - skip) * C
        lam += h * K
        cg += h * T
        counts += h * TILES * T
        life += h * T
        acc = tl.zeros([C, BV], tl.float32)
        base = tl.zeros([C], tl.int32)
        for back in range(own + 1):
            tile = own - back
            p = first + tile * C + tl.arange(0, C)
            score, _ = pair_tile(q, k, cg, at, t, p, end, first, stride_q, H * C, DK, BK, C, GDN, DOT, PREC)
            count = tl.load(counts + tile.to(tl.int64) * T + t, mask=t < end, other=0)
            weight, _ = slot_weights_tile(lam, life, base, count, t, p, end, stride_lam, K)
            value = tl.load(
                (v + p.to(tl.int64) * stride_v)[:, None] + b[None, :],
                mask=(p < end)[:, None] & (b < DV)[None, :],
                other=0.0,
            )
            acc = tl.dot((score * weight).to(DOT), value.to(DOT), acc, input_precision=PREC)
            base += count
        m = tl.load(live_count + row * H + h)
        deaths = live_death + (row.to(tl.int64) * H + h) * K
        states = snap + ((row - row_lo).to(tl.int64) * H + h) * K * DK * DV
        scale = tl.full([C], 1.0, tl.float32)
        if not GDN:
            scale = tl.exp(tl.load(cg + t, mask=t < end, other=0.0))
        for i in range(m):
            index = tl.minimum(base, K - 1)
            w = scale * tl.load(lam + t.to(tl.int64) * stride_lam + index, mask=t < end, other=0.0).to(tl.float32)
            for x in range(0, DK, BK):
                a = x + tl.arange(0, BK)
                query = tl.load(
                    (q + t.to(tl.int64) * stride_q)[:, None] + a[None, :],
                    mask=(t < end)[:, None] & (a < DK)[None, :],
                    other=0.0,
                )
                state = tl.load(
                    states + tl.cast(i, tl.int64) * DK * DV + a[:, None] * DV + b[None, :],
                    mask=(a < DK)[:, None] & (b < DV)[None, :],
                    other=0.0,
                )
                acc = tl.dot((w[:, None] * query.to(tl.float32)).to(DOT), state, acc, input_precision=PREC)
            base += (tl.load(deaths + i) > t).to(tl.int32)
        tl.store(
            o + t.to(tl.int64)[:, None] * stride_v + h * DV + b[None, :],
            acc.to(o.dtype.element_ty),
            mask=(t < end)[:, None] & (b < DV)[None, :],
        )
