"""Detection: where slots open. Scores are computed as in fp32, whatever the input dtype.

The score of token t needs x_t = v_t . S^T k_t, |S^T k_t|^2 and ||S||^2 of the open state S before t. In a chunk of
BT tokens all of them come from BT x BT products that do not depend on where slots open: a restart of the open
state at token s is column masking (l >= s). So a chunk costs one vectorised round a boundary, not one step a token,
and what its tokens read of the slot that was open before it, once: see `triton_open_slot.py`.

Shards of a segment may be run at the same time from an empty state (`detect_kernel`) and corrected afterwards
(`repair_kernel`): runs that share one boundary have the same open state from there on, and the same summed scores from
the next boundary on. So a shard is run again, from the state that the one before it ends with, only up to its second
shared boundary. Where it has none, that was not the true end for the next shard: `repair_rest_kernel` goes on from it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_layout import SIZES
from .triton_local import invert
from .triton_open_slot import delta_products, keep_state, past_products, ring_size, state_products, write_chunk
from .triton_tiles import decays_of, raw_rows, rows_of, store_rows


@triton.jit
def gram_of(x, o_t, end, stride, D: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, PREC: tl.constexpr):
    """x[t] . x[p] over all dims: fp32 [BT, BT], and its diagonal."""
    o_i = tl.arange(0, BT)
    b_xx = tl.zeros([BT, BT], tl.float32)
    for i_d in range(0, D, BK):
        b_x = raw_rows(x, o_t, i_d + tl.arange(0, BK), end, stride, D)
        b_xx = tl.dot(b_x, tl.trans(b_x), b_xx, input_precision=PREC)  # [BT, BK] @ [BK, BT] -> [BT, BT]
    return b_xx, tl.sum(tl.where(o_i[None, :] == o_i[:, None], b_xx, 0.0), 1)


@triton.jit(do_not_specialize=SIZES)
def detect_pairs_kernel(
    k,  # [T, G, DK]
    v,  # [T, H, DV]
    beta,  # [T, H] (Gated DeltaNet only)
    cg,  # [H, T]
    inv,  # [T, H, BT] fp32 out: as in `triton_local.py` (Gated DeltaNet only)
    effect,  # [T, H, BT] fp32 out: E (Gated DeltaNet only)
    inner,  # [T, H, BT] fp32 out: E .* V V^T
    square,  # [T, H, BT] fp32 out: what token l adds to |sum_l E[t, l] v_l|^2 once those after it are in the sum, too
    k2,  # [H, T] fp32 out: |k|^2 (Gated DeltaNet only, as `square`)
    written,  # [H, T] fp32 out: |s_t|^2
    blocks, T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, SUB: tl.constexpr,
    LEVELS: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What does not depend on where slots open, for all chunks at once."""
    i_t, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(blocks + 4 * i_t), tl.load(blocks + 4 * i_t + 1)
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    cg += i_h * T
    b_g = decays_of(cg, o_t, end)
    b_before = tl.load(cg + tl.maximum(tl.minimum(o_t, end) - 1, 0))
    b_write = tl.full([BT], 1.0, tl.float32)
    if GDN:
        b_write = tl.load(beta + o_t.to(tl.int64) * H + i_h, mask=o_t < end, other=0.0).to(tl.float32)
    b_effect, b_k2 = gram_of(k + i_h // GROUP * DK, o_t, end, (H // GROUP) * DK, DK, BK, BT, PREC)
    b_values, b_v2 = gram_of(v + i_h * DV, o_t, end, H * DV, DV, BV, BT, PREC)
    tl.store(written + i_h * T + o_t, b_write * b_write * b_k2 * b_v2, mask=o_t < end)
    b_before = tl.where(o_i > 0, b_before, 0.0)
    m_past = o_i[None, :] < o_i[:, None]
    b_effect *= tl.exp(tl.where(m_past, b_before[:, None] - b_g[None, :], float("-inf")))
    if GDN:
        tl.store(k2 + i_h * T + o_t, b_k2, mask=o_t < end)
        p_inv = inv + (first.to(tl.int64) * H + i_h) * BT
        b_lower = (b_write * tl.exp(b_g - b_before))[:, None] * b_effect
        invert(p_inv, b_lower, end - first, H * BT, BT, SUB, LEVELS, PREC)
        b_inv = rows_of(p_inv, o_i, o_i, end - first, H * BT, BT) * b_write[None, :]
        b_effect = tl.dot(b_effect, b_inv, input_precision=PREC)  # [BT, BT] @ [BT, BT] -> [BT, BT]
        store_rows(effect + i_h * BT, b_effect, o_t, o_i, end, H * BT, BT)
        b_later = tl.dot(b_effect, tl.where(m_past, b_values, 0.0), input_precision=PREC)
        store_rows(square + i_h * BT, b_effect * (2 * b_later + b_effect * b_v2[None, :]), o_t, o_i, end, H * BT, BT)
    store_rows(inner + i_h * BT, b_effect * b_values, o_t, o_i, end, H * BT, BT)


@triton.jit
def scores_of(
    p_inner, p_square, b_inner, b_read2, b_g, b_before, b_gain, b_write, b_shrink, b_write2, norm, carried, since, at,
    at_decay, first, end, stride_e, BT: tl.constexpr, GDN: tl.constexpr,
):  # fmt: skip
    """Scores [BT] of the tokens from `at` on against the slot that is open there and began at token `since`, and
    |S|^2 [BT] after each of them if it opens none.

    `norm` is |S|^2 at the last boundary, whose cumulative decay is `at_decay`.
    """
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    m_part = o_i[None, :] >= since
    b_part = tl.where(m_part, rows_of(p_inner, o_t, o_i, end, stride_e, BT), 0.0)
    b_dot = carried * b_inner + tl.sum(b_part, 1)
    if GDN:
        b_dot = b_write * b_dot
        b_part = tl.where(m_part, rows_of(p_square, o_t, o_i, end, stride_e, BT), 0.0)
        b_p2 = tl.where(carried > 0, b_read2, tl.sum(b_part, 1))
        b_grow = 2 * b_gain * b_shrink * b_dot + b_write2 - b_gain * b_gain * b_write * (1 + b_shrink) * b_p2
    else:
        b_grow = 2 * b_gain * b_dot + b_write2
    b_spread = (o_i[None, :] < o_i[:, None]) & (o_i[None, :] >= at)
    b_spread = tl.exp(tl.where(b_spread, 2 * (b_before[:, None] - b_g[None, :]), float("-inf")))
    b_state2 = tl.sum(b_spread * b_grow[None, :], 1) + norm * tl.exp(2 * tl.minimum(b_before - at_decay, 0.0))
    b_size = tl.sqrt(b_write2) * tl.sqrt(tl.maximum(b_state2, 0.0))  # the product could underflow
    b_cosine = tl.where(b_size > 0, b_dot / tl.where(b_size > 0, b_size, 1.0), 0.0)
    return tl.sqrt(tl.maximum(2 - 2 * b_cosine, 0.0)), b_grow + b_gain * b_gain * b_state2


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
    p_inner,
    p_square,
    p_k2,  # [H, T]
    p_written,
    p_u,  # [`ring_size`] fp32, in place: U of the last chunks (Gated DeltaNet only), see `triton_open_slot.py`
    p_s,  # [DK, DV] fp32, in place: the state of the open slot, once that began before the last NEAR chunks
    p_starts,  # [H, T] int8, out
    p_scores,  # [H, T] fp32, out
    p_sums,  # [H, T] fp32, out: summed scores of the open slot
    first, end,
    tau,  # threshold; BY_TOKEN: pointer [H, T] at the head, to one of each token
    opened,  # first token of the open slot
    info,  # its summed scores so far
    norm,  # its |S|^2
    fresh,  # 1: nothing is open, the first token opens a slot
    stride_k, stride_v, H, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr,
    PV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """One chunk; returns (opened, info, norm, boundaries that the arrays in memory had too and every one after the
    first of them)."""
    o_i = tl.arange(0, BT)
    o_t = first + o_i
    n = end - first
    m_t = o_t < end
    # all loads before anything waits for one
    b_known = tl.load(p_starts + o_t, mask=m_t, other=0)
    b_g = decays_of(p_g, o_t, end)
    b_before = tl.load(p_g + tl.maximum(tl.minimum(o_t, end) - 1, 0))
    b_write2 = tl.load(p_written + o_t, mask=m_t, other=0.0)
    b_write = tl.where(m_t, 1.0, 0.0)
    b_shrink = b_write
    if GDN:
        b_write = tl.load(p_beta + o_t.to(tl.int64) * H, mask=m_t, other=0.0).to(tl.float32)
        b_shrink = 1 - b_write * tl.load(p_k2 + o_t, mask=m_t, other=0.0)
    b_before = tl.where(o_i > 0, b_before, 0.0)
    b_gain = tl.exp(b_g - b_before)  # alpha
    since = tl.where(fresh > 0, 0, opened - first)  # first token of the open slot, from this chunk's first one
    carried = (since < 0).to(tl.float32)  # 1 while the open slot began before this chunk
    held = (since < -NEAR * BT).to(tl.float32)  # 1: it has a state
    back = (BT - 1 - since) // BT  # else the chunks before this one that have its tokens
    b_inner = tl.zeros([BT], tl.float32)
    b_read2 = tl.zeros([BT], tl.float32)
    if GDN:
        b_inner, b_read2 = delta_products(
            p_k, p_v, p_effect, p_g, p_u, p_s, b_g, b_before, o_t, held, first, end, back, stride_k, stride_v, H * BT,
            DK, DV, BK, BV, PK, BT, NEAR, PREC,
        )  # fmt: skip
    elif held > 0:
        b_inner = state_products(p_k, p_v, p_s, b_before, o_t, end, stride_k, stride_v, DK, DV, BK, BV, BT, PREC)
    else:
        b_inner = past_products(
            p_k, p_v, p_g, b_before, o_t, since, first, end, back, stride_k, stride_v, DK, DV, PK, PV, BT, PREC
        )
    tl.debug_barrier()  # all have read `p_starts` and the state before either is overwritten
    at = 0  # first undecided token
    at_decay = tl.zeros([], tl.float32)
    shared = 0
    while at < n:
        b_score, b_after2 = scores_of(
            p_inner, p_square, b_inner, b_read2, b_g, b_before, b_gain, b_write, b_shrink, b_write2, norm, carried,
            since, at, at_decay, first, end, H * BT, BT, GDN,
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
        same = tl.sum(tl.where(o_i == e, b_known.to(tl.int32), 0), 0)
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
            norm = tl.sum(tl.where(o_i == n - 1, b_after2, 0.0), 0)
            at = n
    opened = first + since
    if GDN:
        write_chunk(p_v, p_inv, p_u, b_g, b_write, carried, since, first, end, stride_v, H * BT, DV, BV, BT, NEAR, PREC)
    tl.debug_barrier()  # U is read in another arrangement
    if first - opened > (NEAR - 1) * BT:
        norm = keep_state(
            p_k, p_v, p_g, p_u, p_s, opened, carried * held, first, end, stride_k, stride_v, DK, DV, BK, BV, BT, NEAR,
            GDN, PREC,
        )  # fmt: skip
    return opened, info, norm, shared


@triton.jit
def open_slot(opens, infos, norms, i_nh):
    """(first token, summed scores, |S|^2) of the slot that a shard ends with."""
    return tl.load(opens + i_nh), tl.load(infos + i_nh), tl.load(norms + i_nh)


@triton.jit
def store_open_slot(opens, infos, norms, i_nh, opened, info, norm):
    tl.store(opens + i_nh, opened)
    tl.store(infos + i_nh, info)
    tl.store(norms + i_nh, norm)


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def detect_kernel(
    k, v, beta, cg, inv, effect, inner, square, k2, written,
    tau,  # [H] fp32; BY_TOKEN: [H, T]
    ring,  # [shards, H, `ring_size`] fp32 scratch: U of a shard's last chunks (Gated DeltaNet only)
    state,  # [shards, H, DK, DV] fp32: in for a segment's first shard with a cache, out: the open state at the end
    opens,  # [shards, H] int32: likewise, first token of the open slot
    infos,  # [shards, H] fp32: likewise, its summed scores
    norms,  # [shards, H] fp32: likewise, its |S|^2
    fresh,  # [shards, H] int32: 1 where nothing is open at the start; without a cache unused
    starts, scores, sums,
    shards,  # [n, 3]: first token, end, whether the shard before is of the same segment
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr,
    PV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
    HAS_CACHE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(shards + 3 * i_n), tl.load(shards + 3 * i_n + 1)
    i_nh = i_n.to(tl.int64) * H + i_h
    empty = begin * 0 + 1
    opened, info, norm = begin, tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if HAS_CACHE:
        empty = tl.load(fresh + i_nh)
        opened, info, norm = open_slot(opens, infos, norms, i_nh)
    threshold = threshold_of(tau, T, i_h, BY_TOKEN)
    for first in range(begin, finish, BT):
        opened, info, norm, _ = detect_chunk(
            k + i_h // GROUP * DK, v + i_h * DV, beta + i_h, cg + i_h * T, inv + i_h * BT, effect + i_h * BT,
            inner + i_h * BT, square + i_h * BT, k2 + i_h * T, written + i_h * T, ring + i_nh * ring_size(DV, BT, NEAR),
            state + i_nh * DK * DV, starts + i_h * T, scores + i_h * T, sums + i_h * T, first,
            tl.minimum(first + BT, finish), threshold, opened, info, norm, empty, (H // GROUP) * DK, H * DV, H, DK, DV,
            BK, BV, PK, PV, BT, NEAR, GDN, PREC, BY_TOKEN,
        )  # fmt: skip
        empty = empty * 0
    store_open_slot(opens, infos, norms, i_nh, opened, info, norm)


@triton.jit
def run_again(
    k, v, beta, cg, inv, effect, inner, square, k2, written, tau, p_u, p_s, starts, scores, sums, begin, finish,
    enough,  # shared boundaries after which to stop
    opened, info, norm, T, H, GROUP, i_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr,
    PV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """A shard from an open slot, its state in place; returns (opened, info, norm, boundaries shared)."""
    threshold = threshold_of(tau, T, i_h, BY_TOKEN)
    first = begin
    shared = begin * 0
    while (first < finish) & (shared < enough):
        end = tl.minimum(first + BT, finish)
        opened, info, norm, now = detect_chunk(
            k + i_h // GROUP * DK, v + i_h * DV, beta + i_h, cg + i_h * T, inv + i_h * BT, effect + i_h * BT,
            inner + i_h * BT, square + i_h * BT, k2 + i_h * T, written + i_h * T, p_u, p_s,
            starts + i_h * T, scores + i_h * T, sums + i_h * T, first, end, threshold, opened, info, norm, first * 0,
            (H // GROUP) * DK, H * DV, H, DK, DV, BK, BV, PK, PV, BT, NEAR, GDN, PREC, BY_TOKEN,
        )  # fmt: skip
        # a first shared boundary in an earlier chunk: any boundary since is the second
        o_t = first + tl.arange(0, BT)
        found = tl.sum(tl.load(starts + i_h * T + o_t, mask=o_t < end, other=0).to(tl.int32), 0)
        shared = tl.where(shared > 0, shared + found, now)
        first += BT
    return opened, info, norm, shared


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def repair_kernel(
    k, v, beta, cg, inv, effect, inner, square, k2, written, tau,
    ring,  # see `detect_kernel`; out: of the next shard, where they disagree
    state,  # [shards, H, DK, DV] fp32: the open state at each shard's end; out: likewise
    opens, infos, norms,  # [shards, H]: of the slot that is open there
    starts, scores, sums, shards,
    agreed,  # [shards, H] int32 out: whether the shard ends as in its first run
    opens_again, infos_again, norms_again,  # [shards, H] out: where it does not, the slot that is open at its end
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr,
    PV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Run every shard but a segment's first again, from the end of the one before, until it agrees with itself."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, finish = tl.load(shards + 3 * i_n), tl.load(shards + 3 * i_n + 1)
    i_nh = i_n.to(tl.int64) * H + i_h
    agrees = 1 - tl.load(shards + 3 * i_n + 2)
    if agrees == 0:
        i_last = i_nh - H
        opened, info, norm = open_slot(opens, infos, norms, i_last)
        opened, info, norm, shared = run_again(
            k, v, beta, cg, inv, effect, inner, square, k2, written, tau, ring + i_last * ring_size(DV, BT, NEAR),
            state + i_last * DK * DV, starts, scores, sums, begin, finish, 2, opened, info, norm, T, H, GROUP, i_h, DK,
            DV, BK, BV, PK, PV, BT, NEAR, GDN, PREC, BY_TOKEN,
        )  # fmt: skip
        store_open_slot(opens_again, infos_again, norms_again, i_nh, opened, info, norm)
        agrees = (shared >= 2).to(tl.int32)
    tl.store(agreed + i_nh, agrees)


@triton.jit(do_not_specialize=[*SIZES, "H"])  # with H = 1 known, more is held in registers
def repair_rest_kernel(
    k, v, beta, cg, inv, effect, inner, square, k2, written, tau, ring, state, opens, infos, norms, starts, scores,
    sums, shards,
    agreed,  # [shards, H] int32, see `repair_kernel`; out: whether the next shard began with the right state
    opens_again, infos_again, norms_again,
    segment_shards,  # [n, 2]: first shard, shards of each segment
    T, H, GROUP,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PK: tl.constexpr,
    PV: tl.constexpr, BT: tl.constexpr, NEAR: tl.constexpr, GDN: tl.constexpr, PREC: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Run those shards once more, one after another, that `repair_kernel` did not begin with their true state."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first_shard, n_shards = tl.load(segment_shards + 2 * i_n), tl.load(segment_shards + 2 * i_n + 1)
    home = first_shard.to(tl.int64) * H + i_h  # of which shard the state and the ring are those at this one's true end
    for s in range(1, n_shards):
        shard = first_shard + s
        i_nh = shard.to(tl.int64) * H + i_h
        before, mine = tl.load(agreed + i_nh - H), tl.load(agreed + i_nh)
        if (before == 0) | (mine == 0):
            opened, info, norm = open_slot(opens_again, infos_again, norms_again, i_nh)
            if before == 0:
                # where the second run ended on its own, its end is lost: go on to the shard's
                enough = tl.where(mine > 0, 2, 2**30)
                opened, info, norm = open_slot(opens, infos, norms, i_nh - H)
                opened, info, norm, shared = run_again(
                    k, v, beta, cg, inv, effect, inner, square, k2, written, tau, ring + home * ring_size(DV, BT, NEAR),
                    state + home * DK * DV, starts, scores, sums, tl.load(shards + 3 * shard),
                    tl.load(shards + 3 * shard + 1), enough, opened, info, norm, T, H, GROUP, i_h, DK, DV, BK, BV, PK,
                    PV, BT, NEAR, GDN, PREC, BY_TOKEN,
                )  # fmt: skip
                mine = (shared >= enough).to(tl.int32)
            if mine == 0:  # its end is what was carried here
                store_open_slot(opens, infos, norms, i_nh, opened, info, norm)
            tl.debug_barrier()  # all have read it
            tl.store(agreed + i_nh, mine)
            tl.debug_barrier()
        home = tl.where(mine > 0, i_nh, home)
