"""What long commands print on stderr while they work."""

from __future__ import annotations

import sys
import unicodedata
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_S = 30.0
LOG_FORMAT = "{desc}: {percentage:3.0f}%  {n_fmt}/{total_fmt}  {rate_fmt}  elapsed {elapsed}, left {remaining}{postfix}"


def escaped(text: str) -> str:
    """`text` without what controls a terminal: C0 and C1 codes but newline and tab, and marks that reverse text."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter if letter in "\n\t" or not _controls(letter) else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _controls(letter: str) -> bool:
    return (
        unicodedata.category(letter) in ("Cc", "Cs")
        or letter in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


class _Terminal:
    """A terminal on which text of files and models is shown, and does nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(escaped(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect(stream: Any) -> Any:
    """Standard output as `dla` writes to it: characters that its encoding does not have are escaped, and on a terminal
    control characters too."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return _Terminal(stream) if stream is not None and stream.isatty() else stream  # None: a process without one


class _LogFile:
    """tqdm overwrites one line with carriage returns; in a log file each state becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self.stream.write(f"{line}\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(total: int, description: str, stream: TextIO | None = None, unit: str = "B") -> tqdm:
    """A bar over `total` bytes (or another unit) with rate and time left, on stderr.

    On a terminal it is redrawn in place; in a log file it prints a line every 30 s, and none for shorter work.
    """
    from tqdm import tqdm

    stream = sys.stderr if stream is None else stream
    shared = {"total": total, "desc": description, "unit": unit, "unit_scale": True}
    if stream.isatty():
        return tqdm(**shared, file=stream, dynamic_ncols=True)
    # miniters=1: the time alone decides when a line is due
    interval = {"mininterval": LOG_INTERVAL_S, "delay": LOG_INTERVAL_S, "miniters": 1}
    return tqdm(**shared, **interval, file=_LogFile(stream), bar_format=LOG_FORMAT)
