"""One token on a slot cache, in place: two kernels, cost independent of the context.

`decode_decide_kernel` (one program a head) scores the token against the open state, decides, and merges the scalars of
the cache; `decode_states_kernel` (one program a head and tile of value dims) merges, transforms, writes and reads the
states. The record that links them tells which pair merges, if any, and where the token is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import ceil_div, on_device, power_of_two
from .cache import SlotCache
from .triton_capacity import merge_rule
from .triton_launch import head_values

PLAN_FIELDS = 3  # slot that absorbs its younger neighbour (or -1), slot written, 1 where it is a new one


@triton.jit
def decode_decide_kernel(
    k,  # [B, G, DK]
    v,  # [B, H, DV]
    beta,  # [B, H] or unused
    tau,  # [H] fp32; BY_TOKEN: [B, H]
    states,  # [B, H, K, DK, DV] fp32
    start,  # [B, H, K] int64, in place
    count,  # [B, H, K] int64, in place
    info,  # [B, H, K] fp32, in place
    live,  # [B, H] int64, in place
    position,  # [B] int64
    plan,  # [B, H, 3] int32 out
    pairs,  # [B, H] int32, GIVEN only: the older slot of the pair that merges
    H, GROUP, K,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KP: tl.constexpr, GDN: tl.constexpr,
    BY_TOKEN: tl.constexpr, GIVEN: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    n = tl.load(live + i_bh).to(tl.int32)
    write = 1.0
    if GDN:
        write = tl.load(beta + i_bh).to(tl.float32)
    b_inner = tl.zeros([BK], tl.float32)
    b_norm = tl.zeros([BK], tl.float32)
    b_k2 = tl.zeros([BK], tl.float32)
    b_v2 = tl.zeros([BV], tl.float32)
    p_s = states + (i_bh * K + tl.maximum(n - 1, 0)) * DK * DV
    p_k = k + (i_b * (H // GROUP) + i_h // GROUP) * DK
    for i_k in range(0, DK, BK):
        o_k = i_k + tl.arange(0, BK)
        b_k = tl.load(p_k + o_k, mask=o_k < DK, other=0.0).to(tl.float32)
        b_k2 += b_k * b_k
        for i_v in range(0, DV, BV):
            o_v = i_v + tl.arange(0, BV)
            b_v = tl.load(v + i_bh * DV + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
            m_k = (o_k < DK)[:, None] & (o_v < DV)[None, :] & (n > 0)
            b_s = tl.load(p_s + o_k[:, None] * DV + o_v[None, :], mask=m_k, other=0.0)
            b_inner += b_k * tl.sum(b_s * b_v[None, :], 1)
            b_norm += tl.sum(b_s * b_s, 1)
    for i_v in range(0, DV, BV):
        o_v = i_v + tl.arange(0, BV)
        b_v = tl.load(v + i_bh * DV + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
        b_v2 += b_v * b_v
    size = write * tl.sqrt(tl.sum(b_k2, 0)) * tl.sqrt(tl.sum(b_v2, 0)) * tl.sqrt(tl.sum(b_norm, 0))
    cosine = tl.where(size > 0, write * tl.sum(b_inner, 0) / tl.where(size > 0, size, 1.0), 0.0)
    score = tl.where(n == 0, 1.4142135623730951, tl.sqrt(tl.maximum(2 - 2 * cosine, 0.0)))
    threshold = tl.load(tau + (i_bh if BY_TOKEN else i_h))
    fired = (n == 0) | (score >= threshold)
    o_s = tl.arange(0, KP)
    m_s = o_s < K
    o_slots = i_bh * K + o_s
    b_start = tl.load(start + o_slots, mask=m_s, other=0)
    b_count = tl.load(count + o_slots, mask=m_s, other=0)
    b_info = tl.load(info + o_slots, mask=m_s, other=0.0)
    pair = -1
    if fired & (n == K):
        o_next = tl.minimum(o_s + 1, KP - 1)
        b_total = (b_count + tl.gather(b_count, o_next, 0)).to(tl.float32)
        b_joined = b_info + tl.gather(b_info, o_next, 0)
        if GIVEN:
            pair = tl.load(pairs + i_bh)
        else:
            b_cost = b_total if COUNTS else b_joined / tl.maximum(b_total, 1.0)
            b_cost = tl.where(o_s < K - 1, b_cost, float("inf"))
            pair = tl.argmin(b_cost, 0, tie_break_left=True)
        m_moved = o_s > pair
        b_start = tl.where(m_moved, tl.gather(b_start, o_next, 0), b_start)
        b_both = b_count + tl.gather(b_count, o_next, 0)
        b_count = tl.where(o_s == pair, b_both, tl.where(m_moved, tl.gather(b_count, o_next, 0), b_count))
        b_info = tl.where(o_s == pair, b_joined, tl.where(m_moved, tl.gather(b_info, o_next, 0), b_info))
        n = K - 1
    to = tl.where(fired, n, n - 1)
    m_to = o_s == to
    b_start = tl.where(m_to & fired, tl.load(position + i_b), b_start)
    b_count = tl.where(m_to, tl.where(fired, 1, b_count + 1), b_count)
    b_info = tl.where(m_to, tl.where(fired, score, b_info + score), b_info)
    tl.debug_barrier()
    tl.store(start + o_slots, b_start, mask=m_s)
    tl.store(count + o_slots, b_count, mask=m_s)
    tl.store(info + o_slots, b_info, mask=m_s)
    tl.store(live + i_bh, (to + 1).to(tl.int64))
    tl.store(plan + i_bh * 3, pair)
    tl.store(plan + i_bh * 3 + 1, to)
    tl.store(plan + i_bh * 3 + 2, fired.to(tl.int32))


@triton.jit
def decode_states_kernel(
    q,  # [B, G, DK]
    k, v,
    g,  # [B, H]
    lam,  # [B, H, K]
    beta,
    states,  # [B, H, K, DK, DV] fp32, in place
    live, plan,
    out,  # [B, H, DV]
    H, GROUP, K,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NK: tl.constexpr, GDN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    pair, to = tl.load(plan + i_bh * 3), tl.load(plan + i_bh * 3 + 1)
    opened = tl.load(plan + i_bh * 3 + 2)
    n = tl.load(live + i_bh).to(tl.int32)
    decay = tl.exp(tl.load(g + i_bh).to(tl.float32))
    write = 1.0
    if GDN:
        write = tl.load(beta + i_bh).to(tl.float32)
    b_v = tl.load(v + i_bh * DV + o_v, mask=o_v < DV, other=0.0).to(tl.float32)
    o_qk = (i_b * (H // GROUP) + i_h // GROUP) * DK
    b_o = tl.zeros([BV], tl.float32)
    o_tile = tl.arange(0, BK)
    for i_s in range(n):
        # after a merge, slots younger than the pair come from one place further
        i_from = i_s + ((pair >= 0) & (i_s > pair)).to(tl.int32)
        fresh = (opened > 0) & (i_s == to)
        weight = tl.load(lam + i_bh * K + n - 1 - i_s).to(tl.float32)
        b_read = tl.zeros([BV], tl.float32)
        b_total = tl.zeros([BV], tl.float32)
        qk = 0.0
        for i_k in range(NK):
            o_k = i_k * BK + o_tile
            m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            o_s = i_bh * K * DK * DV + o_k[:, None] * DV + o_v[None, :]
            b_s = tl.load(states + o_s + i_from.to(tl.int64) * DK * DV, mask=m_s & (fresh == 0), other=0.0)
            b_s += tl.load(states + o_s + (i_from + 1).to(tl.int64) * DK * DV, mask=m_s & (i_s == pair), other=0.0)
            b_k = tl.load(k + o_qk + o_k, mask=o_k < DK, other=0.0).to(tl.float32)
            b_q = tl.load(q + o_qk + o_k, mask=o_k < DK, other=0.0).to(tl.float32)
            b_read += tl.sum(b_k[:, None] * b_s, 0)
            b_total += tl.sum(b_q[:, None] * b_s, 0)
            qk += tl.sum(b_q * b_k, 0)
        b_u = tl.where(i_s == to, write, 0.0) * b_v
        if GDN:
            b_u -= decay * write * b_read
        tl.debug_barrier()
        for i_k in range(NK):
            o_k = i_k * BK + o_tile
            m_s = (o_k < DK)[:, None] & (o_v < DV)[None, :]
            o_s = i_bh * K * DK * DV + o_k[:, None] * DV + o_v[None, :]
            b_s = tl.load(states + o_s + i_from.to(tl.int64) * DK * DV, mask=m_s & (fresh == 0), other=0.0)
            b_s += tl.load(states + o_s + (i_from + 1).to(tl.int64) * DK * DV, mask=m_s & (i_s == pair), other=0.0)
            b_k = tl.load(k + o_qk + o_k, mask=o_k < DK, other=0.0).to(tl.float32)
            b_s = decay * b_s + b_k[:, None] * b_u[None, :]
            tl.store(states + o_s + tl.cast(i_s, tl.int64) * DK * DV, b_s, mask=m_s)
        b_o += weight * (decay * b_total + qk * b_u)
        tl.debug_barrier()
    tl.store(out + i_bh * DV + o_v, b_o.to(out.dtype.element_ty), mask=o_v < DV)


@torch.no_grad()
def triton_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    cache: SlotCache,
    beta: Tensor | None,
    *,
    tau: float | Tensor,
    merge: str = "density",
    pairs: Tensor | None = None,
) -> Tensor:
    """Advance `cache` by one token and read it: [B, 1, H, Dv]; arguments as `decode_one`, merge not `ward`."""
    B, _, H, DV = v.shape
    G, DK = k.shape[2:]
    K, device = cache.capacity, v.device
    q, k, v, g, lam = (x.squeeze(1).contiguous() for x in (q, k, v, g, slot_weights))
    write = g if beta is None else beta.squeeze(1).contiguous()
    by_token = isinstance(tau, Tensor) and tau.ndim == 3
    taus = tau.float().contiguous() if by_token else head_values(tau, H, device)  # type: ignore[union-attr]
    for name in ("states", "start", "count", "info", "live", "position"):  # the kernels work on them in place
        setattr(cache, name, getattr(cache, name).contiguous())
    with on_device(v):
        plan = torch.empty(B, H, PLAN_FIELDS, dtype=torch.int32, device=device)
        sizes = (H, H // G, K)
        block = dict(BK=min(64, power_of_two(DK)), BV=min(64, power_of_two(DV)))
        meta = dict(DK=DK, DV=DV, GDN=beta is not None)
        decode_decide_kernel[(B * H,)](
            k, v, write, taus, cache.states, cache.start, cache.count, cache.info, cache.live, cache.position, plan,
            plan if pairs is None else pairs.int().contiguous(), *sizes, **meta, **block, KP=power_of_two(K, 2),
            BY_TOKEN=by_token, **merge_rule(merge, pairs), num_warps=4,
        )  # fmt: skip
        out = torch.empty(B, 1, H, DV, dtype=v.dtype, device=device)
        BV = 16
        decode_states_kernel[(B * H, ceil_div(DV, BV))](
            q, k, v, g, lam, write, cache.states, cache.live, plan, out, *sizes, **meta, BK=block["BK"], BV=BV,
            NK=ceil_div(DK, block["BK"]), num_warps=4,
        )  # fmt: skip
    cache.position += 1
    return out
