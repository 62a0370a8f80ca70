"""The engine: requests in, events out, one step of all sequences at a time.

`submit`, `cancel` and `stats` may be called from any thread; `step` (or `run`, which repeats it) from one at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.serving.engine.adapted import AdaptedModel
from megatron_dla.serving.engine.config import EngineConfig
from megatron_dla.serving.engine.handle import Handle
from megatron_dla.serving.engine.models import ExportedModel, ServedModel
from megatron_dla.serving.engine.output import Output, end_tokens
from megatron_dla.serving.engine.request import EngineClosedError, EngineFullError, Event, FinishReason, Request
from megatron_dla.serving.engine.runner import ModelRunner
from megatron_dla.serving.engine.scheduler import Phase, Scheduler, Sequence
from megatron_dla.serving.engine.stats import Counts, SequenceBytes, Stats, memory_use, sequence_bytes, take_stats
from megatron_dla.serving.hf_model import DeltaMemModel


@dataclass
class _Live:
    """A request that has not ended."""

    handle: Handle
    sequence: Sequence
    output: Output


class Engine:
    """Continuous batching on one model.

    Args:
        model: of `load_export`, or of `load_adapted` (a plain model of transformers, with a δ-mem or without), in eval
            mode; no other thread calls it meanwhile. tokenizer: for text and stop strings; None: token ids only.
        clock: seconds, of deadlines and rates.

    Raises:
        UserError: the model's code is too old.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, config: EngineConfig | None = None, *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.config = config or EngineConfig()
        self.model, self.tokenizer, self._clock = model, tokenizer, clock
        self._model: ServedModel = AdaptedModel(model) if isinstance(model, DeltaMemModel) else ExportedModel(model)
        self._runner = ModelRunner(self._model, self.config)
        self._counts = Counts(self._runner.rows_agree())
        self._scheduler = Scheduler(
            self.config, self._runner, self._runner.windows, whole_prompts=self._model.whole_prompts
        )
        self._ends = end_tokens(self._model.generation_config, tokenizer)
        self._suppressed = sorted(self._model.generation_config.suppress_tokens or [])
        self._live: dict[int, _Live] = {}  # by number; under the lock
        self._cancelled: set[int] = set()  # of `_live`, likewise
        self._new: list[_Live] = []
        self._lock, self._work = threading.Lock(), threading.Condition()
        self._stepping, self._asking = threading.Lock(), 0
        self._closed = False

    # ---- from any thread

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Handle:
        """Queue a request.

        Args:
            listener: called with each event in the thread that steps the engine, instead of the handle's queue.

        Raises:
            UserError: a token that the model does not have, stop strings without a tokenizer, or more tokens than the
                pages hold. EngineFullError: `max_waiting` requests wait. EngineClosedError: `run` has come to its end.
        """
        if odd := [x for x in request.prompt if type(x) is not int or not 0 <= x < self._model.vocabulary]:
            raise UserError(f"prompt has token {odd[0]!r}: the model has tokens 0 to {self._model.vocabulary - 1}")
        if request.sampling.stop and self.tokenizer is None:
            raise UserError(f"stop = {list(request.sampling.stop)}: the engine has no tokenizer: use stop_ids")
        self._model.check(request)
        self._scheduler.check(request)
        digests = self._scheduler.digests(request)
        ends = frozenset(request.stop_ids) | (frozenset() if request.ignore_eos else self._ends)
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            queue = [*(x.sequence for x in self._new), *self._scheduler.waiting]
            waiting = sum(x.arrival not in self._cancelled for x in queue)
            if waiting >= self.config.max_waiting + len(self._scheduler.free_rows):
                raise EngineFullError(
                    f"{waiting} requests wait (max_waiting = {self.config.max_waiting}): try again later"
                )
            handle = Handle(self._counts.requests, request, self.cancel, listener)
            self._counts.requests += 1
            expires = None if request.deadline is None else self._clock() + request.deadline
            sequence = Sequence(request, handle.id, expires, digests=digests)
            live = _Live(handle, sequence, Output(request, self.tokenizer, ends))
            self._live[handle.id] = live
            self._new.append(live)
        with self._work:
            self._work.notify_all()
        return handle

    def cancel(self, number: int) -> None:
        """End a request at the next step; one that has ended already is left alone."""
        with self._lock:
            if number in self._live:
                self._cancelled.add(number)
        with self._work:
            self._work.notify_all()

    def cancel_all(self) -> None:
        """As `cancel`, of every request so far."""
        with self._lock:
            numbers = list(self._live)
        for number in numbers:
            self.cancel(number)

    def room(self, prompt: int) -> int | None:
        """Most tokens that may follow a prompt of so many; None: any number."""
        return self._scheduler.room(prompt)

    def stats(self) -> Stats:
        """Between two steps."""
        with self._between_steps(), self._lock:
            waiting, now = len(self._new), self._clock()
            return take_stats(self._scheduler, self._runner, waiting, self._counts, now)

    def memory_use(self) -> tuple[int, int]:
        """`memory_use` of stats.py, which is cheaper than `stats`."""
        with self._between_steps():
            return memory_use(self._scheduler, self._runner.pool.row_bytes, self._runner.token_bytes)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        with self._lock:
            self._asking += 1
        try:
            with self._stepping:
                yield
        finally:
            with self._lock:
                self._asking -= 1

    def _let_in(self) -> None:
        """Wait for those who look between two steps: a thread that takes a lock again at once always gets it."""
        end = time.monotonic() + 0.01
        while self._asking and time.monotonic() < end:
            time.sleep(1e-4)

    @property
    def running(self) -> int:
        """Sequences with a slot that have not ended."""
        return sum(x.phase is not Phase.ENDED for x in self._scheduler.held)

    @property
    def bytes_each(self) -> tuple[int, int]:
        """Of one state, and of the keys and values of one token in all softmax layers."""
        return self._runner.pool.row_bytes, sum(self._runner.token_bytes)

    def sequence_bytes(self) -> dict[int, SequenceBytes]:
        """By request, of those that have a slot."""
        with self._between_steps():
            held = [x for x in self._scheduler.held if x.phase is not Phase.ENDED]
            return {x.arrival: sequence_bytes(x, self._runner) for x in held}

    # ---- from the thread that steps

    def step(self) -> bool:
        """Decode a token of every sequence that has been read, and read prompts within the token budget; False: there
        was nothing to do."""
        with self._stepping:
            self._take_changes()
            rows = self._scheduler.begin_step()
            for call in sorted({x.row // self.config.rows for x in rows}):
                self._decode(call, [x for x in rows if x.row // self.config.rows == call])
            while (work := self._scheduler.next_read()) is not None:
                self._read_chunk(*work)
            return bool(self._live)

    def run(self, stop: threading.Event) -> None:
        """Step until `stop` is set, waiting where nothing is to do; then cancel what is left, and take no more.

        An exception of the scheduler or of a copy ends all requests with it and is raised.
        """
        try:
            while not stop.is_set():
                more = self.step()
                self._let_in()
                if not more:
                    with self._work:
                        self._work.wait_for(lambda: self._live or stop.is_set(), timeout=0.1)
        except Exception as error:
            self._fail(error)
            raise
        with self._lock:
            self._closed = True
            self._cancelled |= self._live.keys()
        self.step()

    def _fail(self, error: Exception) -> None:
        """After a fault between two calls of the model: every request ends as an error, and none is taken."""
        with self._lock:
            self._closed = True
            left, self._live = list(self._live.values()), {}
        for live in left:
            self._deliver(live, live.output.last(live.sequence, "error", f"{type(error).__name__}: {error}"))

    def drain(self) -> None:
        """Step until every request has ended."""
        while self.step():
            pass

    # ---- one step

    def _take_changes(self) -> None:
        with self._lock:
            new, self._new = self._new, []
            cancelled = set(self._cancelled)
            for live in new:
                self._scheduler.add(live.sequence)
        for number in sorted(cancelled & self._live.keys()):
            self._end(self._live[number], "cancelled")
        for sequence in self._scheduler.expired(self._clock()):
            self._end(self._live[sequence.arrival], "deadline")

    def _decode(self, call: int, rows: list[Sequence]) -> None:
        reading = [row for row in self._scheduler.half_read if row // self.config.rows == call]
        try:
            logits = self._runner.decode(rows, reading)
        except Exception as error:
            for one in rows:
                self._end(self._live[one.arrival], "error", f"{type(error).__name__}: {error}")
            return
        greedy = self._mask(logits).argmax(-1).tolist()
        for one, row, best in zip(rows, logits, greedy, strict=True):
            self._scheduler.decoded(one)
            self._token(one, row, best)

    def _read_chunk(self, sequence: Sequence, stop: int) -> None:
        try:
            logits = self._runner.read(sequence, stop)
        except Exception as error:
            self._end(self._live[sequence.arrival], "error", f"{type(error).__name__}: {error}")
            return
        self._counts.read.add(self._clock(), stop - sequence.length)
        if sequence.length == sequence.cached:
            self._counts.prefix_tokens += sequence.cached
        self._scheduler.was_read(sequence, stop)
        if logits is not None:
            logits = self._mask(logits[None])
            self._token(sequence, logits[0], int(logits.argmax(-1)))

    def _mask(self, logits: Any) -> Any:
        """In place: tokens that the model shall not generate."""
        if self._suppressed:
            logits[:, self._suppressed] = -float("inf")
        return logits

    def _token(self, sequence: Sequence, logits: Any, best: int) -> None:
        live = self._live[sequence.arrival]
        try:
            event = live.output.next(logits, best, sequence)
        except Exception as error:  # of a tokenizer
            self._end(live, "error", f"{type(error).__name__}: {error}")
            return
        self._counts.generated.add(self._clock(), 1)
        if event.finish_reason:
            self._forget(live)
        self._deliver(live, event)

    def _forget(self, live: _Live) -> None:
        live.handle.memory = self._runner.memory(live.sequence)
        self._scheduler.end(live.sequence)
        with self._lock:
            del self._live[live.handle.id]
            self._cancelled.discard(live.handle.id)

    def _end(self, live: _Live, reason: FinishReason, error: str = "") -> None:
        self._forget(live)
        self._deliver(live, live.output.last(live.sequence, reason, error))

    def _deliver(self, live: _Live, event: Event) -> None:
        try:
            live.handle.put(event)
        except Exception as error:  # of a client's listener, which must not end the others
            print(f"request {live.handle.id}: its listener failed ({type(error).__name__}: {error})", file=sys.stderr)
            self.cancel(live.handle.id)
