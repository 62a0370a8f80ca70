"""`dla run`: all processes of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_dla.errors import BAD_INPUT, STOPPED


def _forward(number: int, frame: FrameType | None) -> None:
    """Pass a stop signal on to the ranks, which save at the next step and exit with 75."""
    for child in psutil.Process().children():
        child.send_signal(number)


def run_local(nproc: int, train_arguments: list[str]) -> int:
    """Start `nproc` ranks of `dla train ...`; returns the exit code of the first rank that failed, 0 if none did."""
    threads = max(1, (os.cpu_count() or 1) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["DLA_LAUNCHED"] = "1"  # ranks hand their error to this process instead of printing it each
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        # not SIGTERM: torch's agent would answer it by killing the ranks after 30 s, saved or not
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _forward)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what went wrong is said below
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_dla.cli", "train", *train_arguments)
    except ChildFailedError as error:
        # the agent ends the other ranks with SIGTERM: theirs is never the cause, whatever the clocks say
        failures = error.failures.items()
        rank, failure = min(failures, key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].timestamp))
        if failure.exitcode == BAD_INPUT:
            print(failure.message, file=sys.stderr)
        if failure.exitcode in (BAD_INPUT, STOPPED):
            return failure.exitcode
        print(f"rank {rank} failed with exit code {failure.exitcode}; its output stands above", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
