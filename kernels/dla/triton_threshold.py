"""The gradient of a learned threshold on CUDA: `threshold.threshold_gradient`, where the mathematics stands.

A slot carries the weighted tokens `moved` in it that the toggles so far would move; a merge adds two of them, so there
is no difference of long sums. The terms of the gradient cancel (a kernel's rounding would show), so what is summed is
summed in float64: a few numbers a token. Two kernels: one program a lane walks over the boundaries (tokens between
them at once) and stores the slots at the start of each block; then one program a block goes over its tokens with them.
Slots stand in no order; `nx`, the start of the next younger one (FAR: none, it is open), gives each its end.
No atomics: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FAR = tl.constexpr(2**30)  # after every position


@triton.jit
def _open_slot(b, nx, death, moved, at, life, reset):
    """The slots after a boundary at token `at`: each of [KP] start (-1: none), next start, death, moved."""
    b = tl.where(reset, -1, b)
    dying = (b >= 0) & (death == at)
    gone = tl.max(tl.where(dying, b, -1), 0)
    heir = (b >= 0) & (nx == gone)  # the next older slot takes the tokens over; nx is never -1
    moved += tl.where(heir, tl.sum(tl.where(dying, moved, 0.0), 0), 0.0)
    nx = tl.where(heir, tl.max(tl.where(dying, nx, 0), 0), nx)
    b = tl.where(dying, -1, b)
    nx = tl.where(nx == FAR, at, nx)
    slot = tl.arange(0, b.shape[0])
    new = slot == tl.min(tl.where(b < 0, slot, b.shape[0]), 0)
    return tl.where(new, at, b), tl.where(new, FAR, nx), tl.where(new, life, death), tl.where(new, 0.0, moved)


@triton.jit
def _next_start(b):
    return tl.min(tl.where(b[:, None] > b[None, :], b[:, None], FAR), 0)


@triton.jit
def _overlap(low, high, b, nx):
    """Tokens of [low, high) in each slot, as fp64; 0 where there is no slot."""
    return tl.where(b >= 0, tl.maximum(tl.minimum(high, nx) - tl.maximum(low, b), 0), 0).to(tl.float64)


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
    lane = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, KP)
    b = tl.full([KP], -1, tl.int32)
    nx = tl.full([KP], FAR, tl.int32)
    death = tl.full([KP], 0, tl.int32)
    moved = tl.zeros([KP], tl.float64)
    blocks = tl.cdiv(T, BLOCK)
    for block in range(0, blocks):
        out = (lane * blocks + block) * KP + slot
        tl.store(slots + out, b)
        tl.store(carried + out, moved)
        t = block * BLOCK + tl.arange(0, BLOCK)
        there, end = t < T, block * BLOCK + BLOCK
        life_t = tl.load(life + lane * T + t, mask=there, other=0)
        lo_t = tl.load(lo + lane * T + t, mask=there, other=0)
        w_t = tl.load(weight + lane * T + t, mask=there, other=0.0)
        resets = tl.load(begin + lane * T + t, mask=there, other=-1) == t
        opens = (life_t > 0) | resets
        after = block * BLOCK  # tokens before it are done
        for _ in range(0, tl.sum(opens.to(tl.int32), 0) + 1):
            at = tl.min(tl.where(opens & (t >= after), t, end), 0)
            w = tl.where((t >= after) & (t < at), w_t, 0.0)
            moved += tl.sum(w[:, None] * _overlap(lo_t[:, None], t[:, None], b[None, :], nx[None, :]), 0)
            if at < end:
                here = t == at
                life_at = tl.sum(tl.where(here, life_t, 0), 0)
                reset = tl.sum((here & resets).to(tl.int32), 0) > 0
                b, nx, death, moved = _open_slot(b, nx, death, moved, at, life_at, reset)
            after = at + 1


@triton.jit
def _fired(weight, lo, b, nx):
    """What the live starts move in each slot, [KP]; weight and lo are the lane's."""
    w = tl.load(weight + b, mask=b >= 0, other=0.0)
    low = tl.load(lo + b, mask=b >= 0, other=0)
    return tl.sum(w[:, None] * _overlap(low[:, None], b[:, None], b[None, :], nx[None, :]), 0)


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    dlam,  # [N, T, K] fp32
    lam,  # [N, T, K] fp32
    life,
    begin,
    lo,
    weight,
    slots,
    carried,
    partial,  # [N, blocks] fp64 out: sum of w_p dg_p over t in the block
    T,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of queries of one lane."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(T, BLOCK)
    lane = program // blocks
    first = (program % blocks).to(tl.int32) * BLOCK
    row = lane * T
    b = tl.load(slots + program * KP + tl.arange(0, KP))
    moved = tl.load(carried + program * KP + tl.arange(0, KP))
    nx = _next_start(b)
    death = tl.load(life + row + b, mask=b >= 0, other=0)
    age = tl.sum((b[:, None] > b[None, :]).to(tl.int32), 0)  # slot index by recency
    fired = _fired(weight + row, lo + row, b, nx)
    total = tl.zeros([KP], tl.float64)
    for t in range(first, tl.minimum(first + BLOCK, T)):
        life_t = tl.load(life + row + t)
        reset = tl.load(begin + row + t) == t
        if (life_t > 0) | reset:
            b, nx, death, moved = _open_slot(b, nx, death, moved, t, life_t, reset)
            age = tl.sum((b[:, None] > b[None, :]).to(tl.int32), 0)
            fired = _fired(weight + row, lo + row, b, nx)
        else:
            moved += tl.load(weight + row + t) * _overlap(tl.load(lo + row + t), t, b, nx)
        live = b >= 0
        cell = (row + t) * K + age
        mine = tl.load(lam + cell, mask=live, other=0.0).to(tl.float64)
        older = tl.load(lam + cell + 1, mask=live & (age + 1 < K), other=0.0)
        newer = tl.load(lam + cell - 1, mask=live & (age > 0), other=0.0)
        forward = tl.where(age + 1 < K, older - mine, 0.0) * moved
        backward = tl.where(age > 0, mine - newer, 0.0) * fired
        tokens = tl.where(live, tl.minimum(nx, t + 1) - b, 1).to(tl.float64)
        total += tl.load(dlam + cell, mask=live, other=0.0) * (forward + backward) / tokens
    tl.store(partial + program, tl.sum(total, 0))


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
