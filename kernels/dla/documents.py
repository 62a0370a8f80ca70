"""Where documents begin in packed rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .cache import EMPTY


def document_starts(
    cu_seqlens: Tensor | None,
    batch: int,
    length: int,
    device: torch.device | str | None = None,
    *,
    copy: bool = True,
) -> Tensor:
    """bool [B, T]: True where a document begins, from cumulative lengths over the flattened B*T tokens.

    With several rows, every row start begins a document, whether `cu_seqlens` names it or not. Where `cu_seqlens` is on
    the host, the layers of a model share one transfer of the result to their device. Without `copy` they share the
    result: do not write into it.
    """
    if cu_seqlens is None:
        return torch.zeros(batch, length, dtype=torch.bool, device=device)
    if cu_seqlens.device.type != "cpu":
        return _starts(cu_seqlens, batch, length).to(device or cu_seqlens.device)
    moved = _moved_starts(tuple(cu_seqlens.tolist()), batch, length, device)
    return moved.clone() if copy else moved


def _starts(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=cu_seqlens.device)
    starts[cu_seqlens.long()] = True
    starts = starts[:-1].view(batch, length)
    starts[:, :1] = True
    return starts


@lru_cache(maxsize=16)  # of a batch: whole rows and parts of them
def _moved_starts(ends: tuple[int, ...], batch: int, length: int, device: torch.device | str | None) -> Tensor:
    return _starts(torch.tensor(ends), batch, length).to(device or "cpu")


def document_borders(cu_seqlens: Tensor | None, batch: int, length: int) -> tuple[int, ...]:
    """First token of each document over the flattened tokens, and the end: rising, and every row start is among them.

    Reads `cu_seqlens` on the host (one synchronisation if it is on a GPU).
    """
    named = () if cu_seqlens is None else cu_seqlens.tolist()
    return tuple(sorted({*range(0, batch * length + 1, length), *named}))


def begin_of_document(resets: Tensor) -> Tensor:
    """int64 [N, T]: position of the last document start at or before t; EMPTY + 1 while the row continues a cache."""
    position = torch.arange(resets.shape[1], device=resets.device)
    return torch.where(resets, position, EMPTY + 1).cummax(1).values
