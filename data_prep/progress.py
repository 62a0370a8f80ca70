"""A progress line on stderr that also works in a log file."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts documents and bytes; shows documents/s, MB/s (1e6 bytes of text) and the time left.

    A terminal sees one line rewritten twice a second, anything else a new line every `interval` seconds.
    """

    def __init__(self, total_bytes: int, *, stream: TextIO | None = None, interval: float = 10.0) -> None:
        self.total_bytes = max(total_bytes, 1)
        self.stream = sys.stderr if stream is None else stream
        self.tty = self.stream.isatty()
        self.interval = 0.5 if self.tty else interval
        self.started = self.shown = time.monotonic()
        self.documents = self.text_bytes = self.read_bytes = 0

    def update(self, documents: int, text_bytes: int, read_bytes: int) -> None:
        """Add finished documents and their text; `read_bytes` is the position in the `total_bytes` of input."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.read_bytes = read_bytes
        now = time.monotonic()
        if now - self.shown >= self.interval:
            self.shown = now
            self._show(now)

    def _show(self, now: float, end: str | None = None) -> None:
        seconds = max(now - self.started, 1e-9)
        share = min(self.read_bytes / self.total_bytes, 1.0)
        left = f"{seconds * (1 - share) / share:.0f} s left" if share > 0 else "time left unknown"
        line = (
            f"{share:4.0%}  {self.documents:,} documents  {self.documents / seconds:,.0f} documents/s  "
            f"{self.text_bytes / seconds / 1e6:.2f} MB/s  {left}"
        )
        print(
            f"\r\033[K{line}" if self.tty else line, end=end or ("" if self.tty else "\n"), file=self.stream, flush=True
        )

    def close(self) -> None:
        """Show the final line."""
        self._show(time.monotonic(), end="\n")
