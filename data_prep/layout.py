"""Which documents go into which split and shard. Memory does not grow with their number, time does."""

from __future__ import annotations

import heapq
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.errors import DataError
from megatron_dla.files import naming_full_disk

_BLOCK = 1 << 16  # records read at once
_BUCKET = 1 << 20  # hashes that are compared at once


def release(array: np.ndarray) -> None:
    """Take the pages of a mapped file out of this process's memory; what was written stays in the file."""
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap):
        pages.madvise(mmap.MADV_DONTNEED)


def mapped(path: Path, dtype: Any, count: int) -> np.ndarray:
    """A new file of zeros, mapped. Raises OSError where the disk is full: later, that would kill the process."""
    size = count * np.dtype(dtype).itemsize
    with naming_full_disk(path, size), open(path, "wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(count,)) if size else np.zeros(0, dtype)


def mark_copies(records: np.ndarray, folder: Path) -> tuple[np.ndarray, int]:
    """(bool [documents], mapped: a copy of an earlier document; how many). `records`: see `spool.DOCUMENT`."""
    copies = mapped(folder / "copies", np.bool_, len(records))
    count = math.ceil(len(records) / _BUCKET)
    paths = [folder / f"hashes-{i}" for i in range(count)]
    for path in paths:
        path.unlink(missing_ok=True)  # of a build that was killed
    pair = np.dtype([("hash", "<u8"), ("document", "<u8")])
    for start, block in _blocks(records):
        pairs = np.empty(len(block), dtype=pair)
        pairs["hash"], pairs["document"] = block["hash"], np.arange(start, start + len(block))
        which = block["hash"] % np.uint64(count)
        for i, path in enumerate(paths):
            with open(path, "ab") as file:
                pairs[which == i].tofile(file)
    total = 0
    for path in paths:
        pairs = np.fromfile(path, dtype=pair)
        path.unlink()
        _, first = np.unique(pairs["hash"], return_index=True)  # the first of equal ones
        later = np.delete(pairs["document"], first)
        copies[later] = True
        release(copies)
        total += len(later)
    return copies, total


def _blocks(records: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(records), _BLOCK):
        yield start, np.array(records[start : start + _BLOCK])
        release(records)


@dataclass(frozen=True)
class Threshold:
    """A document is for validation if (hash, number) is below this pair."""

    hash: int
    document: int

    def holds(self, hashes: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """bool, of uint64 hashes and document numbers."""
        if self.hash >= 1 << 64:
            return np.ones(len(hashes), dtype=np.bool_)
        limit = np.uint64(self.hash)
        return (hashes < limit) | ((hashes == limit) & (documents < self.document))


def choose_validation(
    records: np.ndarray, left_out: np.ndarray | None, val_fraction: float, val_docs: int | None, least: int = 1
) -> Threshold:
    """The documents with the smallest hashes: `val_docs` of them, or a share, at least `least` if it is above 0.

    Raises DataError if no document would be left for training. `left_out`: bool [documents].
    """
    limit = Threshold(int(val_fraction * 2.0**64), 0)
    wanted = (least if val_fraction > 0 else 0) if val_docs is None else val_docs
    below = total = 0
    hashes, numbers = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)  # the `wanted` smallest
    for start, block in _blocks(records):
        kept = np.arange(start, start + len(block))
        kept = kept if left_out is None else kept[~left_out[start : start + len(block)]]
        found = block["hash"][kept - start]
        total += len(kept)
        below += int(limit.holds(found, kept).sum())
        hashes, numbers = np.concatenate([hashes, found]), np.concatenate([numbers, kept])
        order = np.lexsort((numbers, hashes))[:wanted]
        hashes, numbers = hashes[order], numbers[order]
    chosen = max(below, wanted) if val_docs is None else wanted
    if chosen >= total:
        given = f"val_fraction = {val_fraction}" if val_docs is None else f"val_docs = {val_docs}"
        fix = "lower it, pass --val-fraction 0," if val_docs is None else "lower --val-docs,"
        raise DataError(
            f"{given}: {chosen} of {total} documents would be for validation, leaving none to train on; {fix} or split "
            "the input into more documents"
        )
    if val_docs is None and below >= wanted:
        return limit
    return Threshold(int(hashes[-1]), int(numbers[-1]) + 1) if wanted else Threshold(0, 0)


@dataclass(frozen=True)
class Layout:
    """The documents of every shard.

    `sizes`: {split: documents in each of its shards}; `members`: document numbers, int64 [documents], mapped, shard
    after shard in the order of `sizes`.
    """

    sizes: dict[str, np.ndarray]
    members: np.ndarray


def assign(
    records: np.ndarray, left_out: np.ndarray | None, validation: Threshold, folder: Path, shard_tokens: int,
    min_train_shards: int,
) -> Layout:  # fmt: skip
    """Give each document, in order, to the shard of its split with the fewest tokens so far.

    A split has as many shards as its tokens need at `shard_tokens`, at least `min_train_shards` (validation: 1), at
    most one a document.
    """

    def splits() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for start, block in _blocks(records):
            numbers = np.arange(start, start + len(block))
            which = validation.holds(block["hash"], numbers).astype(np.int8)
            if left_out is not None:
                which[left_out[start : start + len(block)]] = -1
            yield start, which, block["n_tokens"].astype(np.int64)

    documents, tokens = [0, 0], [0, 0]
    for _, which, n_tokens in splits():
        for split in (0, 1):
            documents[split] += int((which == split).sum())
            tokens[split] += int(n_tokens[which == split].sum())
    least = (min_train_shards, 1)
    counts = [min(max(math.ceil(tokens[split] / shard_tokens), least[split], 1), documents[split]) for split in (0, 1)]
    heaps = [[(0, shard) for shard in range(counts[split])] for split in (0, 1)]
    shard_of = mapped(folder / "shard_of", np.int32, len(records))
    sizes = np.zeros(sum(counts), dtype=np.int64)
    for start, which, n_tokens in splits():
        chosen = np.full(len(which), -1, dtype=np.int32)
        for i, (split, count) in enumerate(zip(which.tolist(), n_tokens.tolist(), strict=True)):
            if split >= 0:
                size, shard = heaps[split][0]
                chosen[i] = shard + split * counts[0]
                heapq.heapreplace(heaps[split], (size + count, shard))
        shard_of[start : start + len(which)] = chosen
        release(shard_of)
        sizes += np.bincount(chosen[chosen >= 0], minlength=len(sizes))
    members = _sorted_by_shard(shard_of, sizes, folder)
    named = {"train": sizes[: counts[0]], "val": sizes[counts[0] :]}
    return Layout({name: part for name, part in named.items() if len(part)}, members)


def _sorted_by_shard(shard_of: np.ndarray, sizes: np.ndarray, folder: Path) -> np.ndarray:
    members = mapped(folder / "members", np.int64, int(sizes.sum()))
    next_free = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for start in range(0, len(shard_of), _BLOCK):
        block = np.array(shard_of[start : start + _BLOCK])
        order = np.argsort(block, kind="stable")
        order = order[block[order] >= 0]
        shards = block[order]
        if not len(shards):
            continue
        begins = np.flatnonzero(np.concatenate([[True], shards[1:] != shards[:-1]]))
        rank = np.arange(len(shards)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(shards)]])))
        members[next_free[shards] + rank] = order + start
        release(members)
        release(shard_of)
        next_free += np.bincount(shards, minlength=len(sizes))
    return members
