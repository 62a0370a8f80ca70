"""Forward kernels of the two-level scan: chunk maps, the scan over chunks, and the replay from each chunk's start.

A program owns a block of state rows of one chunk of one state: rows are independent of each other, and no kernel uses
matrix units or atomics. Names: lane = batch x states (`i_bn`), BT = tokens a chunk, RP = the rank padded to a power of
two, RB = rows a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["T", "N", "CHUNKS"]  # arguments whose value must not compile another kernel


@triton.jit
def gates_of(
    beta, keep, erase, write_mask, o_x, t, m_x,
    HAS_KEEP: tl.constexpr, HAS_ERASE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """keep, erase and write of one token's rows, fp32; padded rows keep an empty state empty."""
    b_write = tl.load(beta + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_keep = 1.0 - b_write
    b_erase = b_write
    if HAS_KEEP:
        b_keep = tl.load(keep + o_x, mask=m_x, other=0.0).to(tl.float32)
    if HAS_ERASE:
        b_erase = tl.load(erase + o_x, mask=m_x, other=0.0).to(tl.float32)
    if HAS_MASK:
        writes = tl.load(write_mask + t) != 0
        b_keep = tl.where(writes, b_keep, 1.0)
        b_erase = tl.where(writes, b_erase, 0.0)
        b_write = tl.where(writes, b_write, 0.0)
    return b_keep, b_erase, b_write


@triton.jit
def vector(x, o_x, m_x):
    return tl.load(x + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def maps_kernel(
    k,  # [B, T, N, R]
    v, beta,
    keep,  # or unused
    erase,  # or unused
    reset,  # uint8 [B, T] or unused
    write_mask,  # uint8 [B, T] or unused
    maps,  # [lanes, CHUNKS - 1, R, R, R] fp32 out: M[i, a, b]
    local,  # [lanes, CHUNKS - 1, R, R] fp32 out: c[i, b]
    T, N, CHUNKS,
    BT: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RB: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """What a chunk does to each row of the state: s_i <- s_i M_i + c_i. The last chunk's is never needed."""
    i_bn, i_t = (tl.program_id(0) // (CHUNKS - 1)).to(tl.int64), tl.program_id(0) % (CHUNKS - 1)
    i_b, i_n = i_bn // N, i_bn % N
    o_i = tl.program_id(1) * RB + tl.arange(0, RB)
    o_j = tl.arange(0, RP)
    b_m = tl.zeros([RB, RP, RP], tl.float32) + (o_j[:, None] == o_j[None, :]).to(tl.float32)[None, :, :]
    b_c = tl.zeros([RB, RP], tl.float32)
    for i in range(BT):
        t = i_b * T + i_t * BT + i
        o_x = (t * N + i_n) * R
        b_k, b_v = vector(k, o_x + o_j, o_j < R), vector(v, o_x + o_i, o_i < R)
        b_keep, b_erase, b_write = gates_of(
            beta, keep, erase, write_mask, o_x + o_i, t, o_i < R, HAS_KEEP, HAS_ERASE, HAS_MASK
        )
        if HAS_RESET:
            empty = tl.load(reset + t) != 0
            b_m = tl.where(empty, 0.0, b_m)
            b_c = tl.where(empty, 0.0, b_c)
        b_um = b_erase[:, None] * tl.sum(b_m * b_k[None, None, :], 2)
        b_uc = b_write * b_v - b_erase * tl.sum(b_c * b_k[None, :], 1)
        b_m = b_keep[:, None, None] * b_m - b_um[:, :, None] * b_k[None, None, :]
        b_c = b_keep[:, None] * b_c + b_uc[:, None] * b_k[None, :]
    o_row = (tl.program_id(0).to(tl.int64) * R + o_i) * R
    tl.store(local + o_row[:, None] + o_j[None, :], b_c, mask=(o_i < R)[:, None] & (o_j < R)[None, :])
    o_cell = (o_row[:, None] + o_j[None, :])[:, :, None] * R + o_j[None, None, :]
    m_cell = ((o_i < R)[:, None] & (o_j < R)[None, :])[:, :, None] & (o_j < R)[None, None, :]
    tl.store(maps + o_cell, b_m, mask=m_cell)


@triton.jit
def load_map(maps, entry, o_i, R: tl.constexpr, RP: tl.constexpr):
    """M [RB, RP, RP] of the rows i of one entry of `maps`, zero outside."""
    o_j = tl.arange(0, RP)
    o_cell = (((entry * R + o_i) * R)[:, None] + o_j[None, :])[:, :, None] * R + o_j[None, None, :]
    m_cell = ((o_i < R)[:, None] & (o_j < R)[None, :])[:, :, None] & (o_j < R)[None, None, :]
    return tl.load(maps + o_cell, mask=m_cell, other=0.0)


@triton.jit
def load_rows(x, entry, o_i, R: tl.constexpr, RP: tl.constexpr):
    """Rows i [RB, RP] of the matrix `entry` of x [entries, R, R], zero outside."""
    o_j = tl.arange(0, RP)
    m_x = (o_i < R)[:, None] & (o_j < R)[None, :]
    return tl.load(x + (entry * R + o_i)[:, None] * R + o_j[None, :], mask=m_x, other=0.0)


@triton.jit
def store_rows(x, entry, o_i, b_x, R: tl.constexpr, RP: tl.constexpr):
    o_j = tl.arange(0, RP)
    tl.store(x + (entry * R + o_i)[:, None] * R + o_j[None, :], b_x, mask=(o_i < R)[:, None] & (o_j < R)[None, :])


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(
    maps,  # [lanes, CHUNKS - 1, R, R, R] fp32
    local,  # [lanes, CHUNKS - 1, R, R] fp32
    state,  # [lanes, R, R] fp32
    starts,  # [lanes, CHUNKS, R, R] fp32 out
    CHUNKS,
    R: tl.constexpr,
    RP: tl.constexpr,
    RB: tl.constexpr,
):
    """The state at the start of every chunk."""
    i_bn = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * RB + tl.arange(0, RB)
    b_s = load_rows(state, i_bn, o_i, R, RP)
    store_rows(starts, i_bn * CHUNKS, o_i, b_s, R, RP)
    entry = i_bn * (CHUNKS - 1)
    b_m = load_map(maps, entry, o_i, R, RP)
    for i_t in range(CHUNKS - 1):
        b_next = load_map(maps, entry + tl.minimum(i_t + 1, CHUNKS - 2), o_i, R, RP)  # in flight during the product
        b_s = tl.sum(b_m * b_s[:, :, None], 1) + load_rows(local, entry + i_t, o_i, R, RP)
        store_rows(starts, i_bn * CHUNKS + i_t + 1, o_i, b_s, R, RP)
        b_m = b_next


@triton.jit(do_not_specialize=SIZES)
def replay_kernel(
    q,  # [B, T, N, R]
    k, v, beta, keep, erase, reset, write_mask,
    starts,  # [lanes, CHUNKS, R, R] fp32
    reads,  # [B, T, N, R] fp32 out
    final,  # [lanes, R, R] fp32 out
    T, N, CHUNKS,
    BT: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, RB: tl.constexpr, HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The recurrence over one chunk from its true start: reads, and the state after the last chunk."""
    i_bn, i_t = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    i_b, i_n = i_bn // N, i_bn % N
    o_i = tl.program_id(1) * RB + tl.arange(0, RB)
    o_j = tl.arange(0, RP)
    b_s = load_rows(starts, tl.program_id(0).to(tl.int64), o_i, R, RP)
    for i in range(i_t * BT, tl.minimum(i_t * BT + BT, T)):
        t = i_b * T + i
        o_x = (t * N + i_n) * R
        b_q, b_k = vector(q, o_x + o_j, o_j < R), vector(k, o_x + o_j, o_j < R)
        b_v = vector(v, o_x + o_i, o_i < R)
        b_keep, b_erase, b_write = gates_of(
            beta, keep, erase, write_mask, o_x + o_i, t, o_i < R, HAS_KEEP, HAS_ERASE, HAS_MASK
        )
        if HAS_RESET:
            b_s = tl.where(tl.load(reset + t) != 0, 0.0, b_s)
        tl.store(reads + o_x + o_i, tl.sum(b_s * b_q[None, :], 1), mask=o_i < R)
        b_u = b_write * b_v - b_erase * tl.sum(b_s * b_k[None, :], 1)
        b_s = b_keep[:, None] * b_s + b_u[:, None] * b_k[None, :]
    if i_t == CHUNKS - 1:
        store_rows(final, i_bn, o_i, b_s, R, RP)
