"""Exact copies of documents in data directories that were built apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dla.data.shards import Documents, ShardReader, read_records
from megatron_dla.data_prep.each_shard import for_each_shard
from megatron_dla.data_prep.layout import mark_copies
from megatron_dla.data_prep.shard_file import write_shard
from megatron_dla.errors import DataError
from megatron_dla.shard_index import REBUILD, ShardIndex, ShardInfo, content_problem

_HASH = np.dtype([("hash", "<u8")])


def copies_among(parts: Sequence[tuple[Path, ShardIndex]], folder: Path, workers: int | None) -> np.ndarray:
    """Which documents have the same tokens as one before them, bool [documents], mapped from a file in `folder`.

    Documents are numbered in the order of parts, their shards and these shards' documents. Reads every shard, in
    `workers` threads (None: one per usable core); 25 bytes a document in `folder`.

    Raises DataError for a shard that is missing or damaged.
    """
    with open(folder / "hashes", "wb") as file:
        for root, index in parts:
            for _, hashes in for_each_shard(root, index, _hashes, workers, description=f"comparing {root}"):
                hashes.tofile(file)
    total = (folder / "hashes").stat().st_size // _HASH.itemsize
    return mark_copies(np.memmap(folder / "hashes", _HASH, "r", shape=(total,)), folder)[0]


def _hashes(reader: ShardReader, shard: ShardInfo) -> np.ndarray:
    documents, _ = _read(reader, shard)
    digests = [hashlib.blake2b(document.tobytes(), digest_size=8).digest() for document in documents.split()]
    return np.frombuffer(b"".join(digests), _HASH)


def _read(reader: ShardReader, shard: ShardInfo) -> tuple[Documents, bytes]:
    with reader.open(shard) as file:
        content = file.read()
    if problem := content_problem(shard, content):
        raise DataError(f"{reader.root}/{shard.path}: {problem}; {REBUILD}")
    return reader.documents(shard, content), content


def write_without(reader: ShardReader, shard: ShardInfo, left_out: np.ndarray, path: Path) -> ShardInfo:
    """Write a shard again without some documents; `left_out`: bool [documents], not all True. Its new entry."""
    documents, content = _read(reader, shard)
    kept = zip(documents.split(), read_records(content), left_out.tolist(), strict=True)
    tokens, records = zip(*[(document, record) for document, record, copy in kept if not copy], strict=True)
    return write_shard(
        path, shard.split, np.concatenate(tokens), np.cumsum([len(document) for document in tokens]),
        [str(record["source"]) for record in records], [int(record["n_bytes"]) for record in records],
    )  # fmt: skip
