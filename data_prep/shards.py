"""Text to tokenised WebDataset shards, in two passes.

The first pass tokenises the documents in worker processes into one spool file, in input order. With all sizes known,
the second one distributes them over splits and shards. The result depends on the inputs, the tokenizer, the seed and
the requested sizes, not on the number of workers, and is identical byte for byte each time. During the build the
output directory also holds the spool, which is about as large as the shards.
"""

from __future__ import annotations

import heapq
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.readers import shown
from megatron_dla.data_prep.sources import DocumentSource, ReadOptions
from megatron_dla.data_prep.tokenise import Spool, token_dtype, tokenise
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError
from megatron_dla.files import file_sha256, write_bytes, write_json
from megatron_dla.shard_index import (
    INDEX_NAME,
    MIN_TRAIN_SHARDS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_NAME,
    ShardIndex,
    ShardInfo,
)

_BUILDING = ".building"
REPORT_NAME = "report.json"
SPLITS = ("train", "val")


def _first_copies(spool: Spool) -> list[int]:
    """Document numbers without exact copies of an earlier document."""
    return sorted(np.unique(np.frombuffer(spool.hashes, dtype=np.uint64), return_index=True)[1].tolist())


def _split(spool: Spool, kept: list[int], val_fraction: float, val_docs: int | None) -> dict[str, list[int]]:
    """The `kept` documents of each split, in input order. Raises DataError if none would be left for training."""
    n = len(kept)
    by_hash = sorted(kept, key=lambda i: (spool.hashes[i], i))
    if val_docs is None:
        limit = int(val_fraction * 2.0**64)
        chosen = sum(spool.hashes[i] < limit for i in kept)
        chosen = max(chosen, 1) if val_fraction > 0 else 0
    else:
        chosen = val_docs
    if chosen >= n:
        raise DataError(
            f"val_fraction = {val_fraction}, val_docs = {val_docs}: {chosen} of {n} documents would be for validation, "
            "leaving none to train on; lower it, pass --val-fraction 0, or split the input into more documents"
        )
    val = set(by_hash[:chosen])
    splits = {"train": [i for i in kept if i not in val], "val": sorted(val)}
    return {name: documents for name, documents in splits.items() if documents}


def _distribute(documents: list[int], n_tokens: Sequence[int], shard_tokens: int, min_shards: int) -> list[list[int]]:
    """Assign each document, in order, to the shard with the fewest tokens so far: shards of similar size."""
    total = sum(n_tokens[i] for i in documents)
    count = min(max(math.ceil(total / shard_tokens), min_shards, 1), len(documents))
    shards: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, shard) for shard in range(count)]
    for i in documents:
        size, shard = heap[0]
        shards[shard].append(i)
        heapq.heapreplace(heap, (size + n_tokens[i], shard))
    return shards


def _write_shard(
    path: Path, split: str, documents: list[int], spool: Spool, tokens: np.ndarray, at: np.ndarray
) -> ShardInfo:
    import webdataset as wds

    with open(path, "wb") as file:
        # with the time of the build, two builds of the same data would differ
        with wds.TarWriter(file, encoder=False, mtime=0) as writer:
            for number, i in enumerate(documents):
                record = {"source": spool.sources[i], "n_tokens": spool.n_tokens[i], "n_bytes": spool.n_bytes[i]}
                writer.write(
                    {
                        "__key__": f"{path.stem}-{number:06d}",
                        "npy": _npy(tokens[at[i] : at[i + 1]]),
                        "json": json.dumps(record, ensure_ascii=False).encode(),
                    }
                )
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(
        name=path.name, split=split, bytes=path.stat().st_size, sha256=file_sha256(path), documents=len(documents),
        tokens=sum(spool.n_tokens[i] for i in documents), text_bytes=sum(spool.n_bytes[i] for i in documents),
    )  # fmt: skip


def _npy(tokens: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, tokens, allow_pickle=False)
    return out.getvalue()


def build_shards(
    inputs: Sequence[str | os.PathLike[str]],
    tokenizer_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    val_fraction: float = 0.02,
    val_docs: int | None = None,
    shard_tokens: int = 1_000_000,
    min_train_shards: int = MIN_TRAIN_SHARDS,
    workers: int | None = None,
    seed: int = 0,
    options: ReadOptions | None = None,
    dedup: bool = False,
    overwrite: bool = False,
) -> ShardIndex:
    """Tokenise `inputs` into `output_dir`: `train/*.tar`, `val/*.tar`, the tokenizer and, last, `index.json`.

    `report.json` counts what was read, left out and why.

    Args:
        tokenizer_path: `tokenizer.model` or `tokenizer.json`, or a directory with one, see `Tokenizer`.
        val_fraction: share of the documents for validation, at least one document if above 0; chosen by a hash of
            (seed, content), so exact copies of a document are in the same split.
        val_docs: number of validation documents, instead of val_fraction.
        shard_tokens: target size of a shard; documents are never cut, so a long one makes a larger shard.
        min_train_shards: shards are made smaller to reach this number (the loader needs one shard per stream);
            a document is never split, so there are at most as many shards as documents.
        workers: processes; None is one per usable core.
        options: how the inputs are read, see `ReadOptions`.
        dedup: of exact copies of a document, keep the first.
        overwrite: replace an existing build. It stays in place until the new one is complete.

    A sample is `<key>.npy` (uint16, or uint32 above 65,536 tokens: [n_tokens], the last is eos) and `<key>.json`
    (`source`, `n_tokens`, `n_bytes`). Empty documents are skipped. Raises DataError for inputs that cannot be
    read, bad arguments, an existing index without `overwrite`, or if no document would be left for training.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction = {val_fraction}: must be in [0, 1)")
    if not 0 <= seed < 2**63:
        raise DataError(f"seed = {seed}: must be in [0, 2^63)")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value, least in (
        ("shard_tokens", shard_tokens, 1), ("min_train_shards", min_train_shards, 1), ("workers", workers, 1),
        ("val_docs", val_docs or 0, 0),
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{name} = {value}: must be at least {least}")
    root = Path(output_dir)
    if (root / INDEX_NAME).exists() and not overwrite:
        raise DataError(f"{root / INDEX_NAME}: exists; pass --overwrite to replace this data, or another --output")
    tokenizer = Tokenizer(tokenizer_path)
    source = DocumentSource(inputs, options)
    building = root / _BUILDING
    shutil.rmtree(building, ignore_errors=True)  # left by a build that was killed
    building.mkdir(parents=True)
    try:
        spool = Spool(building / "tokens")
        tokenise(source, tokenizer, spool, workers, seed)
        if not spool.n_tokens:
            raise DataError(f"{', '.join(map(shown, inputs))}: no text in these inputs")
        index = ShardIndex(
            tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id,
            dtype=token_dtype(tokenizer).name, shards=[], seed=seed, created_by=_created_by(),
            sources=_sources(source),
        )  # fmt: skip
        tokens = np.memmap(spool.file, dtype=token_dtype(tokenizer), mode="r")
        at = np.concatenate([[0], np.cumsum(np.frombuffer(spool.n_tokens, dtype=np.int64))])
        with progress_bar(tokens.nbytes, "writing shards") as bar:
            kept = _first_copies(spool) if dedup else list(range(len(spool.hashes)))
            for split, documents in _split(spool, kept, val_fraction, val_docs).items():
                (building / split).mkdir()
                shards = _distribute(
                    documents, spool.n_tokens, shard_tokens, min_train_shards if split == "train" else 1
                )
                for number, members in enumerate(shards):
                    path = building / split / f"{split}-{number:06d}.tar"
                    index.shards.append(_write_shard(path, split, members, spool, tokens, at))
                    bar.update(index.shards[-1].tokens * tokens.itemsize)
        copies = len(spool.hashes) - len(set(spool.hashes))
        report = {
            **source.report(), "duplicates": copies, "duplicates_removed": dedup, "changed_by_tokenizer": spool.changed,
        }  # fmt: skip
        _publish(root, building, index, tokenizer, report)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for note in tokenizer.notes(spool.changed) + _notes(
        source, copies, dedup, index.totals("train").shards, min_train_shards
    ):
        print(note, file=sys.stderr)
    return index


def _publish(root: Path, building: Path, index: ShardIndex, tokenizer: Tokenizer, report: dict[str, Any]) -> None:
    """Move the finished build into place. There is no index meanwhile, so no reader mixes old and new shards."""
    files = tokenizer.files()
    write_json(root / REPORT_NAME, report, indent=1)
    (root / INDEX_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for old in (root / split).glob(f"{split}-*.tar"):
            old.unlink()
    for shard in index.shards:
        (root / shard.split).mkdir(exist_ok=True)
        os.replace(building / shard.path, root / shard.path)
    for name in (TOKENIZER_NAME, TOKENIZER_JSON, TOKENIZER_CONFIG):
        (root / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(root / name, content)
    index.save(root / INDEX_NAME)


def _created_by() -> str:
    from importlib.metadata import version

    from megatron_dla import __version__

    return f"megatron-dla {__version__}, sentencepiece {version('sentencepiece')}, webdataset {version('webdataset')}"


def _sources(source: DocumentSource) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for file in source.files:
        record = records.setdefault(file.input, {"input": file.input, "files": 0, "bytes": 0})
        record["files"] += 1
        record["bytes"] += file.bytes
    return list(records.values())


def _notes(source: DocumentSource, copies: int, dedup: bool, train_shards: int, wanted: int) -> list[str]:
    notes = source.notes()
    if train_shards < wanted:
        notes.append(
            f"note: {train_shards} train shards, one per document, instead of --min-train-shards {wanted}: "
            f"a run on this data needs data.num_streams <= {train_shards}"
        )
    if copies:
        done = "removed" if dedup else "kept (--dedup removes them)"
        notes.append(f"note: {copies} documents that are exact copies of another one were {done}")
    return notes
