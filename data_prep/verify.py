"""Checks the shards of a data directory against its index and tokenizer."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError
from megatron_dla.shard_index import REBUILD, ShardIndex, ShardInfo, difference


@dataclass(frozen=True)
class VerifyReport:
    """Totals of a data directory without errors. `deep`: the tokens were checked, not only sizes and checksums."""

    directory: Path
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


def verify_shards(directory: str | os.PathLike[str], *, deep: bool = True) -> VerifyReport:
    """Check a data directory: files, sizes, SHA-256, tokenizer; with `deep` also every document.

    `deep` checks the number of documents and tokens, the dtype, that ids are below the vocabulary size, that eos is at
    the end of each document and nowhere else, and, where the tokenizer changes no text, that the tokens' bytes sum to
    the size of the text.

    Raises DataError with a list of all problems (shard, expected, found) and the fix.
    """
    root = Path(directory)
    index = ShardIndex.load(root)
    root = root.parent if root.is_file() else root
    problems: list[str] = []
    token_bytes: np.ndarray | None = None
    try:
        tokenizer = Tokenizer(root)
        if tokenizer.sha256 != index.tokenizer_sha256:
            problems.append(f"{tokenizer.path.name}: {difference('sha256', index.tokenizer_sha256, tokenizer.sha256)}")
        elif (tokenizer.vocab_size, tokenizer.eos_id) != (index.vocab_size, index.eos_id):
            ours, found = (index.vocab_size, index.eos_id), (tokenizer.vocab_size, tokenizer.eos_id)
            problems.append(f"{tokenizer.path.name}: {difference('(vocab_size, eos_id)', ours, found)}")
        else:
            token_bytes = tokenizer.token_bytes() if tokenizer.exact_bytes and not tokenizer.losses else None
    except DataError as error:
        problems.append(str(error))
    with progress_bar(index.totals().bytes, "verifying") as bar:
        for shard in index.shards:
            problems += [f"{shard.path}: {problem}" for problem in _problems(root, index, shard, token_bytes, deep)]
            bar.update(shard.bytes)
    listed = {shard.path for shard in index.shards}
    for split in index.splits:
        extra = sorted(file.name for file in (root / split).glob("*.tar") if f"{split}/{file.name}" not in listed)
        problems += [f"{split}/{name}: not in the index; delete it" for name in extra]
    if problems:
        raise DataError(
            f"{root}: {len(problems)} problem{'s' * (len(problems) > 1)}; {REBUILD}:\n  " + "\n  ".join(problems)
        )
    return VerifyReport(root, deep, **asdict(index.totals()))


def _problems(root: Path, index: ShardIndex, shard: ShardInfo, token_bytes: np.ndarray | None, deep: bool) -> list[str]:
    from megatron_dla.data.shards import ShardReader, read_records  # imports torch, which the rest does without

    if problem := shard.file_problem(root, checksum=True):
        return [problem]
    if not deep:
        return []
    try:
        documents = ShardReader(index, shard.split, verify="none", root=root).read(shard).split()
        sizes = [int(record["n_bytes"]) for record in read_records((root / shard.path).read_bytes())]
    except (DataError, KeyError, TypeError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    if len(sizes) != len(documents):
        return [difference("records", len(documents), len(sizes))]
    problems = []
    for number, (tokens, n_bytes) in enumerate(zip(documents, sizes, strict=True)):
        name = f"document {number}"
        if (top := int(tokens.max())) >= index.vocab_size:
            problems.append(f"{name}: token {top} is not below vocab_size {index.vocab_size}")
        elif token_bytes is not None and (found := int(token_bytes[tokens].sum())) != n_bytes:
            problems.append(f"{name}: {difference('n_bytes', n_bytes, found)} as the sum over its tokens")
        if (inside := np.flatnonzero(tokens[:-1] == index.eos_id)).size:
            problems.append(f"{name}: eos {index.eos_id} at token {inside[0]}, before the end")
    if (total := sum(sizes)) != shard.text_bytes:
        problems.append(difference("text_bytes", shard.text_bytes, total))
    return problems
