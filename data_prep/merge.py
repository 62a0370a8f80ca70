"""Joins data directories that were built apart, on several machines for instance, into one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.shards import REPORT_NAME
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError
from megatron_dla.files import atomic_path, write_bytes, write_json
from megatron_dla.shard_index import INDEX_NAME, ShardIndex, ShardInfo


def merge_shards(
    parts: Sequence[str | os.PathLike[str]], output_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> ShardIndex:
    """Write `output_dir` with the shards of all `parts`, in their order, under new numbers.

    Shards are hard links to those of the parts, or copies on another file system; the parts stay usable. The index is
    written last, so that a merge that was stopped can be done again.

    Raises DataError if a part is missing, damaged or unfinished, has another tokenizer than the first, is given
    twice, or is the output; and for an existing index without `overwrite`.
    """
    root = Path(output_dir)
    roots = [Path(part) for part in parts]
    if (root / INDEX_NAME).exists() and not overwrite:
        raise DataError(f"{root / INDEX_NAME}: exists; pass --overwrite to replace this data, or another --output")
    for number, part in enumerate(roots):
        if part.resolve() in [other.resolve() for other in (root, *roots[:number])]:
            raise DataError(f"{part}: given twice, or as part and --output; its documents would count twice")
    indexes = [ShardIndex.load(part) for part in roots]
    for part, index in zip(roots, indexes, strict=True):
        _check_part(part, index, indexes[0], roots[0])
    merged = replace(
        indexes[0], shards=[], sources=[record for index in indexes for record in index.sources],
        format_version=max(index.format_version for index in indexes),
    )  # fmt: skip
    shards = [(part, shard) for part, index in zip(roots, indexes, strict=True) for shard in index.shards]
    root.mkdir(parents=True, exist_ok=True)
    (root / INDEX_NAME).unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    with progress_bar(sum(shard.bytes for _, shard in shards), "merging") as bar:
        for part, shard in shards:
            new = replace(shard, name=f"{shard.split}-{counts[shard.split]:06d}.tar")
            counts[shard.split] += 1
            _link(part / shard.path, root / new.path)
            merged.shards.append(new)
            bar.update(shard.bytes)
    _delete_others(root, merged.shards)
    for name, content in Tokenizer(roots[0]).files().items():
        write_bytes(root / name, content)
    report = _report(roots)
    write_json(root / REPORT_NAME, report, indent=1)
    if report.get("duplicates_removed"):
        print(
            "note: --dedup removed exact copies within each part, not those of documents in another part; a build "
            "without --part removes them all",
            file=sys.stderr,
        )
    merged.shards.sort(key=lambda shard: (shard.split, shard.name))
    merged.save(root / INDEX_NAME)
    return merged


def _check_part(part: Path, index: ShardIndex, first: ShardIndex, first_root: Path) -> None:
    for key in ("tokenizer_sha256", "vocab_size", "eos_id", "dtype"):
        if (value := getattr(index, key)) != (want := getattr(first, key)):
            raise DataError(
                f"{part}: {key} = {value!r}, but that of {first_root} is {want!r}; build all parts with one tokenizer"
            )
    for shard in index.shards:
        if problem := shard.size_problem(part):
            raise DataError(f"{part / shard.path}: {problem}; copy it again, or build this part again")


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
    for split in ("train", "val"):
        for old in (root / split).glob(f"{split}-*.tar"):
            if f"{split}/{old.name}" not in kept:
                old.unlink()


def _report(roots: list[Path]) -> dict[str, Any]:
    """Counts added up, lists joined, and of switches whether all parts had them; `duplicates` are those within parts.

    A part of an earlier version has no report.
    """
    reports = [json.loads(path.read_text()) for root in roots if (path := root / REPORT_NAME).is_file()]
    total: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if key not in total:
                total[key] = value
            else:
                total[key] = total[key] and value if isinstance(value, bool) else total[key] + value
    parts = sum(report.get("parts", 1) for report in reports) + len(roots) - len(reports)
    return total | {"parts": parts, "duplicates_between_parts_removed": False}
