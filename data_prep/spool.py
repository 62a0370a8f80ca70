"""Tokenised documents on disk, in input order, of a build that may be stopped and go on.

`tokens` holds the ids, `documents` a record for each document, `plan.json` what the build depends on, and
`progress.jsonl` a line for each commit: how much of the two files is valid, and where reading goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_dla.data_prep.sources import Progress
from megatron_dla.errors import DataError
from megatron_dla.files import naming_full_disk, parse_json, write_json, write_text

COMMIT_S = 5.0
DOCUMENT = np.dtype(
    [
        ("start", "<u8"),  # in tokens
        ("n_tokens", "<u8"),
        ("n_bytes", "<u8"),  # of UTF-8 text
        ("hash", "<u8"),
        ("file", "<u4"),
        ("number", "<u8"),
    ]
)


class Encoded(NamedTuple):
    """Tokens of documents, one after the other; their records, DOCUMENT [documents] without `start`; how many of them
    the tokenizer does not reproduce."""

    tokens: bytes
    rows: np.ndarray
    changed: int


_PLAN, _LOG, _LOCK = "plan.json", "progress.jsonl", "lock"


class Spool:
    """The tokens and records of a build in `folder`.

    Attributes:
        documents, tokens: how many are there. changed: documents that the tokenizer does not reproduce.
        progress: what of the inputs is in the spool.

    Args:
        plan: everything that the spool depends on but the inputs. inputs: [name, size, time] of each file. A spool of
            the same plan is continued, from the first file that differs; any other is thrown away, with a note.

    Raises DataError if another process builds in `folder`.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], plan: dict[str, Any], inputs: list[list[Any]]) -> None:
        self.folder, self.dtype = folder, dtype
        self.documents = self.tokens = self.changed = 0
        self.progress = Progress()
        self._committed = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(folder)
        try:
            self._resume(plan, inputs)
            self._files = [self._open("tokens", self.tokens * dtype.itemsize), self._open("documents", self._size())]
        except BaseException:
            self._lock.close()
            raise

    def _size(self) -> int:
        return self.documents * DOCUMENT.itemsize

    def _resume(self, plan: dict[str, Any], inputs: list[list[Any]]) -> None:
        new = {"plan": plan, "inputs": inputs}
        old = _read_plan(self.folder / _PLAN)
        lines = []
        if old is not None and old["plan"] == plan:
            pairs = zip(old["inputs"], inputs, strict=False)
            lines = self._valid_lines(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        elif old is not None:
            changed = sorted(key for key in plan if old["plan"].get(key) != plan[key])
            print(f"note: starting over, with another {', '.join(changed)} than the unfinished build", file=sys.stderr)
        if lines:
            last = parse_json(lines[-1])
            self.documents, self.tokens, self.changed = last["documents"], last["tokens"], last["changed"]
            self.progress = Progress.from_dict(last["progress"])
            print(f"note: going on after {self.documents:,} documents of the unfinished build", file=sys.stderr)
        write_text(self.folder / _LOG, "".join(lines))
        write_json(self.folder / _PLAN, new)

    def _valid_lines(self, same: int) -> list[str]:
        """The commits that hold only records of the first `same` files, as far as the files have their data."""
        sizes = [path.stat().st_size if path.exists() else 0 for path in (self.path("tokens"), self.path("documents"))]
        kept = []
        log = self.folder / _LOG
        for line in log.read_text().splitlines(keepends=True) if log.exists() else []:
            try:
                commit = parse_json(line)
            except ValueError:  # the process was killed while it wrote the line
                break
            at = commit["progress"]
            whole = commit["tokens"] * self.dtype.itemsize <= sizes[0]
            if (at["file"] + (at["record"] > 0) > same) or not whole:
                break
            if commit["documents"] * DOCUMENT.itemsize <= sizes[1]:
                kept.append(line)
        return kept

    def path(self, name: str) -> Path:
        return self.folder / name

    def _open(self, name: str, size: int) -> BinaryIO:
        file = open(self.path(name), "ab")  # noqa: SIM115 (closed by close())
        file.truncate(size)
        return file

    def add(self, encoded: Encoded, progress: Progress) -> None:
        """Add documents; `progress` is what of the inputs is in the spool then."""
        tokens, rows, changed = encoded
        ends = self.tokens + np.cumsum(rows["n_tokens"])
        rows["start"] = ends - rows["n_tokens"]
        with naming_full_disk(self.path("tokens"), len(tokens)):
            self._files[0].write(tokens)
            self._files[1].write(rows.tobytes())
        self.tokens += len(tokens) // self.dtype.itemsize
        self.documents += len(rows)
        self.changed += changed
        self.progress = progress

    def commit(self, *, due: float = 0.0) -> None:
        """Keep what was added so far. `due`: seconds that must have passed since the last commit."""
        if time.monotonic() - self._committed < due:
            return
        with naming_full_disk(self.path("tokens")):
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
        sizes = {"documents": self.documents, "tokens": self.tokens, "changed": self.changed}
        with naming_full_disk(self.folder / _LOG), open(self.folder / _LOG, "a") as log:
            log.write(json.dumps({**sizes, "progress": asdict(self.progress)}) + "\n")
            log.flush()
            os.fsync(log.fileno())
        self._committed = time.monotonic()

    def records(self) -> np.ndarray:
        """The records, DOCUMENT [documents], mapped from the file."""
        self._files[1].flush()
        return np.memmap(self.path("documents"), dtype=DOCUMENT, mode="r", shape=(self.documents,))

    def close(self) -> None:
        """What was added since the last commit may be lost on a full disk, which is no error then: it is read again."""
        for file in (*self._files, self._lock):
            with suppress(OSError):
                file.close()


def lock(folder: Path) -> BinaryIO:
    """A file whose closing ends the lock on the folder of a build or merge, which may then be deleted.

    Raises DataError if another process has it.
    """
    import fcntl

    path = folder / _LOCK
    file = open(path, "wb")  # noqa: SIM115 (held until the build ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = os.path.samestat(os.fstat(file.fileno()), path.stat())  # else its owner has just deleted the folder
    except (BlockingIOError, FileNotFoundError):
        free = False
    except OSError as error:  # Lustre without `-o flock`, some network file systems
        free = True
        print(
            f"note: {folder.parent}: its file system has no locks ({error.strerror}): "
            "see that one process writes to this directory at a time",
            file=sys.stderr,
        )
    if not free:
        file.close()
        raise DataError(f"{path}: another process writes to {folder.parent}; wait for it, or stop it")
    return file


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = parse_json(path.read_bytes())
        return plan if isinstance(plan, dict) and {"plan", "inputs"} <= plan.keys() else None
    except (OSError, ValueError):
        return None
