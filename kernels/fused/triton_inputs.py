"""Kernels from a mixer's projections to the inputs of its recurrence: convolutions, SiLU, gates and slot weights.

A program owns some tokens of one unit: a head of the values, a query/key group, or some columns of the slot weights.
Everything is fp32 between a load and a store. The backward pass computes the convolutions anew, and has two kernels:
one back to the SiLU, token by token, and one through the convolutions. Gradients of parameters are summed over a
program's tokens, and over the programs afterwards, in an order that does not change. Names: BT = tokens a tile,
SPAN = tokens a program of the backward pass, HALO = tokens before the first, whose outputs are not wanted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0, with all digits where it is small."""
    z = tl.exp(x)
    series = z * (1 - z * (0.5 - z * (1 / 3 - z * (0.25 - z * (0.2 - z / 6)))))
    return tl.where(z < 0.0625, series, tl.log(1 + z))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p_exp(-tl.abs(x))


@triton.jit
def load_rows(x, o_t, stride, o_c, m):
    """[BT, BD] of rows o_t that are `stride` apart, zero where masked."""
    return tl.load(x + o_t.to(tl.int64)[:, None] * stride + o_c[None, :], mask=m, other=0.0)


@triton.jit
def load_wide(x, o_t, stride, o_c, m):
    return load_rows(x, o_t, stride, o_c, m).to(tl.float32)


@triton.jit
def store_rows(x, o_t, stride, o_c, b_x, m):
    tl.store(x + o_t.to(tl.int64)[:, None] * stride + o_c[None, :], b_x.to(x.dtype.element_ty), mask=m)


@triton.jit
def appended(items, x):
    """A tuple with one item more."""
    items += (x,)
    return items


@triton.jit
def load_filter(weight, bias, o_c, m_c, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A convolution's weights [BD] of each tap, the current token's first, and its bias."""
    weights = ()
    for back in tl.static_range(W):
        weights = appended(weights, tl.load(weight + o_c * W + (W - 1 - back), mask=m_c, other=0.0).to(tl.float32))
    b_bias = tl.zeros(o_c.shape, tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    return weights, b_bias


@triton.jit
def load_taps(x, starts, o_t, o_c, m_c, T, stride, W: tl.constexpr, HALO: tl.constexpr, HAS_STARTS: tl.constexpr):
    """[BT, BD] in x's dtype of each tap, the current token's first, at tokens o_t of one row; zero in other documents.

    All loads come before what waits for them.
    """
    m_t = o_t < T
    rows, flags = (), ()
    for back in tl.static_range(W):
        m_row = m_t & (o_t - back >= -HALO)
        p_x = x + (o_t - back).to(tl.int64)[:, None] * stride + o_c[None, :]
        rows = appended(rows, tl.load(p_x, mask=m_row[:, None] & m_c[None, :], other=0.0))
        if HAS_STARTS and back > 0:
            flags = appended(flags, tl.load(starts + o_t - (back - 1), mask=m_row, other=0))
    taps = ()
    b_cut = o_t < -HALO  # no token: whether a document begins between the tap and here
    for back in tl.static_range(W):
        if HAS_STARTS and back > 0:
            b_cut = b_cut | (flags[back - 1] != 0)
            taps = appended(taps, tl.where(b_cut[:, None], 0.0, rows[back]))
        else:
            taps = appended(taps, rows[back])
    return taps


@triton.jit
def convolved(taps, weights, b_bias, W: tl.constexpr):
    """Causal convolution before the SiLU, [BT, BD]."""
    b_y = taps[0].to(tl.float32) * weights[0][None, :]
    for back in tl.static_range(1, W):
        b_y += taps[back].to(tl.float32) * weights[back][None, :]
    return b_y + b_bias[None, :]


@triton.jit
def unit_length(b_y):
    """1 / max(|y|, 1e-6) and whether |y| is above that, [BT]."""
    b_length = tl.sqrt(tl.sum(b_y * b_y, 1))
    return 1 / tl.maximum(b_length, 1e-6), b_length > 1e-6


@triton.jit
def forward_values(
    value, step, strength, weight, bias, A_log, dt_bias, starts, out_value, out_write, out_g, out_beta, row, i_h, o_v,
    first_columns, o_t, T, value_t, step_t, strength_t,
    H: tl.constexpr, DV: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr, GDN: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Columns o_v of one head; with its first columns also what has one number a head."""
    m_t, m_c, o_c = o_t < T, o_v < DV, i_h * DV + o_v
    m = m_t[:, None] & m_c[None, :]
    b_dt = tl.load(step + o_t.to(tl.int64) * step_t + i_h, mask=m_t, other=0.0).to(tl.float32)
    weights, b_bias = load_filter(weight, bias, o_c, m_c, W, HAS_BIAS)
    taps = load_taps(value, starts, o_t, o_c, m_c, T, value_t, W, HALO, HAS_STARTS)
    b_y = convolved(taps, weights, b_bias, W)
    b_y = b_y * tl.sigmoid(b_y)
    b_dt = softplus(b_dt + tl.load(dt_bias + i_h))
    if GDN:
        store_rows(out_write + row * H * DV, o_t, H * DV, o_c, b_y, m)
    else:
        store_rows(out_value + row * H * DV, o_t, H * DV, o_c, b_y, m)
        store_rows(out_write + row * H * DV, o_t, H * DV, o_c, b_y * b_dt[:, None], m)
    if first_columns:
        o_h = (row + o_t) * H + i_h
        tl.store(out_g + o_h, -tl.exp(tl.load(A_log + i_h)) * b_dt, mask=m_t)
        if GDN:
            b_r = tl.load(strength + o_t.to(tl.int64) * strength_t + i_h, mask=m_t, other=0.0).to(tl.float32)
            tl.store(out_beta + o_h, tl.sigmoid(b_r), mask=m_t)


@triton.jit
def forward_keys(
    x, weight, bias, starts, out, i_g, o_t, T, stride, scale,
    G: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr, GDN: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Queries or keys of one group."""
    o_k = tl.arange(0, BK)
    m_c, o_c = o_k < DK, i_g * DK + o_k
    weights, b_bias = load_filter(weight, bias, o_c, m_c, W, HAS_BIAS)
    taps = load_taps(x, starts, o_t, o_c, m_c, T, stride, W, HALO, HAS_STARTS)
    b_y = convolved(taps, weights, b_bias, W)
    b_y = b_y * tl.sigmoid(b_y)
    if GDN:
        b_y *= (unit_length(b_y)[0] * scale)[:, None]
    store_rows(out, o_t, G * DK, o_c, b_y, (o_t < T)[:, None] & m_c[None, :])


@triton.jit
def forward_slots(slot, slot_scale, slot_bias, out, o_c, o_t, T, stride, C: tl.constexpr):
    m_c = o_c < C
    m = (o_t < T)[:, None] & m_c[None, :]
    b_scale, b_bias = tl.load(slot_scale + o_c, mask=m_c, other=0.0), tl.load(slot_bias + o_c, mask=m_c, other=0.0)
    b_y = load_wide(slot, o_t, stride, o_c, m)
    store_rows(out, o_t, C, o_c, softplus(b_scale[None, :] * b_y + b_bias[None, :]), m)


@triton.jit(do_not_specialize=["T"])
def inputs_forward_kernel(
    value,  # [B, HALO + T, H * DV], from the first token after the halo on, as query and key
    query, key,  # [B, HALO + T, G * DK]
    step, strength,  # [B, T, H]; strength only with GDN
    slot,  # [B, T, H * K]
    w_value, w_query, w_key,  # [C, W]
    b_value, b_query, b_key,  # [C], or unused
    A_log, dt_bias,  # [H]
    slot_scale, slot_bias,  # [H * K]
    starts,  # uint8 [B, HALO + T], or unused
    out_value,  # [B, T, H * DV] out; unused with GDN, where `out_write` has the values
    out_write, out_query, out_key,
    out_g, out_beta,  # fp32 [B, T, H]
    out_weights,  # fp32 [B, T, H * K]
    T, value_b, value_t, query_b, query_t, key_b, key_t, step_b, step_t, strength_b, strength_t, slot_b, slot_t,
    scale,  # of a query, with GDN
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    HALO: tl.constexpr, GDN: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    SUBS: tl.constexpr = (DV + BV - 1) // BV
    i_u, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = i_b * T
    starts += i_b * (HALO + T) + HALO
    if i_u < H * SUBS:
        forward_values(
            value + i_b * value_b, step + i_b * step_b, strength + i_b * strength_b, w_value, b_value, A_log, dt_bias,
            starts, out_value, out_write, out_g, out_beta, row, i_u // SUBS, (i_u % SUBS) * BV + tl.arange(0, BV),
            i_u % SUBS == 0, o_t, T, value_t, step_t, strength_t, H, DV, W, HALO, GDN, HAS_STARTS, HAS_BIAS,
        )  # fmt: skip
    elif i_u < H * SUBS + G:
        forward_keys(
            query + i_b * query_b, w_query, b_query, starts, out_query + row * G * DK, i_u - H * SUBS, o_t, T, query_t,
            scale, G, DK, BK, W, HALO, GDN, HAS_STARTS, HAS_BIAS,
        )  # fmt: skip
    elif i_u < H * SUBS + 2 * G:
        forward_keys(
            key + i_b * key_b, w_key, b_key, starts, out_key + row * G * DK, i_u - H * SUBS - G, o_t, T, key_t, 1.0,
            G, DK, BK, W, HALO, GDN, HAS_STARTS, HAS_BIAS,
        )  # fmt: skip
    else:
        o_c = (i_u - H * SUBS - 2 * G) * BS + tl.arange(0, BS)
        forward_slots(slot + i_b * slot_b, slot_scale, slot_bias, out_weights + row * H * K, o_c, o_t, T, slot_t, H * K)


@triton.jit
def through_silu(b_dy, b_pre):
    b_sigmoid = tl.sigmoid(b_pre)
    return b_dy * b_sigmoid * (1 + b_pre * (1 - b_sigmoid))


@triton.jit
def no_sums(COUNT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = appended(sums, tl.zeros([BT, BD], tl.float32))
    return sums


@triton.jit
def add_parameters(sums, b_dpre, taps, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Sums for a convolution's weight and bias, still [BT, BD] each: no tile waits for a sum over its tokens."""
    added = ()
    for back in tl.static_range(W):
        added = appended(added, sums[back] + b_dpre * taps[back].to(tl.float32))
    if HAS_BIAS:
        added = appended(added, sums[W] + b_dpre)
    return added


@triton.jit
def store_parameters(dw, db, sums, o_c, m_c, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    for back in tl.static_range(W):
        tl.store(dw + o_c * W + (W - 1 - back), tl.sum(sums[back], 0), mask=m_c)
    if HAS_BIAS:
        tl.store(db + o_c, tl.sum(sums[W], 0), mask=m_c)


@triton.jit
def backward_values(
    value, step, strength, weight, bias, A_log, dt_bias, starts, d_out, d_write, d_g, d_beta, dpre, dstep, dstrength,
    partial, dw, db, row, i_h, o_v, first_columns, first, T, value_t, step_t, strength_t, d_t,
    C, H: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr, GDN: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    m_c, o_c = o_v < DV, i_h * DV + o_v
    sums = no_sums(W + HAS_BIAS, BT, BV)
    b_dA, b_dbias = tl.zeros([BT], tl.float32), tl.zeros([BT], tl.float32)
    b_dt_bias, b_A = tl.load(dt_bias + i_h), -tl.exp(tl.load(A_log + i_h))
    for i in range(SPAN // BT):
        o_t = first + i * BT + tl.arange(0, BT)
        m_t = o_t < T
        m = m_t[:, None] & m_c[None, :]
        o_h = (row + o_t) * H + i_h
        b_dy = load_rows(d_write + row * H * DV, o_t, H * DV, o_c, m)
        b_step = tl.load(step + o_t.to(tl.int64) * step_t + i_h, mask=m_t, other=0.0)
        if HAS_OUT and not GDN:
            b_dout = load_rows(d_out + row * H * DV, o_t, H * DV, o_c, m)
        b_dg = tl.load(d_g + o_h, mask=m_t & first_columns, other=0.0)
        weights, b_bias = load_filter(weight, bias, o_c, m_c, W, HAS_BIAS)
        taps = load_taps(value, starts, o_t, o_c, m_c, T, value_t, W, HALO, HAS_STARTS)
        b_pre = convolved(taps, weights, b_bias, W)
        b_step, b_dy = b_step.to(tl.float32) + b_dt_bias, b_dy.to(tl.float32)
        b_ddt = tl.zeros([BT], tl.float32)
        if not GDN:  # what is written is dt times the value
            b_ddt += tl.sum(b_dy * b_pre * tl.sigmoid(b_pre), 1)
            b_dy *= softplus(b_step)[:, None]
            if HAS_OUT:
                b_dy += b_dout.to(tl.float32)
        b_dpre = through_silu(b_dy, b_pre)
        store_rows(dpre, o_t, C, o_c, b_dpre, m)
        sums = add_parameters(sums, b_dpre, taps, W, HAS_BIAS)
        if first_columns:
            o_in = o_t.to(tl.int64) * d_t + i_h
            b_dg *= b_A
            b_dA += b_dg * softplus(b_step)
            b_dstep = (b_ddt + b_dg) * tl.sigmoid(b_step)
            b_dbias += tl.where(m_t, b_dstep, 0.0)
            tl.store(dstep + o_in, b_dstep.to(dstep.dtype.element_ty), mask=m_t)
            if GDN:
                b_r = tl.load(strength + o_t.to(tl.int64) * strength_t + i_h, mask=m_t, other=0.0).to(tl.float32)
                b_beta = tl.sigmoid(b_r)
                b_dr = tl.load(d_beta + o_h, mask=m_t, other=0.0) * b_beta * (1 - b_beta)
                tl.store(dstrength + o_in, b_dr.to(dstrength.dtype.element_ty), mask=m_t)
    store_parameters(dw, db, sums, o_c, m_c, W, HAS_BIAS)
    if first_columns:
        tl.store(partial + i_h, tl.sum(b_dA, 0))
        tl.store(partial + H + i_h, tl.sum(b_dbias, 0))


@triton.jit
def backward_keys(
    x, weight, bias, starts, dy, dpre, dw, db, i_g, first, T, stride, scale,
    C, G: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr, GDN: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    o_k = tl.arange(0, BK)
    m_c, o_c = o_k < DK, i_g * DK + o_k
    sums = no_sums(W + HAS_BIAS, BT, BK)
    for i in range(SPAN // BT):
        o_t = first + i * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_dy = load_rows(dy, o_t, G * DK, o_c, m)
        weights, b_bias = load_filter(weight, bias, o_c, m_c, W, HAS_BIAS)
        taps = load_taps(x, starts, o_t, o_c, m_c, T, stride, W, HALO, HAS_STARTS)
        b_pre, b_dy = convolved(taps, weights, b_bias, W), b_dy.to(tl.float32)
        if GDN:
            b_y = b_pre * tl.sigmoid(b_pre)
            b_inverse, b_free = unit_length(b_y)
            b_unit = b_y * b_inverse[:, None]
            b_along = tl.where(b_free, tl.sum(b_dy * b_unit, 1), 0.0)
            b_dy = (b_dy - b_unit * b_along[:, None]) * (b_inverse * scale)[:, None]
        b_dpre = through_silu(b_dy, b_pre)
        store_rows(dpre, o_t, C, o_c, b_dpre, m)
        sums = add_parameters(sums, b_dpre, taps, W, HAS_BIAS)
    store_parameters(dw, db, sums, o_c, m_c, W, HAS_BIAS)


@triton.jit
def backward_slots(
    slot, slot_scale, slot_bias, d_weights, dslot, partial, o_c, first, T, stride, d_t,
    C: tl.constexpr, BS: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    m_c = o_c < C
    b_scale, b_bias = tl.load(slot_scale + o_c, mask=m_c, other=0.0), tl.load(slot_bias + o_c, mask=m_c, other=0.0)
    b_dscale, b_dbias = tl.zeros([BT, BS], tl.float32), tl.zeros([BT, BS], tl.float32)
    for i in range(SPAN // BT):
        o_t = first + i * BT + tl.arange(0, BT)
        m = (o_t < T)[:, None] & m_c[None, :]
        b_x, b_d = load_rows(slot, o_t, stride, o_c, m), load_rows(d_weights, o_t, C, o_c, m)
        b_x = b_x.to(tl.float32)
        b_d = b_d.to(tl.float32) * tl.sigmoid(b_scale[None, :] * b_x + b_bias[None, :])
        b_dscale += b_d * b_x
        b_dbias += b_d
        store_rows(dslot, o_t, d_t, o_c, b_d * b_scale[None, :], m)
    tl.store(partial + o_c, tl.sum(b_dscale, 0), mask=m_c)
    tl.store(partial + C + o_c, tl.sum(b_dbias, 0), mask=m_c)


@triton.jit(do_not_specialize=["T"])
def inputs_backward_kernel(
    value, query, key, step, strength, slot, w_value, w_query, w_key, b_value, b_query, b_key, A_log, dt_bias,
    slot_scale, slot_bias, starts,  # as in the forward kernel
    d_out,  # gradient of `out_value` [B, T, H * DV], or unused
    d_write, d_query, d_key, d_g, d_beta, d_weights,
    dpre,  # [B, T, H * DV + 2 * G * DK] out: of what the convolutions gave
    dstep, dstrength, dslot,  # out: as the inputs, with common strides
    partial,  # fp32 [B * programs, TOTAL] out: A_log, dt_bias, slot_scale, slot_bias, w_value, w_query, w_key, biases
    T, value_b, value_t, query_b, query_t, key_b, key_t, step_b, step_t, strength_b, strength_t, slot_b, slot_t,
    d_b, d_t, scale,
    H: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    HALO: tl.constexpr, GDN: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OUT: tl.constexpr,
    TOTAL: tl.constexpr, SPAN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    TV: tl.constexpr, TK: tl.constexpr, TS: tl.constexpr,  # tokens a tile with BV, BK and BS columns
):  # fmt: skip
    SUBS: tl.constexpr = (DV + BV - 1) // BV
    CV: tl.constexpr = H * DV
    CK: tl.constexpr = G * DK
    C: tl.constexpr = CV + 2 * CK
    i_u, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * SPAN
    row = i_b * T
    starts += i_b * (HALO + T) + HALO
    partial += (i_b * tl.num_programs(1) + tl.program_id(1)) * TOTAL
    dpre += row * C
    dw = partial + 2 * H + 2 * H * K
    db = dw + C * W
    if i_u < H * SUBS:
        backward_values(
            value + i_b * value_b, step + i_b * step_b, strength + i_b * strength_b, w_value, b_value, A_log, dt_bias,
            starts, d_out, d_write, d_g, d_beta, dpre, dstep + i_b * d_b, dstrength + i_b * d_b, partial, dw, db,
            row, i_u // SUBS, (i_u % SUBS) * BV + tl.arange(0, BV), i_u % SUBS == 0, first, T, value_t, step_t,
            strength_t, d_t, C, H, DV, BV, W, HALO, GDN, HAS_STARTS, HAS_BIAS, HAS_OUT, SPAN, TV,
        )  # fmt: skip
    elif i_u < H * SUBS + G:
        backward_keys(
            query + i_b * query_b, w_query, b_query, starts, d_query + row * CK, dpre + CV, dw + CV * W, db + CV,
            i_u - H * SUBS, first, T, query_t, scale, C, G, DK, BK, W, HALO, GDN, HAS_STARTS, HAS_BIAS, SPAN, TK,
        )  # fmt: skip
    elif i_u < H * SUBS + 2 * G:
        backward_keys(
            key + i_b * key_b, w_key, b_key, starts, d_key + row * CK, dpre + CV + CK, dw + (CV + CK) * W,
            db + CV + CK, i_u - H * SUBS - G, first, T, key_t, 1.0, C, G, DK, BK, W, HALO, GDN, HAS_STARTS, HAS_BIAS,
            SPAN, TK,
        )  # fmt: skip
    else:
        o_c = (i_u - H * SUBS - 2 * G) * BS + tl.arange(0, BS)
        backward_slots(
            slot + i_b * slot_b, slot_scale, slot_bias, d_weights + row * H * K, dslot + i_b * d_b, partial + 2 * H,
            o_c, first, T, slot_t, d_t, H * K, BS, SPAN, TS,
        )  # fmt: skip


@triton.jit
def backward_section(
    weight, starts, dpre, dx, o_t, o_c, C, T, row_t, d_t,
    W: tl.constexpr, HAS_STARTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Some columns of value, query or key at tokens o_t; `row_t`: between rows of dpre."""
    m_c = o_c < C
    b_dx = tl.zeros([o_t.shape[0], BC], tl.float32)
    b_cut = o_t >= T
    for ahead in tl.static_range(W):
        m_t = (o_t + ahead >= 0) & (o_t + ahead < T)
        if HAS_STARTS and ahead > 0:
            b_cut = b_cut | (tl.load(starts + o_t + ahead, mask=o_t + ahead < T, other=0) != 0)
        b_dpre = load_wide(dpre, o_t + ahead, row_t, o_c, m_t[:, None] & m_c[None, :])
        b_w = tl.load(weight + o_c * W + (W - 1 - ahead), mask=m_c, other=0.0).to(tl.float32)
        b_dx += tl.where(b_cut[:, None], 0.0, b_dpre) * b_w[None, :]
    store_rows(dx, o_t, d_t, o_c, b_dx, (o_t < T)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["T"])
def convolution_backward_kernel(
    w_value, w_query, w_key, starts,  # as in the forward kernel
    dpre,  # [B, T, CV + 2 * CK]
    dvalue, dquery, dkey,  # [B, HALO + T, C] out, from the first token after the halo on, with common strides
    T, d_b, d_t,
    CV: tl.constexpr, CK: tl.constexpr, W: tl.constexpr, HALO: tl.constexpr, HAS_STARTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Through the convolutions, `BC` columns of one section."""
    NV: tl.constexpr = (CV + BC - 1) // BC
    NK: tl.constexpr = (CK + BC - 1) // BC
    C: tl.constexpr = CV + 2 * CK
    i_u, i_b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    o_t, o_c = tl.program_id(1) * BT - HALO + tl.arange(0, BT), tl.arange(0, BC)
    starts += i_b * (HALO + T) + HALO
    dpre += i_b * T * C
    if i_u < NV:
        dx = dvalue + i_b * d_b
        backward_section(w_value, starts, dpre, dx, o_t, i_u * BC + o_c, CV, T, C, d_t, W, HAS_STARTS, BC)
    elif i_u < NV + NK:
        dx, o_c = dquery + i_b * d_b, (i_u - NV) * BC + o_c
        backward_section(w_query, starts, dpre + CV, dx, o_t, o_c, CK, T, C, d_t, W, HAS_STARTS, BC)
    else:
        dx, o_c = dkey + i_b * d_b, (i_u - NV - NK) * BC + o_c
        backward_section(w_key, starts, dpre + CV + CK, dx, o_t, o_c, CK, T, C, d_t, W, HAS_STARTS, BC)
