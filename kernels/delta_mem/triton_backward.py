"""Backward kernels of the two-level scan: the same three phases with M transposed, last chunk first."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_forward import SIZES, gates_of, load_map, load_rows, store_rows, vector


@triton.jit(do_not_specialize=SIZES)
def adjoint_kernel(
    q,  # [B, T, N, R]
    k,
    beta,
    keep,
    erase,
    reset,
    write_mask,
    dreads,  # [B, T, N, R] fp32
    dfinal,  # [lanes, R, R] fp32
    local,  # [lanes, CHUNKS - 1, R, R] fp32 out: of the chunks from the second on
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
    """Gradient of the state at a chunk's start from the chunk's own reads; of the last chunk, the whole gradient."""
    lane, chunk = (tl.program_id(0) // (CHUNKS - 1)).to(tl.int64), tl.program_id(0) % (CHUNKS - 1) + 1
    b, n = lane // N, lane % N
    i = tl.program_id(1) * RB + tl.arange(0, RB)
    a = tl.arange(0, RP)
    g = tl.zeros([RB, RP], tl.float32)
    if chunk == CHUNKS - 1:
        g += load_rows(dfinal, lane, i, R, RP)
    first, end = chunk * C, tl.minimum(chunk * C + C, T)
    for back in range(end - first):
        t = b * T + end - 1 - back
        at = (t * N + n) * R
        query, key = vector(q, at + a, a < R), vector(k, at + a, a < R)
        dread = vector(dreads, at + i, i < R)
        kept, erased, _ = gates_of(beta, keep, erase, write_mask, at + i, t, i < R, HAS_KEEP, HAS_ERASE, HAS_MASK)
        dprediction = erased * tl.sum(g * key[None, :], 1)
        g = kept[:, None] * g - dprediction[:, None] * key[None, :] + dread[:, None] * query[None, :]
        if HAS_RESET:
            g = tl.where(tl.load(reset + t) != 0, 0.0, g)
    store_rows(local, tl.program_id(0).to(tl.int64), i, g, R, RP)


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
    lane = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * RB + tl.arange(0, RB)
    entry, last = lane * (CHUNKS - 1), CHUNKS - 2
    g = load_rows(local, entry + last, i, R, RP)
    store_rows(ends, lane * CHUNKS + last, i, g, R, RP)
    m = load_map(maps, entry + last, i, R, RP)
    for back in range(CHUNKS - 2):
        chunk = last - back  # the gradient goes from its end to its start, which is the end of the one before
        following = load_map(maps, entry + chunk - 1, i, R, RP)
        g = tl.sum(m * g[:, None, :], 2) + load_rows(local, entry + chunk - 1, i, R, RP)
        store_rows(ends, lane * CHUNKS + chunk - 1, i, g, R, RP)
        m = following


@triton.jit(do_not_specialize=[*SIZES, "first_program"])
def gradient_kernel(
    q,  # [B, T, N, R]
    k,
    v,
    beta,
    keep,
    erase,
    reset,
    write_mask,
    dreads,  # [B, T, N, R] fp32
    starts,  # [lanes, CHUNKS, R, R] fp32
    ends,  # [lanes, CHUNKS, R, R] fp32: gradients after each chunk
    history,  # [programs, C, R, R] fp32 scratch
    dq,  # [B, T, N, R] out, as dk, dv, dbeta, dkeep, derase
    dk,
    dv,
    dbeta,
    dkeep,  # or unused
    derase,  # or unused
    dstate,  # [lanes, R, R] fp32 out
    first_program,
    T,
    N,
    CHUNKS,
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Every gradient of one chunk's tokens: the states once more, then back over them with the state's gradient.

    All rows of a state are in one program, so that dq and dk are added up inside it.
    """
    program = first_program + tl.program_id(0).to(tl.int64)
    lane, chunk = program // CHUNKS, (program % CHUNKS).to(tl.int32)
    b, n = lane // N, lane % N
    a = tl.arange(0, RP)
    real = a < R
    first, end = chunk * C, tl.minimum(chunk * C + C, T)
    past = history + tl.program_id(0).to(tl.int64) * C * R * R
    s = load_rows(starts, program, a, R, RP)
    for step in range(end - first):
        t = b * T + first + step
        at = (t * N + n) * R + a
        key, value = vector(k, at, real), vector(v, at, real)
        kept, erased, write = gates_of(beta, keep, erase, write_mask, at, t, real, HAS_KEEP, HAS_ERASE, HAS_MASK)
        if HAS_RESET:
            s = tl.where(tl.load(reset + t) != 0, 0.0, s)
        store_rows(past, step, a, s, R, RP)
        change = write * value - erased * tl.sum(s * key[None, :], 1)
        s = kept[:, None] * s + change[:, None] * key[None, :]
    tl.debug_barrier()  # another thread may read what this one wrote
    g = load_rows(ends, program, a, R, RP)
    for back in range(end - first):
        step = end - first - 1 - back
        t = b * T + first + step
        at = (t * N + n) * R + a
        query, key, value = vector(q, at, real), vector(k, at, real), vector(v, at, real)
        dread = vector(dreads, at, real)
        kept, erased, write = gates_of(beta, keep, erase, write_mask, at, t, real, HAS_KEEP, HAS_ERASE, HAS_MASK)
        s = load_rows(past, step, a, R, RP)
        prediction = tl.sum(s * key[None, :], 1)
        change = write * value - erased * prediction
        dchange = tl.sum(g * key[None, :], 1)
        dprediction = erased * dchange
        tl.store(dq + at, tl.sum(s * dread[:, None], 0).to(dq.dtype.element_ty), mask=real)
        dkey = tl.sum(g * change[:, None] - s * dprediction[:, None], 0)
        tl.store(dk + at, dkey.to(dk.dtype.element_ty), mask=real)
        tl.store(dv + at, (dchange * write).to(dv.dtype.element_ty), mask=real)
        dkept, derased, dwrite = tl.sum(g * s, 1), -dchange * prediction, dchange * value
        if HAS_MASK:
            writes = tl.load(write_mask + t) != 0
            dkept = tl.where(writes, dkept, 0.0)
            derased = tl.where(writes, derased, 0.0)
            dwrite = tl.where(writes, dwrite, 0.0)
        if HAS_KEEP:
            tl.store(dkeep + at, dkept.to(dkeep.dtype.element_ty), mask=real)
        else:
            dwrite -= dkept
        if HAS_ERASE:
            tl.store(derase + at, derased.to(derase.dtype.element_ty), mask=real)
        else:
            dwrite += derased
        tl.store(dbeta + at, dwrite.to(dbeta.dtype.element_ty), mask=real)
        g = kept[:, None] * g - dprediction[:, None] * key[None, :] + dread[:, None] * query[None, :]
        if HAS_RESET:
            g = tl.where(tl.load(reset + t) != 0, 0.0, g)
    if chunk == 0:
        store_rows(dstate, lane, a, g, R, RP)
