"""Pages of a fixed pool and the table of one sequence: which page holds which of its tokens. Pure Python."""

from __future__ import annotations

from megatron_dla.serving.engine.config import PAGE


class PagePool:
    """Numbers of free pages, and how many tables hold each of the others (prefixes are shared).

    Attributes:
        total: pages, numbered from 0.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders = [0] * total

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, page: int) -> None:
        assert self._holders[page] > 0, page
        self._holders[page] += 1

    def holders(self, page: int) -> int:
        """Tables that hold it."""
        return self._holders[page]

    def drop(self, page: int) -> None:
        assert self._holders[page] > 0, page
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)


class PageTable:
    """Pages of one sequence in one pool.

    Attributes:
        pages: numbers, in order. behind: pages before them that a sliding window has left.
        window: tokens that a query sees, itself included; None = all.
    """

    def __init__(self, pool: PagePool, window: int | None = None) -> None:
        self.pool, self.window = pool, window
        self.pages: list[int] = []
        self.behind = self._forked = 0

    def missing(self, tokens: int) -> int:
        """Pages that the first `tokens` tokens still need."""
        return max(0, -(-tokens // PAGE) - self.behind - len(self.pages))

    def grow(self, tokens: int) -> None:
        """Take what is missing; the pool must have it."""
        self.pages += [self.pool.take() for _ in range(self.missing(tokens))]

    def slide(self, tokens: int) -> None:
        """After `tokens` tokens: give back the pages that no later query sees."""
        if self.window is None:
            return
        gone = max(0, tokens - self.window + 1) // PAGE - self.behind
        for page in self.pages[: max(gone, 0)]:
            self.pool.drop(page)
            self.behind += 1
        self.pages = self.pages[max(gone, 0) :]

    def seen_from(self, position: int) -> int:
        """The first token that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def slot_of(self, position: int) -> int:
        """Place of a token in the pool's tensors, counted in tokens."""
        return self.pages[position // PAGE - self.behind] * PAGE + position % PAGE

    def fork(self, tokens: int) -> PageTable:
        """A table that shares the pages of the first `tokens` tokens, a multiple of a page: they are full."""
        assert tokens % PAGE == 0, tokens
        other = PageTable(self.pool, self.window)
        other.pages, other.behind = self.pages[: tokens // PAGE - self.behind], self.behind
        other._forked = tokens // PAGE
        for page in other.pages:
            self.pool.share(page)
        return other

    def clear(self) -> None:
        """Give all pages back; it can `grow` again to the tokens that it had."""
        for page in self.pages:
            self.pool.drop(page)
        self.pages, self._forked = [], 0

    def _shared(self) -> list[int]:
        """Indices of the pages that others hold, too; they are among those of the fork."""
        first = self.pages[: max(0, self._forked - self.behind)]
        return [i for i, page in enumerate(first) if self.pool.holders(page) > 1]

    @property
    def own(self) -> int:
        """Pages that nobody else holds."""
        return len(self.pages) - len(self._shared())

    def idle(self, tokens: int) -> int:
        """Places of its own pages that hold nothing a later query sees, after `tokens` tokens."""
        begin = self.seen_from(tokens)
        places = len(self.pages) * PAGE - (tokens - begin) if self.pages else 0
        for i in self._shared():
            page = (self.behind + i) * PAGE
            places -= min(max(begin - page, 0), PAGE)
        return places
