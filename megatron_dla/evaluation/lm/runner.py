"""Models x tasks: makes the items, measures those that are not in the journal, longest first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_dla.console import progress_bar
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Item, Task, Values, digest
from megatron_dla.evaluation.lm.journal import Journal
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.scoring import batches
from megatron_dla.serving.sampling import cpu_threads


@dataclass
class Outcome:
    """A task's items on one model, and their values, in the task's order."""

    items: list[Item]
    values: list[Values]


class Runner:
    """Runs tasks on one model after the other; only one is in memory.

    Args:
        journal: where finished items are. budget: tokens of a batch. threads: of a CPU, see `cpu_threads`.
    """

    def __init__(self, tasks: Sequence[Task], journal: Journal, budget: int, threads: int | None = None) -> None:
        self.tasks, self.journal, self.budget, self.threads = tasks, journal, budget, threads
        self.outcomes: dict[str, dict[str, Outcome]] = {task.name: {} for task in tasks}
        self._items: dict[tuple[str, str], list[Item]] = {}

    def run(self, load: Callable[[], Subject]) -> Subject:
        """All tasks on the model that `load` returns. Raises UserError where a batch does not fit into memory."""
        subject = load()
        with cpu_threads(subject.model, self.threads):
            for task in self.tasks:
                try:
                    self.outcomes[task.name][subject.name] = self._measure(subject, task)
                except torch.OutOfMemoryError as error:
                    raise UserError(
                        f"{task.name}: --batch-tokens {self.budget} do not fit into the device's memory: give fewer"
                    ) from error
        gc.collect()
        return subject

    def _made(self, subject: Subject, task: Task) -> list[Item]:
        """The items depend on the tokenizer only."""
        key = (task.name, subject.tokenizer_digest)
        if key not in self._items:
            self._items[key] = task.items(subject)
        return self._items[key]

    def _measure(self, subject: Subject, task: Task) -> Outcome:
        items = self._made(subject, task)
        run = f"{digest(subject.digest)}-{task.name}-{digest(task.settings)}"
        found = {item.key: self.journal.get(run, item.key) for item in items}
        todo = [item for item in items if found[item.key] is None]
        if 0 < len(todo) < len(items):
            print(
                f"{subject.name}: {task.name}: {len(items) - len(todo)} of {len(items)} {task.unit} are there already"
            )
        total = sum(item.tokens for item in todo)
        with progress_bar(total, f"{subject.name}: {task.name}", unit="tok") as bar:
            for batch in batches([item.tokens for item in todo], self.budget):
                part = [todo[i] for i in batch]
                values = task.measure(subject, part)
                self.journal.add(run, [item.key for item in part], values)
                found |= {item.key: value for item, value in zip(part, values, strict=True)}
                bar.update(sum(item.tokens for item in part))
        values = [value for item in items if (value := found[item.key]) is not None]
        return Outcome(*task.finish(items, values))
