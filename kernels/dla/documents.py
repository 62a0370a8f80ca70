"""Where documents begin in packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import EMPTY


def document_starts(
    cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str | None = None
) -> Tensor:
    """bool [B, T]: True where a document begins, from cumulative lengths over the flattened B*T tokens.

    With several rows, every row start begins a document, whether `cu_seqlens` names it or not.
    """
    starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        starts[cu_seqlens.long()] = True
    starts = starts[:-1].view(batch, length)
    if cu_seqlens is not None and length:
        starts[:, 0] = True
    return starts


def begin_of_document(resets: Tensor) -> Tensor:
    """int64 [N, T]: position of the last document start at or before t; EMPTY + 1 while the row continues a cache."""
    position = torch.arange(resets.shape[1], device=resets.device)
    return torch.where(resets, position, EMPTY + 1).cummax(1).values
