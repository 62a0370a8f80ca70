"""`dla run`: starts all processes of a run on this machine with torch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_dla.errors import BAD_INPUT, STOPPED
from megatron_dla.launch.watchdog import HUNG, Processes, Watchdog, startup_timeout, tell
from megatron_dla.processes import StopSignals, usable_cpus
from megatron_dla.training.control import LAUNCH, STOP, stop_mark
from megatron_dla.training.fence import attempt_id


class _Stopping:
    """Passes the first stop signal on to the ranks, which save after the current step and exit with 75.

    `number`: of that signal, 0 before it.
    """

    number = 0

    def first(self, number: int) -> None:
        self.number = number
        if not self._send(signal.SIGTERM):
            raise SignalException("stopped before the ranks started", signal.Signals(number))
        note = b"stopping: the ranks save a checkpoint after the current step; a second signal ends them at once\n"
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(sys.stderr.fileno(), note)

    def again(self, _: int) -> None:
        self._send(signal.SIGKILL)

    @staticmethod
    def _send(number: int) -> int:
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        return len(ranks)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _watched(run_dir: Path, hang_timeout: float | None) -> Iterator[Watchdog | None]:
    """Kill the ranks if they hang, see `Watchdog`; 0: never. DLA_ATTEMPT must be set."""
    if hang_timeout == 0:
        yield None
        return
    ended = threading.Event()
    startup = startup_timeout(hang_timeout or 0)
    watchdog = Watchdog(run_dir, attempt_id(), hang_timeout, startup, 5, Processes())
    thread = threading.Thread(target=watchdog.watch, args=(ended.is_set,), daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join()


def run_local(nproc: int, train_arguments: list[str], run_dir: Path, hang_timeout: float | None = None) -> int:
    """Start `nproc` ranks of `dla train ...`.

    Args:
        run_dir: runs/NAME of the config in `train_arguments`. hang_timeout: s between two steps after which the ranks
            are considered hung and are killed, 0 = never, None = from the time that steps take.

    Returns the exit code of the first rank that failed, 4 after a hang, 128 + its number after a signal that ended the
    run before a checkpoint, 0 if no rank failed.
    """
    threads = max(1, usable_cpus() // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    run_dir.mkdir(parents=True, exist_ok=True)
    # a rank ends with the process DLA_LAUNCHED, and passes its error to it, which prints it once
    values = {"DLA_LAUNCHED": str(os.getpid()), "DLA_ATTEMPT": attempt_id(), "DLA_STALE_STOP": stop_mark(run_dir)}
    with _environment(values), _watched(run_dir, hang_timeout) as watchdog:
        code = _launch(nproc, train_arguments, run_dir)
    return HUNG if watchdog is not None and watchdog.hung else code


def _launch(nproc: int, train_arguments: list[str], run_dir: Path) -> int:
    # not in the temporary directory, where nothing would remove it after a SIGKILL of this process
    errors = run_dir / LAUNCH / attempt_id()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(str(errors)),
        signals_to_handle="SIGQUIT",  # torch's agent would kill the ranks 30 s after the others, saved or not
    )
    # by a file: the signal would kill a rank that has not installed its handler yet
    signal.signal(signal.SIGUSR1, lambda *_: (run_dir / STOP).touch())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # errors are printed below
    stopping = _Stopping()
    try:
        with StopSignals(stopping.first, stopping.again):
            elastic_launch(config, sys.executable)("-m", "megatron_dla.cli", "train", *train_arguments)
    except ChildFailedError as error:
        return _exit_code(error, stopping.number)
    except SignalException as error:
        return 128 + error.sigval
    finally:
        shutil.rmtree(errors, ignore_errors=True)
        with contextlib.suppress(OSError):  # another start has one
            errors.parent.rmdir()
    return 0


def _exit_code(error: ChildFailedError, stopped_by: int) -> int:
    """Exit code of a run whose ranks failed; prints the cause. `stopped_by`: number of the stop signal, 0 = none."""
    codes = {failure.exitcode for failure in error.failures.values()}
    if stopped_by and codes <= {-signal.SIGTERM, -signal.SIGKILL}:
        return 128 + stopped_by
    # the agent terminates the other ranks with SIGTERM: those are never the cause, even with an earlier timestamp
    rank, failure = min(
        error.failures.items(),
        key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp, item[1].exitcode != BAD_INPUT),
    )
    told = failure.error_file_data.get("message")  # of `dla`'s one line: the rank did not print it
    if failure.exitcode == BAD_INPUT or (failure.exitcode == 1 and os.path.isfile(failure.error_file) and told):
        tell(failure.message, sys.stderr)
        return failure.exitcode
    if failure.exitcode == STOPPED:
        return STOPPED
    tell(f"rank {rank} failed with exit code {failure.exitcode}; see its output above", sys.stderr)
    return 1
