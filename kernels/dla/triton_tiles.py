"""Loads and products of tiles that several kernels share.

Dim a of token t of one head is at `x + t * stride + a`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(x, o_t, o_d, end, stride, D: tl.constexpr):
    """x[o_t, o_d] as fp32 [len(o_t), len(o_d)], zero from token `end` and dim D on."""
    return raw_rows(x, o_t, o_d, end, stride, D).to(tl.float32)


@triton.jit
def columns_of(x, o_t, o_d, end, stride, D: tl.constexpr):
    """x[o_t, o_d] transposed: fp32 [len(o_d), len(o_t)]."""
    return raw_columns(x, o_t, o_d, end, stride, D).to(tl.float32)


@triton.jit
def raw_rows(x, o_t, o_d, end, stride, D: tl.constexpr):
    """`rows_of` in x's dtype: 16-bit operands multiply exactly into fp32."""
    m_x = (o_t < end)[:, None] & (o_d < D)[None, :]
    return tl.load(x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def raw_columns(x, o_t, o_d, end, stride, D: tl.constexpr):
    """`columns_of` in x's dtype."""
    m_x = (o_t < end)[None, :] & (o_d < D)[:, None]
    return tl.load(x + o_t.to(tl.int64)[None, :] * stride + o_d[:, None], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, b_x, o_t, o_d, end, stride, D: tl.constexpr):
    """x[o_t, o_d] = b_x."""
    p_cell = p_x + o_t.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_cell, b_x.to(p_x.dtype.element_ty), mask=(o_t < end)[:, None] & (o_d < D)[None, :])


@triton.jit
def slots_wanted(blocks, i_t, slots, ENDS: tl.constexpr):
    """`slots` after block i_t; without ENDS none after a segment's last block."""
    if not ENDS:
        slots = tl.where(tl.load(blocks + 4 * i_t + 3) != 0, 0, slots)
    return slots


@triton.jit
def load_tile(p_x, o_r, o_c, ROWS: tl.constexpr, COLS: tl.constexpr):
    """x[o_r, o_c] of a contiguous [ROWS, COLS] matrix, zero outside: [len(o_r), len(o_c)]."""
    m_x = (o_r < ROWS)[:, None] & (o_c < COLS)[None, :]
    return tl.load(p_x + o_r[:, None] * COLS + o_c[None, :], mask=m_x, other=0.0)


@triton.jit
def load_tile_t(p_x, o_r, o_c, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`load_tile` transposed: [len(o_c), len(o_r)]."""
    m_x = (o_r < ROWS)[None, :] & (o_c < COLS)[:, None]
    return tl.load(p_x + o_r[None, :] * COLS + o_c[:, None], mask=m_x, other=0.0)


@triton.jit
def bf16_terms(b_x):
    """An fp32 tile as three bf16 terms, the largest first."""
    b_high = b_x.to(tl.bfloat16)
    b_rest = b_x - b_high.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    return b_high, b_middle, (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def exact_dot(b_x, b_y, b_xy, PREC: tl.constexpr):
    """b_xy + b_x @ b_y to fp32 accuracy. An operand in bf16 is exact: the other one is cut into three bf16 terms."""
    if b_x.dtype == tl.bfloat16:
        b_high, b_middle, b_low = bf16_terms(b_y)
        b_xy = tl.dot(b_x, b_high, tl.dot(b_x, b_middle, tl.dot(b_x, b_low, b_xy)))
    elif b_y.dtype == tl.bfloat16:
        b_high, b_middle, b_low = bf16_terms(b_x)
        b_xy = tl.dot(b_high, b_y, tl.dot(b_middle, b_y, tl.dot(b_low, b_y, b_xy)))
    else:
        b_xy = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_xy, input_precision=PREC)
    return b_xy


@triton.jit
def products(x, y, o_t, end, stride, D: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr):
    """x[t] . y[p] over all dims: fp32 [BT, BT]."""
    b_xy = tl.zeros([BT, BT], tl.float32)
    for i_d in range(0, D, BK):
        o_d = i_d + tl.arange(0, BK)
        b_x = raw_rows(x, o_t, o_d, end, stride, D)
        b_y = raw_columns(y, o_t, o_d, end, stride, D)
        b_xy = tl.dot(b_x, b_y, b_xy, input_precision=PREC)  # [BT, BK] @ [BK, BT] -> [BT, BT]
    return b_xy


@triton.jit
def decays_of(cg, o_t, end):
    """cg[t]; past the block's end its last value, so that no exponent is positive there."""
    return tl.load(cg + tl.minimum(o_t, end - 1))
