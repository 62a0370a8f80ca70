"""Reads one shard at a time: checked against the index, read with webdataset, in an order fixed by seed and epoch.

webdataset itself repeats one shard order every epoch, shuffles with global generators, does not notice
flipped payload bytes and can stop early at a truncated file; so the order and the checks are implemented here.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from megatron_dla.errors import DataError
from megatron_dla.shard_index import REBUILD, ShardIndex, ShardInfo, difference

Verify = Literal["sha256", "size", "none"]
_checked: set[tuple[str, int, int, str]] = set()  # (path, size, mtime, sha256) that this process has verified


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n), int64 [n], that depends on `key` alone, not on the numpy version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    # Raw generator output is a stable format; Generator.permutation is allowed to change between versions.
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


class ShardReader:
    """The shards of one split of a data directory.

    Attributes: `root`, `index`, `split`, `shards` (in index order).

    Raises DataError if the index is missing or damaged, or the split has no shards.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str] | ShardIndex, split: str, *, verify: Verify = "sha256",
        root: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        if verify not in get_args(Verify):
            raise DataError(f"verify = {verify!r}: must be one of {', '.join(get_args(Verify))}")
        if isinstance(data_dir, ShardIndex):
            if root is None:
                raise DataError(
                    "root is not set: an index does not name the directory of its shards, pass root=DIRECTORY too"
                )
            self.index, self.root = data_dir, Path(root)
        else:
            path = Path(data_dir)
            self.index = ShardIndex.load(path)
            self.root = path.parent if path.is_file() else path
        self.split = split
        self.verify = verify
        self.shards = self.index.split(split)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Shard numbers of an epoch, int64 [shards]: all shards shuffled, before they are split among streams."""
        return permutation(len(self.shards), "shards", seed, epoch)

    def document_order(self, shard: ShardInfo, seed: int, epoch: int) -> np.ndarray:
        """Order of a shard's documents in an epoch, int64 [documents]."""
        return permutation(shard.documents, "documents", seed, epoch, shard.path)

    def read(self, shard: ShardInfo) -> list[np.ndarray]:
        """All documents of a shard in stored order, each uint16 or uint32 [n_tokens] ending with eos.

        Raises DataError, naming the shard, if it is missing, differs from the index in size, checksum,
        documents or tokens, or contains anything but token arrays.
        """
        path = self.root / shard.path
        if self.verify != "none":
            self._check_file(path, shard)
        try:
            documents = read_tokens(path)
        except Exception as error:  # tarfile, webdataset and numpy raise many types for damaged bytes
            raise DataError(f"{path}: damaged shard ({type(error).__name__}: {error}); {REBUILD}") from error
        if len(documents) != shard.documents:
            raise _mismatch(path, "documents", shard.documents, len(documents))
        if (tokens := sum(len(document) for document in documents)) != shard.tokens:
            raise _mismatch(path, "tokens", shard.tokens, tokens)
        for number, document in enumerate(documents):
            if (kind := f"{document.ndim}-d {document.dtype}") != (want := f"1-d {self.index.dtype}"):
                raise _mismatch(path, f"document {number}", want, kind)
            if not len(document) or document[-1] != self.index.eos_id:
                raise DataError(f"{path}: document {number} does not end with eos {self.index.eos_id}; {REBUILD}")
        return documents

    def _check_file(self, path: Path, shard: ShardInfo) -> None:
        key = None
        if self.verify == "sha256" and path.is_file():
            stat = path.stat()
            key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, shard.sha256)
        if problem := shard.file_problem(self.root, checksum=key is not None and key not in _checked):
            raise DataError(f"{path}: {problem}; {REBUILD}")
        if key is not None:
            _checked.add(key)


def _mismatch(path: Path, what: str, expected: object, found: object) -> DataError:
    return DataError(f"{path}: {difference(what, expected, found)}; {REBUILD}")


def read_samples(path: Path) -> list[dict[str, bytes]]:
    """The raw samples of a tar file: `__key__`, `npy`, `json`. Raises whatever webdataset and tarfile raise."""
    import webdataset as wds

    pipeline = wds.DataPipeline(
        wds.SimpleShardList([str(path.absolute())]), wds.tarfile_to_samples(handler=wds.reraise_exception)
    )
    return list(pipeline)


def read_tokens(path: Path) -> list[np.ndarray]:
    """The token arrays of a tar file, unchecked."""
    return [np.load(io.BytesIO(sample["npy"]), allow_pickle=False) for sample in read_samples(path)]
