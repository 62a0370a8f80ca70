"""The output kernel, parallel over query tiles, and the tiles that the backward kernels share with it.

With blocks of tokens, slots by recency and the backbone's transition Phi (see README.md):

    O    = (At .* M) V + sum_i diag(lam[t, idx_t(i)]) Qt S_i
    S'_m = Phi sum_{i -> m} S_i + Kh[j in m]^T V[j in m]

Mamba-2 forms At, Qt and Kh from q, k and the decay on the fly; Gated DeltaNet reads what the chunk-local stage wrote
(`triton_local.py`, `triton_compose.py`), with Phi = keep * I - R. States are carried in fp32; what the matrix units
read is rounded to `DOT` once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import load_tile, raw_columns, raw_rows


@triton.jit
def token_products(
    p_x, p_y, o_x, o_y, end, stride, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """x[o_x] . y[o_y] over all D dims, operands rounded to DOT: fp32 [BT, BT]."""
    b_xy = tl.zeros([o_x.shape[0], o_y.shape[0]], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_x = raw_rows(p_x, o_x, o_d, end, stride, D)
        b_y = raw_columns(p_y, o_y, o_d, end, stride, D)
        b_xy = tl.dot(b_x.to(DOT), b_y.to(DOT), b_xy, input_precision=PREC)  # [BX, BD] @ [BD, BY] -> [BX, BY]
    return b_xy


@triton.jit
def pair_tile(
    p_q, p_k, p_g, p_at,  # at the head; At is the chunk-local stage's
    o_t,  # [BT] queries
    o_p,  # [BT] keys
    end, first, stride_q, stride_at,
    DK: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """At[t, p] fp32 [BT, BT], zero where p > t or outside the block; and the decay D[t, p] (Mamba-2, else ones)."""
    causal = (o_p[None, :] <= o_t[:, None]) & (o_t < end)[:, None]
    if GDN:
        p_pair = p_at + first.to(tl.int64) * stride_at  # and 32-bit offsets: half the registers of pointers
        o_pair = ((o_t - first) * stride_at)[:, None] + (o_p - first)[None, :]
        b_at = tl.load(p_pair + o_pair, mask=causal, other=0.0).to(tl.float32)
        b_decay = tl.where(causal, 1.0, 0.0)
    else:
        b_at = token_products(p_q, p_k, o_t, o_p, end, stride_q, DK, BK, BT, DOT, PREC)
        b_gt, b_gp = tl.load(p_g + o_t, mask=o_t < end, other=0.0), tl.load(p_g + o_p, mask=o_p < end, other=0.0)
        b_decay = tl.exp(tl.where(causal, b_gt[:, None] - b_gp[None, :], float("-inf")))
        b_at = b_at * b_decay
    return b_at, b_decay


@triton.jit
def slot_weights_tile(
    p_lam,  # [T, H, K], at the head
    b_death,  # [BT] death of the start at each key, 0 where there is none
    b_newer,  # [BT] live starts newer than the tile at each query
    o_t, o_p, first, end, stride_lam, K,
):  # fmt: skip
    """M[t, p] = lam[t, slot_t(p)], zero where p > t; and live starts from the tile's first on at each query."""
    causal = (o_p[None, :] <= o_t[:, None]) & (o_t < end)[:, None]
    b_alive = ((b_death[None, :] > o_t[:, None]) & causal).to(tl.int32)
    b_slot = b_newer[:, None] + tl.cumsum(b_alive, 1, reverse=True) - b_alive
    b_slot = tl.minimum(b_slot, K - 1)
    p_block = p_lam + first.to(tl.int64) * stride_lam
    b_lam = tl.load(p_block + (((o_t - first) * stride_lam)[:, None] + b_slot), mask=causal, other=0.0)
    return b_lam.to(tl.float32), b_newer + tl.sum(b_alive, 1)


@triton.jit
def starts_in_block(p_counts, o_t, first, end, T, tiles, BT: tl.constexpr):
    """Live starts at t in the first `tiles` tiles of the block (none after its own): int32 [len(o_t)]."""
    b_newer = tl.zeros_like(o_t)
    for i_x in range(tiles):
        m_t = (o_t < end) & (o_t >= first + i_x * BT)
        b_newer += tl.load(p_counts + tl.cast(i_x, tl.int64) * T + o_t, mask=m_t, other=0)
    return b_newer


@triton.jit(do_not_specialize=SIZES)
def read_slots_kernel(
    q,  # [T, G, DK] (Mamba-2) or Qt [T, H, DK]
    cg,  # [H, T]
    lam,  # [T, H, K]
    counts,  # [H, TILES, T]
    blocks,  # [n, 4]
    live_death,
    live_count,  # [rows, H(, K)]
    snap,  # [rows of the window, H, K, DK, DV]
    read,  # [tokens of the window, H, DV] fp32 out
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    BQ: tl.constexpr,  # queries of a program: one tile or two
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What reading the slots before the block adds to the output: sum_i lam_i (Qt S_i)."""
    PARTS: tl.constexpr = TILES * BT // BQ
    i_t, i_q = block_lo + tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_h, i_v = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    row = tl.load(blocks + 4 * i_t + 2)
    if first + i_q * BQ < end:
        o_t, o_v = first + i_q * BQ + tl.arange(0, BQ), i_v * BV + tl.arange(0, BV)
        skip = token_lo.to(tl.int64) * H
        stride_q = (H if GDN else H // GROUP) * DK
        p_q = q + (i_h - skip if GDN else i_h // GROUP) * DK
        p_lam = lam + i_h * K
        b_newer = starts_in_block(counts + i_h * TILES * T, o_t, first, end, T, (i_q + 1) * BQ // BT, BT)
        m = tl.load(live_count + row * H + i_h)
        p_death = live_death + (row.to(tl.int64) * H + i_h) * K
        p_s = snap + ((row - row_lo).to(tl.int64) * H + i_h) * K * DK * DV
        b_scale = tl.full([BQ], 1.0, tl.float32)
        if not GDN:
            b_scale = tl.exp(tl.load(cg + i_h * T + o_t, mask=o_t < end, other=0.0))
        b_q = raw_rows(p_q, o_t, tl.arange(0, BK), end, stride_q, DK)
        b_o = tl.zeros([BQ, BV], tl.float32)
        death = tl.load(p_death, mask=m > 0, other=0)
        for i_s in range(m):
            b_slot = tl.minimum(b_newer, K - 1)
            b_newer += (death > o_t).to(tl.int32)
            death = tl.load(p_death + i_s + 1, mask=i_s + 1 < m, other=0)  # one ahead, for its latency
            b_lam = tl.load(p_lam + o_t.to(tl.int64) * (H * K) + b_slot, mask=o_t < end, other=0.0)
            b_y = tl.zeros([BQ, BV], tl.float32)  # both operands as they lie in shared memory, the weights afterwards
            for i_k in range(0, DK, BK):
                o_k = i_k + tl.arange(0, BK)
                if DK > BK:
                    b_q = raw_rows(p_q, o_t, o_k, end, stride_q, DK)
                b_s = load_tile(p_s + tl.cast(i_s, tl.int64) * DK * DV, o_k, o_v, DK, DV)
                b_y = tl.dot(b_q.to(DOT), b_s, b_y, input_precision=PREC)  # [BQ, BK] @ [BK, BV] -> [BQ, BV]
            b_o += (b_scale * b_lam.to(tl.float32))[:, None] * b_y
        p_read = read + ((o_t - token_lo).to(tl.int64) * H + i_h)[:, None] * DV + o_v[None, :]
        tl.store(p_read, b_o, mask=(o_t < end)[:, None] & (o_v < DV)[None, :])


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    q,  # [T, G, DK] (Mamba-2 only)
    k,
    v,  # [T, H, DV]
    cg,  # [H, T]
    at,  # [T, H, TILES * BT] (Gated DeltaNet only)
    lam,  # [T, H, K]
    life,  # [H, T]
    blocks,  # [n, 4]
    read,  # [tokens of the window, H, DV] fp32: what `read_slots_kernel` found
    o,  # [T, H, DV] out
    T, H, GROUP, K, block_lo, row_lo, token_lo,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    GDN: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The pairs inside the block, and their sum with what reading the slots gave."""
    i_t, i_c = block_lo + tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h, i_v = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    if first + i_c * BT < end:
        o_t = first + i_c * BT + tl.arange(0, BT)
        o_v = i_v * BV + tl.arange(0, BV)
        skip = token_lo.to(tl.int64) * H
        stride_q, stride_v, i_g = H // GROUP * DK, H * DV, i_h // GROUP
        p_q, p_k, p_v = q + i_g * DK, k + i_g * DK, v + i_h * DV
        p_at, p_lam = at + (i_h - skip) * TILES * BT, lam + i_h * K
        p_g, p_life = cg + i_h * T, life + i_h * T
        m_o = (o_t < end)[:, None] & (o_v < DV)[None, :]
        b_o = tl.load(
            read + ((o_t - token_lo).to(tl.int64) * H + i_h)[:, None] * DV + o_v[None, :], mask=m_o, other=0.0
        )
        b_newer = tl.zeros([BT], tl.int32)
        for back in tl.range(0, i_c + 1, num_stages=1):  # the next tiles ahead of time do not fit in registers
            i_x = i_c - back
            o_p = first + i_x * BT + tl.arange(0, BT)
            b_death = tl.load(p_life + o_p, mask=o_p < end, other=0)
            b_at, _ = pair_tile(
                p_q, p_k, p_g, p_at, o_t, o_p, end, first, stride_q, H * TILES * BT, DK, BK, BT, GDN, DOT, PREC
            )
            b_lam, b_newer = slot_weights_tile(p_lam, b_death, b_newer, o_t, o_p, first, end, H * K, K)
            b_v = raw_rows(p_v, o_p, o_v, end, stride_v, DV)
            # [BT, BT] @ [BT, BV] -> [BT, BV]
            b_o = tl.dot((b_at * b_lam).to(DOT), b_v.to(DOT), b_o, input_precision=PREC)
        p_o = o + o_t.to(tl.int64)[:, None] * stride_v + i_h * DV + o_v[None, :]
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_o)
