"""Starts of `dla run`: real ones, and forks of a process that has imported everything, which take a second."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Forked:
    """The part of `subprocess.Popen` that torch's launcher uses, over a fork that calls `main` in a new session."""

    def __init__(self, main: Callable[[], NoReturn]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            try:
                main()
            finally:
                os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 1e9)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def start_real(arguments: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen:
    """`dla run ARGUMENTS` with its output in `log`."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "megatron_dla.cli", "run", *arguments]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | env)


def start_forked(arguments: list[str], log: Path, env: dict[str, str]) -> Forked:
    """The same command as forks: of this process for the launcher, of the launcher for the ranks."""

    def main() -> NoReturn:
        from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(env)
        SubprocessHandler._popen = lambda _, command, values: Forked(lambda: _command(list(command[2:]), values))
        _command(["megatron_dla.cli", "run", *arguments], {})

    return Forked(main)


def _command(argv: list[str], env: dict[str, str]) -> NoReturn:
    from megatron_dla import cli

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # not the launcher's handlers
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(env)
    sys.argv = argv
    code = 1
    try:
        code = cli.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Import what a run uses, before any fork."""
    import torch

    torch.set_num_threads(1)  # a fork has none of the threads of a pool
    from megatron_dla import cli, compat

    compat.install()
    compat.import_deepspeed()
    cli.build_parser()
    for name in ("launch.local", "tasks.pretrain", "tasks.run", "training.trainer", "mixers.dla", "mixers.softmax"):
        importlib.import_module(f"megatron_dla.{name}")
