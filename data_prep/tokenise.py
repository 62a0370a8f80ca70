"""Tokenise documents in worker processes into a spool, in input order for every worker count."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from megatron_dla.console import progress_bar
from megatron_dla.data_prep.sources import Document, DocumentSource, Progress
from megatron_dla.data_prep.spool import COMMIT_S, DOCUMENT, Encoded, Spool
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import DataError

_CHUNK_BYTES, _CHUNK_DOCUMENTS = 1 << 18, 1 << 13  # text, and documents at most, per task of a worker process
Position = tuple[int, Progress]  # bytes read, and what was found, up to a document

_tokenizer: Tokenizer | None = None  # set in each worker process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _return_large_blocks() -> None:
    """Have glibc return freed blocks of over 1 MB to the system.

    It would keep them after the first long document, and the heap would grow with the number of such documents.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for name in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(name, 1 << 20)


def _start_worker(path: str) -> None:
    global _tokenizer
    _return_large_blocks()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = Tokenizer(path)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that start inside never see Ctrl-C, not even while they import: the build ends them."""
    multiprocessing.resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A worker of a build that was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(documents: list[Document], seed: int) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, documents, seed)


def _encode(tokenizer: Tokenizer, documents: list[Document], seed: int) -> Encoded:
    dtype, key = token_dtype(tokenizer), str(seed).encode()
    tokens, ends, digests, changed = array(dtype.char), [0], [], 0
    for document, parts in zip(documents, tokenizer.parts_of_each([d.text for d in documents]), strict=True):
        for ids in parts:
            tokens.extend(ids)
        if tokenizer.losses:
            changed += tokenizer.decode(tokens[ends[-1] :]) != document.text
        tokens.append(tokenizer.eos_id)
        ends.append(len(tokens))
        # Hash of the content, so that exact copies of a document end up in the same split.
        digests.append(hashlib.blake2b(document.text.encode(), digest_size=8, key=key).digest())
    rows = np.zeros(len(documents), DOCUMENT)
    rows["n_tokens"], rows["hash"] = np.diff(ends), np.frombuffer(b"".join(digests), ">u8")
    for column, name in enumerate(("n_bytes", "file", "number"), 1):
        rows[name] = [document[column] for document in documents]
    return Encoded(np.array(tokens, dtype).tobytes(), rows, changed)


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest little-endian type that holds every token id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _chunks(source: DocumentSource, after: Progress) -> Iterator[tuple[list[Document], Position]]:
    chunk: list[Document] = []
    size = 0
    for document in source.documents(after):
        chunk.append(document)
        size += document.n_bytes
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk, (source.bytes_read, copy.deepcopy(source.progress))
            chunk, size = [], 0
    yield chunk, (source.bytes_read, source.progress)


def _encoded(
    chunks: Iterable[tuple[list[Document], Position]], tokenizer: Tokenizer, workers: int, seed: int
) -> Iterator[tuple[Encoded, Position]]:
    """Encode chunks in order, keeping at most 3 * workers + 1 of them in memory."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a thread for each of the processes, which inherit it
    if workers == 1:
        for documents, position in chunks:
            yield _encode(tokenizer, documents, seed), position
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(str(tokenizer.path),)
    )
    waiting: deque[tuple[Future[Encoded], Position]] = deque()
    try:
        for documents, position in chunks:
            with _without_ctrl_c():  # starts a worker as long as all are busy
                future = pool.submit(_encode_in_worker, documents, seed)
            waiting.append((future, position))
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
    """Fill `spool` with the documents of `source` that it does not have yet, each ending with eos.

    Raises DataError, after all documents, if there were bad records or damaged files.
    """
    _return_large_blocks()
    with progress_bar(source.total_bytes, "tokenising") as bar:
        try:
            chunks = _chunks(source, copy.deepcopy(spool.progress))
            for encoded, (bytes_read, progress) in _encoded(chunks, tokenizer, workers, seed):
                spool.add(encoded, progress)
                spool.commit(due=COMMIT_S)
                bar.set_postfix_str(f"{spool.documents:,} documents", refresh=False)
                bar.update(bytes_read - bar.n)
        finally:
            spool.commit()
        bar.update(source.total_bytes - bar.n)
    source.check()
