"""One logical stream: an infinite, deterministic sequence of rows that can be resumed at any row."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dla.data.packing import Row, pack_row
from megatron_dla.data.shards import Documents, ShardReader
from megatron_dla.errors import DataError

_CURSORS = ("epoch", "shard", "document", "offset")


class TokenStream:
    """Stream `number` of `count`: in each epoch, every `count`-th shard of that epoch's order, starting at `number`.

    Position: `epoch`, `shard` (index in the stream's shards of that epoch), `document` (index in the shard's order of
    that epoch), `offset` (tokens of the document already read), and `last`, the first token of the next row.
    Each stream begins its next epoch independently of the others. Memory: the tokens of one shard.
    """

    def __init__(self, reader: ShardReader, number: int, count: int, *, seq_len: int, seed: int) -> None:
        self.reader, self.number, self.count = reader, number, count
        self.seq_len, self.seed = seq_len, seed
        self.epoch = self.shard = 0
        self.last: int | None = None
        self._at = 0  # tokens read of the shard
        self._order: np.ndarray | None = None  # this stream's shards of the epoch
        self._documents: Documents | None = None  # of the shard, in reading order

    def next_row(self) -> Row:
        """The next row of `seq_len` tokens. Raises DataError for a damaged shard, naming it."""
        window = np.empty(self.seq_len + 1, dtype=np.int64)
        filled = 0
        if self.last is not None:
            window[0], filled = self.last, 1
        while filled < len(window):
            tokens = self._current().tokens
            n = min(len(tokens) - self._at, len(window) - filled)
            window[filled : filled + n] = tokens[self._at : self._at + n]
            filled += n
            self._advance(n)
        self.last = int(window[-1])
        return pack_row(window, self.reader.index.eos_id)

    def _current(self) -> Documents:
        if self._order is None:
            self._order = self.reader.order(self.seed, self.epoch)[self.number :: self.count]
        if self._documents is None:
            shard = self.reader.shards[self._order[self.shard]]
            order = self.reader.document_order(shard, self.seed, self.epoch)
            self._documents = self.reader.read(shard).ordered(order)
        return self._documents

    def _advance(self, n: int) -> None:
        assert self._order is not None and self._documents is not None
        self._at += n
        if self._at == len(self._documents.tokens):
            self._at, self.shard, self._documents = 0, self.shard + 1, None
        if self.shard == len(self._order):
            self.shard, self.epoch, self._order = 0, self.epoch + 1, None

    def state_dict(self) -> dict[str, int | None]:
        """Position before the next row, JSON-serialisable."""
        document = offset = 0
        if self._at:
            ends = self._current().ends
            document = int(np.searchsorted(ends, self._at, side="right"))
            offset = self._at - (int(ends[document - 1]) if document else 0)
        position = (self.epoch, self.shard, document, offset)
        return {**dict(zip(_CURSORS, position, strict=True)), "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, saved by a stream of the same data, seed, length and count; reads only that shard.

        Raises DataError if the position does not exist.
        """
        try:
            self.epoch, self.shard, document, offset = (int(state[name]) for name in _CURSORS)
            self.last = None if state["last"] is None else int(state["last"])
            self._order = self._documents = None
            if min(self.epoch, self.shard, document, offset) < 0:
                raise IndexError
            ends = self._current().ends
            self._at = offset + (int(ends[document - 1]) if document else 0)
            if self._at >= ends[document]:
                raise IndexError
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"loader state of stream {self.number} is {state}: no such position in this data; "
                "resume from another checkpoint"
            ) from error
