"""Reads one shard at a time: checked against the index, in an order fixed by seed and epoch.

A shard is a WebDataset tar with one sample: all tokens, where each document ends, and a record of the documents'
sources. Shards of index format 1 have a sample for each document, and are read as well. webdataset itself repeats one
shard order every epoch, shuffles with global generators, does not notice flipped payload bytes and can stop early at a
truncated file; so order, checks and reading are implemented here.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Callable
from typing import Any, BinaryIO, Literal, NamedTuple, get_args

import numpy as np

from megatron_dla.data.remote import RemoteDirectory, open_directory
from megatron_dla.errors import DataError
from megatron_dla.files import parse_json
from megatron_dla.shard_index import ENDS, REBUILD, RECORDS, TOKENS, ShardIndex, ShardInfo, difference

Verify = Literal["sha256", "size", "none"]
_GATHER = 1 << 18  # tokens
_checked: set[tuple[int, int, int, int, str]] = set()  # (device, inode, size, mtime, sha256) verified by this process


class Documents(NamedTuple):
    """The documents of a shard: `tokens` uint16 or uint32 [n_tokens], each document ending with eos, and `ends` int64
    [documents], where each ends in `tokens`."""

    tokens: np.ndarray
    ends: np.ndarray

    def split(self) -> list[np.ndarray]:
        """The tokens of each document, views of `tokens`."""
        ends = self.ends.tolist()
        return [self.tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def ordered(self, order: np.ndarray) -> Documents:
        """The documents in another order, copied; `order`: int64 [documents]."""
        lengths = np.diff(self.ends, prepend=0)[order]
        ends = np.cumsum(lengths)
        shift = self.ends[order] - ends  # from where a document comes to where it goes
        tokens = np.empty_like(self.tokens)
        # One gather for many documents: fast, and without the GIL. In parts, as its index takes 8 bytes a token.
        edges = np.searchsorted(ends, np.arange(_GATHER, len(tokens), _GATHER)) + 1
        for first, last in itertools.pairwise(np.unique([0, *edges, len(order)]).tolist()):
            start, end = int(ends[first] - lengths[first]), int(ends[last - 1])
            tokens[start:end] = self.tokens[np.arange(start, end) + np.repeat(shift[first:last], lengths[first:last])]
        return Documents(tokens, ends)


def permutation(n: int, *key: object) -> np.ndarray:
    """A permutation of range(n), int64 [n], that depends on `key` alone, not on the numpy version."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    # Raw generator output is a stable format; Generator.permutation is allowed to change between versions.
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    return np.argsort(raw, kind="stable")


class ShardReader:
    """The shards of one split of a data directory, given by its path or URL (see `open_directory`).

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
            self.index, self.root = data_dir, open_directory(root)
        else:
            path = open_directory(data_dir)
            self.index = ShardIndex.load(path)
            self.root = path.parent if not isinstance(path, RemoteDirectory) and path.is_file() else path
        self.split = split
        self.verify = verify
        self.shards = self.index.split(split)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Shard numbers of an epoch, int64 [shards]: all shards shuffled, before they are split among streams."""
        return permutation(len(self.shards), "shards", seed, epoch)

    def document_order(self, shard: ShardInfo, seed: int, epoch: int) -> np.ndarray:
        """Order of a shard's documents in an epoch, int64 [documents]."""
        return permutation(shard.documents, "documents", seed, epoch, shard.path)

    def read(self, shard: ShardInfo) -> Documents:
        """All documents of a shard in stored order.

        Raises DataError, naming the shard, if it is missing, differs from the index in size, checksum,
        documents or tokens, or contains anything but token arrays.
        """
        return self.documents(shard, self._content(shard))

    def documents(self, shard: ShardInfo, content: bytes) -> Documents:
        """The documents in the content of a shard's file. Raises DataError as `read` does."""
        path = f"{self.root}/{shard.path}"
        try:
            documents = read_documents(content)
        except Exception as error:  # tarfile and numpy raise many types for damaged bytes
            raise DataError(f"{path}: damaged shard ({type(error).__name__}: {error}); {REBUILD}") from error
        self._check(path, shard, documents)
        return documents

    def open(self, shard: ShardInfo) -> BinaryIO:
        """The shard's file, not checked. Raises OSError, and DataError where it cannot be fetched."""
        return self.root.open(shard) if isinstance(self.root, RemoteDirectory) else open(self.root / shard.path, "rb")

    def expect(self, shard: Callable[[], ShardInfo]) -> None:
        """Start to fetch the shard that will be read next, where it is at a URL."""
        if isinstance(self.root, RemoteDirectory):
            self.root.expect(shard())

    def _content(self, shard: ShardInfo) -> bytes:
        content, problem = self._read(shard)
        if problem and isinstance(self.root, RemoteDirectory):
            self.root.discard(shard)
            content, problem = self._read(shard)
        if problem:
            raise DataError(f"{self.root}/{shard.path}: {problem}; {REBUILD}")
        return content

    def _read(self, shard: ShardInfo) -> tuple[bytes, str]:
        """The content of a shard's file, and how it differs from the index ('': not at all)."""
        try:
            with self.open(shard) as file:
                status, content = os.fstat(file.fileno()), file.read()
        except OSError as error:
            raise DataError(f"{self.root}/{shard.path}: cannot be read ({error.strerror}); {REBUILD}") from error
        if self.verify != "none" and len(content) != shard.bytes:
            return content, difference("bytes", shard.bytes, len(content))
        if self.verify == "sha256":
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, shard.sha256)
            if key not in _checked and (digest := _sha256(content)) != shard.sha256:
                return content, difference("sha256", shard.sha256, digest)
            _checked.add(key)
        return content, ""

    def _check(self, path: str, shard: ShardInfo, documents: Documents) -> None:
        tokens, ends = documents
        if len(ends) != shard.documents:
            raise _mismatch(path, "documents", shard.documents, len(ends))
        if len(tokens) != shard.tokens:
            raise _mismatch(path, "tokens", shard.tokens, len(tokens))
        if tokens.dtype != self.index.dtype:
            raise _mismatch(path, "tokens", f"of {self.index.dtype}", tokens.dtype)
        if np.any(np.diff(ends, prepend=0) < 1) or ends[-1] != len(tokens):
            raise DataError(f"{path}: the documents do not end where their tokens do; {REBUILD}")
        if (wrong := np.flatnonzero(tokens[ends - 1] != self.index.eos_id)).size:
            raise DataError(f"{path}: document {wrong[0]} does not end with eos {self.index.eos_id}; {REBUILD}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _mismatch(path: str, what: str, expected: object, found: object) -> DataError:
    return DataError(f"{path}: {difference(what, expected, found)}; {REBUILD}")


def _members(content: bytes) -> dict[str, memoryview]:
    """{name: content} of a tar file."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            found[member.name] = memoryview(content)[member.offset_data : member.offset_data + member.size]
            if len(found[member.name]) != member.size:
                raise EOFError(f"{member.name} is cut off")
    return found


def _array(content: memoryview | bytes) -> np.ndarray:
    x = np.load(io.BytesIO(content), allow_pickle=False)
    if x.ndim != 1:
        raise ValueError(f"an array of shape {list(x.shape)}, not of one dimension")
    return x


def read_documents(content: bytes) -> Documents:
    """The documents of a tar file, unchecked. Raises whatever tarfile and numpy raise."""
    members = {name: part for name, part in _members(content).items() if name.endswith(".npy")}
    fields = {name.partition(".")[2]: part for name, part in members.items()}
    if TOKENS in fields:
        return Documents(_array(fields[TOKENS]), _array(fields[ENDS]).astype(np.int64))
    documents = [_array(part) for part in members.values()]
    return Documents(np.concatenate(documents), np.cumsum([len(document) for document in documents]))


def read_records(content: bytes) -> list[dict[str, Any]]:
    """`source` and `n_bytes` (of text) of each document in a tar file. Raises whatever tarfile and json raise."""
    return _records([bytes(part) for name, part in _members(content).items() if name.endswith(".json")])


def read_layout(file: BinaryIO) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Where each document of a tar file ends (int64 [documents]), and the records, without reading the tokens.

    Raises whatever tarfile, numpy and json raise. Files of format 1 are read whole.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = {member.name.partition(".")[2]: member for member in tar}
        if TOKENS in members:
            ends, records = (tar.extractfile(members[name]) for name in (ENDS, RECORDS))
            assert ends is not None and records is not None
            return _array(ends.read()).astype(np.int64), _records([records.read()])
    file.seek(0)
    content = file.read()
    return read_documents(content).ends, read_records(content)


def _records(parts: list[bytes]) -> list[dict[str, Any]]:
    records = [parse_json(part) for part in parts]
    if len(records) == 1 and "sources" in records[0]:
        columns = records[0]
        return [{"source": s, "n_bytes": n} for s, n in zip(columns["sources"], columns["n_bytes"], strict=True)]
    return records
