"""The client's side of a request."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_dla.serving.engine.request import Event, FinishReason, Request, TokenLogprob


@dataclass
class Completion:
    """All of a request. Attributes: tokens: generated, an end token included. logprobs: of each, if asked for."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""

    def add(self, event: Event) -> None:
        self.text += event.text
        self.finish_reason, self.error = event.finish_reason, event.error
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)


class Handle:
    """A submitted request: iterate over its events, once, which waits for them; or take the `result`.

    Attributes:
        id: number of the request. listener: takes the events instead, in the thread that steps the engine; one that
            raises has its request cancelled.
        memory: with a δ-mem, when it has ended: its states after the tokens that were fed, all but the last one. None:
            it ended before its prompt was read.
    """

    def __init__(
        self, number: int, request: Request, cancel: Callable[[int], None], listener: Callable[[Event], None] | None
    ) -> None:
        self.id, self.request, self._cancel = number, request, cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.put = listener or self._events.put
        self._completion = Completion()
        self.memory: Any = None

    def __iter__(self) -> Iterator[Event]:
        while self._completion.finish_reason is None:
            event = self._events.get()
            self._completion.add(event)
            yield event

    def result(self) -> Completion:
        """Waits for the end; meanwhile another thread steps the engine."""
        for _ in self:
            pass
        return self._completion

    def cancel(self) -> None:
        self._cancel(self.id)
