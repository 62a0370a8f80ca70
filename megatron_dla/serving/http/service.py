"""Requests of the API on the engine: text to tokens, choices, sessions, and events back in the server's loop."""

from __future__ import annotations

import asyncio
import copy
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio

from megatron_dla.errors import UserError
from megatron_dla.serving.chat import render_chat
from megatron_dla.serving.engine import (
    Engine,
    EngineClosedError,
    EngineFullError,
    Event,
    Handle,
    Request,
    SamplingParams,
)  # fmt: skip
from megatron_dla.serving.http.metrics import Metrics
from megatron_dla.serving.http.schema import ApiError, ChatBody, CompletionBody, ascii_only, refused

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Attributes: body_bytes: of one request. max_tokens: of one answer, and the default of a chat's. sessions: that
    are kept, the least recently used is dropped."""

    body_bytes: int = 8 * 2**20
    max_tokens: int = 4096
    sessions: int = 64


@dataclass
class Call:
    """One API call: its choices, each a request of the engine.

    Attributes:
        begin: of the call, on `time.perf_counter()`.
        handles: in the order of the choices: `n` of the first prompt, then of the next. events: (choice, event).
        complete: every choice came to an end of its own (stop, length).
    """

    model: str
    begin: float
    handles: list[Handle] = field(default_factory=list)
    events: asyncio.Queue[tuple[int, Event]] = field(default_factory=asyncio.Queue)
    complete: bool = False

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Until every choice has ended."""
        left, complete = len(self.handles), True
        while left:
            index, event = await self.events.get()
            if event.finish_reason is not None:
                left -= 1
                complete &= event.finish_reason in ("stop", "length")
                self.complete = complete and not left
            yield index, event

    def cancel(self) -> None:
        for handle in self.handles:
            handle.cancel()


@dataclass
class _Turns:
    """Calls that name one session: one has the lock, the others wait. Attributes: forgotten: while one ran."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    forgotten: bool = False


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def _acquire(lock: asyncio.Lock, timeout: float | None, gone: Callable[[], Awaitable[None]]) -> None:
    """Take the lock. Raises TimeoutError; ClientLeftError: `gone` returned before."""
    if not lock.locked():
        await lock.acquire()
        return
    mine, left = asyncio.ensure_future(lock.acquire()), asyncio.ensure_future(gone())
    taken = False
    try:
        await asyncio.wait((mine, left), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        taken = mine.done()
        if not taken:
            raise ClientLeftError if left.done() else TimeoutError
    finally:
        left.cancel()
        if not taken and not mine.cancel():  # this task was cancelled, and has the lock
            lock.release()


class Sessions:
    """States of δ-mem by name. A call that fails or is cancelled leaves its session as it was.

    Args:
        limit: sessions that are kept. max_waiting: calls that wait for others of their session.
    """

    def __init__(self, limit: int, max_waiting: int) -> None:
        self.limit, self.max_waiting, self.waiting = limit, max_waiting, 0
        self._states: OrderedDict[str, Any] = OrderedDict()
        self._turns: dict[str, _Turns] = {}

    @asynccontextmanager
    async def use(self, name: str, timeout: float | None, gone: Callable[[], Awaitable[None]]) -> AsyncIterator[Any]:
        """The states of a session, None for a new one; others that name it wait.

        Raises:
            EngineFullError: `max_waiting` calls wait. TimeoutError: after `timeout` seconds of waiting.
            ClientLeftError: `gone` returned before.
        """
        turns = self._turns.setdefault(name, _Turns())
        if turns.lock.locked() and self.waiting >= self.max_waiting:
            raise EngineFullError(f"{self.waiting} calls wait for others of their sessions: try again later")
        turns.users += 1
        try:
            self.waiting += 1
            try:
                await _acquire(turns.lock, timeout, gone)
            finally:
                self.waiting -= 1
            try:
                turns.forgotten = False
                yield self._states.get(name)
            finally:
                turns.lock.release()
        finally:
            turns.users -= 1
            if not turns.users:
                del self._turns[name]

    def keep(self, name: str, states: Any) -> None:
        """The states after a call, inside `use`; not of a session that was forgotten meanwhile."""
        if self._turns[name].forgotten:
            return
        self._states[name] = states
        self._states.move_to_end(name)
        while len(self._states) > self.limit:
            self._states.popitem(last=False)

    def forget(self, name: str) -> bool:
        """Also what a call that runs would leave; False: there is no such session."""
        turns = self._turns.get(name)
        if turns is not None:
            turns.forgotten = True
        return self._states.pop(name, None) is not None or turns is not None

    def names(self) -> list[str]:
        return list(self._states)


class Service:
    """One engine behind the API.

    Args:
        engine: another thread steps it. name: of the model. has_memory, by_message: of its δ-mem.

    Attributes:
        draining: no new calls. ended: nor those that have not begun yet. failed: why the engine's thread has ended, ""
            while it runs.
    """

    def __init__(
        self, engine: Engine, name: str, limits: Limits | None = None, *, has_memory: bool = False,
        by_message: bool = False,
    ) -> None:  # fmt: skip
        self.engine, self.name, self.limits = engine, name, limits or Limits()
        self.has_memory, self.by_message = has_memory, by_message
        self.sessions, self.metrics = Sessions(self.limits.sessions, engine.config.max_waiting), Metrics(engine, name)
        self.created, self.draining, self.ended, self.failed = int(time.time()), False, False, ""
        self._threads = anyio.CapacityLimiter(8)  # other routes wait in starlette's
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # the engine's thread has its own
        self._encoding = asyncio.Lock()

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"model = {ascii_only(name)[:200]!r}: this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, call: Callable[[], T]) -> T:
        """What may take long, so that other calls go on."""
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    # ---- text to tokens

    async def encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        async with self._encoding:
            return (await self.in_thread(lambda: self.tokenizer(prompt)))["input_ids"]

    async def encode_chat(self, body: ChatBody) -> tuple[list[int], list[int]]:
        messages = [message.flat() for message in body.messages]
        async with self._encoding:
            try:
                return await self.in_thread(lambda: render_chat(self.tokenizer, messages, numbered=self.by_message))
            except UserError as error:
                raise ApiError(400, ascii_only(f"messages: {error}"), param="messages") from error

    # ---- one call

    @asynccontextmanager
    async def start(
        self, body: CompletionBody | ChatBody, prompts: list[list[int]], messages: list[int] | None, begin: float,
        gone: Callable[[], Awaitable[None]],
    ) -> AsyncIterator[Call]:  # fmt: skip
        """Submit a call's choices; they are cancelled if the block ends before they do.

        Args:
            begin: of the call, on `time.perf_counter()`. gone: returns when its client has left.

        Raises:
            ApiError: 400, what the engine refuses; 408, `timeout` is over before its session is free; 429, too many
                wait; 499, the client left before; 503, the server ends.
        """
        if self.draining or self.failed:
            raise self._ending()
        if body.session is None:
            async with self._submitted(Call(self.name, begin), body, prompts, messages, None, body.timeout) as call:
                yield call
            return
        if not self.has_memory:
            raise ApiError(400, "session: the model has no delta-mem (dla serve --adapter)", param="session")
        asked = time.perf_counter()
        async with AsyncExitStack() as stack:
            try:
                memory = await stack.enter_async_context(self.sessions.use(body.session, body.timeout, gone))
            except ClientLeftError as error:
                raise ApiError(499, "the client left while it waited for its session") from error
            except EngineFullError as error:
                raise _full(error) from error
            except TimeoutError as error:
                text = f"timeout = {body.timeout:g}: another call of session {ascii_only(body.session)!r} is running"
                raise ApiError(408, text, param="timeout") from error
            left = None if body.timeout is None else max(1e-3, body.timeout - (time.perf_counter() - asked))
            async with self._submitted(Call(self.name, begin), body, prompts, messages, memory, left) as call:
                yield call
            if call.complete and call.handles[0].memory is not None:
                self.sessions.keep(body.session, call.handles[0].memory)

    @asynccontextmanager
    async def _submitted(
        self, call: Call, body: CompletionBody | ChatBody, prompts: list[list[int]], messages: list[int] | None,
        memory: Any, deadline: float | None,
    ) -> AsyncIterator[Call]:  # fmt: skip
        loop = asyncio.get_running_loop()

        def submit() -> None:
            for number, prompt in enumerate(map(tuple, prompts)):
                for choice in range(body.choices):
                    index = number * body.choices + choice
                    request = self._request(body, prompt, choice, messages, memory, deadline)

                    def put(event: Event, index: int = index) -> None:  # in the engine's thread
                        self.metrics.count(call.begin, event)
                        loop.call_soon_threadsafe(call.events.put_nowait, (index, event))

                    call.handles.append(self.engine.submit(request, put))

        try:
            await self.in_thread(submit)  # which looks at every token of every choice
            if self.ended or self.failed:
                raise self._ending()
            yield call
        except EngineClosedError as error:
            raise self._ending() from error
        except EngineFullError as error:
            raise _full(error) from error
        except UserError as error:
            raise refused(error) from error
        finally:
            call.cancel()

    def _ending(self) -> ApiError:
        return ApiError(503, self.failed or "the server is shutting down", kind="server_error")

    def _request(
        self, body: CompletionBody | ChatBody, prompt: tuple[int, ...], choice: int, messages: list[int] | None,
        memory: Any, deadline: float | None,
    ) -> Request:  # fmt: skip
        limit, wanted = self.limits.max_tokens, body.max_tokens
        if isinstance(body, ChatBody):
            wanted = body.max_completion_tokens if body.max_completion_tokens is not None else wanted
        if wanted is not None and not 1 <= wanted <= limit:
            raise UserError(f"max_tokens = {wanted}: this server gives 1 to {limit} tokens an answer")
        if wanted is None and (room := self.engine.room(len(prompt))) is not None:
            limit = max(1, min(limit, room))
        seed = time.time_ns() % 2**62 if body.seed is None else body.seed
        sampling = SamplingParams(
            max_new_tokens=limit if wanted is None else wanted,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            stop=body.stops,
            seed=(seed + choice) % 2**63 if 0 <= seed < 2**63 else seed,
        )
        if self.by_message and messages is None:
            messages = [0] * len(prompt)
        return Request(
            prompt, sampling, ignore_eos=body.ignore_eos, logprobs=body.wanted_logprobs,
            priority=body.priority, deadline=deadline, memory=memory,
            messages=tuple(messages or ()) if self.by_message else None,
        )  # fmt: skip


def _full(error: EngineFullError) -> ApiError:
    return ApiError(429, str(error), kind="rate_limit_error", headers={"Retry-After": "1"})
