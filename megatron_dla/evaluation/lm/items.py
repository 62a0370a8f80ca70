"""What a task is made of: items, each measured by itself, and the task that makes and measures them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dla.evaluation.lm.models import Subject

Values = dict[str, Any]
"""Metric -> number of one item (also lists, of tasks that need more)."""


@dataclass(frozen=True)
class Item:
    """One window, question or prompt.

    Attributes:
        key: of the item in its task, with a digest of its content: items of equal keys are the same item.
        tokens: read and generated for it. payload: what the task needs to measure it.
        about: where it belongs in the breakdowns: `length` (tokens), `depth` (0 = start, 1 = end).
    """

    key: str
    tokens: int
    payload: Any
    about: dict[str, Any] = field(default_factory=dict)


class Task:
    """A task. Subclasses set `metrics` (the first is the main one), `unit`, and override `items` and `measure`.

    Attributes:
        name: in tables. settings: what decides the values beside the items; recorded, and compared on resume.
        chance: of the main metric for an answer that does not depend on the prompt; None = none is known.
    """

    metrics: tuple[str, ...]
    unit: str

    def __init__(self, name: str, settings: dict[str, Any], chance: float | None = None) -> None:
        self.name, self.settings, self.chance = name, settings, chance

    def items(self, subject: Subject) -> list[Item]:
        """The items, in order, for the tokenizer of `subject`."""
        raise NotImplementedError

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        """The values of a batch of items, at least those of `metrics`."""
        raise NotImplementedError

    def finish(self, items: list[Item], values: list[Values]) -> tuple[list[Item], list[Values]]:
        """What the tables are made of, when all items are measured."""
        return items, values


def digest(*parts: object) -> str:
    """Eight hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
