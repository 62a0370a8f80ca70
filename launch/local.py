"""`dla run`: starts all processes of a run on this machine with torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_dla.errors import BAD_INPUT, STOPPED
from megatron_dla.launch.watchdog import HUNG, Processes, Watchdog, startup_timeout
from megatron_dla.training.control import STOP
from megatron_dla.training.fence import attempt_id


def _forward(number: int, frame: FrameType | None) -> None:
    """Forward a stop signal to the ranks, which save after the current step and exit with 75."""
    for child in psutil.Process().children():
        child.send_signal(number)


@contextmanager
def _watched(run_dir: Path, hang_timeout: float) -> Iterator[Watchdog | None]:
    """Kill the ranks if they complete no step in `hang_timeout` s (0: never). DLA_ATTEMPT must be set."""
    if not hang_timeout:
        yield None
        return
    ended = threading.Event()
    watchdog = Watchdog(run_dir, attempt_id(), hang_timeout, startup_timeout(hang_timeout), 5, Processes())
    thread = threading.Thread(target=watchdog.watch, args=(ended.is_set,), daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join()


def run_local(nproc: int, train_arguments: list[str], run_dir: Path, hang_timeout: float = 0) -> int:
    """Start `nproc` ranks of `dla train ...`.

    Args:
        run_dir: runs/NAME of the config in `train_arguments`. hang_timeout: s between two steps after which the ranks
            are considered hung and are killed, 0 = never.

    Returns the exit code of the first rank that failed, 4 after a hang, 0 if no rank failed.
    """
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["DLA_LAUNCHED"] = "1"  # the ranks pass their error to this process, which prints it once
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / STOP).unlink(missing_ok=True)  # left by an earlier run
    from_outside = "DLA_ATTEMPT" in os.environ
    os.environ["DLA_ATTEMPT"] = attempt_id()
    try:
        with _watched(run_dir, hang_timeout) as watchdog:
            code = _launch(nproc, train_arguments, run_dir)
    finally:
        if not from_outside:
            del os.environ["DLA_ATTEMPT"]
    return HUNG if watchdog is not None and watchdog.hung else code


def _launch(nproc: int, train_arguments: list[str], run_dir: Path) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        # not SIGTERM: torch's agent would kill the ranks 30 s after it, saved or not
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    signal.signal(signal.SIGTERM, _forward)
    # by a file: the signal would kill a rank that has not installed its handler yet
    signal.signal(signal.SIGUSR1, lambda *_: (run_dir / STOP).touch())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # errors are printed below
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_dla.cli", "train", *train_arguments)
    except ChildFailedError as error:
        # the agent terminates the other ranks with SIGTERM: those are never the cause, even with an earlier timestamp
        failures = error.failures.items()
        rank, failure = min(failures, key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
        if failure.exitcode == BAD_INPUT:
            print(failure.message, file=sys.stderr)
        if failure.exitcode in (BAD_INPUT, STOPPED):
            return failure.exitcode
        print(f"rank {rank} failed with exit code {failure.exitcode}; see its output above", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
