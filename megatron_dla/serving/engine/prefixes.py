"""Beginnings of prompts that are kept so that they are read once. Pure Python; what is kept is opaque here.

A prefix ends where prompts are cut for reading anyway, so that continuing it is the same computation as reading all of
the prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dla.serving.engine.pages import PageTable

_REMEMBERED = 16384  # digests of prefixes that came once


@dataclass
class Prefix:
    """Attributes: tokens that it covers, the state after them, the pages of their keys and values."""

    tokens: int
    state: Any
    tables: list[PageTable]


class Prefixes:
    """At most `limit` prefixes, of lengths that are multiples of `chunk`; the least recently used one goes first."""

    def __init__(self, limit: int, chunk: int) -> None:
        self.limit, self.chunk = limit, chunk
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._came: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def kept(self) -> list[Prefix]:
        return list(self._kept.values())

    def digests(self, prompt: Sequence[int]) -> list[bytes]:
        """Of the prefixes of 1, 2, ... chunks that leave at least one token to read."""
        if not self.limit:
            return []
        found, digest = [], hashlib.blake2b(digest_size=16)
        for start in range(0, len(prompt) - self.chunk, self.chunk):
            digest.update(array("q", prompt[start : start + self.chunk]).tobytes())
            found.append(digest.digest())
        return found

    def find(self, digests: Sequence[bytes]) -> Prefix | None:
        """The longest prefix that is kept."""
        for digest in reversed(digests):
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
        return None

    def keep_at(self, digests: Sequence[bytes], shared: int) -> int:
        """Tokens after which the state of this prompt shall be kept; 0 = nowhere.

        The longest prefix that came before, or that the request calls shared. The prompt is remembered.
        """
        came = max((n for n, digest in enumerate(digests, 1) if digest in self._came), default=0)
        for digest in digests:
            self._came[digest] = None
            self._came.move_to_end(digest)
        while len(self._came) > _REMEMBERED:
            self._came.popitem(last=False)
        chunks = max(came, min(shared // self.chunk, len(digests)))
        return 0 if not chunks or digests[chunks - 1] in self._kept else chunks * self.chunk

    def keep(self, digests: Sequence[bytes], prefix: Prefix) -> None:
        digest = digests[prefix.tokens // self.chunk - 1]
        self._let_go(self._kept.pop(digest, None))
        self._kept[digest] = prefix
        while len(self._kept) > self.limit:
            self.evict()

    def evict(self) -> bool:
        """Drop the least recently used one; False where there is none."""
        if not self._kept:
            return False
        self._let_go(self._kept.popitem(last=False)[1])
        return True

    @staticmethod
    def _let_go(prefix: Prefix | None) -> None:
        for table in prefix.tables if prefix else ():
            table.clear()
