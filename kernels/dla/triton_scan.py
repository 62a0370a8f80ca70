"""Scans over the blocks of a segment: slot states forward, their gradients backward.

A program carries one tile of value dims, and of key dims where Phi is a number (Mamba-2). Gated DeltaNet's Phi mixes
key dims: a program then holds all of them in one tile (bf16, dk <= 128), or goes over tiles in memory (`STAGED`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES


@triton.jit
def add_tokens(
    acc,  # [BK, BV] fp32
    kh,  # k [T, G, DK] (Mamba-2) or Kh [T, H, DK], at the head
    v,  # [T, H, DV], at the head
    cg,  # [H, T], at the head
    stride_k,
    stride_v,
    first,
    end,
    lo,
    hi,
    k_at,
    b,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """acc += Kh[lo:hi]^T V[lo:hi] for tokens of the block [first, end)."""
    a = k_at + tl.arange(0, BK)
    g_end = tl.load(cg + end - 1)
    for tile in range((lo - first) // C, (hi - first + C - 1) // C):
        t = first + tile * C + tl.arange(0, C)
        inside = (t >= lo) & (t < hi)
        keys = tl.load(
            kh + t.to(tl.int64)[None, :] * stride_k + a[:, None], mask=inside[None, :] & (a < DK)[:, None], other=0.0
        )
        if not GDN:
            decay = tl.exp(g_end - tl.load(cg + t, mask=inside, other=0.0))
            keys = keys.to(tl.float32) * tl.where(inside, decay, 0.0)[None, :]
        values = tl.load(
            v + t.to(tl.int64)[:, None] * stride_v + b[None, :], mask=inside[:, None] & (b < DV)[None, :], other=0.0
        )
        acc = tl.dot(keys.to(DOT), values.to(DOT), acc, input_precision=PREC)
    return acc


@triton.jit
def transition_tile(r_matrix, a, b, DK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """R[a, b], or R^T[a, b] = R[b, a]."""
    there = (a < DK)[:, None] & (b < DK)[None, :]
    if TRANSPOSED:
        return tl.load(r_matrix + b[None, :] * DK + a[:, None], mask=there, other=0.0)
    return tl.load(r_matrix + a[:, None] * DK + b[None, :], mask=there, other=0.0)


@triton.jit
def through(
    state, r_matrix, a, b, keep, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    TRANSPOSED: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Rows a of (keep - R) S (or its transpose), S [DK, DV] fp32 in memory: fp32 [BK, BV]."""
    there = (a < DK)[:, None] & (b < DV)[None, :]
    acc = keep * tl.load(state + a[:, None] * DV + b[None, :], mask=there, other=0.0)
    for x in range(0, DK, BK):
        c = x + tl.arange(0, BK)
        s = tl.load(state + c[:, None] * DV + b[None, :], mask=(c < DK)[:, None] & (b < DV)[None, :], other=0.0)
        r = transition_tile(r_matrix, a, c, DK, TRANSPOSED)
        acc -= tl.dot(r.to(DOT), s.to(DOT), input_precision=PREC)
    return acc


@triton.jit
def slots_opened(live_pos, live_count, blocks, block, h, H, K, KP: tl.constexpr):
    """Of one block: row, first token, end, slots before and after it, slots that it opened."""
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    row = tl.load(blocks + 4 * block + 2)
    before, after = tl.load(live_count + row * H + h), tl.load(live_count + (row + 1) * H + h)
    slots = tl.arange(0, KP)
    at = ((row + 1).to(tl.int64) * H + h) * K
    opened = tl.load(live_pos + at + slots, mask=slots < after, other=-1)
    fresh = tl.sum(((opened >= first) & (slots < after)).to(tl.int32), 0)
    return row, first, end, before, after, fresh


@triton.jit(do_not_specialize=SIZES)
def state_scan_kernel(
    kh,  # [T, G, DK] or [T, H, DK]
    v,  # [T, H, DV]
    cg,  # [H, T]
    r_matrix,  # [blocks of the window, H, DK, DK] or unused
    blocks,  # [n, 4]
    segments,  # [n, 4]: the window's
    live_pos,
    live_death,
    live_count,  # [rows, H(, K)]
    carry,  # [segments of the window, 2, H, K, DK, DV] fp32: [:, 0] = incoming states; scratch
    snap,  # [rows of the window, H, K, DK, DV] out: states at each row before a block
    final,  # [segments of the window, H, K, DK, DV] fp32 out: states after the last block
    T,
    H,
    GROUP,  # heads per q/k group
    K,
    block_lo,
    row_lo,
    token_lo,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGED: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    s, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    k_at = tl.program_id(1) * BK
    k_end = k_at + BK
    if STAGED:
        k_end = k_at + DK
    b = tl.program_id(2) * BV + tl.arange(0, BV)
    first_block, n_blocks = tl.load(segments + 4 * s), tl.load(segments + 4 * s + 1)
    stride_k, stride_v = (H if GDN else H // GROUP) * DK, H * DV
    keys = kh + (h - token_lo.to(tl.int64) * H if GDN else h // GROUP) * DK
    values, decays = v + h * DV, cg + h * T
    size = K * DK * DV
    source = carry + (s.to(tl.int64) * 2 * H + h) * size
    dest = source + (h * 0 + H) * size
    for n in range(n_blocks):
        block = first_block + n
        row, first, end, m, m_next, fresh = slots_opened(live_pos, live_count, blocks, block, h, H, K, KP)
        here, after = (row.to(tl.int64) * H + h) * K, ((row + 1).to(tl.int64) * H + h) * K
        out = snap + ((row - row_lo).to(tl.int64) * H + h) * size
        keep = tl.exp(tl.load(decays + end - 1))
        rm = r_matrix + ((block - block_lo).to(tl.int64) * H + h) * DK * DK
        hi = end  # the tokens before the block's first live start belong to the slot that was open
        if fresh > 0:
            hi = tl.load(live_pos + after + fresh - 1)
        for x in range(k_at, k_end, BK):
            a = x + tl.arange(0, BK)
            tile = a[:, None] * DV + b[None, :]
            there = (a < DK)[:, None] & (b < DV)[None, :]
            to = fresh
            acc = tl.zeros([BK, BV], tl.float32)
            for i in range(m):
                state = tl.load(source + tl.cast(i, tl.int64) * DK * DV + tile, mask=there, other=0.0)
                tl.store(out + tl.cast(i, tl.int64) * DK * DV + tile, state.to(DOT), mask=there)
                acc += state
                if (tl.load(live_death + here + i) >= end) | (i == m - 1):  # the next older slot stays apart
                    if not STAGED:
                        total = acc
                        acc = keep * acc
                        if GDN:
                            r = transition_tile(rm, a, a, DK, False)
                            acc -= tl.dot(r, total.to(DOT), input_precision=PREC)
                        if to == fresh:
                            acc = add_tokens(
                                acc,
                                keys,
                                values,
                                decays,
                                stride_k,
                                stride_v,
                                first,
                                end,
                                first,
                                hi,
                                x,
                                b,
                                DK,
                                DV,
                                BK,
                                BV,
                                C,
                                GDN,
                                DOT,
                                PREC,
                            )
                    tl.store(dest + to.to(tl.int64) * DK * DV + tile, acc, mask=there & (to < K))
                    to += 1
                    acc = tl.zeros([BK, BV], tl.float32)
        if STAGED:  # `dest` holds the merged states; what they become goes where they came from
            tl.debug_barrier()
            for to in range(fresh, m_next):
                for x in range(k_at, k_end, BK):
                    a = x + tl.arange(0, BK)
                    at = tl.cast(to, tl.int64) * DK * DV
                    acc = through(dest + at, rm, a, b, keep, DK, DV, BK, BV, False, DOT, PREC)
                    if to == fresh:
                        acc = add_tokens(
                            acc,
                            keys,
                            values,
                            decays,
                            stride_k,
                            stride_v,
                            first,
                            end,
                            first,
                            hi,
                            x,
                            b,
                            DK,
                            DV,
                            BK,
                            BV,
                            C,
                            GDN,
                            DOT,
                            PREC,
                        )
                    tl.store(
                        source + at + a[:, None] * DV + b[None, :], acc, mask=(a < DK)[:, None] & (b < DV)[None, :]
                    )
        else:
            source, dest = dest, source
        for j in range(fresh):
            lo = tl.load(live_pos + after + j)
            until = end
            if j > 0:
                until = tl.load(live_pos + after + j - 1)
            for x in range(k_at, k_end, BK):
                a = x + tl.arange(0, BK)
                acc = tl.zeros([BK, BV], tl.float32)
                acc = add_tokens(
                    acc,
                    keys,
                    values,
                    decays,
                    stride_k,
                    stride_v,
                    first,
                    end,
                    lo,
                    until,
                    x,
                    b,
                    DK,
                    DV,
                    BK,
                    BV,
                    C,
                    GDN,
                    DOT,
                    PREC,
                )
                tl.store(
                    source + tl.cast(j, tl.int64) * DK * DV + a[:, None] * DV + b[None, :],
                    acc,
                    mask=(a < DK)[:, None] & (b < DV)[None, :],
                )
        tl.debug_barrier()  # the next block reads what other threads wrote
    last = tl.load(blocks + 4 * (first_block + n_blocks - 1) + 2) + 1
    out = final + (s.to(tl.int64) * H + h) * size
    copy_slots(source, out, tl.load(live_count + last * H + h), k_at, k_end, b, DK, DV, BK)


@triton.jit
def copy_slots(source, out, m, k_at, k_end, b, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr):
    """The first m slots, in the type of `out`."""
    for i in range(m):
        for x in range(k_at, k_end, BK):
            a = x + tl.arange(0, BK)
            cell = tl.cast(i, tl.int64) * DK * DV + a[:, None] * DV + b[None, :]
            there = (a < DK)[:, None] & (b < DV)[None, :]
            tl.store(out + cell, tl.load(source + cell, mask=there, other=0.0).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def reverse_scan_kernel(
    cg,
    r_matrix,  # [blocks of the window, H, DK, DK] or unused
    blocks,
    segments,  # [n, 4]: the window's
    live_pos,
    live_death,
    live_count,
    snap,  # [rows of the window, H, K, DK, DV]
    grad_states,  # same shape: in, the blocks' own parts; out, D at every row
    carry,  # [segments of the window, 2, H, K, DK, DV] fp32: [:, 0] = gradient of the states at the end; scratch
    initial,  # [segments of the window, H, K, DK, DV] fp32 out: gradient of the states at the start
    dphi,  # [programs, blocks of the window, H] fp32 out: parts of <D, S> (Mamba-2 only)
    T,
    H,
    K,
    N_BLOCKS,
    block_lo,
    row_lo,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGED: tl.constexpr,
    KP: tl.constexpr,
    GDN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    s, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    k_at = tl.program_id(1) * BK
    k_end = k_at + BK
    if STAGED:
        k_end = k_at + DK
    b = tl.program_id(2) * BV + tl.arange(0, BV)
    program = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    first_block, n_blocks = tl.load(segments + 4 * s), tl.load(segments + 4 * s + 1)
    size = K * DK * DV
    source = carry + (s.to(tl.int64) * 2 * H + h) * size
    dest = source + (h * 0 + H) * size
    last = tl.load(blocks + 4 * (first_block + n_blocks - 1) + 2) + 1
    out = grad_states + ((last - row_lo).to(tl.int64) * H + h) * size
    copy_slots(source, out, tl.load(live_count + last * H + h), k_at, k_end, b, DK, DV, BK)
    for back in range(n_blocks):
        block = first_block + n_blocks - 1 - back
        row, first, end, m, m_next, fresh = slots_opened(live_pos, live_count, blocks, block, h, H, K, KP)
        here = (row.to(tl.int64) * H + h) * K
        states = snap + ((row - row_lo).to(tl.int64) * H + h) * size
        out = grad_states + ((row - row_lo).to(tl.int64) * H + h) * size
        keep = tl.exp(tl.load(cg + h * T + end - 1))
        rm = r_matrix + ((block - block_lo).to(tl.int64) * H + h) * DK * DK
        dkeep = tl.zeros([], tl.float32)
        to = fresh
        for i in range(m):
            moved = source + tl.minimum(to, K - 1).to(tl.int64) * DK * DV
            for x in range(k_at, k_end, BK):
                a = x + tl.arange(0, BK)
                tile = a[:, None] * DV + b[None, :]
                there = (a < DK)[:, None] & (b < DV)[None, :]
                cell = tl.cast(i, tl.int64) * DK * DV + tile
                grad = tl.load(out + cell, mask=there, other=0.0).to(tl.float32)
                if STAGED:
                    grad += through(moved, rm, a, b, keep, DK, DV, BK, BV, True, DOT, PREC)
                else:
                    ahead = tl.load(moved + tile, mask=there, other=0.0)
                    grad += keep * ahead
                    if GDN:
                        r = transition_tile(rm, a, a, DK, True)
                        grad -= tl.dot(r, ahead.to(DOT), input_precision=PREC)
                    else:
                        state = tl.load(states + cell, mask=there, other=0.0).to(tl.float32)
                        dkeep += tl.sum(tl.sum(state * ahead, 1), 0)
                tl.store(dest + cell, grad, mask=there)
                tl.store(out + cell, grad.to(DOT), mask=there)
            to += (tl.load(live_death + here + i) >= end).to(tl.int32)
        if not GDN:
            tl.store(dphi + (program.to(tl.int64) * N_BLOCKS + block - block_lo) * H + h, dkeep)
        source, dest = dest, source
        tl.debug_barrier()  # the next block reads what other threads wrote
    row = tl.load(blocks + 4 * first_block + 2)
    out = initial + (s.to(tl.int64) * H + h) * size
    copy_slots(source, out, tl.load(live_count + row * H + h), k_at, k_end, b, DK, DV, BK)
