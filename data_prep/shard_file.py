"""Writes one shard: a tar with one sample that holds all documents."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np

from megatron_dla.data_prep.readers import refuse_url, shown
from megatron_dla.errors import DataError
from megatron_dla.files import file_sha256, naming_full_disk
from megatron_dla.shard_index import ENDS, INDEX_NAME, RECORDS, TOKENS, ShardIndex, ShardInfo

SPLITS = ("train", "val")
# folders that commands work in, inside their output
UNFINISHED = {".building": "shards", ".built-*": "shards", ".merging": "merge"}


def check_exists(root: Path, overwrite: bool) -> None:
    """Raises DataError for an existing index without `overwrite`."""
    if (root / INDEX_NAME).exists() and not overwrite:
        raise DataError(f"{root / INDEX_NAME}: exists; pass --overwrite to replace this data, or another --output")


def check_creatable(folder: Path, option: str = "--output") -> None:
    """Raises DataError where `folder` is none, or cannot be made or written to. Makes nothing."""
    refuse_url(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "cannot be written to" if there.is_dir() else "not a directory"
        raise DataError(f"{shown(there)}: {what}; choose another {option}")


def check_output(root: Path, own: str) -> None:
    """Refuse an output that a build or merge may not write to.

    Args:
        own: the folder in it that the caller works in. Where it exists, shards without an index may be those of a
            caller that was killed at its end.

    Raises DataError where nothing can be written, for the unfinished work of another command, and for a tar file in a
    split's directory that the index of `root` does not list: it would be replaced or deleted, and is of somebody else.
    """
    check_creatable(root)
    for name, command in UNFINISHED.items():
        for path in root.glob(name) if command != UNFINISHED[own] else ():
            raise DataError(
                f"{path}: of a `dla data {command}` that is running or was stopped; end it, run it again or delete "
                "this folder, or choose another --output"
            )
    if (root / own).exists():
        return
    listed: set[str] = set()
    if (root / INDEX_NAME).exists():
        try:
            listed = {shard.path for shard in ShardIndex.load(root).shards}
        except DataError:  # damaged: what it listed is not known, and a new build is how to repair it
            return
    for split in SPLITS:
        for path in sorted((root / split).glob("*.tar")):
            if f"{split}/{path.name}" not in listed:
                raise DataError(
                    f"{path}: in no {INDEX_NAME}, so of an older build or of somebody else; move or delete it, or "
                    "choose another --output"
                )


def write_shard(
    path: Path, split: str, tokens: np.ndarray, ends: np.ndarray, sources: list[str], n_bytes: list[int]
) -> ShardInfo:
    """Write a shard that is on the disk on return; equal documents give equal bytes.

    Args:
        tokens: uint16 or uint32 [n_tokens], each document ending with eos. ends: int64 [documents], where each ends.
        sources, n_bytes: of each document, where it comes from and its size in bytes of UTF-8.

    Returns:
        Its entry in the index.
    """
    columns = json.dumps({"sources": sources, "n_bytes": n_bytes}, ensure_ascii=False)
    sample = {TOKENS: _npy(tokens), ENDS: _npy(ends), RECORDS: columns.encode()}
    with naming_full_disk(path), open(path, "wb") as file:
        # as webdataset.TarWriter writes it, which would import torch into the build
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in sorted(sample.items()):
                # no time of the build, with which two builds of the same data would differ
                member = tarfile.TarInfo(f"{path.stem}.{name}")
                member.size, member.mode, member.uname, member.gname = len(content), 0o444, "bigdata", "bigdata"
                tar.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
    return ShardInfo(
        name=path.name, split=split, bytes=path.stat().st_size, sha256=file_sha256(path), documents=len(ends),
        tokens=len(tokens), text_bytes=sum(n_bytes),
    )  # fmt: skip


def _npy(tokens: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, tokens, allow_pickle=False)
    return out.getvalue()
