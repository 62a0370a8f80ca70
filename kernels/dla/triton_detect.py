"""Detection: where slots open. Scores are computed as in fp32, whatever the input dtype.

The score of token t needs x_t = v_t . S^T k_t, |S^T k_t|^2 and ||S||^2 of the open state S before t. In a chunk of
BT tokens all of them come from BT x BT products that do not depend on where slots open: a restart of the open
state at token s is column masking (l >= s). So a chunk costs one vectorised round a boundary, not one step a token.

Shards of a segment may be run at the same time from an empty state (`detect_kernel`) and corrected afterwards
(`repair_kernel`): runs that share one boundary have the same open state from there on, and the same summed scores from
the next boundary on. So a shard is run again, from the state that the one before it ends with, only up to its second
shared boundary. Where it has none, that was not the true end for the next shard: `repair_rest_kernel` goes on from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_tiles import columns_of, decays_of, exact_dot, load_tile, products, raw_rows, rows_of


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


@triton.jit(do_not_specialize=SIZES)
def detect_pairs_kernel(
    k,  # [T, G, DK]
    v,  # [T, H, DV]
    beta,  # [T, H] (Gated DeltaNet only)
    cg,  # [H, T]
    inv,  # [T, H, BT] (Gated DeltaNet only)
    effect,  # [T, H, BT] fp32 out: E (Gated DeltaNet), or E .* V V^T
    pairs,  # [T, H, BT] fp32 out: V V^T (Gated DeltaNet only)
    k2,  # [H, T] fp32 out: |k|^2
    written,  # [H, T] fp32 out: |s_t|^2
    blocks, T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """What does not depend on where slots open, for all chunks at once."""
    i_t, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    k += i_h // GROUP * DK
    stride_k = (H // GROUP) * DK
    b_k2 = tl.zeros([BT], tl.float32)
    for i_k in range(0, DK, BK):
        b_k = rows_of(k, o_t, i_k + tl.arange(0, BK), end, stride_k, DK)
        b_k2 += tl.sum(b_k * b_k, 1)
    b_v2 = tl.zeros([BT], tl.float32)
    for i_v in range(0, DV, BV):
        b_v = rows_of(v + i_h * DV, o_t, i_v + tl.arange(0, BV), end, H * DV, DV)
        b_v2 += tl.sum(b_v * b_v, 1)
    b_write = tl.full([BT], 1.0, tl.float32)
    if GDN:
        b_write = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    tl.store(k2 + i_h * T + o_t, b_k2, mask=o_t < end)
    tl.store(written + i_h * T + o_t, b_write * b_write * b_k2 * b_v2, mask=o_t < end)
    b_pairs = products(v + i_h * DV, v + i_h * DV, o_t, end, H * DV, DV, BV, BT, PREC)
    o_pairs = o_t.to(tl.int64)[:, None] * H * BT + i_h * BT + o_i[None, :]
    m_pairs = (o_t < end)[:, None] & (o_i >= 0)[None, :]
    if GDN:
        tl.store(pairs + o_pairs, b_pairs, mask=m_pairs)
    b_g = decays_of(cg + i_h * T, o_t, end)
    b_before = tl.where(o_i > 0, tl.load(cg + i_h * T + tl.maximum(tl.minimum(o_t, end) - 1, 0)), 0.0)
    b_gap = tl.exp(tl.where(o_i[None, :] < o_i[:, None], b_before[:, None] - b_g[None, :], float("-inf")))
    b_gram = products(k, k, o_t, end, stride_k, DK, BK, BT, PREC) * b_gap
    if GDN:
        b_inv = rows_of(inv + i_h * BT, o_t, o_i, end, H * BT, BT) * b_write[None, :]
        b_gram = tl.dot(b_gram, b_inv, input_precision=PREC)  # [BT, BT] @ [BT, BT] -> [BT, BT]
        tl.store(effect + o_pairs, b_gram, mask=m_pairs)
    else:
        tl.store(effect + o_pairs, b_gram * b_pairs, mask=m_pairs)


@triton.jit
def open_state_products(
    p_k, p_v, p_effect, p_s, b_g, b_before, o_t, end, stride_k, stride_v, stride_e,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Of the slot that is open as the chunk begins, S, without the chunk's own writes: |S|^2, v_t . S^T k_t [BT].

    The third result [BT] (Gated DeltaNet) is |S^T k_t|^2 but for what the chunk's writes alone contribute.
    """
    o_i = tl.arange(0, BT)
    norm = tl.zeros([], tl.float32)
    b_inner = tl.zeros([BT], tl.float32)
    b_read2 = tl.zeros([BT], tl.float32)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_read = read_state(p_k, p_s, o_t, o_v, end, stride_k, DK, DV, BK, BV, BT, PREC)
        if GDN:
            b_start = tl.exp(b_g)[:, None] * b_read
            b_read = tl.exp(b_before)[:, None] * b_read
            b_effect = rows_of(p_effect, o_t, o_i, end, stride_e, BT)
            b_read -= tl.dot(b_effect, b_start, input_precision=PREC)  # [BT, BT] @ [BT, BV] -> [BT, BV]
            # p = read + E v: |p|^2 but for |E v|^2
            b_effect = rows_of(p_effect, o_t, o_i, end, stride_e, BT)
            b_v = raw_rows(p_v, o_t, o_v, end, stride_v, DV)
            b_ev = exact_dot(b_effect, b_v, tl.zeros([BT, BV], tl.float32), PREC)
            b_read2 += tl.sum(b_read * (b_read + 2 * b_ev), 1)
        else:
            b_read = tl.exp(b_before)[:, None] * b_read
        b_inner += tl.sum(b_read * rows_of(p_v, o_t, o_v, end, stride_v, DV), 1)
        for i_k in range(0, DK, BK):
            b_s = load_tile(p_s, i_k + tl.arange(0, BK), o_v, DK, DV)
            norm += tl.sum(tl.sum(b_s * b_s, 1), 0)
    return norm, b_inner, b_read2


@triton.jit
def scores_of(
    p_effect, p_pairs, b_inner, b_read2, b_g, b_before, b_gain, b_write, b_shrink, b_write2, norm, carried, since, at,
    at_decay, first, end, stride_e, BT: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Scores [BT] of the tokens from `at` on against the slot that is open there and began at token `since`.

    `norm` is |S|^2 at the last boundary, whose cumulative decay is `at_decay`.
    """
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    b_square = tl.zeros([BT, BT], tl.float32)
    if GDN:
        for i_y in range(0, BT, 16):  # a slab at a time: whole operands take more registers than sm_80 has
            o_y = i_y + tl.arange(0, 16)
            b_left = tl.where(o_y[None, :] >= since, rows_of(p_effect, o_t, o_y, end, stride_e, BT), 0.0)
            b_right = rows_of(p_pairs, first + o_y, o_i, end, stride_e, BT)
            b_square = tl.dot(b_left, b_right, b_square, input_precision=PREC)  # [BT, 16] @ [16, BT] -> [BT, BT]
    b_part = rows_of(p_effect, o_t, o_i, end, stride_e, BT)
    b_part = tl.where(o_i[None, :] >= since, b_part, 0.0)
    if GDN:
        b_pairs = rows_of(p_pairs, o_t, o_i, end, stride_e, BT)
        b_dot = b_write * (carried * b_inner + tl.sum(b_part * b_pairs, 1))
        b_p2 = carried * b_read2 + tl.sum(b_square * b_part, 1)
        b_grow = 2 * b_gain * b_shrink * b_dot + b_write2 - b_gain * b_gain * b_write * (1 + b_shrink) * b_p2
    else:
        b_dot = carried * b_inner + tl.sum(b_part, 1)
        b_grow = 2 * b_gain * b_dot + b_write2
    b_spread = (o_i[None, :] < o_i[:, None]) & (o_i[None, :] >= at)
    b_spread = tl.exp(tl.where(b_spread, 2 * (b_before[:, None] - b_g[None, :]), float("-inf")))
    b_state2 = tl.sum(b_spread * b_grow[None, :], 1) + norm * tl.exp(2 * tl.minimum(b_before - at_decay, 0.0))
    b_size = tl.sqrt(b_write2) * tl.sqrt(tl.maximum(b_state2, 0.0))  # the product could underflow
    b_cosine = tl.where(b_size > 0, b_dot / tl.where(b_size > 0, b_size, 1.0), 0.0)
    return tl.sqrt(tl.maximum(2 - 2 * b_cosine, 0.0))


@triton.jit
def advance_open_state(
    p_k, p_v, p_g, p_inv, p_s, b_g, b_write, carried, since, first, end, stride_k, stride_v, stride_e,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """The open state at the chunk's end, in place: the tokens from `since` on, and S where carried > 0."""
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    m_t = o_t < end
    g_end = tl.load(p_g + end - 1)
    keep = tl.exp(g_end)
    mine = (o_i >= since) & m_t
    b_to_end = tl.where(m_t, tl.exp(g_end - b_g), 0.0)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = tl.where(mine[:, None], raw_rows(p_v, o_t, o_v, end, stride_v, DV), 0.0)
        if GDN:
            b_v = b_v.to(tl.float32)
            if carried > 0:
                b_read = read_state(p_k, p_s, o_t, o_v, end, stride_k, DK, DV, BK, BV, BT, PREC)
                b_v -= tl.where(m_t, tl.exp(b_g), 0.0)[:, None] * b_read
            tl.debug_barrier()
            # Kh^T V = ck^T (B V): B V first, [BT, BT] @ [BT, BV] -> [BT, BV], then the keys
            b_inv = rows_of(p_inv, o_t, o_i, end, stride_e, BT)
            b_v = tl.dot(b_inv, b_write[:, None] * b_v, input_precision=PREC)
        for i_k in range(0, DK, BK):
            o_k = i_k + tl.arange(0, BK)
            b_k = columns_of(p_k, o_t, o_k, end, stride_k, DK) * b_to_end[None, :]
            p_tile = p_s + o_k[:, None] * DV + o_v[None, :]
            m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            b_s = tl.zeros([BK, BV], tl.float32)
            if carried > 0:
                b_s += keep * tl.load(p_tile, mask=m_s, other=0.0)
            tl.store(p_tile, exact_dot(b_k, b_v, b_s, PREC), mask=m_s)  # [BK, BT] @ [BT, BV] -> [BK, BV]


@triton.jit
def threshold_of(tau, T, i_h, BY_TOKEN: tl.constexpr):
    """Of a head: the number, or a pointer to those of its tokens."""
    return tau + i_h * T if BY_TOKEN else tl.load(tau + i_h)


@triton.jit
def detect_chunk(
    p_k,  # [T, G, DK], at the head, as all pointers are
    p_v,  # [T, H, DV]
    p_beta,  # [T, H] (Gated DeltaNet only)
    p_g,  # cg [H, T]
    p_inv,  # [T, H, BT] (Gated DeltaNet only)
    p_effect,  # [T, H, BT], see `detect_pairs_kernel`
    p_pairs,
    p_k2,  # [H, T]
    p_written,
    p_s,  # [DK, DV] fp32, in place: the open state
    p_starts,  # [H, T] int8, out
    p_scores,  # [H, T] fp32, out
    p_sums,  # [H, T] fp32, out: summed scores of the open slot
    first, end,
    tau,  # threshold; BY_TOKEN: pointer [H, T] at the head, to one of each token
    info,  # summed scores of the open slot so far
    fresh,  # 1: nothing is open, the first token opens a slot
    stride_k, stride_v, H, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    GDN: tl.constexpr, PREC: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """One chunk; returns (info, boundaries that the arrays in memory had too and every one after the first of them)."""
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    n = end - first
    m_t = o_t < end
    b_g = decays_of(p_g, o_t, end)
    b_before = tl.where(o_i > 0, tl.load(p_g + tl.maximum(tl.minimum(o_t, end) - 1, 0)), 0.0)
    b_gain = tl.exp(b_g - b_before)  # alpha
    norm = tl.zeros([], tl.float32)
    b_inner = tl.zeros([BT], tl.float32)
    b_read2 = tl.zeros([BT], tl.float32)
    if fresh == 0:
        norm, b_inner, b_read2 = open_state_products(
            p_k, p_v, p_effect, p_s, b_g, b_before, o_t, end, stride_k, stride_v, H * BT, DK, DV, BK, BV, BT, GDN, PREC
        )
    b_write2 = tl.load(p_written + o_t, mask=m_t, other=0.0)
    b_write = tl.where(m_t, 1.0, 0.0)
    b_shrink = b_write
    if GDN:
        b_write = tl.load(p_beta + o_t.to(tl.int64) * H, mask=m_t, other=0.0).to(tl.float32)
        b_shrink = 1 - b_write * tl.load(p_k2 + o_t, mask=m_t, other=0.0)
    b_known = tl.load(p_starts + o_t, mask=m_t, other=0).to(tl.int32)
    tl.debug_barrier()  # all have read `p_starts` and the state before either is overwritten
    since = 0  # first token of the open slot in this chunk
    carried = (1 - fresh).to(tl.float32)  # 1 while the open slot began before this chunk
    at = 0  # first undecided token
    at_decay = tl.zeros([], tl.float32)
    shared = 0
    while at < n:
        b_score = scores_of(
            p_effect, p_pairs, b_inner, b_read2, b_g, b_before, b_gain, b_write, b_shrink, b_write2, norm, carried,
            since, at, at_decay, first, end, H * BT, BT, GDN, PREC,
        )  # fmt: skip
        b_tau = tau
        if BY_TOKEN:  # again each round: held over the loop they would take registers
            b_tau = tl.load(tau + o_t, mask=m_t, other=0.0)
        fire = (o_i >= at) & m_t & ((b_score >= b_tau) | ((o_i == 0) & (fresh > 0)))
        e = tl.min(tl.where(fire, o_i, BT), 0)
        decided = (o_i >= at) & (o_i <= e) & m_t
        grown = (o_i >= at) & (o_i < e) & m_t
        tl.store(p_scores + o_t, b_score, mask=decided)
        tl.store(p_starts + o_t, (o_i == e).to(p_starts.dtype.element_ty), mask=decided)
        b_total = tl.where(grown, b_score, 0.0)
        opening = tl.sum(tl.where(o_i == e, b_score, 0.0), 0)
        tl.store(p_sums + o_t, tl.where(o_i == e, opening, info + tl.cumsum(b_total, 0)), mask=decided)
        # not in the branch: an integer sum there may run under a wrong predicate, see `predicated_reductions`
        same = tl.sum(tl.where(o_i == e, b_known, 0), 0)
        if e < BT:
            if shared > 0:
                shared += 1
            else:
                shared = same
            info = opening
            norm = tl.sum(tl.where(o_i == e, b_write2, 0.0), 0)
            at_decay = tl.sum(tl.where(o_i == e, b_g, 0.0), 0)
            since = e
            carried = carried * 0.0
            at = e + 1
        else:
            info += tl.sum(b_total, 0)
            at = n
    advance_open_state(
        p_k, p_v, p_g, p_inv, p_s, b_g, b_write, carried, since, first, end, stride_k, stride_v, H * BT, DK, DV, BK, BV,
        BT, GDN, PREC,
    )  # fmt: skip
    tl.debug_barrier()  # the next chunk reads the state in another arrangement
    return info, shared


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def detect_kernel(
    k, v, beta, cg, inv, effect, pairs, k2, written,
    tau,  # [H] fp32; BY_TOKEN: [H, T]
    state,  # [shards, H, DK, DV] fp32: in for a segment's first shard with a cache, out: the open state at the end
    infos,  # [shards, H] fp32: likewise, summed scores of the open slot
    fresh,  # [shards, H] int32: 1 where nothing is open at the start; without a cache unused
    starts, scores, sums, blocks,
    shards,  # [n, 3]: first block, blocks, whether the shard before is of the same segment
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr, HAS_CACHE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_block, n_blocks = tl.load(shards + 3 * i_n), tl.load(shards + 3 * i_n + 1)
    i_nh = i_n.to(tl.int64) * H + i_h
    empty = n_blocks * 0 + 1
    info = tl.zeros([], tl.float32)
    if HAS_CACHE:
        empty = tl.load(fresh + i_nh)
        info = tl.load(infos + i_nh)
    threshold = threshold_of(tau, T, i_h, BY_TOKEN)
    for i_b in range(n_blocks):
        first, end = tl.load(blocks + 4 * (first_block + i_b)), tl.load(blocks + 4 * (first_block + i_b) + 1)
        info, _ = detect_chunk(
            k + i_h // GROUP * DK, v + i_h * DV, beta + i_h, cg + i_h * T, inv + i_h * BT, effect + i_h * BT,
            pairs + i_h * BT, k2 + i_h * T, written + i_h * T, state + i_nh * DK * DV, starts + i_h * T,
            scores + i_h * T, sums + i_h * T, first, end, threshold, info, empty, (H // GROUP) * DK, H * DV, H, DK, DV,
            BK, BV, BT, GDN, PREC, BY_TOKEN,
        )  # fmt: skip
        empty = empty * 0
    tl.store(infos + i_nh, info)


@triton.jit
def run_again(
    k, v, beta, cg, inv, effect, pairs, k2, written, tau, p_s, starts, scores, sums, blocks, first_block, n_blocks,
    enough,  # shared boundaries after which to stop
    info, T, H, GROUP, i_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Blocks of a shard from the state in `p_s`, in place; returns (summed scores at the end, boundaries shared)."""
    threshold = threshold_of(tau, T, i_h, BY_TOKEN)
    i_b = first_block * 0
    shared = i_b
    while (i_b < n_blocks) & (shared < enough):
        first, end = tl.load(blocks + 4 * (first_block + i_b)), tl.load(blocks + 4 * (first_block + i_b) + 1)
        info, now = detect_chunk(
            k + i_h // GROUP * DK, v + i_h * DV, beta + i_h, cg + i_h * T, inv + i_h * BT, effect + i_h * BT,
            pairs + i_h * BT, k2 + i_h * T, written + i_h * T, p_s, starts + i_h * T, scores + i_h * T, sums + i_h * T,
            first, end, threshold, info, i_b * 0, (H // GROUP) * DK, H * DV, H, DK, DV, BK, BV, BT, GDN, PREC, BY_TOKEN,
        )  # fmt: skip
        # a first shared boundary in an earlier chunk: any boundary since is the second
        o_t = first + tl.arange(0, BT)
        opened = tl.sum(tl.load(starts + i_h * T + o_t, mask=o_t < end, other=0).to(tl.int32), 0)
        shared = tl.where(shared > 0, shared + opened, now)
        i_b += 1
    return info, shared


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def repair_kernel(
    k, v, beta, cg, inv, effect, pairs, k2, written, tau,
    state,  # [shards, H, DK, DV] fp32: the open state at each shard's end; out: at the next one's, where they disagree
    infos,  # [shards, H] fp32: likewise, summed scores of the open slot
    starts, scores, sums, blocks, shards,
    agreed,  # [shards, H] int32 out: whether the shard ends as in its first run
    ends,  # [shards, H] fp32 out: where it does not, its summed scores
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Run every shard but a segment's first again, from the end of the one before, until it agrees with itself."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_block, n_blocks = tl.load(shards + 3 * i_n), tl.load(shards + 3 * i_n + 1)
    i_nh = i_n.to(tl.int64) * H + i_h
    agrees = 1 - tl.load(shards + 3 * i_n + 2)
    if agrees == 0:
        i_last = i_nh - H
        info, shared = run_again(
            k, v, beta, cg, inv, effect, pairs, k2, written, tau, state + i_last * DK * DV, starts, scores, sums,
            blocks, first_block, n_blocks, 2, tl.load(infos + i_last), T, H, GROUP, i_h, DK, DV, BK, BV, BT, GDN, PREC,
            BY_TOKEN,
        )  # fmt: skip
        tl.store(ends + i_nh, info)
        agrees = (shared >= 2).to(tl.int32)
    tl.store(agreed + i_nh, agrees)


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def repair_rest_kernel(
    k, v, beta, cg, inv, effect, pairs, k2, written, tau, state, infos, starts, scores, sums, blocks, shards,
    agreed,  # [shards, H] int32, see `repair_kernel`; out: whether the next shard began with the right state
    ends,
    segment_shards,  # [n, 2]: first shard, shards of each segment
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GDN: tl.constexpr,
    PREC: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Run those shards once more, one after another, that `repair_kernel` did not begin with their true state."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_shard, n_shards = tl.load(segment_shards + 2 * i_n), tl.load(segment_shards + 2 * i_n + 1)
    for s in range(1, n_shards):
        shard = first_shard + s
        i_nh = shard.to(tl.int64) * H + i_h
        i_last = i_nh - H
        before, mine = tl.load(agreed + i_last), tl.load(agreed + i_nh)
        if (before == 0) | (mine == 0):
            info = tl.load(ends + i_nh)
            if before == 0:
                # where the second run ended on its own, its end is lost: go on to the shard's
                enough = tl.where(mine > 0, 2, 2**30)
                info, shared = run_again(
                    k, v, beta, cg, inv, effect, pairs, k2, written, tau, state + i_last * DK * DV, starts, scores,
                    sums, blocks, tl.load(shards + 3 * shard), tl.load(shards + 3 * shard + 1), enough,
                    tl.load(infos + i_last), T, H, GROUP, i_h, DK, DV, BK, BV, BT, GDN, PREC, BY_TOKEN,
                )  # fmt: skip
                mine = (shared >= enough).to(tl.int32)
            if mine == 0:  # its end is what was carried here
                for i_k in range(0, DK, BK):
                    for i_v in range(0, DV, BV):
                        o_k, o_v = i_k + tl.arange(0, BK), i_v + tl.arange(0, BV)
                        o_tile = o_k[:, None] * DV + o_v[None, :]
                        m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
                        b_s = tl.load(state + i_last * DK * DV + o_tile, mask=m_s, other=0.0)
                        tl.store(state + i_nh * DK * DV + o_tile, b_s, mask=m_s)
                tl.store(infos + i_nh, info)
            tl.debug_barrier()  # all have read it
            tl.store(agreed + i_nh, mine)
            tl.debug_barrier()
