"""What long commands print on stderr while they work."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_S = 30.0
LOG_FORMAT = "{desc}: {percentage:3.0f}%  {n_fmt}/{total_fmt}  {rate_fmt}  elapsed {elapsed}, left {remaining}{postfix}"


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
