"""Joins data directories that were built apart, on several machines for instance, into one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.readers import refuse_url
from megatron_dla.data_prep.shard_file import SPLITS, check_exists, check_output
from megatron_dla.data_prep.shards import REPORT_NAME
from megatron_dla.data_prep.spool import lock
from megatron_dla.data_prep.tokenizer import tokenizer_of
from megatron_dla.errors import DataError
from megatron_dla.files import atomic_path, parse_json, write_bytes, write_json
from megatron_dla.shard_index import FORMAT_VERSION, INDEX_NAME, ShardIndex, ShardInfo

_MERGING, _DONE = ".merging", "done"  # the second is in the first, with a key of the merge, once all shards are there
_NONE = np.zeros(0, dtype=np.bool_)


def merge_shards(
    parts: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    dedup: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> ShardIndex:
    """Write `output_dir` with the shards of all `parts`, in their order, under new numbers.

    Shards are hard links to those of the parts, or copies on another file system; the parts stay usable. The index is
    written last, so that a merge that was stopped can be done again.

    Args:
        dedup: of documents with the same tokens, in one part or several, keep the first in that order. All shards are
            read, in `workers` threads (None: one per usable core), and those with copies are written again.

    Raises DataError if a part is missing, damaged or unfinished, has another tokenizer than the first, is given
    twice, or is the output; for an existing index without `overwrite`; and where another build or merge into the output
    runs or was stopped.
    """
    root = Path(output_dir)
    roots = [Path(part) for part in parts]
    work = root / _MERGING
    done = work / _DONE
    ended = done.exists() and (root / INDEX_NAME).exists()  # a merge that was killed before it removed its folder
    check_exists(root, overwrite or ended)
    for number, part in enumerate(roots):
        refuse_url(part)
        if part.resolve() in [other.resolve() for other in (root, *roots[:number])]:
            raise DataError(f"{part}: given twice, or as part and --output; its documents would count twice")
    indexes = [ShardIndex.load(part) for part in roots]
    key = _key(indexes, dedup)
    if ended:
        same = done.read_text() == key
        shutil.rmtree(work, ignore_errors=True)  # another process may be at it
        if same:
            print(f"note: this merge was complete; removed {work.name}, which it had left", file=sys.stderr)
            return ShardIndex.load(root)
        check_exists(root, overwrite)
    for part, index in zip(roots, indexes, strict=True):
        _check_part(part, index, indexes[0], roots[0])
    _note_seeds(roots, indexes)
    if not dedup:
        _note_copies(roots, indexes)
    files = tokenizer_of(roots[0], indexes[0]).files()
    _note_missing(report := _report(roots))
    report |= {"duplicates_between_parts_removed": dedup}
    merged = replace(
        indexes[0], shards=[], sources=[record for index in indexes for record in index.sources],
        format_version=FORMAT_VERSION if dedup else max(index.format_version for index in indexes),
    )  # fmt: skip
    check_output(root, _MERGING)
    work.mkdir(parents=True, exist_ok=True)
    with lock(work):
        check_exists(root, overwrite)  # again: of another merge, which has just ended
        try:
            removed = _place_shards(list(zip(roots, indexes, strict=True)), root, work, merged, dedup, workers)
        except BaseException:
            if not merged.shards:
                shutil.rmtree(work)
                with contextlib.suppress(OSError):  # not empty: it was an output before
                    root.rmdir()
            raise
        _delete_others(root, merged.shards)
        for name, content in files.items():
            write_bytes(root / name, content)
        if dedup:
            report |= {"duplicates_removed": True, "duplicates_between_parts": removed}
        write_json(root / REPORT_NAME, report, indent=1)
        if not any(shard.split == "val" for shard in merged.shards):
            fix = "build with a larger --val-fraction, or train with training.eval_every=0"
            print(f"note: no document of these parts is for validation: {fix}", file=sys.stderr)
        merged.shards.sort(key=lambda shard: (shard.split, shard.name))
        write_bytes(done, key.encode())
        merged.save(root / INDEX_NAME)
        shutil.rmtree(work)
    if dedup and removed:
        print(f"note: {removed} documents that are exact copies of another one were removed", file=sys.stderr)
    elif report.get("duplicates_removed") and not dedup:
        print(
            "note: `shards --dedup` removed exact copies within each part, not those of documents in another part: "
            "`merge --dedup` removes them",
            file=sys.stderr,
        )
    return merged


def _place_shards(
    parts: list[tuple[Path, ShardIndex]], root: Path, work: Path, merged: ShardIndex, dedup: bool, workers: int | None
) -> int:
    """Put the parts' shards into `root` and `merged`; returns how many copies of documents were left out."""
    if dedup:
        from megatron_dla.data_prep.dedup import copies_among

        copies = copies_among(parts, work, workers)
    (root / INDEX_NAME).unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    at = removed = 0
    with progress_bar(sum(shard.bytes for _, index in parts for shard in index.shards), "merging") as bar:
        for part, index in parts:
            for shard in index.shards:
                left_out = np.array(copies[at : at + shard.documents]) if dedup else _NONE
                at, removed = at + shard.documents, removed + int(left_out.sum())
                if not left_out.any() or not left_out.all():
                    new = replace(shard, name=f"{shard.split}-{counts[shard.split]:06d}.tar")
                    counts[shard.split] += 1
                    merged.shards.append(_place(part, index, shard, left_out, root / new.path, work, new))
                bar.update(shard.bytes)
    return removed


def _place(
    part: Path, index: ShardIndex, shard: ShardInfo, left_out: np.ndarray, target: Path, work: Path, new: ShardInfo
) -> ShardInfo:
    """Link a shard, or write it without the documents `left_out`; its entry in the new index."""
    if not left_out.any():
        _link(part / shard.path, target)
        return new
    from megatron_dla.data.shards import ShardReader
    from megatron_dla.data_prep.dedup import write_without

    written = write_without(ShardReader(index, shard.split, root=part), shard, left_out, work / new.name)
    target.parent.mkdir(exist_ok=True)
    os.replace(work / new.name, target)
    return written


def _check_part(part: Path, index: ShardIndex, first: ShardIndex, first_root: Path) -> None:
    for key in ("tokenizer_sha256", "vocab_size", "eos_id", "dtype"):
        if (value := getattr(index, key)) != (want := getattr(first, key)):
            raise DataError(
                f"{part}: {key} = {value!r}, but that of {first_root} is {want!r}; build all parts with one tokenizer"
            )
    for shard in index.shards:
        if problem := shard.size_problem(part):
            raise DataError(f"{part / shard.path}: {problem}; copy it again, or build this part again")


def _note_seeds(roots: list[Path], indexes: list[ShardIndex]) -> None:
    """Say which part chose its validation documents with another seed: a document may be in both splits of a merge."""
    others = [
        f"{root} ({index.seed})" for root, index in zip(roots, indexes, strict=True) if index.seed != indexes[0].seed
    ]
    if others:
        print(
            f"note: the seed of {roots[0]} is {indexes[0].seed}, not that of {', '.join(others[:5])}: copies of a "
            "document may be in train of one part and in val of another; build with one --seed, or use --dedup",
            file=sys.stderr,
        )


def _note_copies(roots: list[Path], indexes: list[ShardIndex]) -> None:
    """Say which shards have the content of another one, as where a part and a merge of it are given."""
    seen: dict[str, Path] = {}
    paths = [
        (part / shard.path, shard.sha256) for part, index in zip(roots, indexes, strict=True) for shard in index.shards
    ]
    copies = [(path, seen[digest]) for path, digest in paths if seen.setdefault(digest, path) != path]
    if copies:
        path, other = copies[0]
        print(
            f"note: {len(copies)} shards are copies of others, such as {path} of {other}; their documents count twice "
            "(--dedup removes them)",
            file=sys.stderr,
        )


def _note_missing(report: dict[str, Any]) -> None:
    """Say which parts of `shards --part` are missing; where several corpora have as many, there is one of each."""
    counts = Counter(report.get("parts_of", []))
    for number in sorted({part.partition("/")[2] for part in counts}, key=int):
        names = [f"{i}/{number}" for i in range(int(number))]
        if missing := [name for name in names if counts[name] < max(counts[other] for other in names)]:
            print(
                f"note: parts {', '.join(missing)} are not among these directories; build and add them", file=sys.stderr
            )


def _key(indexes: list[ShardIndex], dedup: bool) -> str:
    """What the result depends on."""
    digests = [shard.sha256 for index in indexes for shard in index.shards]
    return hashlib.sha256("\n".join([str(dedup), *digests]).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    with atomic_path(target, fsync=False) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(source, temporary)


def _delete_others(root: Path, shards: list[ShardInfo]) -> None:
    """Shards of an earlier build."""
    kept = {shard.path for shard in shards}
    for split in SPLITS:
        for old in (root / split).glob(f"{split}-*.tar"):
            if f"{split}/{old.name}" not in kept:
                old.unlink()


def _report(roots: list[Path]) -> dict[str, Any]:
    """Counts added up, lists joined, and of switches whether all parts had them; `duplicates` are those within parts.

    A part of an earlier version has no report.
    """
    reports = [_read_report(path) for root in roots if (path := root / REPORT_NAME).is_file()]
    total: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if key not in total:
                total[key] = value
            else:
                total[key] = total[key] and value if isinstance(value, bool) else total[key] + value
    parts = sum(report.get("parts", 1) for report in reports) + len(roots) - len(reports)
    return total | {"parts": parts, "duplicates_between_parts_removed": False}


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = parse_json(path.read_bytes())
        kinds = {
            "bad_records": list,
            "parts_of": list,
            "duplicates_removed": bool,
            "duplicates_between_parts_removed": bool,
        }
        if not isinstance(report, dict):
            raise ValueError("not an object")
        for key, value in report.items():
            if type(value) is not (kind := kinds.get(key, int)):
                raise ValueError(f"{key} = {value!r}: must be {kind.__name__}")
    except ValueError as error:
        raise DataError(f"{path}: damaged report ({error}); copy it again, or delete it") from error
    return report
