"""Forward kernels of the two-level scan: chunk maps, the scan over chunks, and the replay from each chunk's start.

A program owns a block of state rows of one chunk of one state: rows are independent of each other, and no kernel uses
matrix units or atomics. Names: lane = batch x states, RP = the rank padded to a power of two, RB = rows a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["T", "N", "CHUNKS"]  # arguments whose value must not compile another kernel


@triton.jit
def gates_of(
    beta, keep, erase, write_mask, at, flag_at, there,
    HAS_KEEP: tl.constexpr, HAS_ERASE: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """keep, erase and write of one token's rows, fp32; padded rows keep an empty state empty."""
    write = tl.load(beta + at, mask=there, other=0.0).to(tl.float32)
    kept = 1.0 - write
    erased = write
    if HAS_KEEP:
        kept = tl.load(keep + at, mask=there, other=0.0).to(tl.float32)
    if HAS_ERASE:
        erased = tl.load(erase + at, mask=there, other=0.0).to(tl.float32)
    if HAS_MASK:
        writes = tl.load(write_mask + flag_at) != 0
        kept = tl.where(writes, kept, 1.0)
        erased = tl.where(writes, erased, 0.0)
        write = tl.where(writes, write, 0.0)
    return kept, erased, write


@triton.jit
def vector(x, at, there):
    return tl.load(x + at, mask=there, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def maps_kernel(
    k,  # [B, T, N, R]
    v,
    beta,
    keep,  # or unused
    erase,  # or unused
    reset,  # uint8 [B, T] or unused
    write_mask,  # uint8 [B, T] or unused
    maps,  # [lanes, CHUNKS - 1, R, R, R] fp32 out: M[i, a, b]
    local,  # [lanes, CHUNKS - 1, R, R] fp32 out: c[i, b]
    T,
    N,
    CHUNKS,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    RB: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """What a chunk does to each row of the state: s_i <- s_i M_i + c_i. The last chunk's is never needed."""
    lane, chunk = (tl.program_id(0) // (CHUNKS - 1)).to(tl.int64), tl.program_id(0) % (CHUNKS - 1)
    b, n = lane // N, lane % N
    i = tl.program_id(1) * RB + tl.arange(0, RB)
    a = tl.arange(0, RP)
    m = tl.zeros([RB, RP, RP], tl.float32) + (a[:, None] == a[None, :]).to(tl.float32)[None, :, :]
    c = tl.zeros([RB, RP], tl.float32)
    for step in range(C):
        t = b * T + chunk * C + step
        at = (t * N + n) * R
        key, value = vector(k, at + a, a < R), vector(v, at + i, i < R)
        kept, erased, write = gates_of(beta, keep, erase, write_mask, at + i, t, i < R, HAS_KEEP, HAS_ERASE, HAS_MASK)
        if HAS_RESET:
            empty = tl.load(reset + t) != 0
            m = tl.where(empty, 0.0, m)
            c = tl.where(empty, 0.0, c)
        of_m = erased[:, None] * tl.sum(m * key[None, None, :], 2)
        of_c = write * value - erased * tl.sum(c * key[None, :], 1)
        m = kept[:, None, None] * m - of_m[:, :, None] * key[None, None, :]
        c = kept[:, None] * c + of_c[:, None] * key[None, :]
    row = (tl.program_id(0).to(tl.int64) * R + i) * R
    tl.store(local + row[:, None] + a[None, :], c, mask=(i < R)[:, None] & (a < R)[None, :])
    cell = (row[:, None] + a[None, :])[:, :, None] * R + a[None, None, :]
    there = ((i < R)[:, None] & (a < R)[None, :])[:, :, None] & (a < R)[None, None, :]
    tl.store(maps + cell, m, mask=there)


@triton.jit
def load_map(maps, entry, i, R: tl.constexpr, RP: tl.constexpr):
    """M [RB, RP, RP] of the rows i of one entry of `maps`, zero outside."""
    a = tl.arange(0, RP)
    cell = (((entry * R + i) * R)[:, None] + a[None, :])[:, :, None] * R + a[None, None, :]
    there = ((i < R)[:, None] & (a < R)[None, :])[:, :, None] & (a < R)[None, None, :]
    return tl.load(maps + cell, mask=there, other=0.0)


@triton.jit
def load_rows(x, entry, i, R: tl.constexpr, RP: tl.constexpr):
    """Rows i [RB, RP] of the matrix `entry` of x [entries, R, R], zero outside."""
    a = tl.arange(0, RP)
    return tl.load(x + (entry * R + i)[:, None] * R + a[None, :], mask=(i < R)[:, None] & (a < R)[None, :], other=0.0)


@triton.jit
def store_rows(x, entry, i, value, R: tl.constexpr, RP: tl.constexpr):
    a = tl.arange(0, RP)
    tl.store(x + (entry * R + i)[:, None] * R + a[None, :], value, mask=(i < R)[:, None] & (a < R)[None, :])


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
    lane = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * RB + tl.arange(0, RB)
    s = load_rows(state, lane, i, R, RP)
    store_rows(starts, lane * CHUNKS, i, s, R, RP)
    entry = lane * (CHUNKS - 1)
    m = load_map(maps, entry, i, R, RP)
    for chunk in range(CHUNKS - 1):
        following = load_map(maps, entry + tl.minimum(chunk + 1, CHUNKS - 2), i, R, RP)  # in flight during the product
        s = tl.sum(m * s[:, :, None], 1) + load_rows(local, entry + chunk, i, R, RP)
        store_rows(starts, lane * CHUNKS + chunk + 1, i, s, R, RP)
        m = following


@triton.jit(do_not_specialize=SIZES)
def replay_kernel(
    q,  # [B, T, N, R]
    k,
    v,
    beta,
    keep,
    erase,
    reset,
    write_mask,
    starts,  # [lanes, CHUNKS, R, R] fp32
    reads,  # [B, T, N, R] fp32 out
    final,  # [lanes, R, R] fp32 out
    T,
    N,
    CHUNKS,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    RB: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The recurrence over one chunk from its true start: reads, and the state after the last chunk."""
    lane, chunk = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(0) % CHUNKS
    b, n = lane // N, lane % N
    i = tl.program_id(1) * RB + tl.arange(0, RB)
    a = tl.arange(0, RP)
    s = load_rows(starts, tl.program_id(0).to(tl.int64), i, R, RP)
    for position in range(chunk * C, tl.minimum(chunk * C + C, T)):
        t = b * T + position
        at = (t * N + n) * R
        query, key = vector(q, at + a, a < R), vector(k, at + a, a < R)
        value = vector(v, at + i, i < R)
        kept, erased, write = gates_of(beta, keep, erase, write_mask, at + i, t, i < R, HAS_KEEP, HAS_ERASE, HAS_MASK)
        if HAS_RESET:
            s = tl.where(tl.load(reset + t) != 0, 0.0, s)
        tl.store(reads + at + i, tl.sum(s * query[None, :], 1), mask=i < R)
        change = write * value - erased * tl.sum(s * key[None, :], 1)
        s = kept[:, None] * s + change[:, None] * key[None, :]
    if chunk == CHUNKS - 1:
        store_rows(final, lane, i, s, R, RP)
