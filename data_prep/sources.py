"""Documents from text files: `.txt` (one document per file) and `.jsonl` (one per line).

Both may be compressed (`.gz`, `.xz`, `.zst`). Directories are walked in sorted order, so the same inputs always give
the same documents in the same order.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from megatron_dla.errors import DataError

FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One document: its text, its source (`file` or `file:line`) and its length in bytes of UTF-8."""

    text: str
    source: str
    n_bytes: int


@dataclass(frozen=True)
class SourceFile:
    """One input file. `name`: recorded in the shards, the same on every machine. `bytes`: size on disk."""

    path: Path
    name: str
    input: str
    bytes: int


class _ZstdReader(io.RawIOBase):
    """Raw reader of a `.zst` file; unlike zstandard's own reader it raises on a truncated frame."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new: Callable[[], Any] = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame: Any = None
        self._in = b""
        self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            self._in = self._in or self._raw.read(1 << 17)
            if not self._in:
                if self._frame is not None:
                    raise EOFError("the compressed data ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            self._out, self._in = self._frame.decompress(self._in), b""
            if self._frame.eof:
                self._in, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._out))
        buffer[:n], self._out = self._out[:n], self._out[n:]
        return n


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 17))
    return raw


def _kind(path: Path) -> tuple[str, str] | None:
    """(format, compression) of a file name, or None if it is neither .txt nor .jsonl."""
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    stem = path.with_suffix("") if compression else path
    return (stem.suffix.lower(), compression) if stem.suffix.lower() in FORMATS else None


class DocumentSource:
    """Streams the documents of files and directories and counts the bytes read from disk.

    Attributes: `files` (in reading order), `total_bytes` (on disk), `bytes_read` (of `total_bytes`, updated
    line by line; compressed bytes for compressed files), `ignored` (files in walked directories that are
    neither .txt nor .jsonl), `blank_lines` (skipped lines of .jsonl files).

    Raises DataError for a missing or unreadable input, an input given twice, an unknown format or a directory without
    documents; while iterating, for bad JSON, a missing text field, invalid UTF-8 or damaged compression.
    """

    def __init__(self, inputs: Sequence[str | os.PathLike[str]], *, text_field: str = "text") -> None:
        if not inputs:
            raise DataError(
                "inputs is empty: give at least one .txt or .jsonl file or a directory of them (--input PATH)"
            )
        self.text_field = text_field
        self.files: list[SourceFile] = []
        self.ignored: list[Path] = []
        for item in inputs:
            self._add(Path(item))
        seen: set[Path] = set()
        for file in self.files:
            real = file.path.resolve()
            if real in seen:
                raise DataError(f"{file.path}: given twice as input; its documents would count twice, name it once")
            seen.add(real)
        self.total_bytes = sum(file.bytes for file in self.files)
        self.bytes_read = 0
        self.blank_lines = 0

    def _add(self, path: Path) -> None:
        if path.is_file():
            if _kind(path) is None:
                raise DataError(f"{path}: unknown format; must be .txt or .jsonl, optionally with .gz, .xz or .zst")
            self.files.append(SourceFile(path, path.name, path.name, path.stat().st_size))
        elif path.is_dir():
            root, before = path.resolve().name or "root", len(self.files)
            for folder, subfolders, names in os.walk(path):
                subfolders.sort()
                for name in sorted(names):
                    file = Path(folder) / name
                    if _kind(file) is None or not file.is_file():
                        self.ignored.append(file)
                        continue
                    shown = f"{root}/{file.relative_to(path).as_posix()}"
                    self.files.append(SourceFile(file, shown, root, file.stat().st_size))
            if len(self.files) == before:
                raise DataError(f"{path}: no .txt or .jsonl file (optionally .gz, .xz, .zst) in this directory")
        else:
            raise DataError(f"{path}: no such file or directory; check --input")

    def notes(self) -> list[str]:
        """What was skipped so far, one line each."""
        notes = []
        if self.ignored:
            first = ", ".join(str(path) for path in self.ignored[:3])
            notes.append(f"note: ignored {len(self.ignored)} files that are neither .txt nor .jsonl: {first}...")
        if self.blank_lines:
            notes.append(f"note: skipped {self.blank_lines} blank lines in .jsonl files")
        return notes

    def __iter__(self) -> Iterator[Document]:
        self.bytes_read = 0
        self.blank_lines = 0
        for file in self.files:
            done = self.bytes_read
            yield from self._read(file, done)
            self.bytes_read = done + file.bytes

    def _read(self, file: SourceFile, done: int) -> Iterator[Document]:
        kind = _kind(file.path)
        assert kind is not None
        try:
            with open(file.path, "rb") as raw, _decompressed(raw, kind[1]) as stream:
                if kind[0] == ".txt":
                    yield _document(stream.read().removeprefix(_BOM), file.name, str(file.path))
                    return
                for number, line in enumerate(stream, 1):
                    self.bytes_read = done + raw.tell()
                    if not line.strip():
                        self.blank_lines += 1
                        continue
                    yield self._parse(line.removeprefix(_BOM) if number == 1 else line, file, number)
        except DataError:
            raise
        except ImportError as error:
            raise DataError(f"{file.path}: reading .zst needs the zstandard package: pip install zstandard") from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"{file.path}: cannot be read ({error}); copy or compress it again") from error
        except Exception as error:
            # zlib.error and ZstdError share no base class with the above; anything else is a bug and is raised as is
            if type(error).__module__.split(".")[0] not in ("zlib", "zstandard"):
                raise
            raise DataError(f"{file.path}: damaged compression ({error}); copy or compress it again") from error

    def _parse(self, line: bytes, file: SourceFile, number: int) -> Document:
        where = f"{file.path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not valid UTF-8 at byte {error.start} of the line; convert it to UTF-8"
            ) from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object on one line ({error}); fix or remove the line") from None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            return _document(text, f"{file.name}:{number}", where)
        if isinstance(record, dict) and self.text_field in record:
            raise DataError(f"{where}: field {self.text_field!r} is {type(text).__name__}: must be a string")
        have = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no field {self.text_field!r} (found {have}); name the right one with --text-field")


def _document(text: bytes | str, source: str, where: str) -> Document:
    try:
        if isinstance(text, bytes):
            return Document(text.decode("utf-8"), source, len(text))
        return Document(text, source, len(text.encode("utf-8")))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not valid UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: lone surrogate at character {error.start} is not valid Unicode; remove it") from None
