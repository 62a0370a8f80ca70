"""One logical stream: an infinite, deterministic sequence of rows that can be resumed at any row."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dla.data.packing import Row, pack_row
from megatron_dla.data.shards import ShardReader
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
        self.epoch = self.shard = self.document = self.offset = 0
        self.last: int | None = None
        self._order: np.ndarray | None = None  # this stream's shards of the epoch
        self._documents: list[np.ndarray] | None = None  # documents of the shard, in reading order

    def next_row(self) -> Row:
        """The next row of `seq_len` tokens. Raises DataError for a damaged shard, naming it."""
        window = np.empty(self.seq_len + 1, dtype=np.int64)
        filled = 0
        if self.last is not None:
            window[0], filled = self.last, 1
        while filled < len(window):
            source = self._current()
            n = min(len(source) - self.offset, len(window) - filled)
            window[filled : filled + n] = source[self.offset : self.offset + n]
            filled += n
            self._advance(n)
        self.last = int(window[-1])
        return pack_row(window, self.reader.index.eos_id)

    def _current(self) -> np.ndarray:
        if self._order is None:
            self._order = self.reader.order(self.seed, self.epoch)[self.number :: self.count]
        if self._documents is None:
            shard = self.reader.shards[self._order[self.shard]]
            stored = self.reader.read(shard)
            self._documents = [stored[i] for i in self.reader.document_order(shard, self.seed, self.epoch)]
        return self._documents[self.document]

    def _advance(self, n: int) -> None:
        assert self._order is not None and self._documents is not None
        self.offset += n
        if self.offset == len(self._documents[self.document]):
            self.offset, self.document = 0, self.document + 1
        if self.document == len(self._documents):
            self.document, self.shard, self._documents = 0, self.shard + 1, None
        if self.shard == len(self._order):
            self.shard, self.epoch, self._order = 0, self.epoch + 1, None

    def state_dict(self) -> dict[str, int | None]:
        """Position before the next row, JSON-serialisable."""
        return {**{name: getattr(self, name) for name in _CURSORS}, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, saved by a stream of the same data, seed, length and count; reads only that shard.

        Raises DataError if the position does not exist.
        """
        try:
            position = {name: int(state[name]) for name in _CURSORS}
            last = None if state["last"] is None else int(state["last"])
            self._order = self._documents = None
            self.__dict__.update(position, last=last)
            if min(position.values()) < 0 or self.offset >= len(self._current()):
                raise IndexError
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"loader state of stream {self.number} is {state}: no such position in this data; "
                "resume from another checkpoint"
            ) from error
