"""One finite, deterministic pass over the validation shards, of the same length on every rank."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np

from megatron_dla.data.packing import Batch, Row, make_batch, pad_row
from megatron_dla.data.shards import ShardReader, Verify
from megatron_dla.errors import DataError
from megatron_dla.shard_index import ShardIndex


def validation_batches(
    data_dir: str | os.PathLike[str] | ShardIndex,
    seq_len: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_rows: int | None = None,
    *,
    split: str = "val",
    verify: Verify = "sha256",
    root: str | os.PathLike[str] | None = None,
) -> Iterator[Batch]:
    """Iterate one rank's batches over the first `max_rows` rows (None: all) of a split, in stored order.

    Every rank gets the same number of batches, each of `micro_batch_size` rows; rows beyond the end, and the part of
    the last row that has no tokens, have loss_mask 0. Row r goes to rank (r // micro_batch_size) % dp_size; the union
    of all ranks' rows does not depend on dp_size. Arguments are checked immediately; a damaged shard raises when read.

    Raises DataError for missing data, a split without shards, or bad sizes.
    """
    least = {"seq_len": seq_len, "micro_batch_size": micro_batch_size, "dp_size": dp_size}
    if max_rows is not None:
        least["max_rows"] = max_rows
    for name, value in least.items():
        if value < 1:
            raise DataError(f"{name} = {value}: must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank = {dp_rank}: must be 0 to {dp_size - 1} (dp_size = {dp_size})")
    reader = ShardReader(data_dir, split, verify=verify, root=root)
    tokens = sum(shard.tokens for shard in reader.shards)
    count = math.ceil((tokens - 1) / seq_len)
    if count < 1:
        raise DataError(
            f"split {split!r} of {reader.root} has {tokens} token(s), and a row needs at least 2: add documents to it"
        )
    return _batches(reader, seq_len, micro_batch_size, dp_rank, dp_size, min(count, max_rows or count))


def _batches(reader: ShardReader, seq_len: int, size: int, rank: int, ranks: int, count: int) -> Iterator[Batch]:
    rows: list[Row] = []
    numbers: list[int] = []
    windows = _windows(reader, seq_len)
    for number in range(math.ceil(count / (size * ranks)) * size * ranks):
        window = next(windows) if number < count else np.empty(0, dtype=np.int64)
        if number // size % ranks != rank:
            continue
        rows.append(pad_row(window, reader.index.eos_id, seq_len))
        numbers.append(number)
        if len(rows) == size:
            yield make_batch(rows, numbers)
            rows, numbers = [], []


def _windows(reader: ShardReader, seq_len: int) -> Iterator[np.ndarray]:
    """Windows of seq_len + 1 tokens that overlap by one; the last may be shorter, but has at least two."""
    held = np.empty(0, dtype=np.int64)
    for shard in reader.shards:
        held = np.concatenate([held, reader.read(shard).tokens])
        start = 0
        while len(held) - start > seq_len:
            yield held[start : start + seq_len + 1]
            start += seq_len
        held = held[start:]
    if len(held) > 1:
        yield held
