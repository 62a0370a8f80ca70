"""What a question costs: tokens of its prompt, time, and what is kept of an episode's text until it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

TOKENS, SECONDS, BYTES = "prompt tokens", "seconds", "bytes an episode keeps"


class Costs:
    """Means over questions, and over episodes for what is kept.

    Args:
        questions, episodes: in all. bare: tokens of the prompts of all questions without any context.

    Attributes:
        found: {condition: {quantity: mean}}.
    """

    def __init__(self, questions: int, episodes: int, bare: int) -> None:
        self.questions, self.episodes, self.bare = questions, episodes, bare
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def of(self, condition: str) -> Iterator[None]:
        """Time what is inside; until the others are given, prompts are bare and nothing is kept."""
        started = time.perf_counter()
        yield
        seconds = (time.perf_counter() - started) / self.questions
        self.found[condition] = {TOKENS: self.bare / self.questions, SECONDS: seconds, BYTES: 0.0}

    def read(self, condition: str, tokens: int) -> None:
        """`tokens`: of all prompts."""
        self.found[condition][TOKENS] = tokens / self.questions

    def keep(self, condition: str, count: int) -> None:
        """`count`: bytes of all episodes."""
        self.found[condition][BYTES] = count / self.episodes
