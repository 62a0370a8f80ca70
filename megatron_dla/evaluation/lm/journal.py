"""Finished items on disk: an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Values, digest
from megatron_dla.files import parse_json

JOURNAL = "items.jsonl"


class Journal:
    """`items.jsonl` of an output directory, one line an item; without a directory in memory only.

    A line names the model's digest, the task and its settings, and has a digest of itself; lines of others stay and are
    not read, nor are those of versions that wrote no digest. What a kill left of a line is cut off.

    Raises:
        UserError: another process writes there, `items.jsonl` is not a file, or a line of it is damaged.
    """

    def __init__(self, out: Path | None) -> None:
        self._found: dict[tuple[str, str], Values] = {}
        self._file = None
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / JOURNAL
        if path.exists() and not path.is_file():
            raise UserError(f"--out {str(out)!r}: its {JOURNAL} is not a file: remove it, or give another directory")
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"--out {str(out)!r}: another evaluation writes there: give another directory") from error
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = parse_json(line)
                run, item, values = entry["run"], entry["item"], entry["values"]
                if "digest" not in entry:
                    continue
                if entry["digest"] != _digest(run, item, values):
                    raise ValueError("its values are not those that were written")
                self._found[run, item] = values
            except (ValueError, KeyError, TypeError) as error:
                self._file.close()
                raise UserError(f"{str(path)!r}, line {number} is damaged ({error}): remove the file") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, run: str, item: str) -> Values | None:
        """The values of an item, or None. `run`: of model, task and settings."""
        return self._found.get((run, item))

    def add(self, run: str, items: Sequence[str], values: Sequence[Values]) -> None:
        """Record a batch; on return it is on the disk."""
        for item, value in zip(items, values, strict=True):
            self._found[run, item] = value
        if self._file is None:
            return
        entries = (
            {"run": run, "item": item, "values": value, "digest": _digest(run, item, value)}
            for item, value in zip(items, values, strict=True)
        )
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def _digest(run: str, item: str, values: Values) -> str:
    """Of a line; `values` as JSON gives them back."""
    return digest(run, item, json.dumps(values, sort_keys=True))
