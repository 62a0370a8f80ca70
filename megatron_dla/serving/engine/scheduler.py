"""Which sequences are read, decoded, put aside and ended at each step. Pure Python: it never looks at a tensor.

Order: by priority, then by arrival. The first sequence in that order is never put aside, and a request that could not
be held alone is refused when it comes, so there is always progress.
"""

from __future__ import annotations

import heapq
import sys
from bisect import insort
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from megatron_dla.errors import UserError
from megatron_dla.serving.engine.config import PAGE, EngineConfig
from megatron_dla.serving.engine.pages import PagePool, PageTable
from megatron_dla.serving.engine.prefixes import Prefix, Prefixes
from megatron_dla.serving.engine.request import Request


class Phase(Enum):
    WAITING = "waiting"  # for its first slot
    READING = "reading"  # its prompt
    DECODING = "decoding"
    SAVED = "saved"  # put aside, in the middle of either
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    Attributes:
        arrival: number of the request. expires: on the engine's clock, or None.
        length: tokens whose effect the state holds. tokens: generated; all but the last have been fed when it decodes.
        row: its slot, which has its state after `length` tokens; nothing at 0.
        tables: pages of its keys and values, one table a pool. state: the runner's, while it is put aside.
        keep_at: length at which the state is kept as a prefix, 0 = nowhere. cached: tokens that a prefix saved.
    """

    request: Request
    arrival: int
    expires: float | None = None
    tables: list[PageTable] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    length: int = 0
    tokens: list[int] = field(default_factory=list)
    row: int = -1
    state: Any = None
    digests: list[bytes] = field(default_factory=list)
    keep_at: int = 0
    cached: int = 0
    turn: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return -self.request.priority, self.arrival

    @property
    def is_read(self) -> bool:
        return self.length >= len(self.request.prompt)


class Store(Protocol):
    """What moves the states: the runner, or a stand-in in a test."""

    def save(self, sequence: Sequence) -> None:
        """Copy what it holds to host memory; its row and pages are given to others after this."""

    def load(self, sequence: Sequence) -> None:
        """Copy it back into its new row and pages."""

    def move(self, sequence: Sequence, row: int) -> None:
        """Copy its state from its row to another one."""

    def snapshot(self, sequence: Sequence) -> Any:
        """A copy of the state in its row."""

    def begin(self, sequence: Sequence, snapshot: Any) -> None:
        """Copy a snapshot to its row."""


class Scheduler:
    """See the module.

    Attributes:
        pools: of pages, one a kind of softmax layer; windows: what each kind sees.
        waiting: in order, those that were put aside among them. held: the sequences that have a row.
    """

    def __init__(
        self, config: EngineConfig, store: Store, windows: Items[int | None] = (), *, whole_prompts: bool = False
    ) -> None:
        self.config, self.store, self.windows = config, store, tuple(windows)
        self.chunk = sys.maxsize if whole_prompts else config.prefill_chunk
        self.pools = [PagePool(config.pages) for _ in windows]
        self.prefixes = Prefixes(config.prefix_states, config.prefill_chunk)
        self.waiting: list[Sequence] = []
        self.held: list[Sequence] = []
        self.free_rows = list(range(config.slots))
        self.saves = 0
        self._budget = self._left = self._turn = 0

    # ---- in and out

    def check(self, request: Request) -> None:
        """Raises UserError where the pages of all its tokens do not exist."""
        tokens = len(request.prompt) + request.sampling.max_new_tokens
        for pool, window in zip(self.pools, self.windows, strict=True):
            if self._most(tokens, window) > pool.total:
                raise UserError(
                    f"prompt of {len(request.prompt)} tokens with max_tokens = {request.sampling.max_new_tokens}: the "
                    f"pool holds keys and values of {pool.total * PAGE} tokens: shorten either, or start the engine "
                    "with more kv_pages"
                )

    def room(self, prompt: int) -> int | None:
        """Most tokens that may follow a prompt of so many tokens; None: any number."""
        full = [pool.total for pool, window in zip(self.pools, self.windows, strict=True) if window is None]
        return max(0, min(full) * PAGE - prompt) if full else None

    def digests(self, request: Request) -> list[bytes]:
        """Of the beginnings of a prompt, by which kept prefixes are found. Any thread may call it."""
        if request.memory is not None or request.messages is not None:
            return []
        return self.prefixes.digests(request.prompt)

    def add(self, sequence: Sequence) -> None:
        sequence.tables = [PageTable(*x) for x in zip(self.pools, self.windows, strict=True)]
        sequence.digests = sequence.digests or self.digests(sequence.request)
        insort(self.waiting, sequence, key=lambda x: x.order)

    def end(self, sequence: Sequence) -> None:
        """Whatever it does: it is out, and what it holds is free."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.phase = Phase.ENDED
        ended = [sequence]
        if self.config.whole_batches and sequence in self.held:
            ended = [] if any(x.phase is not Phase.ENDED for x in self.held) else list(self.held)
        for one in ended:
            self._release(one)
            one.state = None

    def expired(self, now: float) -> list[Sequence]:
        return [x for x in self.active if x.expires is not None and now >= x.expires]

    @property
    def active(self) -> list[Sequence]:
        """All that have not ended."""
        return [x for x in (*self.held, *self.waiting) if x.phase is not Phase.ENDED]

    # ---- one step: decode, then read while the budget lasts

    def begin_step(self) -> list[Sequence]:
        """The sequences that decode a token now, by row; each has room for its keys and values."""
        for sequence in sorted(self.held, key=lambda x: x.order):
            if sequence.phase is Phase.DECODING:
                self._ensure(sequence, sequence.length + 1)
        self._compact()
        decoding = [x for x in self.held if x.phase is Phase.DECODING]
        self._budget = self._left = self.config.budget - len(decoding)
        return sorted(decoding, key=lambda x: x.row)

    @property
    def half_read(self) -> list[int]:
        """Rows with the states of prompts that are being read."""
        return [x.row for x in self.held if x.phase is Phase.READING and x.length]

    def decoded(self, sequence: Sequence) -> None:
        self._advance(sequence, sequence.length + 1)

    def next_read(self) -> tuple[Sequence, int] | None:
        """A sequence, and the token before which its next chunk ends; None: nothing to read, or no budget left.

        Chunks end at multiples of `prefill_chunk`, whatever the load, since their length decides how sums are rounded.
        """
        self._admit()
        readers = [x for x in self.held if x.phase is Phase.READING]
        if not readers:
            return None
        one = min(readers, key=lambda x: (-x.request.priority, x.turn, x.arrival))
        stop = min(len(one.request.prompt), (one.length // self.chunk + 1) * self.chunk)
        if not self._affords(stop - one.length) or not self._ensure(one, stop):
            return None
        self._left -= stop - one.length
        self._turn += 1
        one.turn = self._turn
        return one, stop

    def was_read(self, sequence: Sequence, stop: int) -> None:
        self._advance(sequence, stop)
        if stop == sequence.keep_at:
            tables = [table.fork(stop) for table in sequence.tables]
            self.prefixes.keep(sequence.digests, Prefix(stop, self.store.snapshot(sequence), tables))
        if sequence.is_read:
            sequence.phase = Phase.DECODING

    def put_aside(self, sequence: Sequence) -> None:
        """Save a held sequence; it goes on, in its order, when there is room."""
        self.store.save(sequence)
        self.saves += 1
        self._release(sequence)
        sequence.phase = Phase.SAVED
        insort(self.waiting, sequence, key=lambda x: x.order)

    # ---- resources

    def _most(self, tokens: int, window: int | None) -> int:
        """Pages that a sequence of so many tokens holds at most at once in a pool."""
        whole = -(-max(tokens, self.config.reserve_tokens) // PAGE)
        if window is None:
            return whole
        return min(whole, -(-(window - 1 + self.chunk) // PAGE) + 1)

    def _advance(self, sequence: Sequence, length: int) -> None:
        sequence.length = length
        for table in sequence.tables:
            table.slide(length)

    def _release(self, sequence: Sequence) -> None:
        for table in sequence.tables:
            table.clear()
        if sequence in self.held:
            self.held.remove(sequence)
            heapq.heappush(self.free_rows, sequence.row)
            sequence.row = -1

    def _ensure(self, sequence: Sequence, tokens: int) -> bool:
        """Room for the first `tokens` tokens, if need be that of kept prefixes and of later sequences; False: it was
        put aside itself."""
        while lacking := [n for n, table in enumerate(sequence.tables) if table.missing(tokens) > table.pool.free]:
            if any(self._reclaimable(kind) for kind in lacking):
                self.prefixes.evict()
                continue
            last = max((x for x in self.held if x.phase is not Phase.ENDED), key=lambda x: x.order)
            self.put_aside(last)
            if last is sequence:
                return False
        for table in sequence.tables:
            table.grow(tokens)
        return True

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are pages for its prompt, or for what it had, and one more for each sequence that decodes."""
        tokens = max(len(sequence.request.prompt) + 1, sequence.length + 1, self.config.reserve_tokens)
        spare = sum(x.phase is Phase.DECODING for x in self.held)
        for kind, table in enumerate(sequence.tables):
            wanted = min(table.missing(tokens), self._most(tokens, table.window)) + spare
            if self.held and wanted > table.pool.free + self._reclaimable(kind):
                return False
            while wanted > table.pool.free and self.prefixes.evict():
                pass
        return True

    def _reclaimable(self, kind: int) -> int:
        """Pages that nobody but kept prefixes holds."""
        held = Counter(page for prefix in self.prefixes.kept for page in prefix.tables[kind].pages)
        return sum(self.pools[kind].holders(page) == count for page, count in held.items())

    def _admit(self) -> None:
        if self.config.whole_batches and self.held:
            return
        while self.waiting:
            one = self.waiting[0]
            if not (one.is_read or self._reads_next(one) or self.config.whole_batches):
                return
            if one.phase is Phase.WAITING and any(self._reads_for(x, one) for x in self.held):
                return
            if not self.free_rows:
                last = max(self.held, key=lambda x: x.order)
                saved = sum(x.phase is Phase.SAVED for x in self.waiting)
                if one.request.priority <= last.request.priority or saved >= self.config.max_saved:
                    return
                self.put_aside(last)
            if not self._fits(one):
                return
            self.waiting.remove(one)
            one.row = heapq.heappop(self.free_rows)
            self.held.append(one)
            self._start(one)

    def _reads_next(self, sequence: Sequence) -> bool:
        """Whether a chunk of it would be read at once: a prompt that would only wait gets no row."""
        readers = [x for x in self.held if x.phase is Phase.READING]
        chunk = min(len(sequence.request.prompt), self.chunk)
        return (
            len(readers) < self.config.readers
            and self._affords(chunk)
            and all(x.length and x.request.priority <= sequence.request.priority for x in readers)
        )

    def _affords(self, tokens: int) -> bool:
        """Whether the step has room for a chunk; a whole prompt that is longer than any step is read alone."""
        return tokens <= self._left or self._left == self._budget

    def _reads_for(self, reader: Sequence, other: Sequence) -> bool:
        """Whether a prefix of `other` will be kept when `reader` has read it."""
        if reader.phase is not Phase.READING or reader.keep_at <= reader.length:
            return False
        return reader.digests[reader.keep_at // self.config.prefill_chunk - 1] in other.digests

    def _start(self, sequence: Sequence) -> None:
        """In its new row: from the beginning, from a kept prefix, or from where it was put aside."""
        was = sequence.phase
        sequence.phase = Phase.DECODING if sequence.is_read else Phase.READING
        if was is Phase.SAVED:
            self._take(sequence, sequence.length)
            self.store.load(sequence)
            return
        sequence.keep_at = self.prefixes.keep_at(sequence.digests, sequence.request.shared_prefix)
        if prefix := self.prefixes.find(sequence.digests):
            sequence.length = sequence.cached = prefix.tokens
            self.store.begin(sequence, prefix.state)
            sequence.tables = [table.fork(prefix.tokens) for table in prefix.tables]
        self._take(sequence, sequence.length)

    def _take(self, sequence: Sequence, tokens: int) -> None:
        for table in sequence.tables:
            table.grow(tokens if table.window else max(tokens, self.config.reserve_tokens))

    def _compact(self) -> None:
        """Move sequences out of decode calls that the others do not need."""
        rows = self.config.rows
        wanted = -(-len(self.held) // rows) * rows
        for sequence in sorted(self.held, key=lambda x: -x.row):
            if sequence.row < wanted or not self.free_rows or self.free_rows[0] >= wanted:
                return
            row = heapq.heappop(self.free_rows)
            self.store.move(sequence, row)
            heapq.heappush(self.free_rows, sequence.row)
            sequence.row = row
