"""Calls a function ahead of its consumer, in a thread.

A thread and not a process: it ends with the process however that ends, gets no signals, needs no copies, and does not
start CUDA or import anything again. Reading, checksums and copies of whole shards run without the GIL.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")
_JOIN_S = 10.0  # a read from a file system that hangs must not keep the process


class ReadAhead(Generic[T]):
    """`get` returns, in order, what calls of `make` return; a thread makes up to `depth` calls ahead.

    Args:
        make: must not refer to this object, which ends the thread when it is collected, at `close`, and at the exit of
            the interpreter. depth: 0 = `get` calls `make` itself.
    """

    def __init__(self, make: Callable[[], T], depth: int) -> None:
        self._make, self._depth = make, depth
        self._ready: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._end: weakref.finalize | None = None

    def get(self) -> T:
        """The next value. What `make` raised is raised after the values before it, and again at every later call."""
        if not self._depth:
            return self._make()
        if self._end is None:  # not before it is needed: a resume may still move what `make` reads from
            stop = threading.Event()
            work = (self._make, self._ready, self._room, stop)
            thread = threading.Thread(target=_fill, args=work, name="read ahead", daemon=True)
            self._end = weakref.finalize(self, _finish, thread, self._room, stop)
            thread.start()
        value, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))
            raise error
        self._room.release()
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread, and forget what it made."""
        if self._end is not None:
            self._end()
        self._make, self._depth = _closed, 0


def _closed() -> NoReturn:
    raise RuntimeError("this loader is closed")


def _fill(make: Callable[[], T], ready: SimpleQueue, room: threading.Semaphore, stop: threading.Event) -> None:
    while room.acquire() and not stop.is_set():
        try:
            ready.put((make(), None))
        except BaseException as error:  # whatever it is, the consumer must not wait for ever
            ready.put((None, error))
            return


def _finish(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()
    thread.join(_JOIN_S)
