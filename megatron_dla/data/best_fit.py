"""Packing `best_fit`: no document that fits into a row is cut (Ding et al. 2024, arXiv 2404.10830).

A shard is packed on its own: the documents, longest first, each into the row with the least space that holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from megatron_dla.data.packing import Row, pad_row
from megatron_dla.data.shards import permutation
from megatron_dla.data.stream import ShardStream


class Packed(NamedTuple):
    """Rows made of pieces of documents, all int64 but `cut`, bool.

    Piece i is the tokens `starts[i]` to `stops[i]` of the shard; row r has the pieces `edges[r]` to `edges[r + 1]`.
    `cut[i]`: the piece is the last one of a document that was cut.
    """

    starts: np.ndarray
    stops: np.ndarray
    cut: np.ndarray
    edges: np.ndarray


def best_fit(ends: np.ndarray, seq_len: int) -> Packed:
    """Pack documents into windows of at most seq_len + 1 tokens, of which the last one is a label only.

    A longer document fills whole rows, which overlap by one token as in `concat`; its rest is packed as a document.

    Args:
        ends: int64 [documents], where each ends.
    """
    starts = np.concatenate([[0], ends[:-1]])
    full = np.maximum(ends - starts - 2, 0) // seq_len  # rows that a document fills: its rest has 2 tokens at least
    number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    whole = np.repeat(starts, full) + number * seq_len
    rest = starts + full * seq_len
    row = np.concatenate([np.arange(len(whole)), len(whole) + _rows(ends - rest, seq_len + 1)])
    order = np.argsort(row, kind="stable")
    return Packed(
        np.concatenate([whole, rest])[order],
        np.concatenate([whole + seq_len + 1, ends])[order],
        np.concatenate([np.zeros(len(whole), dtype=bool), full > 0])[order],
        np.searchsorted(row[order], np.arange(row.max() + 2)),
    )


def _rows(sizes: np.ndarray, space: int) -> np.ndarray:
    """The row of each piece, int64 [pieces]; sizes are 1 to `space`, that of an empty row."""
    rows = np.empty(len(sizes), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(space)]  # rows that have space left
    some, count = 0, 0  # bit n of `some` is set where by_space[n] has rows
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if fitting := some >> size:
            least = size + (fitting & -fitting).bit_length() - 1
            row = by_space[least].pop()
            if not by_space[least]:
                some ^= 1 << least
        else:
            least, row, count = space, count, count + 1
        rows[piece] = row
        if left := least - size:
            by_space[left].append(row)
            some |= 1 << left
    return rows


class BestFitStream(ShardStream):
    """Rows of one shard after the other, shuffled. Position: `epoch`, `shard`, and `row` of the shard."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.row = 0
        self._packed: tuple[np.ndarray, Packed, np.ndarray] | None = None  # the shard's tokens, rows, and their order

    def next_row(self) -> Row | None:
        if self.ended:
            return None
        tokens, packed, order = self._current()
        pieces = slice(*packed.edges[order[self.row] :][:2].tolist())
        spans = zip(packed.starts[pieces].tolist(), packed.stops[pieces].tolist(), strict=True)
        window = np.concatenate([tokens[start:stop] for start, stop in spans])
        eos = self.reader.index.eos_id
        ends = pieces.stop - pieces.start if window[-1] == eos else 0
        self.tokens += len(window) if ends else self.seq_len  # the last token of a whole row begins the next one
        self.documents += ends
        self.cut += int(packed.cut[pieces].sum())
        self.padding += self.seq_len + 1 - len(window)
        self.row += 1
        if self.row == len(order):
            self.row, self._packed = 0, None
            self._next_shard()
        return pad_row(window, eos, self.seq_len)

    def _current(self) -> tuple[np.ndarray, Packed, np.ndarray]:
        if self._packed is None:
            documents, path = self._read(), self._current_shard().path
            packed = best_fit(documents.ends, self.seq_len)
            order = permutation(len(packed.edges) - 1, "rows", self.seed, self.epoch, path)
            self._packed = documents.tokens, packed, order
        return self._packed

    def state_dict(self) -> dict[str, int | None]:
        return {"epoch": self.epoch, "shard": self.shard, "row": self.row}

    def _go_to(self, state: dict[str, Any]) -> None:
        self.epoch, self.shard, self.row = (int(state[name]) for name in ("epoch", "shard", "row"))
        self._order = self._packed = None
        if min(self.epoch, self.shard, self.row) < 0 or self.row >= len(self._current()[2]):
            raise IndexError
