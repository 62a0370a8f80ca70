"""Backward kernels of the two-level scan: the same three phases with M transposed, last chunk first."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import SIZES, gates_of, load_map, load_rows, store_rows, vector


@triton.jit(do_not_specialize=SIZES)
def adjoint_kernel(
    q,  # [B, T, N, R]
    k, beta, keep, erase, reset, write_mask,
    dreads,  # [B, T, N, R] fp32
    dfinal,  # [lanes, R, R] fp32
    local,  # [lanes, CHUNKS - 1, R, R] fp32 out: of the chunks from the second on
    T, N, CHUNKS,
    BT: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RB: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Gradient of the state at a chunk's start from the chunk's own reads; of the last chunk, the whole gradient."""
    i_bn, i_t = (tl.program_id(0) // (CHUNKS - 1)).to(tl.int64), tl.program_id(0) % (CHUNKS - 1) + 1
    i_b, i_n = i_bn // N, i_bn % N
    o_i = tl.program_id(1) * RB + tl.arange(0, RB)
    o_j = tl.arange(0, RP)
    b_ds = tl.zeros([RB, RP], tl.float32)
    if i_t == CHUNKS - 1:
        b_ds += load_rows(dfinal, i_bn, o_i, R, RP)
    first, end = i_t * BT, tl.minimum(i_t * BT + BT, T)
    for i in range(end - first):
        t = i_b * T + end - 1 - i
        o_x = (t * N + i_n) * R
        b_q, b_k = vector(q, o_x + o_j, o_j < R), vector(k, o_x + o_j, o_j < R)
        b_do = vector(dreads, o_x + o_i, o_i < R)
        b_keep, b_erase, _ = gates_of(
            beta, keep, erase, write_mask, o_x + o_i, t, o_i < R, HAS_KEEP, HAS_ERASE, HAS_MASK
        )
        b_dp = b_erase * tl.sum(b_ds * b_k[None, :], 1)
        b_ds = b_keep[:, None] * b_ds - b_dp[:, None] * b_k[None, :] + b_do[:, None] * b_q[None, :]
        if HAS_RESET:
            b_ds = tl.where(tl.load(reset + t) != 0, 0.0, b_ds)
    store_rows(local, tl.program_id(0).to(tl.int64), o_i, b_ds, R, RP)


@triton.jit(do_not_specialize=SIZES)
def reverse_scan_kernel(
    maps,  # [lanes, CHUNKS - 1, R, R, R] fp32, of the chunks but the last
    local,  # [lanes, CHUNKS - 1, R, R] fp32, of the chunks but the first
    ends,  # [lanes, CHUNKS, R, R] fp32 out, all but the last chunk's
    CHUNKS,
    R: tl.constexpr,
    RP: tl.constexpr,
    RB: tl.constexpr,
):
    """The gradient of the state at the end of every chunk but the last."""
    i_bn = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * RB + tl.arange(0, RB)
    entry, last = i_bn * (CHUNKS - 1), CHUNKS - 2
    b_ds = load_rows(local, entry + last, o_i, R, RP)
    store_rows(ends, i_bn * CHUNKS + last, o_i, b_ds, R, RP)
    b_m = load_map(maps, entry + last, o_i, R, RP)
    for i in range(CHUNKS - 2):
        i_t = last - i  # the gradient goes from its end to its start, which is the end of the one before
        b_next = load_map(maps, entry + i_t - 1, o_i, R, RP)
        b_ds = tl.sum(b_m * b_ds[:, None, :], 2) + load_rows(local, entry + i_t - 1, o_i, R, RP)
        store_rows(ends, i_bn * CHUNKS + i_t - 1, o_i, b_ds, R, RP)
        b_m = b_next


@triton.jit(do_not_specialize=[*SIZES, "first_program"])
def gradient_kernel(
    q,  # [B, T, N, R]
    k, v, beta, keep, erase, reset, write_mask,
    dreads,  # [B, T, N, R] fp32
    starts,  # [lanes, CHUNKS, R, R] fp32
    ends,  # [lanes, CHUNKS, R, R] fp32: gradients after each chunk
    history,  # [programs, BT, R, R] fp32 scratch
    dq,  # [B, T, N, R] out, as dk, dv, dbeta, dkeep, derase
    dk, dv, dbeta,
    dkeep,  # or unused
    derase,  # or unused
    dstate,  # [lanes, R, R] fp32 out
    first_program, T, N, CHUNKS,
    BT: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_ERASE: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Every gradient of one chunk's tokens: the states once more, then back over them with the state's gradient.

    All rows of a state are in one program, so that dq and dk are added up inside it.
    """
    i_p = first_program + tl.program_id(0).to(tl.int64)
    i_bn, i_t = i_p // CHUNKS, (i_p % CHUNKS).to(tl.int32)
    i_b, i_n = i_bn // N, i_bn % N
    o_j = tl.arange(0, RP)
    m_j = o_j < R
    first, end = i_t * BT, tl.minimum(i_t * BT + BT, T)
    p_s = history + tl.program_id(0).to(tl.int64) * BT * R * R
    b_s = load_rows(starts, i_p, o_j, R, RP)
    for i in range(end - first):
        t = i_b * T + first + i
        o_x = (t * N + i_n) * R + o_j
        b_k, b_v = vector(k, o_x, m_j), vector(v, o_x, m_j)
        b_keep, b_erase, b_write = gates_of(beta, keep, erase, write_mask, o_x, t, m_j, HAS_KEEP, HAS_ERASE, HAS_MASK)
        if HAS_RESET:
            b_s = tl.where(tl.load(reset + t) != 0, 0.0, b_s)
        store_rows(p_s, i, o_j, b_s, R, RP)
        b_u = b_write * b_v - b_erase * tl.sum(b_s * b_k[None, :], 1)
        b_s = b_keep[:, None] * b_s + b_u[:, None] * b_k[None, :]
    tl.debug_barrier()  # another thread may read what this one wrote
    b_ds = load_rows(ends, i_p, o_j, R, RP)
    for i_back in range(end - first):
        i = end - first - 1 - i_back
        t = i_b * T + first + i
        o_x = (t * N + i_n) * R + o_j
        b_q, b_k, b_v = vector(q, o_x, m_j), vector(k, o_x, m_j), vector(v, o_x, m_j)
        b_do = vector(dreads, o_x, m_j)
        b_keep, b_erase, b_write = gates_of(beta, keep, erase, write_mask, o_x, t, m_j, HAS_KEEP, HAS_ERASE, HAS_MASK)
        b_s = load_rows(p_s, i, o_j, R, RP)
        b_p = tl.sum(b_s * b_k[None, :], 1)
        b_u = b_write * b_v - b_erase * b_p
        b_du = tl.sum(b_ds * b_k[None, :], 1)
        b_dp = b_erase * b_du
        tl.store(dq + o_x, tl.sum(b_s * b_do[:, None], 0).to(dq.dtype.element_ty), mask=m_j)
        b_dk = tl.sum(b_ds * b_u[:, None] - b_s * b_dp[:, None], 0)
        tl.store(dk + o_x, b_dk.to(dk.dtype.element_ty), mask=m_j)
        tl.store(dv + o_x, (b_du * b_write).to(dv.dtype.element_ty), mask=m_j)
        b_dkeep, b_derase, b_dwrite = tl.sum(b_ds * b_s, 1), -b_du * b_p, b_du * b_v
        if HAS_MASK:
            write_t = tl.load(write_mask + t) != 0
            b_dkeep = tl.where(write_t, b_dkeep, 0.0)
            b_derase = tl.where(write_t, b_derase, 0.0)
            b_dwrite = tl.where(write_t, b_dwrite, 0.0)
        if HAS_KEEP:
            tl.store(dkeep + o_x, b_dkeep.to(dkeep.dtype.element_ty), mask=m_j)
        else:
            b_dwrite -= b_dkeep
        if HAS_ERASE:
            tl.store(derase + o_x, b_derase.to(derase.dtype.element_ty), mask=m_j)
        else:
            b_dwrite += b_derase
        tl.store(dbeta + o_x, b_dwrite.to(dbeta.dtype.element_ty), mask=m_j)
        b_ds = b_keep[:, None] * b_ds - b_dp[:, None] * b_k[None, :] + b_do[:, None] * b_q[None, :]
        if HAS_RESET:
            b_ds = tl.where(tl.load(reset + t) != 0, 0.0, b_ds)
    if i_t == 0:
        store_rows(dstate, i_bn, o_j, b_ds, R, RP)
