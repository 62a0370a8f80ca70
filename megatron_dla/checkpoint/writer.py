"""Writing a checkpoint's files beside training: reused host buffers, one thread a rank, no collectives.

Training uses the process groups meanwhile, so ranks tell rank 0 through the groups' store that their files are on the
disk. A thread is enough: hashing, writing and syncing hold Python's lock only between pieces of 8 MB. Where the ranks
compute on all processors, it works slowly, so that each step gives up a few per cent instead of one step half a second.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.checkpoint.integrity import FilesRecord, file_record
from megatron_dla.files import fsync_file, naming_full_disk, save_tensors
from megatron_dla.processes import usable_cpus

POLL_S = 0.02
CROWDED_SHARE = 0.02  # of a processor, for a save on a machine whose processors all compute
PEERS_S = 10.0  # how long an ending process waits for the others' files


class HostBuffer:
    """Host memory for the tensors of one file, kept from save to save; page-locked where there is a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @staticmethod
    def sizes(like: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, int]:
        """Bytes of each of these tensors, to the next multiple of 64."""
        return {name: -(-math.prod(shape) * dtype.itemsize // 64) * 64 for name, (shape, dtype) in like.items()}

    def reserve(self, size: int, *, touch: bool = False) -> None:
        """Make it hold `size` bytes, its content lost where it did not. `touch`: have the system map them now."""
        if size > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # before the new one is made
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            if touch:
                self._memory.zero_()

    def room(self, like: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Uninitialised tensors of these shapes and dtypes, valid until the next call."""
        sizes = self.sizes(like)
        self.reserve(sum(sizes.values()))
        views, start = {}, 0
        for name, (shape, dtype) in like.items():
            end = start + math.prod(shape) * dtype.itemsize
            views[name] = self._memory[start:end].view(dtype).view(shape)
            start += sizes[name]
        return views

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' values; on CUDA they are there after a synchronisation."""
        views = self.room({name: (x.shape, x.dtype) for name, x in tensors.items()})
        for name, x in tensors.items():
            views[name].copy_(x.detach(), non_blocking=True)
        return views


class Pace:
    """Called between pieces of work: pauses so long that the calling thread takes `share` of a processor."""

    def __init__(self, share: float) -> None:
        self._idle = 1 / share - 1  # seconds of pause for a second of work
        self._hurry = threading.Event()
        self._used = 0.0  # the thread's processor time at the end of the last pause

    def hurry(self) -> None:
        """No more pauses, from another thread: somebody waits for the work."""
        self._hurry.set()

    def __call__(self, descriptor: int) -> None:
        # have the system write this piece out now; it would keep all of them for the sync at the end
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._hurry.wait((time.thread_time() - self._used) * self._idle)
        self._used = time.thread_time()


def background_share() -> float:
    """Of a processor, for a save beside training: all of one where the ranks of this machine leave one to each."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = 1 if torch.cuda.is_available() else torch.get_num_threads()
    return 1.0 if usable_cpus() >= ranks * (threads + 1) else CROWDED_SHARE


@dataclass
class Files:
    """What one rank writes: {path inside the checkpoint: content}."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bytes: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(x.nbytes for file in self.tensors.values() for x in file.values()) + sum(
            map(len, self.bytes.values())
        )

    def write(self, directory: Path, pace: Pace | None = None) -> FilesRecord:
        """Write and sync them; returns their records. Raises OSError, and leaves nothing of this rank then."""
        records: FilesRecord = {}
        names = [*self.tensors, *self.bytes]
        try:
            for name in names:
                path = directory / name
                path.parent.mkdir(exist_ok=True)
                if name in self.tensors:
                    digest = save_tensors(self.tensors[name], path, after_chunk=pace)
                    records[name] = file_record(path, digest)
                else:
                    with naming_full_disk(path, len(self.bytes[name])):
                        path.write_bytes(self.bytes[name])
                        fsync_file(path)
                    records[name] = file_record(path)
        except OSError:
            for name in names:
                (directory / name).unlink(missing_ok=True)
            raise
        return records


class Report:
    """Each rank's word to rank 0 on one save: the records of its files, or an error.

    Args:
        name: of the save, unlike any other's.
    """

    def __init__(self, name: str) -> None:
        self._store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
        self._keys = [str(rank) for rank in range(dist.get_world_size())]

    def give(self, value: dict[str, Any]) -> None:
        self._store.set(str(dist.get_rank()), json.dumps(value))

    def collect(self, ending: threading.Event) -> list[dict[str, Any]]:
        """Of all ranks, once they have given it.

        Raises:
            TimeoutError: this process ends, and a rank gave none within PEERS_S.
        """
        deadline = math.inf
        while not self._store.check(self._keys):
            if ending.is_set():
                deadline = min(deadline, time.monotonic() + PEERS_S)
            if time.monotonic() > deadline:
                raise TimeoutError("a rank did not finish its files")
            time.sleep(POLL_S)
        values = [json.loads(self._store.get(key)) for key in self._keys]
        for key in self._keys:
            self._store.delete_key(key)
        return values


def start_thread(work: Callable[[], None]) -> threading.Thread:
    """Run `work` at the lowest priority: it gets what training leaves of the processors."""

    def run() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread alone (Linux)
        work()

    thread = threading.Thread(target=run, name="checkpoint", daemon=True)
    thread.start()
    return thread
