"""What a stretch of tokens does to any state: s_i <- s_i M_i + c_i for each row i, for context parallelism.

A rank computes the summary of its own tokens without knowing where they start, ranks exchange N (r^3 + r^2) numbers,
and each composes those before it. Gradients flow through all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scan import delta_mem_scan

Summary = tuple[Tensor, Tensor]


def chunk_summary(k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> Summary:
    """(M [B, N, r, r, r], c [B, N, r, r]) of the tokens; `apply_summary` is the final state from any initial one.

    Args: as `delta_mem_scan`, which runs r + 1 times as one batch (r unit states for M, and zero for c).
    `options`: keep, erase, reset, write_mask, backend, chunk_size.
    """
    B, _, N, r = v.shape

    def copies(x: Tensor) -> Tensor:
        return x.expand(r + 1, *x.shape).flatten(0, 1)

    for name in ("keep", "erase", "reset", "write_mask"):
        if options.get(name) is not None:
            options[name] = copies(options[name])
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    units = torch.eye(r + 1, r, dtype=dtype, device=v.device)  # the last state is zero
    state = units[:, None, None, None].expand(r + 1, B, N, r, r).flatten(0, 1)
    values = torch.cat([torch.zeros_like(v).repeat(r, 1, 1, 1), v])
    keys = copies(k)
    _, final = delta_mem_scan(torch.zeros_like(keys), keys, values, copies(beta), initial_state=state, **options)
    final = final.view(r + 1, B, N, r, r)
    return final[:r].permute(1, 2, 3, 0, 4), final[r]


def apply_summary(state: Tensor, summary: Summary) -> Tensor:
    """The state [B, N, r, r] after the summary's tokens."""
    maps, added = summary
    return torch.einsum("bnia,bniaj->bnij", state, maps) + added


def compose(earlier: Summary, later: Summary) -> Summary:
    """The summary of two stretches, one after the other."""
    return torch.einsum("bniac,bnicj->bniaj", earlier[0], later[0]), apply_summary(earlier[1], later)
