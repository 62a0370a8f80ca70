"""Documents and packed rows of a data directory as text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dla.data_prep.tokenizer import tokenizer_of
from megatron_dla.errors import DataError
from megatron_dla.shard_index import REBUILD, ShardIndex

if TYPE_CHECKING:
    from megatron_dla.data.loader import Packing
    from megatron_dla.data.packing import Batch
    from megatron_dla.data.remote import RemoteDirectory


def show_document(directory: str | os.PathLike[str], number: int, split: str = "train") -> str:
    """A line about document `number` (from 0, in stored order), and its text as the tokens give it.

    Reads one shard. Raises DataError for missing or damaged data, and a number that is not there.
    """
    from megatron_dla.data.remote import open_directory
    from megatron_dla.data.shards import ShardReader, read_records

    root = open_directory(directory)
    reader = ShardReader(root, split)
    count = sum(shard.documents for shard in reader.shards)
    if not 0 <= number < count:
        raise DataError(f"document {number}: split {split!r} of {root} has documents 0 to {count - 1}")
    left = number
    for shard in reader.shards:
        if left < shard.documents:
            break
        left -= shard.documents
    tokens = reader.read(shard).split()[left]
    try:
        with reader.open(shard) as file:
            record = read_records(file.read())[left]
        about = f"{record['source']}, {len(tokens):,} tokens, {int(record['n_bytes']):,} bytes of text, {shard.path}"
    except Exception as error:  # tarfile and json raise many types for damaged bytes
        raise DataError(f"{root}: {shard.path}: damaged records ({error}); {REBUILD}") from error
    text = tokenizer_of(_folder(root), reader.index).decode(tokens[:-1].tolist())
    return f"document {number} of {count:,} ({split}): {about}\n{text}"


def _folder(root: Path | RemoteDirectory) -> Path | RemoteDirectory:
    """Of an index file, the directory."""
    return root.parent if isinstance(root, Path) and root.is_file() else root


def show_row(
    directory: str | os.PathLike[str],
    number: int,
    split: str = "train",
    *,
    seq_len: int,
    num_streams: int,
    seed: int,
    packing: Packing,
) -> str:
    """Row `number` (from 0) of the rows that a run on this data alone reads, as text between its boundaries.

    Row i of a step is row `step * global_batch_size + i`. Reads all rows before it in its stream. Raises DataError for
    missing or damaged data and for sizes that do not fit it.
    """
    from megatron_dla.data.loader import TokenLoader
    from megatron_dla.data.remote import open_directory

    if number < 0:
        raise DataError(f"row {number}: must be at least 0")
    if num_streams < 1:
        raise DataError(f"num_streams = {num_streams}: must be at least 1")
    root = open_directory(directory)
    index = ShardIndex.load(root)
    tokens = index.totals(split).tokens
    if not 1 <= seq_len <= tokens:
        raise DataError(f"seq_len = {seq_len}: must be 1 to {tokens}, the tokens of {split}")
    if number > (most := _PASSES * max(1, tokens // seq_len)):
        raise DataError(f"row {number}: must be at most {most}, {_PASSES:,} passes over the data")
    loader = TokenLoader(
        root, split, seq_len=seq_len, global_batch_size=num_streams, micro_batch_size=1, num_streams=num_streams,
        dp_rank=number % num_streams, dp_size=num_streams, seed=seed, packing=packing,
    )  # fmt: skip
    before = None
    for _ in range(number // num_streams):
        before = loader.next_step()
    (batch,) = loader.next_step()
    eos = index.eos_id
    inside = packing == "concat" and before is not None and int(before[0].tokens[0, -1]) != eos
    parts = list(_parts(batch, eos, inside))
    decode = tokenizer_of(_folder(root), index).decode
    about = f"seq_len {seq_len}, {num_streams} streams, seed {seed}, {packing}"
    loss = f"{int(batch.loss_mask.sum())} of {seq_len} tokens are part of the loss"
    lines = [f"row {number} of {split} ({about}): {len(parts)} parts, {loss}"]
    for start, end, what in parts:
        text = "" if what == _PADDING else "\n" + decode(batch.tokens[0, start:end].tolist())
        lines.append(f"--- tokens {start} to {end - 1}{what} ---{text}")
    return "\n".join(lines)


_PADDING = ", padding"
_PASSES = 1000


def _parts(batch: Batch, eos: int, inside: bool) -> Iterator[tuple[int, int, str]]:
    """(start, end, what to say about it) of each document in the only row of a batch."""
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        last, following = (int(x[0, end - 1]) for x in (batch.tokens, batch.labels))
        if not batch.loss_mask[0, start:end].any() and (end - start > 1 or last != eos):
            yield start, end, _PADDING
            continue
        begins = ", goes on from the row before" if start == 0 and inside else ""
        yield start, end, begins + ("" if eos in (last, following) else ", cut at the end of the row")
