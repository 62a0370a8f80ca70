"""A pool of gloo ranks that lives for a test module: starting Python and Megatron once, not once a test."""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_dla.processes import end_with_parent


def _serve(rank: int, world_size: int, store: str, pipe: Any, environment: dict[str, str]) -> None:
    end_with_parent(os.getppid())  # also while stopped
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    from megatron_dla import compat

    compat.install()
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        fn, args = job
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """`ranks.run(fn, *args)` calls fn on every rank and returns the results; a failing rank's trace is raised.

    The processes are stopped between two calls: each gloo group has a thread that wakes 100 times a second, and ranks
    that do nothing would take most of the machine.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        store = os.path.join(tempfile.mkdtemp(), "store")
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.preload"])
        pairs = [context.Pipe() for _ in range(world_size)]
        self.pipes = [mine for mine, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, store, theirs, dict(os.environ)), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def _signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send((fn, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.stop()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s in {fn.__name__}")
            done, value = pipe.recv()
            if not done:
                self.stop()  # the others may be stuck in a collective
                raise AssertionError(f"rank {rank} of {self.world_size} failed in {fn.__name__}:\n{value}")
            results.append(value)
        self._signal(signal.SIGSTOP)
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
