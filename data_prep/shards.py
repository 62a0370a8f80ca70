"""Text to tokenised WebDataset shards, in two passes.

The first pass tokenises the documents in worker processes into a spool on disk, in input order. With all sizes known,
the second one distributes them over splits and shards. The result depends on the inputs, the tokenizer, the seed and
the requested sizes, not on the number of workers or on interruptions, and is identical byte for byte each time. During
the build, and after one that was stopped, `OUTPUT/.building` holds the spool, about as large as the shards, and the
shards written so far; the same command goes on from there. When all shards are in place it becomes
`OUTPUT/.built-KEY`, whose name tells a start after a kill at the end which command it was of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.bpe_form import export_note
from megatron_dla.data_prep.each_shard import check_workers
from megatron_dla.data_prep.layout import Layout, assign, choose_validation, mark_copies, release
from megatron_dla.data_prep.shard_file import SPLITS, check_exists, check_output, write_shard
from megatron_dla.data_prep.sources import DocumentSource, ReadOptions
from megatron_dla.data_prep.spool import Spool, lock
from megatron_dla.data_prep.tokenise import token_dtype, tokenise
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError
from megatron_dla.files import parse_json, write_bytes, write_json
from megatron_dla.shard_index import (
    INDEX_NAME,
    MIN_TRAIN_SHARDS,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_NAME,
    ShardIndex,
    ShardInfo,
)

_BUILDING, _BUILT, _WRITTEN = ".building", ".built-", "shards.jsonl"
REPORT_NAME = "report.json"


class _Wanted(NamedTuple):
    """What the layout depends on besides the spool."""

    val_fraction: float
    val_docs: int | None
    dedup: bool
    shard_tokens: int
    min_train_shards: int


class _Writer:
    """Writes shards from a spool; those that an interrupted build of the same `key` has written are kept.

    Args:
        key: of everything that the shards depend on: inputs, tokenizer, options and layout.
    """

    def __init__(self, spool: Spool, source: DocumentSource, key: str) -> None:
        self.spool, self.source = spool, source
        self.records = spool.records()
        self.log = spool.path(_WRITTEN)
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        if not lines or lines[0] != key:
            lines = [key]
        self.done: dict[str, ShardInfo] = {}
        for line in lines[1:]:
            try:
                shard = ShardInfo(**parse_json(line))
            except (ValueError, TypeError):  # the process was killed while it wrote the line
                break
            self.done[shard.path] = shard
        lines = [key, *(json.dumps(asdict(shard)) for shard in self.done.values())]
        self.log.write_text("".join(f"{line}\n" for line in lines))

    def write(self, layout: Layout) -> Iterator[ShardInfo]:
        """The shards in order, each written or found."""
        at = 0
        with open(self.log, "a") as log, open(self.spool.path("tokens"), "rb") as tokens:
            for split, sizes in layout.sizes.items():
                (self.spool.folder / split).mkdir(exist_ok=True)
                for number, size in enumerate(sizes.tolist()):
                    path = self.spool.folder / split / f"{split}-{number:06d}.tar"
                    shard = self._found(f"{split}/{path.name}")
                    if shard is None:
                        shard = self._write(path, split, np.array(layout.members[at : at + size]), tokens.fileno())
                        log.write(json.dumps(asdict(shard)) + "\n")
                        log.flush()
                    at += size
                    yield shard

    def _found(self, name: str) -> ShardInfo | None:
        shard = self.done.get(name)
        return None if shard is None or shard.size_problem(self.spool.folder) else shard

    def _write(self, path: Path, split: str, members: np.ndarray, tokens: int) -> ShardInfo:
        records = self.records[members]
        release(self.records)
        content = b"".join(os.pread(tokens, length, start) for start, length in self._where(records))
        ends = np.cumsum(records["n_tokens"].astype(np.int64))
        sources = list(map(self.source.name, records["file"].tolist(), records["number"].tolist()))
        return write_shard(
            path, split, np.frombuffer(content, self.spool.dtype), ends, sources, records["n_bytes"].tolist()
        )

    def _where(self, records: np.ndarray) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of each document in the spool's tokens."""
        size = self.spool.dtype.itemsize
        return zip((records["start"] * size).tolist(), (records["n_tokens"] * size).tolist(), strict=True)


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
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> ShardIndex:
    """Tokenise `inputs` into `output_dir`: `train/*.tar`, `val/*.tar`, the tokenizer and, last, `index.json`.

    `report.json` counts what was read, left out and why.

    Args:
        tokenizer_path: `tokenizer.model` or `tokenizer.json`, or a directory with one, see `Tokenizer`.
        val_fraction: share of the documents for validation, at least one document if above 0 (not in a part); chosen
            by a hash of (seed, content), so exact copies of a document are in the same split.
        val_docs: number of validation documents, instead of val_fraction.
        shard_tokens: target size of a shard; documents are never cut, so a long one makes a larger shard.
        min_train_shards: shards are made smaller to reach this number (the loader needs one shard per stream);
            a document is never split, so there are at most as many shards as documents.
        workers: processes; None is one per usable core.
        options: how the inputs are read, see `ReadOptions`.
        dedup: of exact copies of a document, keep the first.
        part: (i, n): read only the files i, i + n, i + 2n, ... of the inputs; the parts can be merged (`merge_shards`).
        overwrite: replace an existing build. It stays in place until the new one is complete.

    A build that was stopped, or failed, goes on where it was if it is called again with the same inputs, tokenizer,
    seed and reading options (`skip_bad` may differ); after changes of some files, from the first of them.

    A shard holds one sample, named like the file: `tokens.npy` (uint16, or uint32 above 65,536 tokens: [n_tokens], eos
    ends each document), `ends.npy` (int64 [documents], where each ends) and `records.json` (`sources` and `n_bytes`, of
    each document). Empty documents are skipped. Raises DataError for inputs that cannot be
    read, bad arguments, an existing index without `overwrite`, or if no document would be left for training.
    """
    workers = check_workers(workers)
    _check_arguments(val_fraction, val_docs, shard_tokens, min_train_shards, seed)
    root = Path(output_dir)
    built = _leftover(root)
    check_exists(root, overwrite or built is not None)
    check_output(root, _BUILDING)
    tokenizer = Tokenizer(tokenizer_path)
    source = DocumentSource(inputs, options, part)
    plan, files = _plan(source, tokenizer, seed)
    wanted = _Wanted(val_fraction, val_docs, dedup, shard_tokens, min_train_shards)
    key = _digest([plan, files, wanted, source.part])  # a part of one file may have no document for validation
    own = root / f"{_BUILT}{key}"
    if built is not None:
        shutil.rmtree(built, ignore_errors=True)  # another process may be at it
        if built == own:
            print(f"note: this build was complete; removed {built.name}, which it had left", file=sys.stderr)
            return ShardIndex.load(root)
        check_exists(root, overwrite)
    if note := export_note(tokenizer):
        print(note, file=sys.stderr)  # before hours of work
    for note in source.listing.notes():
        print(note, file=sys.stderr)
    spool = Spool(root / _BUILDING, token_dtype(tokenizer), plan, files)
    try:
        _tokenise(source, tokenizer, spool, workers, seed)
        index, report = _write_shards(spool, source, tokenizer, seed, wanted, key)
        _publish(root, spool.folder, index, tokenizer, report)
        os.replace(spool.folder, own)
        index.save(root / INDEX_NAME)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on after {spool.documents:,} documents", file=sys.stderr)
        raise
    finally:
        spool.close()
    shutil.rmtree(own, ignore_errors=True)
    notes = _notes(source, report["duplicates"], dedup, index.totals("train").shards, min_train_shards)
    for note in tokenizer.notes(spool.changed) + notes:
        print(note, file=sys.stderr)
    return index


def _write_shards(
    spool: Spool, source: DocumentSource, tokenizer: Tokenizer, seed: int, wanted: _Wanted, key: str
) -> tuple[ShardIndex, dict[str, Any]]:
    """Write the shards into the spool's folder; their index and the report."""
    records = spool.records()
    copies, count = mark_copies(records, spool.folder)
    left_out = copies if wanted.dedup else None
    least = int(source.part[1] == 1)  # a part takes the documents that a build of all files would take
    validation = choose_validation(records, left_out, wanted.val_fraction, wanted.val_docs, least)
    layout = assign(records, left_out, validation, spool.folder, wanted.shard_tokens, wanted.min_train_shards)
    writer = _Writer(spool, source, key)
    index = ShardIndex(
        tokenizer_sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id,
        dtype=spool.dtype.name, shards=[], seed=seed, created_by=_created_by(), sources=_sources(source),
    )  # fmt: skip
    with progress_bar(spool.tokens * spool.dtype.itemsize, "writing shards") as bar:
        for shard in writer.write(layout):
            index.shards.append(shard)
            bar.update(shard.tokens * spool.dtype.itemsize)
    report: dict[str, Any] = {
        "duplicates": count,
        "duplicates_removed": wanted.dedup,
        "changed_by_tokenizer": spool.changed,
    }
    if source.part[1] > 1:
        report["parts_of"] = ["{}/{}".format(*source.part)]
    return index, source.report() | report


def _check_arguments(
    val_fraction: float, val_docs: int | None, shard_tokens: int, min_train_shards: int, seed: int
) -> None:
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction = {val_fraction}: must be in [0, 1)")
    if not 0 <= seed < 2**63:
        raise DataError(f"seed = {seed}: must be in [0, 2^63)")
    for name, value, least in (
        ("shard_tokens", shard_tokens, 1), ("min_train_shards", min_train_shards, 1), ("val_docs", val_docs or 0, 0),
    ):  # fmt: skip
        if value < least:
            raise DataError(f"{name} = {value}: must be at least {least}")


def _leftover(root: Path) -> Path | None:
    """What a build that wrote its index has left; of one that was killed just before, the build goes on."""
    built = next(root.glob(f"{_BUILT}*"), None)
    if built is None or (root / INDEX_NAME).exists():
        return built
    with lock(built):
        os.replace(built, root / _BUILDING)
    return None


def _plan(source: DocumentSource, tokenizer: Tokenizer, seed: int) -> tuple[dict[str, Any], list[list[Any]]]:
    """What the spool depends on, and [name, size, time] of each input file."""
    options = source.options
    plan = {
        "format": 1, "tokenizer": tokenizer.sha256, "eos": tokenizer.eos_id, "seed": seed,
        "text_field": options.text_field, "separator": options.separator, "min_chars": options.min_chars,
        "max_chars": options.max_chars,
    }  # fmt: skip
    return plan, [[file.name, file.bytes, file.path.stat().st_mtime_ns] for file in source.files]


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _tokenise(source: DocumentSource, tokenizer: Tokenizer, spool: Spool, workers: int, seed: int) -> None:
    root = spool.folder.parent
    try:
        tokenise(source, tokenizer, spool, workers, seed)
        if not spool.documents:
            raise source.nothing()
    except DataError as error:
        if not spool.documents:
            shutil.rmtree(spool.folder)  # nothing to go on from
            with contextlib.suppress(OSError):  # not empty: it was an output before
                root.rmdir()
            raise
        kept = f"the tokens of the other documents are kept in {spool.folder} for the next try"
        raise DataError(f"{error}\n  {kept}") from error


def _publish(root: Path, building: Path, index: ShardIndex, tokenizer: Tokenizer, report: dict[str, Any]) -> None:
    """Move all but the index into place. There is no index meanwhile, so no reader mixes old and new shards."""
    files = tokenizer.files()
    (root / INDEX_NAME).unlink(missing_ok=True)
    write_json(root / REPORT_NAME, report, indent=1)
    new = {shard.path for shard in index.shards}
    for split in SPLITS:
        for old in (root / split).glob(f"{split}-*.tar"):
            if f"{split}/{old.name}" not in new:
                old.unlink()
    for shard in index.shards:
        (root / shard.split).mkdir(exist_ok=True)
        os.replace(building / shard.path, root / shard.path)
    for name in (TOKENIZER_NAME, TOKENIZER_JSON, TOKENIZER_CONFIG):
        if name not in files:
            (root / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(root / name, content)


def _created_by() -> str:
    from importlib.metadata import version

    from megatron_dla import __version__

    return f"megatron-dla {__version__}, sentencepiece {version('sentencepiece')}"


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
