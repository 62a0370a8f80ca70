"""Packing: a stream of documents, each ending with eos, is cut into rows of equal length.

Row i of a stream covers its tokens [i*T, (i+1)*T]: T inputs and, shifted by one, T labels. A document longer
than a row continues in the next row as if it were a new document (state is not carried across rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class Row(NamedTuple):
    """One packed row of T tokens.

    `tokens`, `labels` int64 [T]; `loss_mask` float32 [T], 0 where the input is eos: its label is the first token of
    the next, unrelated document; `document_starts` int64, sorted positions in [0, T)
    where a document begins, always including 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    document_starts: np.ndarray


class Batch(NamedTuple):
    """One micro batch of b rows.

    `tokens`, `labels` int64 [b, T]; `loss_mask` float32 [b, T]; `cu_seqlens` int32 [n + 1], document boundaries in the
    b*T flattened tokens: 0, every row start, every document start, b*T; `rows` int64 [b], each row's index in the
    global batch of its step (in the whole pass, for validation).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor

    def positions(self, documents: bool) -> torch.Tensor:
        """Tokens before each one in its row, or with `documents` in its part of a document; int64 [b, T]."""
        index = torch.arange(self.tokens.numel())
        if not documents:
            return (index % self.tokens.shape[1]).view_as(self.tokens)
        begin = self.cu_seqlens.long()
        return (index - begin[torch.searchsorted(begin, index, right=True) - 1]).view_as(self.tokens)


def pack_row(window: np.ndarray, eos_id: int) -> Row:
    """A row from a window of T + 1 tokens of a stream."""
    window = window.astype(np.int64)
    tokens, labels = window[:-1], window[1:]
    ends = tokens == eos_id
    starts = np.flatnonzero(ends[:-1]) + 1
    return Row(tokens, labels, (~ends).astype(np.float32), np.concatenate([[0], starts]))


def pad_row(window: np.ndarray, eos_id: int, seq_len: int) -> Row:
    """A row from at most T + 1 tokens: the rest is padded with token 0, masked from the loss, a segment of its own."""
    real = max(len(window) - 1, 0)
    row = pack_row(np.pad(window, (0, seq_len + 1 - len(window))), eos_id)
    row.loss_mask[real:] = 0
    # the last real token has no label, so it belongs to the padding unless it begins a document
    starts = row.document_starts
    return row._replace(document_starts=np.union1d(starts[starts < real], [0, real] if real < seq_len else [0]))


def make_batch(rows: Sequence[Row], numbers: Sequence[int]) -> Batch:
    """Stack rows of equal length into torch tensors; `numbers` are their indices in the global batch."""
    seq_len = len(rows[0].tokens)
    borders = [row.document_starts + i * seq_len for i, row in enumerate(rows)]
    cu_seqlens = np.concatenate([*borders, [len(rows) * seq_len]]).astype(np.int32)
    return Batch(
        torch.from_numpy(np.stack([row.tokens for row in rows])),
        torch.from_numpy(np.stack([row.labels for row in rows])),
        torch.from_numpy(np.stack([row.loss_mask for row in rows])),
        torch.from_numpy(cu_seqlens),
        torch.tensor(list(numbers), dtype=torch.int64),
    )
