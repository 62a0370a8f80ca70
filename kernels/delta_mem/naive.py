"""The oracle: δ-mem's recurrence token by token (arXiv 2605.12357, eqs 6, 10-12), exact in float64.

Written to be held against the paper, not to be fast: one loop, autograd for every gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    write_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_mem_scan`, all of the dtype to compute in; reads [B, T, N, r] and the final state."""
    keep = 1 - beta if keep is None else keep
    erase = beta if erase is None else erase
    reads = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0.0, state)
        reads.append(torch.einsum("bnij,bnj->bni", state, q[:, t]))  # before the write: a token never reads itself
        prediction = torch.einsum("bnij,bnj->bni", state, k[:, t])  # of the state before its decay
        change = beta[:, t] * v[:, t] - erase[:, t] * prediction
        written = keep[:, t, ..., None] * state + change[..., None] * k[:, t, :, None, :]
        state = written if write_mask is None else torch.where(write_mask[:, t, None, None, None], written, state)
    return torch.stack(reads, 1), state
