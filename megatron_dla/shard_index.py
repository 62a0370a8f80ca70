"""`index.json`: the contents of a data directory. It is written last, so its presence means that the build finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_dla.errors import DataError
from megatron_dla.files import parse_json, write_text

FORMAT_VERSION = 2
_READABLE = (1, 2)  # 1: shards with a sample for each document
TOKENS, ENDS, RECORDS = "tokens.npy", "ends.npy", "records.json"  # the members of a shard, after its key
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"  # beside TOKENIZER_JSON, which does not say what ends a document
# Enough for the data.num_streams of every shipped config and for data-parallel sizes up to 64: a stream needs a shard.
MIN_TRAIN_SHARDS = 64
REBUILD = "rebuild with `dla data shards ... --overwrite` or copy it again"


_SHA256 = re.compile("[0-9a-f]{64}")


def difference(what: str, expected: object, found: object) -> str:
    """The words for a value that is not the one in the index."""
    return f"expected {what} {expected}, found {found}"


def _is_name(*names: str) -> bool:
    return all(name not in ("", ".", "..") and "/" not in name and name.isprintable() for name in names)


@dataclass(frozen=True)
class ShardInfo:
    """One tar file `<split>/<name>`: its size, checksum and content. `tokens` includes each eos."""

    name: str
    split: str
    bytes: int
    sha256: str
    documents: int
    tokens: int
    text_bytes: int

    @property
    def path(self) -> str:
        """Path inside the data directory."""
        return f"{self.split}/{self.name}"

    def size_problem(self, root: Path) -> str:
        """How the file below the data directory `root` differs in size; empty if it does not."""
        try:
            size = (root / self.path).stat().st_size
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return difference("bytes", self.bytes, size) if size != self.bytes else ""


def content_problem(shard: ShardInfo, content: bytes) -> str:
    """How the content of a shard's file differs in size or SHA-256; empty if it does not."""
    if len(content) != shard.bytes:
        return difference("bytes", shard.bytes, len(content))
    digest = hashlib.sha256(content).hexdigest()
    return difference("sha256", shard.sha256, digest) if digest != shard.sha256 else ""


@dataclass(frozen=True)
class Totals:
    """Sums over shards. `text_bytes`: of UTF-8 text. `bytes`: of the tar files."""

    shards: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int


@dataclass
class ShardIndex:
    """The content of `index.json`. `dtype`: of the stored tokens. `sources`: one record per input."""

    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    shards: list[ShardInfo]
    seed: int
    created_by: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ShardIndex:
        """Read an index file, or the `index.json` of a directory. Raises DataError if missing, damaged or too new."""
        file = Path(path)
        file = file / INDEX_NAME if file.is_dir() else file
        if not file.is_file():
            raise DataError(
                f"{file}: no such index: the data is missing or its build did not finish; run `dla data shards` again, "
                "or copy the data again"
            )
        try:
            raw = parse_json(file.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a readable index ({error}); {REBUILD}") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version not in _READABLE:
            raise DataError(
                f"{file}: format_version = {version!r}, but this megatron-dla reads {FORMAT_VERSION} and older; use "
                "the version that wrote it, or rebuild with `dla data shards ... --overwrite`"
            )
        try:
            index = cls(**{**raw, "shards": [ShardInfo(**shard) for shard in raw["shards"]]})
            index._check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError(f"{file}: damaged index ({error}); {REBUILD}") from error
        return index

    def _check(self) -> None:
        if self.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype = {self.dtype!r}: must be uint16 or uint32")
        kinds = {"int": int, "str": str}
        parts: list[ShardIndex | ShardInfo] = [self, *self.shards]
        for part in parts:
            for item in fields(part):
                want = kinds.get(str(item.type))
                if want and type(getattr(part, item.name)) is not want:
                    raise ValueError(f"{item.name} = {getattr(part, item.name)!r}: must be {item.type}")
        most = 2 ** (16 if self.dtype == "uint16" else 24)
        if not 2 <= self.vocab_size <= most or not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"vocab_size = {self.vocab_size}, eos_id = {self.eos_id}: must be 2 to {most}, and a token below it"
            )
        if not isinstance(self.sources, list) or not all(isinstance(source, dict) for source in self.sources):
            raise ValueError("sources must be a list of records")
        if not self.shards:
            raise ValueError("shards is empty")
        for shard in self.shards:
            if min(shard.documents, shard.tokens, shard.bytes) < 1 or not _is_name(shard.name, shard.split):
                raise ValueError(f"shard {shard.path!r} is empty or has a name that is no file")
            if not _SHA256.fullmatch(shard.sha256):  # it names a file of the cache
                raise ValueError(f"sha256 = {shard.sha256!r} of {shard.path}: must be 64 hexadecimal digits")
        if len({shard.path for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is listed twice")

    def _json(self) -> str:
        return json.dumps({"format_version": self.format_version, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically to a file, or as `index.json` into a directory."""
        file = Path(path)
        write_text(file / INDEX_NAME if file.is_dir() else file, self._json())

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that determines which tokens are read, and in which order."""
        content = [self.tokenizer_sha256, self.dtype, self.eos_id, [[s.path, s.sha256] for s in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have shards, sorted."""
        return sorted({shard.split for shard in self.shards})

    def split(self, name: str) -> list[ShardInfo]:
        """The shards of a split, in index order. Raises DataError if there are none."""
        shards = [shard for shard in self.shards if shard.split == name]
        if not shards:
            fix = "; rebuild with --val-fraction above 0" if name == "val" else ""
            raise DataError(f"split {name!r} has no shards; the splits of this data are {self.splits}{fix}")
        return shards

    def totals(self, split: str | None = None) -> Totals:
        """Sums over one split, or over everything."""
        s = [shard for shard in self.shards if split in (None, shard.split)]
        return Totals(
            len(s), sum(x.documents for x in s), sum(x.tokens for x in s), sum(x.text_bytes for x in s),
            sum(x.bytes for x in s),
        )  # fmt: skip
