"""Layouts and chunk-local arrays that the torch passes share."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def lanes(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[B, T, G, ...] -> [B * heads, T, ...]; groups are repeated for their heads."""
    x = x.to(dtype)
    if x.shape[2] != heads:
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
    return x.transpose(1, 2).reshape(x.shape[0] * heads, x.shape[1], *x.shape[3:])


def unlanes(x: Tensor, batch: int) -> Tensor:
    """[B * H, T, ...] -> [B, T, H, ...]."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def chunked(x: Tensor, size: int) -> Tensor:
    """[N, T, ...] -> [N, n, size, ...], zero-padded at the end."""
    pad = -x.shape[1] % size
    if pad:
        x = torch.cat([x, x.new_zeros(x.shape[0], pad, *x.shape[2:])], dim=1)
    return x.view(x.shape[0], -1, size, *x.shape[2:])


def delta_rule_inverse(k: Tensor, beta: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """T = (I + stril(diag(beta) (K K^T .* D)))^-1 and stril(K K^T .* D), both [..., C, C]."""
    gram = (k @ k.transpose(-1, -2) * D).tril(-1)
    eye = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
    L = beta[..., None] * gram  # its diagonal is taken as 1
    return torch.linalg.solve_triangular(L, eye.expand_as(gram), upper=False, left=False, unitriangular=True), gram


def document_cumsum(g: Tensor, within: Tensor) -> Tensor:
    """Inclusive cumsum of g over the last axis [..., C] that restarts at each document.

    `within` [..., C, C] is True where two tokens share a document. A doubling scan, so that no rounding error of one
    document reaches the next: packed documents are isolated bit for bit.
    """
    shift = 1
    while shift < g.shape[-1]:
        joined = within.diagonal(-shift, -2, -1)
        g = torch.cat([g[..., :shift], g[..., shift:] + torch.where(joined, g[..., :-shift], 0)], -1)
        shift *= 2
    return g


def causal_decay(row: Tensor, col: Tensor, within: Tensor, diagonal: int = 0) -> Tensor:
    """exp(row_t - col_j) for j <= t + diagonal in one document, else 0."""
    gap = row[..., :, None] - col[..., None, :]
    return (gap.clamp_(max=80).exp_() * within).tril_(diagonal)  # what is left out must be finite, too
