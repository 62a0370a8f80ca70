"""Straight-through gradient of a learned threshold tau: capacity-aware, prorated toggles.

The forward pass stays hard, so training and inference agree. Firing (or not) at token p moves the tokens before p by
one slot; with a full cache a firing also merges a pair, so only the tokens in [lo_p, p) move. Each slot's gradient is
prorated over its tokens, so only lam, dlam and the partition are read:

    dg_p = sum_{t >= p} sum_{lo_p <= j < p} dlam[t, s] / n[t, s] * (lam[t, s + 1] - lam[t, s]),   s = slot_t(j)

for a token that did not fire, and the backward difference over p's life for one that did;
dtau = -sum_p dg_p sigmoid'((I_p - tau) / temperature) / temperature. The score is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    block: int = 64,
) -> Tensor:
    """dL/dtau per lane: [N].

    O(T^2) elementwise work in blocks of `block` rows; no state is read.

    Args:
        dlam, lam: [N, T, K], gradient and value of the slot weights. start, death, lo, score: [N, T].
        begin: int64 [N, T], first token of t's document. tau: [N]. temperature: width of the surrogate sigmoid.
    """
    N, T, K = lam.shape
    p = torch.arange(T, device=lam.device)
    death = torch.where(death >= T, T, death).long()
    low = lo.long()
    unfired = torch.zeros(N, T, dtype=lam.dtype, device=lam.device)
    fired = torch.zeros_like(unfired)
    for first in range(0, T, block):
        t = p[first : first + block, None]  # [R, 1]
        rows = slice(first, first + block)
        visible = (p <= t) & (p >= begin[:, rows, None])  # [N, R, T]
        alive = visible & start[:, None] & (death[:, None] > t)
        count = alive.long().cumsum(-1)
        slot = (count[..., -1:] - count).clamp_(max=K - 1)
        tokens = torch.zeros_like(lam[:, rows]).scatter_add_(-1, slot, visible.to(lam.dtype))
        step = torch.diff(lam[:, rows], dim=-1)  # lam_{s+1} - lam_s
        share = dlam[:, rows] / tokens.clamp(min=1)
        forward = torch.nn.functional.pad(step, (0, 1)) * share
        backward = torch.nn.functional.pad(step, (1, 0)) * share
        for total, difference, lives in ((unfired, forward, visible & ~start[:, None]), (fired, backward, alive)):
            moved = torch.nn.functional.pad((difference.gather(-1, slot) * visible).cumsum(-1), (1, 0))
            span = moved[..., :-1] - moved.gather(-1, low[:, None].expand(-1, moved.shape[1], -1))
            total += (span * lives).sum(1)
    toggles = torch.where(start, fired, unfired) * (p != begin)  # a document's first token always fires
    soft = torch.sigmoid((score.to(lam.dtype) - tau[:, None]) / temperature)
    return -(toggles * soft * (1 - soft)).sum(1) / temperature
