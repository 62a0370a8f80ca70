"""Checks a data directory against its index, and its shards against the tokenizer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dla.data_prep.index import REBUILD, TOKENIZER_NAME, ShardIndex, ShardInfo
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError


@dataclass(frozen=True)
class VerifyReport:
    """What was found good. `deep`: the tokens were looked at, not only sizes and checksums."""

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
            f"{self.directory}: {self.shards} shards good ({checked}): {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {self.text_bytes:,} bytes of text, {self.bytes:,} bytes of shards"
        )


def verify_shards(directory: str | os.PathLike[str], *, deep: bool = True) -> VerifyReport:
    """Check a data directory: files, sizes, SHA-256, tokenizer; with `deep` also every document.

    Deep: number of documents and tokens, dtype, ids below the vocabulary size, eos at the end of each document
    and nowhere else, and the text size that the tokens add up to.

    Raises DataError that lists every problem (shard, expected, found) and the fix.
    """
    root = Path(directory)
    index = ShardIndex.load(root)
    root = root.parent if root.is_file() else root
    problems: list[str] = []
    token_bytes: np.ndarray | None = None
    try:
        tokenizer = Tokenizer(root / TOKENIZER_NAME)
        if tokenizer.sha256 != index.tokenizer_sha256:
            problems.append(f"{TOKENIZER_NAME}: sha256 want {index.tokenizer_sha256}, found {tokenizer.sha256}")
        elif (tokenizer.vocab_size, tokenizer.eos_id) != (index.vocab_size, index.eos_id):
            found = f"{tokenizer.vocab_size} and {tokenizer.eos_id}"
            problems.append(
                f"index: vocab_size and eos_id {index.vocab_size} and {index.eos_id}, tokenizer has {found}"
            )
        else:
            token_bytes = tokenizer.token_bytes()
    except DataError as error:
        problems.append(str(error))
    for shard in index.shards:
        problems += [f"{shard.path}: {problem}" for problem in _shard_problems(root, index, shard, token_bytes, deep)]
    listed = {shard.path for shard in index.shards}
    for split in index.splits:
        extra = sorted(file.name for file in (root / split).glob("*.tar") if f"{split}/{file.name}" not in listed)
        problems += [f"{split}/{name}: not in the index; delete it" for name in extra]
    if problems:
        raise DataError(
            f"{root}: {len(problems)} problem{'s' * (len(problems) > 1)}; {REBUILD}:\n  " + "\n  ".join(problems)
        )
    totals = index.totals()
    return VerifyReport(
        root, deep, totals.shards, totals.documents, totals.tokens, totals.text_bytes, totals.bytes
    )  # fmt: skip


def _shard_problems(
    root: Path, index: ShardIndex, shard: ShardInfo, token_bytes: np.ndarray | None, deep: bool
) -> list[str]:
    from megatron_dla.data.shards import ShardReader, read_samples  # imports torch, which the rest does without
    from megatron_dla.files import file_sha256

    path = root / shard.path
    try:
        if (size := path.stat().st_size) != shard.bytes:
            return [f"want {shard.bytes} bytes, found {size}"]
        if (digest := file_sha256(path)) != shard.sha256:
            return [f"sha256 want {shard.sha256}, found {digest}"]
    except OSError as error:
        return [f"want {shard.bytes} bytes, found none ({error.strerror})"]
    if not deep:
        return []
    try:
        documents = ShardReader(index, shard.split, verify="none", root=root).read(shard)
        records = [json.loads(sample["json"]) for sample in read_samples(path)]
        sizes = [(record["n_tokens"], record["n_bytes"]) for record in records]
    except (DataError, KeyError, TypeError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    problems = []
    for number, (tokens, (n_tokens, n_bytes)) in enumerate(zip(documents, sizes, strict=True)):
        name = f"document {number}"
        if len(tokens) != n_tokens:
            problems.append(f"{name}: want {n_tokens} tokens, found {len(tokens)}")
        if (top := int(tokens.max())) >= index.vocab_size:
            problems.append(f"{name}: token {top}, want below vocab_size {index.vocab_size}")
        elif token_bytes is not None and (found := int(token_bytes[tokens].sum())) != n_bytes:
            problems.append(f"{name}: want {n_bytes} bytes of text, its tokens add up to {found}")
        if (inside := np.flatnonzero(tokens[:-1] == index.eos_id)).size:
            problems.append(f"{name}: eos {index.eos_id} inside, at token {inside[0]}")
    if (total := sum(size[1] for size in sizes)) != shard.text_bytes:
        problems.append(f"want {shard.text_bytes} bytes of text, found {total}")
    return problems
