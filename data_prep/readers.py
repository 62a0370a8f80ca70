"""Reads the records of one file: which reader a name's suffix selects, which decompression, and where the text is."""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from megatron_dla.errors import DataError
from megatron_dla.files import parse_json

if TYPE_CHECKING:
    import pyarrow

_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20  # bytes read at once
_STORIES = 1 << 16  # of files with a separator, whose stories, held at once, may be of one letter
_NAMED = 20  # fields or columns in a message
_ROWS, _ROWS_BYTES = 256, 1 << 22  # of a table decoded at once: rows at most, and bytes about
# parquet: rows of the smallest page that pyarrow and its users write, and bytes of a page that are worth a note
_PAGE_ROWS, _PAGE_BYTES = 1024, 1 << 26
# the largest window that the format can ask for (zstd --ultra --long=31); memory is taken as far as it is used
_ZSTD_WINDOW = 1 << 31


class Problem(NamedTuple):
    """Why a record cannot be used, and what to do about it."""

    what: str
    fix: str


class Record(NamedTuple):
    """A record of a file. `number`: line, row or story from 1, 0 for a whole file. `text`: None for a blank line.

    `position`: bytes of the file on disk that were read so far.
    """

    number: int
    text: str | Problem | None
    position: int


class UnreadableError(DataError):
    """The system could not read a file: the network's fault, or a permission, not that of what is in the file."""


class _FramesReader(io.RawIOBase):
    """Raw reader of a file of compressed frames (streams, members), one after the other.

    Unlike the readers of zstandard, lzma and bz2 it raises on a truncated frame, and on what follows a frame and is
    none: lzma and bz2 take that for the end of the file, and would drop all documents after a damaged header.

    Args:
        new: makes a decompressor of one frame. padding: whether zeros may follow a frame (xz).
    """

    def __init__(self, raw: BinaryIO, new: Callable[[], Any], padding: bool = False) -> None:
        self._raw, self._new, self._padding = raw, new, padding
        self._frame: Any = None
        self._any = False  # a frame has ended
        self._in = b""
        self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            hungry = self._frame is None or getattr(self._frame, "needs_input", True)
            if hungry and not self._in:
                self._in = self._raw.read(1 << 17)
                if not self._in:
                    if self._frame is not None:
                        raise EOFError("the compressed data ends in the middle of a frame")
                    return 0
            if self._frame is None and self._any and self._padding:
                self._in = self._in.lstrip(b"\0")
                if not self._in:
                    continue
            self._frame = self._frame or self._new()
            self._out, self._in = self._decompress(), b""
            if self._frame.eof:
                self._in, self._frame, self._any = self._frame.unused_data, None, True
        n = min(len(buffer), len(self._out))
        buffer[:n], self._out = self._out[:n], self._out[n:]
        return n

    def _decompress(self) -> bytes:
        if hasattr(self._frame, "needs_input"):  # of lzma and bz2, which keep what is above the limit
            return self._frame.decompress(self._in, _BLOCK)
        return self._frame.decompress(self._in)


def _frames(raw: BinaryIO, new: Callable[[], Any], padding: bool = False) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_FramesReader(raw, new, padding), 1 << 17))


def _zstd(raw: BinaryIO) -> BinaryIO:
    import zstandard

    return _frames(raw, lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj())


def _bz2(raw: BinaryIO) -> BinaryIO:
    import bz2  # a Python that was built without it reads the other formats

    return _frames(raw, bz2.BZ2Decompressor)


def _xz(raw: BinaryIO) -> BinaryIO:
    import lzma

    return _frames(raw, lzma.LZMADecompressor, padding=True)


COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: cast(BinaryIO, gzip.GzipFile(fileobj=raw)),
    ".xz": _xz,
    ".bz2": _bz2,
    ".zst": _zstd,
}


class Kind(NamedTuple):
    """What the suffixes of a file name say: its format and its compression ("" for none)."""

    format: str
    compression: str


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name, or None if no reader takes it.

    A compressed file whose name says no more (Pushshift's RC_2019-04.zst) is one of `.json`: JSONL, if it holds that.
    """
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    form = (Path(path.stem) if compression else path).suffix.lower()
    if compression and not form:
        form = ".json"
    if form not in READERS or (compression and form in TABLES):
        return None
    return Kind(form, compression)


def known_formats() -> str:
    """The readable names, for messages."""
    plain = [form for form in READERS if form not in TABLES]
    packed = ", ".join(form for form in COMPRESSIONS if form)
    return f"{', '.join(plain)} (also with {packed}), {', '.join(TABLES)}, or a dataset of save_to_disk"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as valid text: bytes of a file name that are not UTF-8 become escapes such as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Raises DataError for a URL where a file or directory of this machine is needed."""
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(path)) and not os.path.exists(path):
        raise DataError(
            f"{shown(path)}: URLs are read by training and by `dla data verify`, `stats` and `show` alone; give a path "
            "of this machine, and copy from or to the URL"
        )


def read_records(path: Path, kind: Kind, text_field: str, separator: str) -> Iterator[Record]:
    """The records of one file, in order.

    Raises UnreadableError where the system cannot read the file, and DataError for damaged compression, a table
    without the column or with another type in it; a single record that is unusable has a Problem instead.
    """
    number = 0
    try:
        if kind.compression and not path.stat().st_size:  # gzip and bz2 would read an empty text
            raise EOFError("the file is empty")
        for record in READERS[kind.format](path, kind.compression, text_field, separator):
            number = record.number
            yield record
    except DataError:
        raise
    except ImportError as error:
        known = {"pyarrow": "pip install 'megatron-dla[data]'", "zstandard": "pip install zstandard"}
        fix = known.get((error.name or "").split(".")[0], "use a Python that has it")
        raise DataError(f"{shown(path)}: {error}, which reading it needs; {fix}") from error
    except Exception as error:
        # the packages' errors share no base class with the others; anything else is a bug and is raised as is
        packages = ("zlib", "_lzma", "zstandard", "pyarrow")
        # the last two: pyarrow's for damaged names of columns and lengths of values
        builtin = (OSError, EOFError, UnicodeDecodeError, SystemError)
        if not isinstance(error, builtin) and type(error).__module__.split(".")[0] not in packages:
            raise
        after = f" after record {number}" if number else ""
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        # damaged compression and tables have no number, but EINVAL where they make pyarrow seek to nowhere
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            fix = "allow it" if isinstance(error, PermissionError) else "try again"
            raise UnreadableError(f"{shown(path)}: cannot be read{after} ({error.strerror}); {fix}") from error
        raise DataError(f"{shown(path)}: cannot be read{after} ({what}); copy or compress it again") from error


def _read_txt(path: Path, compression: str, text_field: str, separator: str) -> Iterator[Record]:
    with open(path, "rb") as raw, COMPRESSIONS[compression](raw) as stream:
        if not separator:
            yield Record(0, _utf8(stream.read().removeprefix(_BOM)), raw.tell())
            return
        number = 0
        for stories in _stories(stream, separator.encode()):
            position = raw.tell()
            for story in stories:
                if story := story.strip(b"\r\n"):
                    number += 1
                    yield Record(number, _utf8(story), position)


def _stories(stream: BinaryIO, mark: bytes) -> Iterator[list[bytes]]:
    """What stands between the marks, in lists of what ends in a block. No byte of a long story is searched twice,
    but where it ends."""
    held, at = bytearray(stream.read(_STORIES).removeprefix(_BOM)), 0
    more = True
    while more:
        if held.find(mark, at) >= 0:
            *ended, last = bytes(held).split(mark)
            yield ended
            held = bytearray(last)
        at = max(0, len(held) - len(mark) + 1)
        more = bool(block := stream.read(_STORIES))
        held += block
    yield bytes(held).split(mark)


def _read_lines(path: Path, compression: str, text_field: str, separator: str) -> Iterator[Record]:
    with open(path, "rb") as raw, COMPRESSIONS[compression](raw) as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            yield Record(number, _json_text(line, text_field) if line.strip() else None, raw.tell())


def _json_text(line: bytes, text_field: str) -> str | Problem:
    try:
        record = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(f"not valid UTF-8 at byte {error.start} of the line", "convert it to UTF-8")
    except (ValueError, RecursionError) as error:
        return Problem(f"not a JSON object on one line ({error})", "fix or remove the line")
    if not isinstance(record, dict):
        what = f"a JSON {type(record).__name__}, not an object"
        return Problem(what, "write one object a line (`jq -c '.[]'` does that to an array)")
    value: Any = record
    for key in [text_field] if text_field in record else text_field.split("."):
        if not isinstance(value, dict) or key not in value:
            return Problem(f"no field {text_field!r} (found {_some(record)})", "name the right one with --text-field")
        value = value[key]
    if not isinstance(value, str):
        return Problem(f"field {text_field!r} is {type(value).__name__}: must be a string", "fix or remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return Problem(f"lone surrogate at character {error.start} is not valid Unicode", "remove it")
    return value


def _some(names: Iterable[str]) -> str:
    """A list of names for a message."""
    ordered = sorted(names)
    return str(ordered[:_NAMED]) + (f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else "")


def _utf8(text: bytes) -> str | Problem:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(f"not valid UTF-8 at byte {error.start}", "convert it to UTF-8")


def _read_parquet(path: Path, compression: str, text_field: str, separator: str) -> Iterator[Record]:
    import pyarrow.parquet

    size, number = path.stat().st_size, 0
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # the default one keeps a part of every row group
    # buffered: a column of a row group is read in pieces, not at once
    with pyarrow.parquet.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False) as file:
        column = _column(path, file.schema_arrow, text_field)
        total = max(file.metadata.num_rows, 1)
        sizes = [_column_bytes(file.metadata.row_group(group), column) for group in range(file.num_row_groups)]
        if note := _note_of_pages(path, sizes):
            print(note, file=sys.stderr)
        for group, (stored, number_of_rows) in enumerate(sizes):
            rows = _rows_at_once(stored, number_of_rows)
            pyarrow.default_memory_pool().release_unused()  # or memory grows by a third from 60 to 600 MB of text
            for batch in file.iter_batches(rows, row_groups=[group], columns=[text_field], use_threads=False):
                for text in _cells(batch, column):
                    number += 1
                    yield Record(number, text, size * number // total)


def _column_bytes(group: Any, column: list[str]) -> tuple[int, int]:
    """Bytes of a column in a row group, not compressed, and the rows of the group."""
    parts = [group.column(i) for i in range(group.num_columns)]
    return sum(
        part.total_uncompressed_size for part in parts if part.path_in_schema == ".".join(column)
    ), group.num_rows


def _note_of_pages(path: Path, sizes: list[tuple[int, int]]) -> str:
    """What to say of a file whose pages, which are read whole, are large; "" if they are not."""
    pages = [(stored * min(1.0, _PAGE_ROWS / max(rows, 1)), stored, rows) for stored, rows in sizes]
    largest, stored, rows = max(pages, default=(0.0, 0, 0))
    if largest <= _PAGE_BYTES:
        return ""
    return (
        f"note: {shown(path)}: a row group has {rows} rows and {stored / 1e6:,.0f} MB of text, in pages of "
        f"{_PAGE_ROWS} rows if pyarrow wrote it; a page is read whole, which may take {3 * largest / 1e9:.1f} GB of "
        "memory: write row groups of fewer rows (row_group_size)"
    )


def _read_arrow(path: Path, compression: str, text_field: str, separator: str) -> Iterator[Record]:
    import pyarrow

    number = 0
    # mapped: a batch may be much larger than the rows decoded at once
    with pyarrow.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader: Any = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            _check_end(file)
            reader = batches = pyarrow.ipc.open_stream(file)
        column = _column(path, reader.schema, text_field)
        for batch in batches:
            batch.column(column[0]).validate()  # damaged lengths and offsets, followed, would end the process
            rows = _rows_at_once(batch.nbytes, batch.num_rows)
            for start in range(0, batch.num_rows, rows):
                for text in _cells(batch.slice(start, rows), column):
                    number += 1
                    yield Record(number, text, file.tell())


_CONTINUES = b"\xff" * 4  # before the length of each message of an Arrow stream since 2019; a length of 0 is its end


def _check_end(file: Any) -> None:
    """EOFError for an Arrow stream without its end mark: cut between two batches, it reads as a whole one."""
    size = file.size()
    continues = file.read(4) == _CONTINUES
    file.seek(max(0, size - 8))
    end = file.read(8)
    file.seek(0)
    if not (end == _CONTINUES + bytes(4) if continues else end.endswith(bytes(4))):
        raise EOFError("the mark at the end of an Arrow stream is missing: it was cut")


def _rows_at_once(n_bytes: int, rows: int) -> int:
    return max(1, min(_ROWS, _ROWS_BYTES * rows // max(n_bytes, 1)))


def _column(path: Path, schema: pyarrow.Schema, text_field: str) -> list[str]:
    """The way to the text column: one name, or those of nested structs. Raises DataError if it is not there."""
    import pyarrow.types as is_type

    names = [text_field] if text_field in schema.names else text_field.split(".")
    kind: Any = None
    fields: Any = schema
    for name in names:
        inside = fields is schema or is_type.is_struct(fields)
        if not inside or (at := fields.get_field_index(name)) < 0:
            twice = "more than one" if fields is schema and name in schema.names else "no"
            raise DataError(
                f"{shown(path)}: {twice} column {text_field!r} (found {_some(schema.names)}); name the right one with "
                "--text-field"
            )
        kind = fields = fields.field(at).type
    kind = kind.value_type if is_type.is_dictionary(kind) else kind
    texts = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view")
    if not any(getattr(is_type, name)(kind) for name in texts):
        raise DataError(
            f"{shown(path)}: column {text_field!r} is {kind}: must be a string; name the right one with --text-field"
        )
    return names


def _cells(batch: pyarrow.RecordBatch, column: list[str]) -> Iterator[str | Problem]:
    import pyarrow
    import pyarrow.compute

    array = batch.column(column[0])
    if column[1:]:
        array = pyarrow.compute.struct_field(array, column[1:])
    if pyarrow.types.is_dictionary(array.type):
        _as_bytes(array.dictionary)
        least, most = pyarrow.compute.min_max(array.indices).values()
        if least.is_valid and not 0 <= least.as_py() <= most.as_py() < len(array.dictionary):
            raise pyarrow.ArrowInvalid("a row names a value that the dictionary does not have")
        array = array.dictionary_decode()
    # bytes, which are decoded one by one, so that a row with invalid text can be named
    for cell in _as_bytes(array).cast(pyarrow.large_binary()).to_pylist():
        yield Problem("the text is null", "fix or remove the row") if cell is None else _utf8(cell)


def _as_bytes(array: pyarrow.Array) -> pyarrow.Array:
    """Texts as bytes, without a copy. Raises pyarrow.ArrowInvalid for offsets outside of the data."""
    import pyarrow

    kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    kinds[pyarrow.string_view()] = pyarrow.binary_view()
    array = array.cast(kinds.get(array.type, array.type))
    array.validate(full=True)
    return array


Reader = Callable[[Path, str, str, str], Iterator[Record]]
TABLES: dict[str, Reader] = {".parquet": _read_parquet, ".arrow": _read_arrow}
READERS: dict[str, Reader] = {
    ".txt": _read_txt,
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_lines,
    **TABLES,
}


def holds_lines(path: Path, kind: Kind) -> bool:
    """Whether a `.json` file begins as JSONL does: an object that ends on its line. Raises what reading raises."""
    with open(path, "rb") as raw, COMPRESSIONS[kind.compression](raw) as stream:
        while part := stream.readline(_BLOCK):  # of a binary file a line may be all of it
            if line := part.removeprefix(_BOM).strip():
                if not line.startswith(b"{"):
                    return False
                while not part.endswith(b"\n") and (more := stream.readline(_BLOCK)):
                    part = more
                return part.rstrip().endswith(b"}")
    return True
