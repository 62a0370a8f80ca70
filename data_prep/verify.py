"""Checks the shards of a data directory against its index and tokenizer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dla.data_prep.each_shard import for_each_shard
from megatron_dla.data_prep.tokenizer import Tokenizer, tokenizer_problem
from megatron_dla.errors import DataError
from megatron_dla.shard_index import REBUILD, ShardIndex, ShardInfo, content_problem, difference

if TYPE_CHECKING:
    from megatron_dla.data.remote import RemoteDirectory
    from megatron_dla.data.shards import Documents, ShardReader

_LISTED = 1000  # problems that an error names; the others are counted


@dataclass(frozen=True)
class VerifyReport:
    """Totals of a data directory without errors. `deep`: the tokens were checked, not only sizes and checksums."""

    directory: Path | RemoteDirectory
    deep: bool
    shards: int
    documents: int
    tokens: int
    text_bytes: int
    bytes: int

    def __str__(self) -> str:
        checked = "sizes, checksums and every token" if self.deep else "sizes and checksums"
        return (
            f"{self.directory}: {self.shards} shards ok ({checked}): {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {self.text_bytes:,} bytes of text, {self.bytes:,} bytes of shards"
        )


def verify_shards(directory: str | os.PathLike[str], *, deep: bool = True, workers: int | None = None) -> VerifyReport:
    """Check a data directory: files, sizes, SHA-256, tokenizer; with `deep` also every document.

    `deep` checks the number of documents and tokens, the dtype, that ids are below the vocabulary size, that eos is at
    the end of each document and nowhere else, and, where the tokenizer changes no text, that the tokens' bytes sum to
    the size of the text. `workers`: threads, each of which holds a shard; None: one per usable core.

    Raises DataError with a list of the problems (shard, expected, found; 1,000 at most) and the fix.
    """
    from megatron_dla.data.remote import open_directory  # imports torch, which the rest does without

    root = open_directory(directory)
    index = ShardIndex.load(root)
    if isinstance(root, Path) and root.is_file():
        root = root.parent
    token_bytes, problems = _check_tokenizer(root, index)
    for shard, wrong in for_each_shard(root, index, partial(_problems, token_bytes=token_bytes, deep=deep), workers):
        problems += [f"{shard.path}: {problem}" for problem in wrong]
    listed = {shard.path for shard in index.shards}
    if isinstance(root, Path):
        found = sorted(f"{split}/{file.name}" for split in index.splits for file in (root / split).glob("*.tar"))
        problems += [f"{path}: not in the index; delete it" for path in found if path not in listed]
    if problems:
        rest = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise DataError(
            f"{root}: {len(problems)} problem{'s' * (len(problems) > 1)}; {REBUILD}:\n  "
            + "\n  ".join([*problems[:_LISTED], *rest])
        )
    return VerifyReport(root, deep, **asdict(index.totals()))


def _check_tokenizer(root: Path | RemoteDirectory, index: ShardIndex) -> tuple[np.ndarray | None, list[str]]:
    """Bytes of each token, where they are exact, and the problems."""
    try:
        tokenizer = Tokenizer(root)
    except DataError as error:
        return None, [str(error)]
    if problem := tokenizer_problem(tokenizer, index):
        return None, [f"{tokenizer.path.name}: {problem}"]
    return tokenizer.token_bytes() if tokenizer.exact_bytes and not tokenizer.losses else None, []


def _problems(reader: ShardReader, shard: ShardInfo, *, token_bytes: np.ndarray | None, deep: bool) -> list[str]:
    from megatron_dla.data.shards import read_records

    try:
        with reader.open(shard) as file:
            content = file.read()
    except OSError as error:
        return [f"cannot be read ({error.strerror})"]
    except DataError as error:
        return [str(error)]
    if problem := content_problem(shard, content):
        return [problem]
    if not deep:
        return []
    try:
        documents, records = reader.documents(shard, content), read_records(content)
        n_bytes = np.array([int(record["n_bytes"]) for record in records], dtype=np.int64)
    except (DataError, KeyError, TypeError, ValueError, OverflowError) as error:
        return [f"{type(error).__name__}: {error}"]
    if len(records) != len(documents.ends):
        return [difference("records", len(documents.ends), len(records))]
    problems = [
        f"document {i}: {problem}" for i, problem in _in_documents(documents, n_bytes, reader.index, token_bytes)
    ]
    if (total := int(n_bytes.sum())) != shard.text_bytes:
        problems.append(difference("text_bytes", shard.text_bytes, total))
    return problems


def _in_documents(
    documents: Documents, n_bytes: np.ndarray, index: ShardIndex, token_bytes: np.ndarray | None
) -> list[tuple[int, str]]:
    """(number, problem), the first of each kind in a document, sorted by document."""
    tokens, ends = documents
    starts = ends - np.diff(ends, prepend=0)

    def firsts(positions: np.ndarray) -> list[tuple[int, int, int]]:
        """(document, position in it, token) of the first position in each document."""
        found, first = np.unique(np.searchsorted(ends, positions, side="right"), return_index=True)
        at = positions[first]
        return list(zip(found.tolist(), (at - starts[found]).tolist(), tokens[at].tolist(), strict=True))

    large = firsts(np.flatnonzero(tokens >= index.vocab_size))
    problems = [(i, f"token {token} is not below vocab_size {index.vocab_size}") for i, _, token in large]
    is_end = tokens == index.eos_id
    is_end[ends - 1] = False
    inside = firsts(np.flatnonzero(is_end))
    problems += [(i, f"eos {index.eos_id} at token {at}, before the end") for i, at, _ in inside]
    if token_bytes is not None:
        sums = np.add.reduceat(token_bytes[np.minimum(tokens, index.vocab_size - 1)].astype(np.int64), starts)
        wrong = np.setdiff1d(np.flatnonzero(sums != n_bytes), [i for i, *_ in large])
        problems += [
            (i, f"{difference('n_bytes', int(n_bytes[i]), int(sums[i]))} as the sum over its tokens")
            for i in wrong.tolist()
        ]
    return sorted(problems)
