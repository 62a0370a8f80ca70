"""The open state of detection, S, as a chunk meets it: from the tokens of the slot, or from memory.

Most slots began a few chunks before. Their S^T k_t needs no state: Mamba-2's is a sum over the slot's tokens of
(k_t . k_l) (v_t . v_l), and Gated DeltaNet's of (k_t . k_l) u_l, where U = inv B (V - exp(cg) K S) is what a chunk in
fact wrote: it stays in a ring of the last NEAR + 1 chunks. A slot that began earlier has a state in memory, [DK, DV],
that each chunk reads once and then decays and adds ek^T V (U) to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import columns_of, decays_of, exact_dot, load_tile, raw_columns, raw_rows, rows_of, store_rows


@triton.jit
def ring_size(DV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr):
    """Numbers of one shard and head: U of NEAR + 1 chunks, [BT, DV] each, and scratch for products of two chunks."""
    return ((NEAR + 1) * DV + NEAR * BT) * BT


@triton.jit
def ring_slot(first, BT: tl.constexpr, NEAR: tl.constexpr):
    """Place of a chunk among the last NEAR + 1 of a segment; its chunks lie BT tokens apart."""
    return first // BT % (NEAR + 1)


@triton.jit
def read_state(
    p_k, p_s, o_t, o_v, end, stride_k, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """K S of one tile of value dims: fp32 [BT, BV]."""
    b_ks = tl.zeros([BT, BV], tl.float32)
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_s = load_tile(p_s, o_k, o_v, DK, DV)
        b_ks = exact_dot(raw_rows(p_k, o_t, o_k, end, stride_k, DK), b_s, b_ks, PREC)  # [BT, BK] @ [BK, BV] -> [BT, BV]
    return b_ks


@triton.jit
def products_with_past(
    x, b_x, o_t, o_l, end, stride, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x[t] . x[l] over all dims: fp32 [BT, BT]; `b_x` has the first BD of x[t]."""
    b_xx = tl.dot(b_x, raw_columns(x, o_l, tl.arange(0, BD), end, stride, D), input_precision=PREC)
    for i_d in range(BD, D, BD):
        o_d = i_d + tl.arange(0, BD)
        b_y = raw_columns(x, o_l, o_d, end, stride, D)
        b_xx = tl.dot(raw_rows(x, o_t, o_d, end, stride, D), b_y, b_xx, input_precision=PREC)
    return b_xx  # [BT, BD] @ [BD, BT] -> [BT, BT]


@triton.jit
def store_past_products(
    p_k, p_g, p_kk, o_t, first, end, back, stride_k, DK: tl.constexpr, PK: tl.constexpr, BT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """k_t . k_l, decayed from l to the chunk's start, with the `back` chunks before: fp32 [back, BT, BT]."""
    o_i = tl.arange(0, BT)
    b_k = raw_rows(p_k, o_t, tl.arange(0, PK), end, stride_k, DK)
    across = 0.0
    i_p = 1
    while i_p <= back:
        begin = first - i_p * BT
        b_g, g_end = tl.load(p_g + begin + o_i), tl.load(p_g + begin + BT - 1)
        b_kk = products_with_past(p_k, b_k, o_t, begin + o_i, end, stride_k, DK, PK, BT, PREC)
        store_rows(p_kk + (i_p - 1) * BT * BT, b_kk * tl.exp(g_end - b_g + across)[None, :], o_i, o_i, BT, BT, BT)
        across += g_end
        i_p += 1


@triton.jit
def read_past(
    p_kk, p_u, o_v, first, back, DV: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """K S of one tile of value dims [BT, BV], S = ek^T U of the `back` chunks before."""
    o_i = tl.arange(0, BT)
    b_ks = tl.zeros([BT, BV], tl.float32)
    i_p = 1
    while i_p <= back:
        b_u = rows_of(p_u + ring_slot(first - i_p * BT, BT, NEAR) * BT * DV, o_i, o_v, BT, DV, DV)
        b_kk = rows_of(p_kk + (i_p - 1) * BT * BT, o_i, o_i, BT, BT, BT)
        b_ks = tl.dot(b_kk, b_u, b_ks, input_precision=PREC)  # [BT, BT] @ [BT, BV] -> [BT, BV]
        i_p += 1
    return b_ks


@triton.jit
def past_products(
    p_k, p_v, p_g, b_before, o_t, since, first, end, back, stride_k, stride_v, DK: tl.constexpr, DV: tl.constexpr,
    PK: tl.constexpr, PV: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """v_t . S^T k_t [BT] of Mamba-2 from the tokens of the open slot in the `back` chunks before: no state."""
    o_i = tl.arange(0, BT)
    b_k = raw_rows(p_k, o_t, tl.arange(0, PK), end, stride_k, DK)
    b_v = raw_rows(p_v, o_t, tl.arange(0, PV), end, stride_v, DV)
    b_sum = tl.zeros([BT, BT], tl.float32)
    across = 0.0
    i_p = 1
    while i_p <= back:
        begin = first - i_p * BT
        b_g, g_end = tl.load(p_g + begin + o_i), tl.load(p_g + begin + BT - 1)
        b_kk = products_with_past(p_k, b_k, o_t, begin + o_i, end, stride_k, DK, PK, BT, PREC)
        b_vv = products_with_past(p_v, b_v, o_t, begin + o_i, end, stride_v, DV, PV, BT, PREC)
        b_decay = tl.where(o_i - i_p * BT >= since, tl.exp(g_end - b_g + across), 0.0)
        b_sum += b_decay[None, :] * b_kk * b_vv
        across += g_end
        i_p += 1
    return tl.exp(b_before) * tl.sum(b_sum, 1)


@triton.jit
def state_products(
    p_k, p_v, p_s, b_before, o_t, end, stride_k, stride_v, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """v_t . S^T k_t [BT] of Mamba-2 from the state S."""
    b_inner = tl.zeros([BT], tl.float32)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_ks = read_state(p_k, p_s, o_t, o_v, end, stride_k, DK, DV, BK, BV, BT, PREC)
        b_inner += tl.sum(b_ks * rows_of(p_v, o_t, o_v, end, stride_v, DV), 1)
    return tl.exp(b_before) * b_inner


@triton.jit
def delta_products(
    p_k, p_v, p_effect, p_g, p_u, p_s, b_g, b_before, o_t, held, first, end, back, stride_k, stride_v, stride_e,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr, BT: tl.constexpr,
    NEAR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of Gated DeltaNet's open state as the chunk begins, S: v_t . S^T k_t [BT], and |S^T k_t|^2 [BT] with the chunk's
    own writes before t. K S goes to the chunk's place in the ring, see `write_chunk`.
    """
    p_kk = p_u + (NEAR + 1) * BT * DV
    back = tl.where(held > 0, 0, back)
    store_past_products(p_k, p_g, p_kk, o_t, first, end, back, stride_k, DK, PK, BT, PREC)
    tl.debug_barrier()
    o_i = tl.arange(0, BT)
    b_effect = rows_of(p_effect, o_t, o_i, end, stride_e, BT)
    m_diagonal = o_i[None, :] == o_i[:, None]
    b_through = tl.where(m_diagonal, tl.exp(b_before)[:, None], 0.0) - b_effect * tl.exp(b_g)[None, :]
    b_inner = tl.zeros([BT], tl.float32)
    b_read2 = tl.zeros([BT], tl.float32)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        if held > 0:
            b_ks = read_state(p_k, p_s, o_t, o_v, end, stride_k, DK, DV, BK, BV, BT, PREC)
        else:
            b_ks = read_past(p_kk, p_u, o_v, first, back, DV, BV, BT, NEAR, PREC)
        store_rows(p_u + ring_slot(first, BT, NEAR) * BT * DV, b_ks, o_i, o_v, BT, DV, DV)
        b_read = tl.dot(b_through, b_ks, input_precision=PREC)  # S^T k: [BT, BT] @ [BT, BV] -> [BT, BV]
        b_v = raw_rows(p_v, o_t, o_v, end, stride_v, DV)
        b_inner += tl.sum(b_read * b_v.to(tl.float32), 1)
        b_read = exact_dot(b_effect, b_v, b_read, PREC)  # and what the chunk wrote: [BT, BT] @ [BT, BV] -> [BT, BV]
        b_read2 += tl.sum(b_read * b_read, 1)
    return b_inner, b_read2


@triton.jit
def write_chunk(
    p_v, p_inv, p_u, b_g, b_write, carried, since, first, end, stride_v, stride_e, DV: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """U = inv B (V - exp(g) K S) of Gated DeltaNet, in place of K S: the chunk adds ek^T U to the open state, which
    decays over it. V of the tokens from `since` on, S where carried > 0."""
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    p_u += ring_slot(first, BT, NEAR) * BT * DV
    mine = (o_i >= since) & (o_t < end)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_u = tl.where(mine[:, None], rows_of(p_v, o_t, o_v, end, stride_v, DV), 0.0)
        if carried > 0:
            b_ks = rows_of(p_u, o_i, o_v, BT, DV, DV)
            b_u -= tl.where(o_t < end, tl.exp(b_g), 0.0)[:, None] * b_ks
        b_inv = rows_of(p_inv, o_t, o_i, end, stride_e, BT)
        b_u = tl.dot(b_inv, b_write[:, None] * b_u, input_precision=PREC)  # [BT, BT] @ [BT, BV] -> [BT, BV]
        tl.debug_barrier()  # all have read K S
        store_rows(p_u, b_u, o_i, o_v, BT, DV, DV)


@triton.jit
def add_chunk(
    p_k, p_v, p_g, p_u, p_s, carried, since, first, end, stride_k, stride_v, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The open state S at a chunk's end, in place: the tokens from `since` on, and S if it is `carried`. Its |S|^2."""
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    m_t = o_t < end
    g_end = tl.load(p_g + end - 1)
    b_to_end = tl.where(m_t, tl.exp(g_end - decays_of(p_g, o_t, end)), 0.0)
    b_norm = tl.zeros([BK], tl.float32)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        if GDN:
            b_v = rows_of(p_u + ring_slot(first, BT, NEAR) * BT * DV, o_i, o_v, BT, DV, DV)
        else:
            b_v = raw_rows(p_v, o_t, o_v, end, stride_v, DV)
            b_v = tl.where((o_i >= since)[:, None], b_v, 0.0)
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            b_k = columns_of(p_k, o_t, o_k, end, stride_k, DK) * b_to_end[None, :]
            p_tile = p_s + o_k[:, None] * DV + o_v[None, :]
            m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            b_s = tl.zeros([BK, BV], tl.float32)
            if carried:
                b_s += tl.exp(g_end) * tl.load(p_tile, mask=m_s, other=0.0)
            b_s = exact_dot(b_k, b_v, b_s, PREC)  # [BK, BT] @ [BT, BV] -> [BK, BV]
            tl.store(p_tile, b_s, mask=m_s)
            b_norm += tl.sum(b_s * b_s, 1)
    return tl.sum(b_norm, 0)


@triton.jit
def keep_state(
    p_k, p_v, p_g, p_u, p_s,
    opened,  # first token of the open slot
    carried,  # 1: the state is that of the slot before this chunk
    first, end, stride_k, stride_v,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr,
    GDN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The state after a chunk, in place, of a slot that the next chunk is too far from to do without; |S|^2."""
    norm = tl.zeros([], tl.float32)
    i_p = tl.where(carried > 0, 0, NEAR)  # chunks back to begin with
    while i_p >= 0:
        begin = first - i_p * BT
        norm = add_chunk(
            p_k, p_v, p_g, p_u, p_s, begin > opened, opened - begin, begin, tl.minimum(begin + BT, end), stride_k,
            stride_v, DK, DV, BK, BV, BT, NEAR, GDN, PREC,
        )  # fmt: skip
        tl.debug_barrier()  # it is read in another arrangement
        i_p -= 1
    return norm
