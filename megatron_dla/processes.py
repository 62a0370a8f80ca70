"""How the processes of a run end: with their parent, and at signals. Standard library only: launchers import this."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from megatron_dla.files import FULL

PR_SET_PDEATHSIG = 1  # prctl(2)
PARENT = "DLA_PARENT"
"""Environment variable: the process that a `dla` command ends with; not passed on by it."""
SAME_REQUEST_S = 0.5


def end_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when the one that started it ends, however that ends.

    Linux only; elsewhere nothing happens.

    Args:
        parent: process id of the parent. Where it has ended already, this process is killed at once.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class StopSignals:
    """Context manager that catches SIGTERM, SIGINT and SIGHUP.

    SIGINT and SIGHUP that are ignored when it is entered stay ignored: by nohup, or for a background job of a script.

    Args:
        first: called with the number of the first signal. again: with that of later ones, except within
            `SAME_REQUEST_S` of the first: a terminal that closes sends SIGHUP twice, timeout(1) its signal.
    """

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]) -> None:
        self._first, self._again = first, again
        self._since: float | None = None

    def __enter__(self) -> StopSignals:
        caught = [signal.SIGTERM]
        caught += [s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._handle) for s in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._first(number)
        elif time.monotonic() - self._since > SAME_REQUEST_S:
            self._again(number)


def end_by(number: int) -> None:
    """End this process at once, as the signal does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def print_or_drop(text: str) -> None:
    """Print a line, in one piece where several threads do.

    Where standard output has gone (a closed terminal, `| tee` after Ctrl-C), /dev/null replaces it; on a full disk the
    line is lost.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        if error.errno in FULL:
            return
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
