"""The gradient of a learned threshold on CUDA: `threshold.threshold_gradient`, which has the mathematics.

A slot carries the weighted tokens `moved` in it that the toggles so far would move; a merge adds two of them, so there
is no difference of long sums. The terms of the gradient cancel (a kernel's rounding would show), so what is summed is
summed in float64: a few numbers a token. Two kernels: one program a lane loops over the boundaries (tokens between
them at once) and stores the slots at the start of each block; then one program a block goes over its tokens with them.
Slots are not sorted: the start of the next younger one (`b_next`) says where each ends (FAR: it is open).
No atomics: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FAR = tl.constexpr(2**30)  # after every position


@triton.jit
def _open_slot(b_start, b_next, b_death, b_moved, at, life, reset):
    """The slots after a boundary at token `at`: each of [KP] start (-1: none), next start, death, moved."""
    b_start = tl.where(reset, -1, b_start)
    m_dying = (b_start >= 0) & (b_death == at)
    merged = tl.max(tl.where(m_dying, b_start, -1), 0)
    m_into = (b_start >= 0) & (b_next == merged)  # the next older slot takes the tokens; b_next is never -1
    b_moved += tl.where(m_into, tl.sum(tl.where(m_dying, b_moved, 0.0), 0), 0.0)
    b_next = tl.where(m_into, tl.max(tl.where(m_dying, b_next, 0), 0), b_next)
    b_start = tl.where(m_dying, -1, b_start)
    b_next = tl.where(b_next == FAR, at, b_next)
    o_s = tl.arange(0, b_start.shape[0])
    m_new = o_s == tl.min(tl.where(b_start < 0, o_s, b_start.shape[0]), 0)
    b_start, b_next = tl.where(m_new, at, b_start), tl.where(m_new, FAR, b_next)
    return b_start, b_next, tl.where(m_new, life, b_death), tl.where(m_new, 0.0, b_moved)


@triton.jit
def _next_start(b_start):
    return tl.min(tl.where(b_start[:, None] > b_start[None, :], b_start[:, None], FAR), 0)


@triton.jit
def _overlap(low, high, b_start, b_next):
    """Tokens of [low, high) in each slot, as fp64; 0 where there is no slot."""
    return tl.where(b_start >= 0, tl.maximum(tl.minimum(high, b_next) - tl.maximum(low, b_start), 0), 0).to(tl.float64)


@triton.jit(do_not_specialize=["T"])
def walk_kernel(
    life,  # [N, T] int32: death of the start at each token, 0 = no start
    begin,  # [N, T] int32: first token of the document
    lo,  # [N, T] int32
    weight,  # [N, T] fp64: w_p of the threshold's gradient
    slots,  # [N, blocks, KP] int32 out: starts of the live slots at each block's first token, -1 = none
    carried,  # [N, blocks, KP] fp64 out: `moved` of each
    T,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slots and `moved` at the start of every block, over one lane."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, KP)
    b_start = tl.full([KP], -1, tl.int32)
    b_next = tl.full([KP], FAR, tl.int32)
    b_death = tl.full([KP], 0, tl.int32)
    b_moved = tl.zeros([KP], tl.float64)
    blocks = tl.cdiv(T, BLOCK)
    for i_t in range(0, blocks):
        o_out = (i_n * blocks + i_t) * KP + o_s
        tl.store(slots + o_out, b_start)
        tl.store(carried + o_out, b_moved)
        o_t = i_t * BLOCK + tl.arange(0, BLOCK)
        m_t, end = o_t < T, i_t * BLOCK + BLOCK
        b_life = tl.load(life + i_n * T + o_t, mask=m_t, other=0)
        b_lo = tl.load(lo + i_n * T + o_t, mask=m_t, other=0)
        b_weight = tl.load(weight + i_n * T + o_t, mask=m_t, other=0.0)
        m_reset = tl.load(begin + i_n * T + o_t, mask=m_t, other=-1) == o_t
        m_open = (b_life > 0) | m_reset
        after = i_t * BLOCK  # tokens before it are done
        for _ in range(0, tl.sum(m_open.to(tl.int32), 0) + 1):
            at = tl.min(tl.where(m_open & (o_t >= after), o_t, end), 0)
            b_w = tl.where((o_t >= after) & (o_t < at), b_weight, 0.0)
            b_tokens = _overlap(b_lo[:, None], o_t[:, None], b_start[None, :], b_next[None, :])  # [BLOCK, KP]
            b_moved += tl.sum(b_w[:, None] * b_tokens, 0)
            if at < end:
                m_at = o_t == at
                life_at = tl.sum(tl.where(m_at, b_life, 0), 0)
                reset = tl.sum((m_at & m_reset).to(tl.int32), 0) > 0
                b_start, b_next, b_death, b_moved = _open_slot(b_start, b_next, b_death, b_moved, at, life_at, reset)
            after = at + 1


@triton.jit
def _fired(weight, lo, b_start, b_next):
    """What the live starts move in each slot, [KP]; weight and lo are the lane's."""
    b_w = tl.load(weight + b_start, mask=b_start >= 0, other=0.0)
    b_lo = tl.load(lo + b_start, mask=b_start >= 0, other=0)
    return tl.sum(b_w[:, None] * _overlap(b_lo[:, None], b_start[:, None], b_start[None, :], b_next[None, :]), 0)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    dlam,  # [N, T, K] fp32
    lam,  # [N, T, K] fp32
    life, begin, lo, weight, slots, carried,
    partial,  # [N, blocks] fp64 out: sum of w_p dg_p over t in the block
    T,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of queries of one lane."""
    i_p = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK)
    i_n = i_p // blocks
    first = (i_p % blocks).to(tl.int32) * BLOCK
    row = i_n * T
    b_start = tl.load(slots + i_p * KP + tl.arange(0, KP))
    b_moved = tl.load(carried + i_p * KP + tl.arange(0, KP))
    b_next = _next_start(b_start)
    b_death = tl.load(life + row + b_start, mask=b_start >= 0, other=0)
    b_age = tl.sum((b_start[:, None] > b_start[None, :]).to(tl.int32), 0)  # slot index by recency
    b_fired = _fired(weight + row, lo + row, b_start, b_next)
    b_total = tl.zeros([KP], tl.float64)
    for t in range(first, tl.minimum(first + BLOCK, T)):
        life_t = tl.load(life + row + t)
        reset = tl.load(begin + row + t) == t
        if (life_t > 0) | reset:
            b_start, b_next, b_death, b_moved = _open_slot(b_start, b_next, b_death, b_moved, t, life_t, reset)
            b_age = tl.sum((b_start[:, None] > b_start[None, :]).to(tl.int32), 0)
            b_fired = _fired(weight + row, lo + row, b_start, b_next)
        else:
            b_moved += tl.load(weight + row + t) * _overlap(tl.load(lo + row + t), t, b_start, b_next)
        m_live = b_start >= 0
        o_lam = (row + t) * K + b_age
        b_mine = tl.load(lam + o_lam, mask=m_live, other=0.0).to(tl.float64)
        b_older = tl.load(lam + o_lam + 1, mask=m_live & (b_age + 1 < K), other=0.0)
        b_newer = tl.load(lam + o_lam - 1, mask=m_live & (b_age > 0), other=0.0)
        b_forward = tl.where(b_age + 1 < K, b_older - b_mine, 0.0) * b_moved
        b_backward = tl.where(b_age > 0, b_mine - b_newer, 0.0) * b_fired
        b_tokens = tl.where(m_live, tl.minimum(b_next, t + 1) - b_start, 1).to(tl.float64)
        b_total += tl.load(dlam + o_lam, mask=m_live, other=0.0) * (b_forward + b_backward) / b_tokens
    tl.store(partial + i_p, tl.sum(b_total, 0))


def threshold_gradient(
    dlam: Tensor,
    lam: Tensor,
    start: Tensor,
    death: Tensor,
    lo: Tensor,
    score: Tensor,
    begin: Tensor,
    tau: Tensor,
    temperature: float,
    *,
    block: int = 32,
) -> Tensor:
    """dL/dtau per lane, fp32 [N]; arguments as `threshold.threshold_gradient`. `block`: queries of one program."""
    N, T, K = lam.shape
    dlam, lam = dlam.float().contiguous(), lam.float().contiguous()
    position = torch.arange(T, dtype=torch.int32, device=lam.device)
    begin = begin.clamp(min=0).to(torch.int32).contiguous()
    low = lo.to(torch.int32).contiguous()
    life = torch.where(start, death.to(torch.int32), 0).contiguous()
    soft = torch.sigmoid((score.double() - tau.double()[:, None]) / temperature)
    weight = torch.where(begin == position, 0, soft * (1 - soft)).contiguous()
    blocks, width = triton.cdiv(T, block), triton.next_power_of_2(K)
    slots = torch.empty(N, blocks, width, dtype=torch.int32, device=lam.device)
    carried, partial = torch.empty_like(slots, dtype=torch.float64), lam.new_empty(N, blocks, dtype=torch.float64)
    sizes = dict(KP=width, BLOCK=block, num_warps=max(1, width // 32))
    walk_kernel[(N,)](life, begin, low, weight, slots, carried, T, **sizes)
    lane = life, begin, low, weight, slots, carried
    gradient_kernel[(N * blocks,)](dlam, lam, *lane, partial, T, K=K, **sizes)
    return (-partial.sum(1) / temperature).float()
