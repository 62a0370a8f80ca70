"""Work on every shard of a data directory, in threads: reading, checksums and numpy run without the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_dla.console import progress_bar
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex, ShardInfo

if TYPE_CHECKING:
    from megatron_dla.data.remote import RemoteDirectory
    from megatron_dla.data.shards import ShardReader

T = TypeVar("T")
MAX_WORKERS = 4096


def check_workers(workers: int | None) -> int:
    """`workers`, or one for each usable core. Raises DataError below 1 and above 4,096."""
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if not 1 <= workers <= MAX_WORKERS:
        raise DataError(f"workers = {workers}: must be 1 to {MAX_WORKERS} (--workers)")
    return workers


def for_each_shard(
    root: Path | RemoteDirectory,
    index: ShardIndex,
    work: Callable[[ShardReader, ShardInfo], T],
    workers: int | None,
    shards: Sequence[ShardInfo] | None = None,
    description: str = "verifying",
) -> Iterator[tuple[ShardInfo, T]]:
    """Each shard with what `work` returns for it, in order; a bar on stderr shows bytes, rate and time left.

    Args:
        workers: threads; None: one per usable core. Memory: that of `work` for each of them.
        shards: those to work on; None: all of the index.

    Raises DataError for `workers` out of range, and what `work` raises.
    """
    from megatron_dla.data.shards import ShardReader

    workers = check_workers(workers)
    shards = index.shards if shards is None else shards
    splits = {shard.split for shard in shards}
    readers = {split: ShardReader(index, split, verify="none", root=root) for split in splits}
    waiting: deque[tuple[ShardInfo, Future[T]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        with progress_bar(sum(shard.bytes for shard in shards), description) as bar:

            def oldest() -> tuple[ShardInfo, T]:
                shard, future = waiting.popleft()
                result = future.result()
                bar.update(shard.bytes)
                return shard, result

            for shard in shards:
                waiting.append((shard, pool.submit(work, readers[shard.split], shard)))
                if len(waiting) > 2 * workers:
                    yield oldest()
            while waiting:
                yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)
