"""Kernels of the gated norm of each head, with Mamba-2's skip before it; fp32 between a load and a store.

A program owns some tokens of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_inputs import load_wide, store_rows


@triton.jit
def normed(x, skip, gate, b_D, o_t, o_c, m, row_t, gate_t, eps, DV: tl.constexpr, HAS_SKIP: tl.constexpr,
           GATE_FIRST: tl.constexpr):  # fmt: skip
    """The input with its skip, the skip, the gate, what is normed and 1 / RMS of tokens o_t."""
    b_x, b_gate = load_wide(x, o_t, row_t, o_c, m), load_wide(gate, o_t, gate_t, o_c, m)
    b_skip = tl.zeros_like(b_x)
    if HAS_SKIP:
        b_skip += load_wide(skip, o_t, row_t, o_c, m)
        b_x += b_D * b_skip
    b_u = b_x
    if GATE_FIRST:
        b_u = b_x * b_gate * tl.sigmoid(b_gate)
    b_rstd = 1 / tl.sqrt(tl.sum(b_u * b_u, 1) / DV + eps)
    return b_x, b_skip, b_gate, b_u, b_rstd[:, None]


@triton.jit(do_not_specialize=["T"])
def norm_forward_kernel(
    x,  # [B, T, H * DV]
    skip,  # [B, T, H * DV], or unused
    D,  # fp32 [H], or unused
    gate,  # [B, T, H * DV], rows `gate_t` apart
    weight,  # [DV]
    y,  # [B, T, H * DV] out
    T, gate_b, gate_t, eps,
    H: tl.constexpr, DV: tl.constexpr, HAS_SKIP: tl.constexpr, GATE_FIRST: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_t, o_v = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BV)
    m_c, o_c = o_v < DV, i_h * DV + o_v
    m = (o_t < T)[:, None] & m_c[None, :]
    row = i_b * T * H * DV
    b_D = 0.0
    if HAS_SKIP:
        b_D = tl.load(D + i_h)
    _, _, b_gate, b_u, b_rstd = normed(
        x + row, skip + row, gate + i_b * gate_b, b_D, o_t, o_c, m, H * DV, gate_t, eps, DV, HAS_SKIP, GATE_FIRST
    )
    b_y = b_u * b_rstd * tl.load(weight + o_v, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if not GATE_FIRST:
        b_y *= b_gate * tl.sigmoid(b_gate)
    store_rows(y + row, o_t, H * DV, o_c, b_y, m)


@triton.jit(do_not_specialize=["T"])
def norm_backward_kernel(
    x, skip, D, gate, weight,
    dy, dx,  # [B, T, H * DV]; dx is out
    dskip,  # [B, T, H * DV] out, or unused
    dgate,  # [B, T, H * DV] out, rows `dgate_t` apart
    dweight,  # fp32 [B * programs, H, DV] out: sums over a program's tokens
    dD,  # fp32 [B * programs, H] out, or unused
    T, gate_b, gate_t, dgate_b, dgate_t, eps,
    H: tl.constexpr, DV: tl.constexpr, HAS_SKIP: tl.constexpr, GATE_FIRST: tl.constexpr,
    TILES: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_c, o_c = o_v < DV, i_h * DV + o_v
    row = i_b * T * H * DV
    b_w = tl.load(weight + o_v, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_dw, b_dD = tl.zeros([BV], tl.float32), tl.zeros([BT], tl.float32)
    b_D = 0.0
    if HAS_SKIP:
        b_D = tl.load(D + i_h)
    for i in range(TILES):
        o_t = (tl.program_id(1) * TILES + i) * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_x, b_skip, b_gate, b_u, b_rstd = normed(
            x + row, skip + row, gate + i_b * gate_b, b_D, o_t, o_c, m, H * DV, gate_t, eps, DV, HAS_SKIP, GATE_FIRST
        )
        b_dy = load_wide(dy + row, o_t, H * DV, o_c, m)
        b_n, b_sigmoid = b_u * b_rstd, tl.sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        b_dsilu = b_sigmoid * (1 + b_gate * (1 - b_sigmoid))
        b_dn = b_dy
        if not GATE_FIRST:
            b_dn = b_dy * b_silu
        b_dw += tl.sum(b_dn * b_n, 0)
        b_dn = b_dn * b_w
        b_dx = b_rstd * (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / DV)[:, None])
        if GATE_FIRST:
            b_dgate = b_dx * b_x * b_dsilu
            b_dx = b_dx * b_silu
        else:
            b_dgate = b_dy * b_n * b_w * b_dsilu
        store_rows(dgate + i_b * dgate_b, o_t, dgate_t, o_c, b_dgate, m)
        store_rows(dx + row, o_t, H * DV, o_c, b_dx, m)
        if HAS_SKIP:
            store_rows(dskip + row, o_t, H * DV, o_c, b_dx * b_D, m)
            b_dD += tl.sum(b_dx * b_skip, 1)
    i_p = (i_b * tl.num_programs(1) + tl.program_id(1)) * H + i_h
    tl.store(dweight + i_p * DV + o_v, b_dw, mask=m_c)
    if HAS_SKIP:
        tl.store(dD + i_p, tl.sum(b_dD, 0))
