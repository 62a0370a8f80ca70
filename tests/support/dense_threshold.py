"""The learned threshold's gradient by its definition, over all (query, token) pairs: the oracle of the fast passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dla.kernels.dla import partition
from megatron_dla.kernels.dla.documents import begin_of_document, document_starts
from tests.support.dla_cases import Case


def random_problem(case: Case, dtype: torch.dtype = torch.float64, temperature: float = 0.3) -> tuple[Any, ...]:
    """Arguments of `threshold_gradient`: the case's partition with random slot weights and gradients."""
    x = case.make()
    tau = torch.full((case.H,), case.tau, dtype=torch.float64, requires_grad=True)
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **{**case.rule, "tau": tau})
    assert decided.lo is not None
    lanes = [t.transpose(1, 2).flatten(0, 1) for t in (decided.start, decided.death, decided.lo, decided.score)]
    gen = torch.Generator().manual_seed(case.seed)
    N = case.B * case.H
    lam, dlam = torch.randn(2, N, case.T, case.capacity, generator=gen, dtype=torch.float64).to(dtype)
    resets = document_starts(case.cu_seqlens, case.B, case.T).repeat_interleave(case.H, dim=0)
    lane_tau = torch.full((N,), case.tau, dtype=dtype)
    return dlam, lam, *lanes, begin_of_document(resets), lane_tau, temperature


def dense_threshold_gradient(
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

    Arguments as `megatron_dla.kernels.dla.threshold.threshold_gradient`; `block`: rows at once.
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
