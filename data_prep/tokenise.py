"""Tokenise documents in worker processes into one spool file, in input order for every worker count."""

from __future__ import annotations

import hashlib
import multiprocessing
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.sources import Document, DocumentSource
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError

_CHUNK_BYTES = 1 << 18  # text per task of a worker process
# one per document: tokens, UTF-8 bytes, content hash, source, whether the tokens decode to another text
Encoded = list[tuple[bytes, int, int, str, bool]]

_tokenizer: Tokenizer | None = None  # set in each worker process


def _start_worker(path: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(path)


def _encode_in_worker(documents: list[Document], seed: int) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, documents, seed)


def _encode(tokenizer: Tokenizer, documents: list[Document], seed: int) -> Encoded:
    dtype = token_dtype(tokenizer)
    out: Encoded = []
    for text, source, n_bytes in documents:
        ids = tokenizer.encode(text)
        changed = bool(tokenizer.losses) and tokenizer.decode(ids) != text
        tokens = np.array([*ids, tokenizer.eos_id], dtype=dtype)
        # Hash of the content, so that exact copies of a document end up in the same split.
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
        out.append((tokens.tobytes(), n_bytes, int.from_bytes(digest, "big"), source, changed))
    return out


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest little-endian type that holds every token id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


@dataclass
class Spool:
    """Tokenised documents in input order. The tokens are in `file`; the lists have one entry per document."""

    file: Path
    n_tokens: array[int] = field(default_factory=lambda: array("q"))
    n_bytes: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    sources: list[str] = field(default_factory=list)
    changed: int = 0


def _chunks(source: DocumentSource) -> Iterator[tuple[list[Document], int]]:
    chunk: list[Document] = []
    size = 0
    for document in source.documents():
        chunk.append(document)
        size += document.n_bytes
        if size >= _CHUNK_BYTES:
            yield chunk, source.bytes_read
            chunk, size = [], 0
    if chunk:
        yield chunk, source.bytes_read


def _encoded(
    chunks: Iterable[tuple[list[Document], int]], tokenizer: Tokenizer, workers: int, seed: int
) -> Iterator[tuple[Encoded, int]]:
    """Encode chunks in order, keeping at most 3 * workers + 1 of them in memory."""
    if workers == 1:
        for documents, position in chunks:
            yield _encode(tokenizer, documents, seed), position
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(tokenizer.path),)
    )
    waiting: deque[tuple[Future[Encoded], int]] = deque()
    try:
        for documents, position in chunks:
            waiting.append((pool.submit(_encode_in_worker, documents, seed), position))
            if len(waiting) > 3 * workers:
                future, position = waiting.popleft()
                yield future.result(), position
        for future, position in waiting:
            yield future.result(), position
    except BrokenProcessPool as error:
        raise DataError(
            f"workers = {workers}: a worker process died, probably out of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def tokenise(source: DocumentSource, tokenizer: Tokenizer, spool: Spool, workers: int, seed: int) -> None:
    """Fill `spool` with the documents of `source`, each ending with eos.

    Raises DataError, after all documents, if there were bad records or damaged files.
    """
    itemsize = token_dtype(tokenizer).itemsize
    with open(spool.file, "wb") as out, progress_bar(source.total_bytes, "tokenising") as bar:
        for encoded, position in _encoded(_chunks(source), tokenizer, workers, seed):
            for tokens, n_bytes, digest, name, changed in encoded:
                out.write(tokens)
                spool.n_tokens.append(len(tokens) // itemsize)
                spool.n_bytes.append(n_bytes)
                spool.hashes.append(digest)
                spool.sources.append(name)
                spool.changed += changed
            bar.set_postfix_str(f"{len(spool.sources):,} documents", refresh=False)
            bar.update(position - bar.n)
        bar.update(source.total_bytes - bar.n)  # what is left out at the end is part of no chunk
    source.check()
