"""Paired results of a task under several conditions, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_dla.evaluation.stats import Interval, bootstrap_mean


@dataclass
class Table:
    """Results of one task.

    Attributes:
        unit: what one number is of, in the plural. values: condition -> metric -> one number a unit [n], the same
            units in the same order everywhere. metrics: the first is the main one. groups: [n], see `bootstrap_mean`;
            None = independent units. pairs: differences to report, first minus second. settings: parameters of the
            task. layers: one row a layer. costs: condition -> quantity -> mean, see costs.py.
    """

    task: str
    unit: str
    metrics: tuple[str, ...]
    values: dict[str, dict[str, np.ndarray]]
    pairs: list[tuple[str, str]]
    settings: dict[str, Any]
    groups: np.ndarray | None = None
    layers: list[dict[str, float]] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    def interval(self, condition: str, metric: str, seed: int = 0) -> Interval:
        return bootstrap_mean(self.values[condition][metric], self.groups, seed=seed)

    def difference(self, first: str, second: str, metric: str, seed: int = 0) -> Interval:
        """Paired, unit by unit."""
        return bootstrap_mean(self.values[first][metric] - self.values[second][metric], self.groups, seed=seed)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """The table with its intervals as JSON values."""
        return {
            "task": self.task,
            "unit": self.unit,
            "settings": self.settings,
            "conditions": {
                condition: {metric: self.interval(condition, metric, seed).to_dict() for metric in self.metrics}
                for condition in self.values
            },
            "differences": [
                {"first": a, "second": b, "metric": metric, **self.difference(a, b, metric, seed).to_dict()}
                for a, b in self.pairs
                for metric in self.metrics
            ],
            "layers": self.layers,
            **({"costs": self.costs} if self.costs else {}),
        }

    def text(self, seed: int = 0, digits: int = 3) -> str:
        """The printed table: conditions by metric, then the paired differences."""
        first = next(iter(self.values))
        shown = self.interval(first, self.metrics[0], seed)
        groups = f" in {shown.groups} groups" if self.groups is not None else ""
        rows = [["condition", *self.metrics]]
        rows += [[c, *(self.interval(c, m, seed).text(digits) for m in self.metrics)] for c in self.values]
        rows += [
            [f"{a} - {b}", *(self.difference(a, b, m, seed).text(digits) for m in self.metrics)] for a, b in self.pairs
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * len(max(lines, key=len)))
        if self.pairs:
            lines.insert(2 + len(self.values), "")
        head = f"{self.task}: {shown.count} {self.unit}{groups}; mean [95 % interval, paired bootstrap]"
        return "\n".join([head, *lines, *self._cost_lines()])

    def _cost_lines(self) -> list[str]:
        """Each quantity with three digits that count."""
        if not self.costs:
            return []
        names = list(next(iter(self.costs.values())))
        rows = [["means", *names]]
        rows += [[key, *(f"{found[name]:,.3g}" for name in names)] for key, found in self.costs.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
        return ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)]


def join_tables(tables: list[Table]) -> Table:
    """Tables of the same task and several adapters (training seeds) as one, grouped by adapter."""
    first = tables[0]
    sizes = [len(next(iter(table.values.values()))[first.metrics[0]]) for table in tables]
    values = {
        condition: {m: np.concatenate([t.values[condition][m] for t in tables]) for m in first.metrics}
        for condition in first.values
        if all(condition in table.values for table in tables)
    }
    pairs = [pair for pair in first.pairs if set(pair) <= values.keys()]
    settings = {**first.settings, "adapters": len(tables)}
    layers = [{"adapter": i, **row} for i, table in enumerate(tables) for row in table.layers]
    groups = np.repeat(np.arange(len(tables)), sizes)
    costs = {
        condition: {name: float(np.mean([table.costs[condition][name] for table in tables])) for name in found}
        for condition, found in first.costs.items()
    }
    return Table(first.task, first.unit, first.metrics, values, pairs, settings, groups, layers, costs)
