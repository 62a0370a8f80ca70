"""Detection: where slots open. Scores are computed as in fp32, whatever the input dtype.

The score of token t needs x_t = v_t . S^T k_t, |S^T k_t|^2 and ||S||^2 of the open state S before t. In a chunk of C
tokens all of them come from C x C products that do not depend on where slots open: a restart of the open
state at token s is column masking (l >= s). So a chunk costs one vectorised round a boundary, not one step a token.

Shards of a segment may be run at the same time from an empty state (`detect_kernel`) and corrected afterwards
(`repair_kernel`): runs that share one boundary have the same open state from there on, and the same summed scores from
the next boundary on. So a shard is run again, from its true incoming state, only up to its second shared boundary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_local import columns_of, decays_of, products, raw_rows, rows_of


@triton.jit
def exact_dot(x, y, acc, PREC: tl.constexpr):
    """acc + x @ y to fp32 accuracy. An operand in bf16 is exact: the other one is cut into three bf16 terms."""
    if x.dtype == tl.bfloat16:
        high = y.to(tl.bfloat16)
        rest = y - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        acc = tl.dot(x, high, acc)
    elif y.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(low, y, acc)
        acc = tl.dot(middle, y, acc)
        acc = tl.dot(high, y, acc)
    else:
        acc = tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PREC)
    return acc


@triton.jit
def read_state(
    k, state, t, b, end, stride_k, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """K S of one tile of value dims: fp32 [C, BV]."""
    acc = tl.zeros([C, BV], tl.float32)
    for x in range(0, DK, BK):
        a = x + tl.arange(0, BK)
        s = tl.load(state + a[:, None] * DV + b[None, :], mask=(a < DK)[:, None] & (b < DV)[None, :], other=0.0)
        acc = exact_dot(raw_rows(k, t, a, end, stride_k, DK), s, acc, PREC)
    return acc


@triton.jit(do_not_specialize=SIZES)
def detect_pairs_kernel(
    k,  # [T, G, DK]
    v,  # [T, H, DV]
    beta,  # [T, H] (Gated DeltaNet only)
    cg,  # [H, T]
    inv,  # [T, H, C] (Gated DeltaNet only)
    effect,  # [T, H, C] fp32 out: E (Gated DeltaNet), or E .* V V^T
    pairs,  # [T, H, C] fp32 out: V V^T (Gated DeltaNet only)
    k2,  # [H, T] fp32 out: |k|^2
    written,  # [H, T] fp32 out: |s_t|^2
    blocks,
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    PREC: tl.constexpr,
):
    """What does not depend on where slots open, for all chunks at once."""
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    i = tl.arange(0, C)
    t = first + i
    k += h // GROUP * DK
    stride_k = (H // GROUP) * DK
    keys = tl.zeros([C], tl.float32)
    for x in range(0, DK, BK):
        key = rows_of(k, t, x + tl.arange(0, BK), end, stride_k, DK)
        keys += tl.sum(key * key, 1)
    values = tl.zeros([C], tl.float32)
    for y in range(0, DV, BV):
        value = rows_of(v + h * DV, t, y + tl.arange(0, BV), end, H * DV, DV)
        values += tl.sum(value * value, 1)
    write = tl.full([C], 1.0, tl.float32)
    if GDN:
        write = tl.load(beta + t.to(tl.int64) * H + h, mask=t < end, other=0.0).to(tl.float32)
    tl.store(k2 + h * T + t, keys, mask=t < end)
    tl.store(written + h * T + t, write * write * keys * values, mask=t < end)
    both = products(v + h * DV, v + h * DV, t, end, H * DV, DV, BV, C, PREC)
    cell = t.to(tl.int64)[:, None] * H * C + h * C + i[None, :]
    there = (t < end)[:, None] & (i >= 0)[None, :]
    if GDN:
        tl.store(pairs + cell, both, mask=there)
    decays = decays_of(cg + h * T, t, end)
    before = tl.where(i > 0, tl.load(cg + h * T + tl.maximum(tl.minimum(t, end) - 1, 0)), 0.0)
    gap = tl.exp(tl.where(i[None, :] < i[:, None], before[:, None] - decays[None, :], float("-inf")))
    gram = products(k, k, t, end, stride_k, DK, BK, C, PREC) * gap
    if GDN:
        gram = tl.dot(gram, rows_of(inv + h * C, t, i, end, H * C, C) * write[None, :], input_precision=PREC)
        tl.store(effect + cell, gram, mask=there)
    else:
        tl.store(effect + cell, gram * both, mask=there)


@triton.jit
def detect_chunk(
    k,  # [T, G, DK], at the head
    v,  # [T, H, DV], at the head
    beta,  # [T, H], at the head (Gated DeltaNet only)
    cg,  # [H, T], at the head
    inv,  # [T, H, C], at the head (Gated DeltaNet only)
    effect,  # [T, H, C], at the head, see `detect_pairs_kernel`
    pairs,
    k2,  # [H, T], at the head
    written,
    state,  # [DK, DV] fp32, in place: the open state
    starts,  # [H, T] int8, at the head, out
    scores,  # [H, T] fp32, at the head, out
    sums,  # [H, T] fp32, at the head, out: summed scores of the open slot
    first,
    end,
    tau,
    info,  # summed scores of the open slot so far
    fresh,  # 1: nothing is open, the first token opens a slot
    stride_k,
    stride_v,
    H,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    PREC: tl.constexpr,
):
    """One chunk; returns (info, boundaries that the arrays in memory had too and every one after the first of them)."""
    i = tl.arange(0, C)
    t = first + i
    n = end - first
    valid = t < end
    decays = decays_of(cg, t, end)
    before = tl.where(i > 0, tl.load(cg + tl.maximum(tl.minimum(t, end) - 1, 0)), 0.0)
    gain = tl.exp(decays - before)  # alpha
    norm = tl.zeros([], tl.float32)
    inner = tl.zeros([C], tl.float32)  # of the carried state
    read2 = tl.zeros([C], tl.float32)
    if fresh == 0:
        for y in range(0, DV, BV):
            b = y + tl.arange(0, BV)
            read = read_state(k, state, t, b, end, stride_k, DK, DV, BK, BV, C, PREC)
            if GDN:
                from_start = tl.exp(decays)[:, None] * read
                read = tl.exp(before)[:, None] * read
                read -= tl.dot(rows_of(effect, t, i, end, H * C, C), from_start, input_precision=PREC)
                # p = read + E v: |p|^2 but for |E v|^2
                ev = exact_dot(
                    rows_of(effect, t, i, end, H * C, C),
                    raw_rows(v, t, b, end, stride_v, DV),
                    tl.zeros([C, BV], tl.float32),
                    PREC,
                )
                read2 += tl.sum(read * (read + 2 * ev), 1)
            else:
                read = tl.exp(before)[:, None] * read
            inner += tl.sum(read * rows_of(v, t, b, end, stride_v, DV), 1)
            for x in range(0, DK, BK):
                a = x + tl.arange(0, BK)
                s = tl.load(state + a[:, None] * DV + b[None, :], mask=(a < DK)[:, None] & (b < DV)[None, :], other=0.0)
                norm += tl.sum(tl.sum(s * s, 1), 0)
    write2 = tl.load(written + t, mask=valid, other=0.0)
    write = tl.where(valid, 1.0, 0.0)
    shrink = write
    if GDN:
        write = tl.load(beta + t.to(tl.int64) * H, mask=valid, other=0.0).to(tl.float32)
        shrink = 1 - write * tl.load(k2 + t, mask=valid, other=0.0)
    known = tl.load(starts + t, mask=valid, other=0).to(tl.int32)
    tl.debug_barrier()  # all have read `starts` and the state before either is overwritten
    since = 0  # first token of the open slot in this chunk
    carried = (1 - fresh).to(tl.float32)  # 1 while the open slot began before this chunk
    at = 0  # first undecided token
    at_decay = tl.zeros([], tl.float32)
    shared = 0
    while at < n:
        square = tl.zeros([C, C], tl.float32)
        if GDN:
            for y in range(0, C, 16):  # a slab at a time: whole operands take more registers than sm_80 has
                j = y + tl.arange(0, 16)
                left = tl.where(j[None, :] >= since, rows_of(effect, t, j, end, H * C, C), 0.0)
                right = rows_of(pairs, first + j, i, end, H * C, C)
                square = tl.dot(left, right, square, input_precision=PREC)
        part = rows_of(effect, t, i, end, H * C, C)
        part = tl.where(i[None, :] >= since, part, 0.0)
        if GDN:
            both = rows_of(pairs, t, i, end, H * C, C)
            dot = write * (carried * inner + tl.sum(part * both, 1))
            p2 = carried * read2 + tl.sum(square * part, 1)
            grow = 2 * gain * shrink * dot + write2 - gain * gain * write * (1 + shrink) * p2
        else:
            dot = carried * inner + tl.sum(part, 1)
            grow = 2 * gain * dot + write2
        spread = (i[None, :] < i[:, None]) & (i[None, :] >= at)
        spread = tl.exp(tl.where(spread, 2 * (before[:, None] - decays[None, :]), float("-inf")))
        state2 = tl.sum(spread * grow[None, :], 1) + norm * tl.exp(2 * tl.minimum(before - at_decay, 0.0))
        size = tl.sqrt(write2) * tl.sqrt(tl.maximum(state2, 0.0))  # the product could underflow
        cosine = tl.where(size > 0, dot / tl.where(size > 0, size, 1.0), 0.0)
        score = tl.sqrt(tl.maximum(2 - 2 * cosine, 0.0))
        fire = (i >= at) & valid & ((score >= tau) | ((i == 0) & (fresh > 0)))
        e = tl.min(tl.where(fire, i, C), 0)
        decided = (i >= at) & (i <= e) & valid
        grown = (i >= at) & (i < e) & valid
        tl.store(scores + t, score, mask=decided)
        tl.store(starts + t, (i == e).to(starts.dtype.element_ty), mask=decided)
        total = tl.where(grown, score, 0.0)
        opening = tl.sum(tl.where(i == e, score, 0.0), 0)
        tl.store(sums + t, tl.where(i == e, opening, info + tl.cumsum(total, 0)), mask=decided)
        # not in the branch: an integer sum there may run under a wrong predicate, see `predicated_reductions`
        same = tl.sum(tl.where(i == e, known, 0), 0)
        if e < C:
            if shared > 0:
                shared += 1
            else:
                shared = same
            info = opening
            norm = tl.sum(tl.where(i == e, write2, 0.0), 0)
            at_decay = tl.sum(tl.where(i == e, decays, 0.0), 0)
            since = e
            carried = carried * 0.0
            at = e + 1
        else:
            info += tl.sum(total, 0)
            at = n
    g_end = tl.load(cg + end - 1)
    keep = tl.exp(g_end)
    mine = (i >= since) & valid
    to_end = tl.where(valid, tl.exp(g_end - decays), 0.0)
    for y in range(0, DV, BV):
        b = y + tl.arange(0, BV)
        value = tl.where(mine[:, None], raw_rows(v, t, b, end, stride_v, DV), 0.0)
        if GDN:
            value = value.to(tl.float32)
            if carried > 0:
                read = read_state(k, state, t, b, end, stride_k, DK, DV, BK, BV, C, PREC)
                value -= tl.where(valid, tl.exp(decays), 0.0)[:, None] * read
            tl.debug_barrier()
            # Kh^T V = ck^T (B V): [C, C] times [C, BV] first, then the keys
            value = tl.dot(rows_of(inv, t, i, end, H * C, C), write[:, None] * value, input_precision=PREC)
        for x in range(0, DK, BK):
            a = x + tl.arange(0, BK)
            key = columns_of(k, t, a, end, stride_k, DK) * to_end[None, :]
            cell = state + a[:, None] * DV + b[None, :]
            there = (a < DK)[:, None] & (b < DV)[None, :]
            new = tl.zeros([BK, BV], tl.float32)
            if carried > 0:
                new += keep * tl.load(cell, mask=there, other=0.0)
            tl.store(cell, exact_dot(key, value, new, PREC), mask=there)
    tl.debug_barrier()  # the next chunk reads the state in another arrangement
    return info, shared


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def detect_kernel(
    k,
    v,
    beta,
    cg,
    inv,
    effect,
    pairs,
    k2,
    written,
    tau,  # [H] fp32
    state,  # [shards, H, DK, DV] fp32: in for a segment's first shard with a cache, out: the open state at the end
    infos,  # [shards, H] fp32: likewise, summed scores of the open slot
    fresh,  # [shards, H] int32: 1 where nothing is open at the start
    starts,
    scores,
    sums,
    blocks,
    shards,  # [n, 2]: first block, blocks
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    PREC: tl.constexpr,
):
    shard, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_block, n_blocks = tl.load(shards + 2 * shard), tl.load(shards + 2 * shard + 1)
    lane = shard.to(tl.int64) * H + h
    empty = tl.load(fresh + lane)
    info = tl.load(infos + lane)
    threshold = tl.load(tau + h)
    for n in range(n_blocks):
        first, end = tl.load(blocks + 4 * (first_block + n)), tl.load(blocks + 4 * (first_block + n) + 1)
        info, _ = detect_chunk(
            k + h // GROUP * DK, v + h * DV, beta + h, cg + h * T, inv + h * C, effect + h * C,
                pairs + h * C, k2 + h * T, written + h * T, state + lane * DK * DV, starts + h * T,
            scores + h * T, sums + h * T, first, end, threshold, info, empty, (H // GROUP) * DK, H * DV, H, DK, DV, BK,
            BV, C, GDN, PREC,
        )  # fmt: skip
        empty = empty * 0
    tl.store(infos + lane, info)


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def repair_kernel(
    k,
    v,
    beta,
    cg,
    inv,
    effect,
    pairs,
    k2,
    written,
    tau,
    state,
    infos,
    starts,
    scores,
    sums,
    blocks,
    shards,
    segment_shards,  # [n, 2]: first shard, shards of each segment
    T,
    H,
    GROUP,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    GDN: tl.constexpr,
    PREC: tl.constexpr,
):
    """Run every shard but a segment's first again from its true incoming state, until it agrees with itself."""
    segment, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_shard, n_shards = tl.load(segment_shards + 2 * segment), tl.load(segment_shards + 2 * segment + 1)
    threshold = tl.load(tau + h)
    for s in range(1, n_shards):
        shard = first_shard + s
        lane = shard.to(tl.int64) * H + h
        came = lane - H
        first_block, n_blocks = tl.load(shards + 2 * shard), tl.load(shards + 2 * shard + 1)
        info = tl.load(infos + came)
        n = 0
        shared = 0
        while (n < n_blocks) & (shared < 2):
            first, end = tl.load(blocks + 4 * (first_block + n)), tl.load(blocks + 4 * (first_block + n) + 1)
            info, now = detect_chunk(
                k + h // GROUP * DK, v + h * DV, beta + h, cg + h * T, inv + h * C, effect + h * C,
                pairs + h * C, k2 + h * T, written + h * T, state + came * DK * DV,
                starts + h * T, scores + h * T, sums + h * T, first, end, threshold, info, n * 0, (H // GROUP) * DK,
                H * DV, H, DK, DV, BK, BV, C, GDN, PREC,
            )  # fmt: skip
            # a first shared boundary in an earlier chunk: any boundary since is the second
            t = first + tl.arange(0, C)
            opened = tl.sum(tl.load(starts + h * T + t, mask=t < end, other=0).to(tl.int32), 0)
            shared = tl.where(shared > 0, shared + opened, now)
            n += 1
        if shared < 2:  # the shard's own run never met the true one: hand on what was carried here
            for x in range(0, DK, BK):
                for y in range(0, DV, BV):
                    a, b = x + tl.arange(0, BK), y + tl.arange(0, BV)
                    cell = a[:, None] * DV + b[None, :]
                    there = (a < DK)[:, None] & (b < DV)[None, :]
                    tl.store(
                        state + lane * DK * DV + cell,
                        tl.load(state + came * DK * DV + cell, mask=there, other=0.0),
                        mask=there,
                    )
            tl.store(infos + lane, info)
        tl.debug_barrier()
