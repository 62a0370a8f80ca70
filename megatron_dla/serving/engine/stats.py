"""What an engine does and holds, in numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_dla.serving.engine.config import PAGE
from megatron_dla.serving.engine.scheduler import Phase, Scheduler, Sequence
from megatron_dla.serving.engine.states import state_bytes

if TYPE_CHECKING:
    from megatron_dla.serving.engine.runner import ModelRunner


@dataclass(frozen=True)
class SequenceBytes:
    """Of one sequence that has a slot. Attributes: state: constant. kv_reserved: its pages. kv_used: of them, keys and
    values that a later token can see."""

    state: int
    kv_reserved: int
    kv_used: int


@dataclass(frozen=True)
class Stats:
    """A moment of an engine.

    Attributes:
        running, waiting, saved: sequences with a slot; without one; put aside (among the waiting).
        slots, slots_used, pages, pages_used: of the pools; pages of all kinds of softmax layers together.
        pool_bytes: allocated at the start. reserved_bytes: of them, held by sequences and prefixes. used_bytes: of
            those, states after the first token, and keys and values that a later token can see. saved_bytes: in host
            memory.
        prefix_bytes: beside the pool, states of kept prefixes (their pages are in it).
        open_slots, all_slots: DLA slots of the running sequences that hold tokens, and all of them: a state has its
            full size from the first token on.
        generated, read: tokens so far, and a second over the last ten. saves, requests: so far.
        prefix_tokens: prompt tokens that kept prefixes saved. rows_agree: see `ModelRunner.rows_agree`.
    """

    running: int
    waiting: int
    saved: int
    slots: int
    slots_used: int
    pages: int
    pages_used: int
    pool_bytes: int
    reserved_bytes: int
    used_bytes: int
    saved_bytes: int
    prefix_bytes: int
    open_slots: int
    all_slots: int
    generated: int
    generated_per_s: float
    read: int
    read_per_s: float
    saves: int
    requests: int
    prefix_tokens: int
    rows_agree: bool

    @property
    def waste(self) -> float:
        """Share of the reserved memory that holds nothing."""
        return 1 - self.used_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


class Meter:
    """A rate over the last `seconds`."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds, self.total = seconds, 0
        self._begin: float | None = None
        self._log: deque[tuple[float, int]] = deque()

    def add(self, now: float, count: int) -> None:
        self._begin = now if self._begin is None else self._begin
        self.total += count
        self._log.append((now, count))
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._log and self._log[0][0] < now - self.seconds:
            self._log.popleft()

    def rate(self, now: float) -> float:
        self._forget(now)
        if self._begin is None:
            return 0.0
        return sum(count for _, count in self._log) / max(min(self.seconds, now - self._begin), 1e-9)


@dataclass
class Counts:
    """What an engine counts itself, see `Stats`."""

    rows_agree: bool
    requests: int = 0
    prefix_tokens: int = 0
    generated: Meter = field(default_factory=Meter)
    read: Meter = field(default_factory=Meter)


def sequence_bytes(sequence: Sequence, runner: ModelRunner) -> SequenceBytes:
    reserved = idle = 0
    for table, token in zip(sequence.tables, runner.token_bytes, strict=True):
        reserved += len(table.pages) * PAGE * token
        idle += table.idle(sequence.length) * token
    return SequenceBytes(runner.pool.row_bytes if sequence.row >= 0 else 0, reserved, reserved - idle)


def memory_use(scheduler: Scheduler, row_bytes: int, token_bytes: Items[int]) -> tuple[int, int]:
    """Bytes of the pools that sequences and prefixes hold, and those of them that hold something: states, once a token
    has been read, and keys and values that a later token can see. A page that several hold counts once; what an ended
    sequence of a static batch still holds is of no use.

    Args:
        row_bytes: of one state. token_bytes: by pool, keys and values of one token.
    """
    live = [x for x in scheduler.held if x.phase is not Phase.ENDED]
    ended = [x for x in scheduler.held if x.phase is Phase.ENDED]
    empty = sum(x.length == 0 for x in live)
    reserved, idle = len(scheduler.held) * row_bytes, (len(ended) + empty) * row_bytes
    for kind, (pool, token) in enumerate(zip(scheduler.pools, token_bytes, strict=True)):
        reserved += (pool.total - pool.free) * PAGE * token
        idle += sum(x.tables[kind].idle(x.length) for x in live) * token
        idle += sum(x.tables[kind].own for x in ended) * PAGE * token
    return reserved, reserved - idle


def take_stats(scheduler: Scheduler, runner: ModelRunner, new: int, counts: Counts, now: float) -> Stats:
    """`new`: requests that the scheduler does not know yet. `now`: on the clock of the meters."""
    running = [x for x in scheduler.held if x.phase is not Phase.ENDED]
    saved = [x for x in scheduler.waiting if x.phase is Phase.SAVED]
    reserved, used = memory_use(scheduler, runner.pool.row_bytes, runner.token_bytes)
    every_page = zip(scheduler.pools, runner.token_bytes, strict=True)
    total = runner.pool.nbytes + sum(pool.total * PAGE * token for pool, token in every_page)
    slots, every = runner.pool.open_slots([x.row for x in running if x.phase is Phase.DECODING])
    pages = sum(pool.total for pool in scheduler.pools)
    return Stats(
        running=len(running),
        waiting=len(scheduler.waiting) + new,
        saved=len(saved),
        slots=scheduler.config.slots,
        slots_used=len(scheduler.held),
        pages=pages,
        pages_used=pages - sum(pool.free for pool in scheduler.pools),
        pool_bytes=total,
        reserved_bytes=reserved,
        used_bytes=used,
        saved_bytes=sum(x.state.nbytes for x in saved),
        prefix_bytes=sum(state_bytes(x.state) for x in scheduler.prefixes.kept),
        open_slots=slots,
        all_slots=every,
        generated=counts.generated.total,
        generated_per_s=counts.generated.rate(now),
        read=counts.read.total,
        read_per_s=counts.read.rate(now),
        saves=scheduler.saves,
        requests=counts.requests,
        prefix_tokens=counts.prefix_tokens,
        rows_agree=counts.rows_agree,
    )
