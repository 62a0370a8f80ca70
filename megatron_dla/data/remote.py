"""Data directories at URLs: shards are fetched when they are needed, into a cache on a local disk.

http and https are read with the standard library, the other protocols with fsspec and its package for each of them.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import importlib
import netrc
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dla.errors import DataError, UserError
from megatron_dla.files import atomic_path, parse_json, write_bytes
from megatron_dla.masking import check_url, mask_text
from megatron_dla.shard_index import (
    INDEX_NAME,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    TOKENIZER_NAME,
    ShardIndex,
    ShardInfo,
    content_problem,
    difference,
)

CACHE_GB = 50.0
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
_TRIES, _WAIT_S, _MOST_WAIT_S = 8, 1.0, 30.0  # the wait doubles each time: 1.5 minutes in all
_TIMEOUT_S = 60.0  # without a byte
_POLL_S = 0.05  # while another process fetches the same shard
_AT_ONCE = 4  # shards that a process fetches ahead at once
_PASSING = {408, 425, 429}  # answers below 500 after which the same request may succeed
_wait = random.SystemRandom()  # the generators of `random` belong to the run


def is_url(path: object) -> bool:
    """Whether a data directory is named by a URL."""
    return isinstance(path, str) and "://" in path


def default_cache() -> Path:
    """`~/.cache/megatron-dla`, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-dla"


def open_directory(
    path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] = "", cache_gb: float = CACHE_GB
) -> Path | RemoteDirectory:
    """A data directory by its path or URL. Of a URL, index and tokenizer are fetched.

    Args:
        cache_dir: directory for what is fetched ("": `default_cache()`); processes of one machine may share it.
        cache_gb: size of the shards in it, in 1e9 bytes.

    Raises DataError if they cannot be fetched, are damaged, or a shard does not fit into the cache.
    """
    if isinstance(path, RemoteDirectory):
        return path
    if not is_url(path):
        return Path(path)
    return RemoteDirectory(str(path), Path(cache_dir or default_cache()).expanduser(), int(cache_gb * 1e9))


def local_directory(path: str, cache_dir: str = "") -> Path:
    """A data directory, or, of a URL, where `open_directory` keeps its index and tokenizer; nothing is fetched."""
    if not is_url(path):
        return Path(path)
    cache = Path(cache_dir or default_cache()).expanduser()
    return cache / "directories" / hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:16]


class RemoteDirectory(os.PathLike[str]):
    """A data directory at a URL.

    As a path it is a local directory with the index and the tokenizer; `open` gives its shards.

    Attributes: `url`; `fetched` (shards) and `retries`, counted in this process.
    """

    def __init__(self, url: str, cache: Path, limit: int) -> None:
        try:
            self.url = check_url(url).rstrip("/")
        except ValueError as error:
            raise DataError(f"{mask_text(url)!r}: {error}") from None
        self.fetched = self.retries = 0
        self._get = _reader(self.url)
        self._shards = ShardCache(cache, limit)
        self._local = local_directory(self.url, str(cache))
        self._ahead: dict[str, Future[BinaryIO]] = {}
        self._turn = threading.BoundedSemaphore(_AT_ONCE)
        self._fetch_files()

    def __fspath__(self) -> str:
        return str(self._local)

    def __str__(self) -> str:
        return self.url

    def _fetch_files(self) -> None:
        """The tokenizer, then the index, which says that the rest is there."""
        content = self.fetch(INDEX_NAME, _json_problem)
        tokenizer = str(parse_json(content).get("tokenizer_sha256"))
        files = {}
        for name in (TOKENIZER_NAME, TOKENIZER_JSON):
            try:
                files[name] = self.fetch(name, lambda found: _sha256_problem(found, tokenizer))
            except _NotThereError as error:
                if name == TOKENIZER_JSON:
                    raise DataError(f"{error}, nor {TOKENIZER_NAME}") from error
            else:
                break
        if TOKENIZER_JSON in files:
            files[TOKENIZER_CONFIG] = self.fetch(TOKENIZER_CONFIG, _json_problem)
        with self._shards.errors():
            self._local.mkdir(parents=True, exist_ok=True)
            for name, found in {**files, INDEX_NAME: content}.items():
                write_bytes(self._local / name, found)
        try:
            index = ShardIndex.load(self._local)
        except DataError as error:
            raise DataError(str(error).replace(str(self._local), self.url)) from error
        self._shards.check_room(self.url, index)

    def fetch(self, name: str, problem: Callable[[bytes], str]) -> bytes:
        """A file of the directory, tried again until `problem` finds none (''), with longer and longer waits.

        Raises DataError after the last try, and immediately where the file is not there or not for us.
        """
        url = f"{self.url}/{name}"
        for number in range(1, _TRIES + 1):
            try:
                content = self._get(url)
                what = problem(content)
            except Exception as error:  # fsspec's packages raise errors of their own
                _raise_final(url, error)
                what = f"{type(error).__name__}: {error}".removesuffix(": ")
            if not what:
                return content
            if number < _TRIES:
                wait = min(_MOST_WAIT_S, _WAIT_S * 2 ** (number - 1)) * _wait.uniform(0.5, 1)
                self.retries += 1
                print(f"note: {url}: {what}; try {number + 1} of {_TRIES} in {wait:.1f} s", file=sys.stderr, flush=True)
                time.sleep(wait)
        raise DataError(f"{url}: {what}, after {_TRIES} tries; check the network, or copy the data there again")

    def open(self, shard: ShardInfo) -> BinaryIO:
        """The shard, fetched if it is not in the cache, and kept there until the file is closed.

        Raises DataError if it cannot be fetched, is not the one of the index, or the cache cannot be written.
        """
        ahead = self._ahead.pop(shard.sha256, None)
        return self._obtain(shard) if ahead is None else ahead.result()

    def expect(self, shard: ShardInfo) -> None:
        """Start to fetch a shard that will be opened soon, in a thread."""
        if shard.sha256 not in self._ahead:
            self._ahead[shard.sha256] = future = Future[BinaryIO]()
            threading.Thread(target=self._obtain_into, args=(future, shard), name="fetch", daemon=True).start()

    def discard(self, shard: ShardInfo) -> None:
        """Forget the local copy of a shard, which was damaged after it was fetched."""
        self._shards.delete(shard)

    def _obtain_into(self, future: Future[BinaryIO], shard: ShardInfo) -> None:
        try:
            with self._turn:
                future.set_result(self._obtain(shard))
        except BaseException as error:  # raised where the shard is opened
            future.set_exception(error)

    def _obtain(self, shard: ShardInfo) -> BinaryIO:
        while True:
            with self._shards.errors():
                if (file := self._shards.open(shard)) is not None:
                    return file
            with self._shards.claim(shard) as ours:
                if ours and not self._shards.path(shard).exists():
                    content = self.fetch(shard.path, lambda found: content_problem(shard, found))
                    self.fetched += 1
                    self._shards.add(shard, content)
            if not ours:
                time.sleep(_POLL_S)


class ShardCache:
    """Shards of any data directories by their SHA-256, shared by the processes of a machine.

    A file has its name once it is complete. Whoever uses one holds a shared lock on it; where there is no room for
    another, those that were not used for longest are deleted, but none with a lock. Locks end with their process.
    """

    def __init__(self, cache: Path, limit: int) -> None:
        self.folder, self.limit = cache / "shards", limit
        self._cache = cache
        self._told = False
        with self.errors():
            self.folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns errors of the disk into one that names the cache."""
        try:
            yield
        except OSError as error:
            fix = "needs a disk with file locks" if error.errno in (errno.ENOSYS, errno.ENOLCK) else "set another one"
            raise DataError(
                f"data.cache_dir = {str(self._cache)!r}: cannot be used ({error.strerror}); {fix}"
            ) from error

    def check_room(self, url: str, index: ShardIndex) -> None:
        """Raises DataError unless the shard in use and the next one fit."""
        need = 2 * max((shard.bytes for shard in index.shards), default=0)
        if need > self.limit:
            raise DataError(
                f"data.cache_gb = {self.limit / 1e9:g}: must be at least {need / 1e9:.2g}, two of the largest shards "
                f"of {url}, and better two for each stream that this machine reads"
            )

    def path(self, shard: ShardInfo) -> Path:
        """Where the shard is, if it is."""
        return self.folder / f"{shard.sha256}.tar"

    def open(self, shard: ShardInfo) -> BinaryIO | None:
        """The shard, locked until it is closed, or None if it is not here. A copy of another size is deleted."""
        path = self.path(shard)
        try:
            file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == shard.bytes:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # also where the disk does not note reads
            return file
        file.close()
        if status.st_nlink:
            self.delete(shard)
        return None

    def delete(self, shard: ShardInfo) -> None:
        """Delete a damaged copy."""
        with self._alone():
            self.path(shard).unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process adds or deletes shards meanwhile."""
        with self.errors(), open(self.folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def claim(self, shard: ShardInfo) -> Iterator[bool]:
        """Whether it is this caller who is to fetch the shard; of all processes and threads, one at a time is."""
        path = self.folder / f"{shard.sha256}.lock"
        with self.errors():
            file = open(path, "ab")  # noqa: SIM115 (closed below)
        with file:
            try:
                with self.errors():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except DataError as error:
                if not isinstance(error.__cause__, BlockingIOError):
                    raise
                yield False
                return
            if not os.fstat(file.fileno()).st_nlink:  # of a claim that has just ended
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)

    def add(self, shard: ShardInfo, content: bytes) -> None:
        """Write a shard whole, after others have made room for it."""
        with self._alone():
            self._make_room(len(content))
            with atomic_path(self.path(shard), fsync=False) as part:
                part.write_bytes(content)

    def _make_room(self, need: int) -> None:
        for part in self.folder.glob(".*.part"):
            part.unlink()  # only the holder of the lock writes: this one was killed
        found = [(entry.stat(), entry.path) for entry in os.scandir(self.folder) if entry.name.endswith(".tar")]
        total = need + sum(status.st_size for status, _ in found)
        for status, path in sorted(found, key=lambda item: item[0].st_atime_ns):
            if total <= self.limit:
                return
            with open(path, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.unlink(path)
            total -= status.st_size
        if total > self.limit and not self._told:
            self._told = True
            print(
                f"note: {self._cache} holds {total / 1e9:.3g} GB of shards in use, more than data.cache_gb = "
                f"{self.limit / 1e9:g}",
                file=sys.stderr, flush=True,
            )  # fmt: skip


class _NotThereError(DataError):
    """A file is not at its URL."""


def _raise_final(url: str, error: Exception) -> None:
    """Raise the errors that another try does not mend."""
    code = getattr(error, "code", None)
    if isinstance(error, UserError):
        raise error
    if isinstance(error, FileNotFoundError) or code in (404, 410):
        raise _NotThereError(f"{url}: no such file; check data.dir, or copy the data there again") from error
    if isinstance(error, PermissionError) or (isinstance(code, int) and 400 <= code < 500 and code not in _PASSING):
        raise _NotThereError(f"{url}: refused ({error}); check data.dir and your credentials for it") from error


def _reader(url: str) -> Callable[[str], bytes]:
    """What reads a file at a URL like this one."""
    protocol = url.partition("://")[0].lower()
    if protocol in ("http", "https"):
        return _read_http
    package = _PACKAGES.get(protocol)
    needed = f"fsspec {package}" if package else "fsspec"
    try:
        fsspec: Any = importlib.import_module("fsspec")
        files = fsspec.filesystem(protocol)
    except ImportError as error:
        raise DataError(f"data.dir = {url!r}: reading it needs {needed}; pip install {needed}") from error
    except ValueError as error:
        raise DataError(
            f"data.dir = {url!r}: protocol {protocol!r} is not known; use a path, https://, s3:// or gs://"
        ) from error
    return files.cat_file


def _read_http(url: str) -> bytes:
    request = urllib.request.Request(url)
    if login := _login(url):
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return answer.read()


def _login(url: str) -> str:
    """user:password for the host of a URL from ~/.netrc, or the file in NETRC; "" where there is none."""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(path).authenticators(urllib.parse.urlsplit(url).hostname or "")
    except FileNotFoundError:
        return ""
    except (OSError, netrc.NetrcParseError) as error:
        raise DataError(f"{str(path)!r} cannot be read ({type(error).__name__}): mend it, or set NETRC") from None
    return f"{found[0]}:{found[2]}" if found else ""


def _json_problem(content: bytes) -> str:
    try:
        return "" if isinstance(parse_json(content), dict) else "not a JSON object"
    except ValueError as error:
        return f"not JSON ({error})"


def _sha256_problem(content: bytes, expected: str) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return "" if digest == expected else difference("sha256", expected, digest)
