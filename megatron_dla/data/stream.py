"""Infinite, deterministic sequences of rows over the shards of one source, which can be resumed at any row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from megatron_dla.data.packing import Row, pack_row
from megatron_dla.data.shards import Documents, ShardReader
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardInfo

_CURSORS = ("epoch", "shard", "document", "offset")


class ShardStream(ABC):
    """Stream `number` of `count`: in each epoch, every `count`-th shard of that epoch's order, starting at `number`.

    Each stream begins its next epoch independently of the others; after `max_epochs` (0: never) it has `ended`.
    Memory: the tokens of one shard.

    Attributes: `epoch`; `shard` (index in the stream's shards of that epoch); of the rows read so far: `tokens` of
    documents, `documents` that ended, those of them that were `cut` at the end of a row, and `padding` (positions).
    """

    def __init__(
        self, reader: ShardReader, number: int, count: int, *, seq_len: int, seed: int, max_epochs: int = 0
    ) -> None:
        self.reader, self.number, self.count = reader, number, count
        self.seq_len, self.seed, self.max_epochs = seq_len, seed, max_epochs
        self.epoch = self.shard = 0
        self.tokens = self.documents = self.cut = self.padding = 0
        self._order: np.ndarray | None = None  # this stream's shards of the epoch

    @property
    def ended(self) -> bool:
        return 0 < self.max_epochs <= self.epoch

    @abstractmethod
    def next_row(self) -> Row | None:
        """The next row of `seq_len` tokens; None if it has ended. Raises DataError for a damaged shard, naming it."""

    @abstractmethod
    def state_dict(self) -> dict[str, int | None]:
        """Position before the next row, JSON-serialisable."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the position, saved by a stream of the same data, seed, length and count; reads only that shard.

        Raises DataError if the position does not exist.
        """
        self.documents = self.cut = self.padding = 0
        try:
            self._go_to(state)
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"loader state of stream {self.number} is {state}: no such position in this data; "
                "resume from another checkpoint"
            ) from error

    @abstractmethod
    def _go_to(self, state: dict[str, Any]) -> None: ...

    def _current_shard(self) -> ShardInfo:
        if self._order is None:
            self._order = self.reader.order(self.seed, self.epoch)[self.number :: self.count]
        return self.reader.shards[self._order[self.shard]]

    def _read(self) -> Documents:
        """The current shard, in the order of the epoch. The next one is fetched meanwhile, where it is at a URL."""
        shard = self._current_shard()
        documents = self.reader.read(shard)
        self.reader.expect(self._following_shard)
        return documents.ordered(self.reader.document_order(shard, self.seed, self.epoch))

    def _following_shard(self) -> ShardInfo:
        assert self._order is not None
        if self.shard + 1 < len(self._order):
            return self.reader.shards[self._order[self.shard + 1]]
        return self.reader.shards[self.reader.order(self.seed, self.epoch + 1)[self.number]]

    def _next_shard(self) -> None:
        assert self._order is not None
        self.shard += 1
        if self.shard == len(self._order):
            self.shard, self.epoch, self._order = 0, self.epoch + 1, None


class TokenStream(ShardStream):
    """Packing `concat`: rows are cut from the joined documents, across shards and epochs.

    Position: `epoch`, `shard`, `document` (index in the shard's order of that epoch), `offset` (tokens of the document
    already read), and `last`, the first token of the next row. What is left at the end of the last epoch is no row.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.last: int | None = None
        self._at = 0  # tokens read of the shard
        self._inside = False  # whether the last row ended inside a document; not known right after a resume
        self._documents: Documents | None = None  # of the shard, in reading order

    def next_row(self) -> Row | None:
        window = np.empty(self.seq_len + 1, dtype=np.int64)
        filled = 0
        if self.last is not None:
            window[0], filled = self.last, 1
        while filled < len(window):
            if self.ended:
                return None
            tokens = self._current().tokens
            n = min(len(tokens) - self._at, len(window) - filled)
            window[filled : filled + n] = tokens[self._at : self._at + n]
            filled += n
            self._advance(n)
        self.last = int(window[-1])
        row = pack_row(window, self.reader.index.eos_id)
        self._count(row)
        return row

    def _count(self, row: Row) -> None:
        ended = int(self.seq_len - row.loss_mask.sum())  # an eos is not part of the loss
        self.tokens += self.seq_len
        self.documents += ended
        self.cut += self._inside and ended > 0
        self._inside = bool(row.loss_mask[-1])

    def _current(self) -> Documents:
        if self._documents is None:
            self._documents = self._read()
        return self._documents

    def _advance(self, n: int) -> None:
        self._at += n
        if self._at == len(self._current().tokens):
            self._at, self._documents = 0, None
            self._next_shard()

    def state_dict(self) -> dict[str, int | None]:
        document = offset = 0
        if self._at:
            ends = self._current().ends
            document = int(np.searchsorted(ends, self._at, side="right"))
            offset = self._at - (int(ends[document - 1]) if document else 0)
        position = (self.epoch, self.shard, document, offset)
        return {**dict(zip(_CURSORS, position, strict=True)), "last": self.last}

    def _go_to(self, state: dict[str, Any]) -> None:
        self.epoch, self.shard, document, offset = (int(state[name]) for name in _CURSORS)
        self.last = None if state["last"] is None else int(state["last"])
        self._order = self._documents = None
        if min(self.epoch, self.shard, document, offset) < 0:
            raise IndexError
        ends = self._current().ends
        self._at = offset + (int(ends[document - 1]) if document else 0)
        if self._at >= ends[document]:
            raise IndexError
        if self._at and self.last != int(self._current().tokens[self._at - 1]):
            raise IndexError
        if self.last is not None and not 0 <= self.last < self.reader.index.vocab_size:  # of the shard before
            raise IndexError
