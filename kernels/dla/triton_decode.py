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
from .triton_launch import head_values

PLAN_FIELDS = 3  # slot that absorbs its younger neighbour (or -1), slot written, 1 where it is a new one


@triton.jit
def decode_decide_kernel(
    k,  # [B, G, DK]
    v,  # [B, H, DV]
    beta,  # [B, H] or unused
    tau,  # [H] fp32
    states,  # [B, H, K, DK, DV] fp32
    start,  # [B, H, K] int64, in place
    count,  # [B, H, K] int64, in place
    info,  # [B, H, K] fp32, in place
    live,  # [B, H] int64, in place
    position,  # [B] int64
    plan,  # [B, H, 3] int32 out
    H,
    GROUP,
    K,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KP: tl.constexpr,
    GDN: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    b, h = lane // H, lane % H
    n = tl.load(live + lane).to(tl.int32)
    write = 1.0
    if GDN:
        write = tl.load(beta + lane).to(tl.float32)
    inner = tl.zeros([BK], tl.float32)
    norm = tl.zeros([BK], tl.float32)
    k2 = tl.zeros([BK], tl.float32)
    v2 = tl.zeros([BV], tl.float32)
    state = states + (lane * K + tl.maximum(n - 1, 0)) * DK * DV
    key_at = k + (b * (H // GROUP) + h // GROUP) * DK
    for x in range(0, DK, BK):
        a = x + tl.arange(0, BK)
        key = tl.load(key_at + a, mask=a < DK, other=0.0).to(tl.float32)
        k2 += key * key
        for y in range(0, DV, BV):
            c = y + tl.arange(0, BV)
            value = tl.load(v + lane * DV + c, mask=c < DV, other=0.0).to(tl.float32)
            s = tl.load(
                state + a[:, None] * DV + c[None, :], mask=(a < DK)[:, None] & (c < DV)[None, :] & (n > 0), other=0.0
            )
            inner += key * tl.sum(s * value[None, :], 1)
            norm += tl.sum(s * s, 1)
    for y in range(0, DV, BV):
        c = y + tl.arange(0, BV)
        value = tl.load(v + lane * DV + c, mask=c < DV, other=0.0).to(tl.float32)
        v2 += value * value
    size = write * tl.sqrt(tl.sum(k2, 0)) * tl.sqrt(tl.sum(v2, 0)) * tl.sqrt(tl.sum(norm, 0))
    cosine = tl.where(size > 0, write * tl.sum(inner, 0) / tl.where(size > 0, size, 1.0), 0.0)
    score = tl.where(n == 0, 1.4142135623730951, tl.sqrt(tl.maximum(2 - 2 * cosine, 0.0)))
    fired = (n == 0) | (score >= tl.load(tau + h))
    slot = tl.arange(0, KP)
    there = slot < K
    at = lane * K + slot
    starts = tl.load(start + at, mask=there, other=0)
    counts = tl.load(count + at, mask=there, other=0)
    infos = tl.load(info + at, mask=there, other=0.0)
    pair = -1
    if fired & (n == K):
        nxt = tl.minimum(slot + 1, KP - 1)
        total = (counts + tl.gather(counts, nxt, 0)).to(tl.float32)
        joined = infos + tl.gather(infos, nxt, 0)
        cost = tl.where(slot < K - 1, joined / tl.maximum(total, 1.0), float("inf"))
        pair = tl.argmin(cost, 0, tie_break_left=True)
        moved = slot > pair
        starts = tl.where(moved, tl.gather(starts, nxt, 0), starts)
        both = counts + tl.gather(counts, nxt, 0)
        counts = tl.where(slot == pair, both, tl.where(moved, tl.gather(counts, nxt, 0), counts))
        infos = tl.where(slot == pair, joined, tl.where(moved, tl.gather(infos, nxt, 0), infos))
        n = K - 1
    to = tl.where(fired, n, n - 1)
    mine = slot == to
    starts = tl.where(mine & fired, tl.load(position + b), starts)
    counts = tl.where(mine, tl.where(fired, 1, counts + 1), counts)
    infos = tl.where(mine, tl.where(fired, score, infos + score), infos)
    tl.debug_barrier()
    tl.store(start + at, starts, mask=there)
    tl.store(count + at, counts, mask=there)
    tl.store(info + at, infos, mask=there)
    tl.store(live + lane, (to + 1).to(tl.int64))
    tl.store(plan + lane * 3, pair)
    tl.store(plan + lane * 3 + 1, to)
    tl.store(plan + lane * 3 + 2, fired.to(tl.int32))


@triton.jit
def decode_states_kernel(
    q,  # [B, G, DK]
    k,
    v,
    g,  # [B, H]
    lam,  # [B, H, K]
    beta,
    states,  # [B, H, K, DK, DV] fp32, in place
    live,
    plan,
    out,  # [B, H, DV]
    H,
    GROUP,
    K,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NK: tl.constexpr,
    GDN: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    b, h = lane // H, lane % H
    c = tl.program_id(1) * BV + tl.arange(0, BV)
    pair, to = tl.load(plan + lane * 3), tl.load(plan + lane * 3 + 1)
    opened = tl.load(plan + lane * 3 + 2)
    n = tl.load(live + lane).to(tl.int32)
    decay = tl.exp(tl.load(g + lane).to(tl.float32))
    write = 1.0
    if GDN:
        write = tl.load(beta + lane).to(tl.float32)
    value = tl.load(v + lane * DV + c, mask=c < DV, other=0.0).to(tl.float32)
    query_at = (b * (H // GROUP) + h // GROUP) * DK
    acc = tl.zeros([BV], tl.float32)
    tile = tl.arange(0, BK)
    for slot in range(n):
        # after a merge, slots younger than the pair come from one place further
        source = slot + ((pair >= 0) & (slot > pair)).to(tl.int32)
        fresh = (opened > 0) & (slot == to)
        weight = tl.load(lam + lane * K + n - 1 - slot).to(tl.float32)
        read = tl.zeros([BV], tl.float32)
        total = tl.zeros([BV], tl.float32)
        mixed = 0.0
        for x in range(NK):
            a = x * BK + tile
            there = (a < DK)[:, None] & (c < DV)[None, :]
            at = lane * K * DK * DV + a[:, None] * DV + c[None, :]
            s = tl.load(states + at + source.to(tl.int64) * DK * DV, mask=there & (fresh == 0), other=0.0)
            s += tl.load(states + at + (source + 1).to(tl.int64) * DK * DV, mask=there & (slot == pair), other=0.0)
            key = tl.load(k + query_at + a, mask=a < DK, other=0.0).to(tl.float32)
            query = tl.load(q + query_at + a, mask=a < DK, other=0.0).to(tl.float32)
            read += tl.sum(key[:, None] * s, 0)
            total += tl.sum(query[:, None] * s, 0)
            mixed += tl.sum(query * key, 0)
        change = tl.where(slot == to, write, 0.0) * value
        if GDN:
            change -= decay * write * read
        tl.debug_barrier()
        for x in range(NK):
            a = x * BK + tile
            there = (a < DK)[:, None] & (c < DV)[None, :]
            at = lane * K * DK * DV + a[:, None] * DV + c[None, :]
            s = tl.load(states + at + source.to(tl.int64) * DK * DV, mask=there & (fresh == 0), other=0.0)
            s += tl.load(states + at + (source + 1).to(tl.int64) * DK * DV, mask=there & (slot == pair), other=0.0)
            key = tl.load(k + query_at + a, mask=a < DK, other=0.0).to(tl.float32)
            tl.store(
                states + at + tl.cast(slot, tl.int64) * DK * DV, decay * s + key[:, None] * change[None, :], mask=there
            )
        acc += weight * (decay * total + mixed * change)
        tl.debug_barrier()
    tl.store(out + lane * DV + c, acc.to(out.dtype.element_ty), mask=c < DV)


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
) -> Tensor:
    """Advance `cache` by one token and read it: [B, 1, H, Dv]; arguments as `decode_step`, which checks them."""
    B, _, H, DV = v.shape
    G, DK = k.shape[2:]
    K, device = cache.capacity, v.device
    q, k, v, g, lam = (x.squeeze(1).contiguous() for x in (q, k, v, g, slot_weights))
    write = g if beta is None else beta.squeeze(1).contiguous()
    taus = head_values(tau, H, device)
    for name in ("states", "start", "count", "info", "live", "position"):  # the kernels work on them in place
        setattr(cache, name, getattr(cache, name).contiguous())
    with on_device(v):
        plan = torch.empty(B, H, PLAN_FIELDS, dtype=torch.int32, device=device)
        sizes = (H, H // G, K)
        block = dict(BK=min(64, power_of_two(DK)), BV=min(64, power_of_two(DV)))
        meta = dict(DK=DK, DV=DV, GDN=beta is not None)
        decode_decide_kernel[(B * H,)](
            k, v, write, taus, cache.states, cache.start, cache.count, cache.info, cache.live, cache.position, plan,
            *sizes,
            **meta, **block, KP=power_of_two(K, 2), num_warps=4,
        )  # fmt: skip
        out = torch.empty(B, 1, H, DV, dtype=v.dtype, device=device)
        BV = 16
        decode_states_kernel[(B * H, ceil_div(DV, BV))](
            q, k, v, g, lam, write, cache.states, cache.live, plan, out, *sizes, **meta, BK=block["BK"], BV=BV,
            NK=ceil_div(DK, block["BK"]), num_warps=4,
        )  # fmt: skip
    cache.position += 1
    return out
