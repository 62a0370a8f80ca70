"""Write evaluation results as JSON and as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dla.evaluation.costs import BYTES, SECONDS, TOKENS
from megatron_dla.evaluation.table import Table

JSON_NAME, PICTURE_NAME = "eval.json", "eval.png"


def write_report(out: Path, tables: Sequence[Table], about: dict[str, Any], seed: int = 0) -> list[Path]:
    """Write eval.json (settings, means with intervals, paired differences, layers) and eval.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    results = {**about, "tasks": [table.summary(seed) for table in tables]}
    path = out / JSON_NAME
    path.write_text(json.dumps(plain(results), indent=2) + "\n")
    return [path, draw_report(out / PICTURE_NAME, tables, seed)]


def plain(value: Any) -> Any:
    """NumPy scalars as Python numbers; nan and inf, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw_report(path: Path, tables: Sequence[Table], seed: int = 0) -> Path:
    """Draw one panel a task (conditions with 95 % intervals, chance dashed), one of costs, one of all tables that
    differ in a setting (curves over it), and one of gates and corrections by layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = next((table.layers for table in tables if table.layers), [])
    swept = [table for table in tables if "sweep" in table.settings]
    tables = [table for table in tables if "sweep" not in table.settings]
    costly = [table for table in tables if table.costs]
    panels = len(tables) + len(costly) + bool(swept) + bool(layers)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.8), constrained_layout=True, squeeze=False)
    for table, ax in zip(tables, axes.flat, strict=False):
        metric = table.metrics[0]
        for y, condition in enumerate(table.values):
            found = table.interval(condition, metric, seed)
            color = "tab:blue" if condition in ("kept", "adapter") else "tab:gray"
            ax.plot([found.low, found.high], [y, y], color=color, linewidth=2)
            ax.plot(found.mean, y, "o", color=color)
        ax.set_yticks(range(len(table.values)), list(table.values))
        ax.invert_yaxis()
        if "chance" in table.settings:
            ax.axvline(table.settings["chance"], color="tab:red", linestyle="--", linewidth=1, label="chance")
            ax.legend(fontsize=8)
        ax.set(title=table.task, xlabel=f"{metric}, 95 % interval")
    for table, ax in zip(costly, axes.flat[len(tables) :], strict=False):
        _draw_costs(ax, table, seed)
    if swept:
        _draw_curves(axes.flat[len(tables) + len(costly)], swept, seed)
    if layers:
        _draw_layers(axes.flat[-1], layers)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_costs(ax: Any, table: Table, seed: int) -> None:
    """The main metric over the tokens of a prompt, with the time and the memory of each condition in the legend."""
    metric = table.metrics[0]
    for condition, cost in table.costs.items():
        found = table.interval(condition, metric, seed)
        label = f"{condition}: {cost[SECONDS]:.2g} s, {cost[BYTES]:,.0f} bytes"
        (line,) = ax.plot(cost[TOKENS], found.mean, "o", label=label)
        ax.plot([cost[TOKENS]] * 2, [found.low, found.high], color=line.get_color(), linewidth=2)
    ax.set(
        title="What a question costs", xlabel=TOKENS, ylabel=f"{metric}, 95 % interval", xlim=(0, None), ylim=(0, 1.02)
    )
    ax.legend(fontsize=7)


def _draw_curves(ax: Any, tables: Sequence[Table], seed: int) -> None:
    first, metric = tables[0], tables[0].metrics[0]
    key = first.settings["sweep"]
    values = [table.settings[key] for table in tables]
    places = values if all(isinstance(value, int) for value in values) else list(range(len(values)))
    for condition in first.values:
        found = [table.interval(condition, metric, seed) for table in tables]
        (line,) = ax.plot(places, [one.mean for one in found], "o-", markersize=3, label=condition)
        ax.fill_between(
            places, [one.low for one in found], [one.high for one in found], color=line.get_color(), alpha=0.15
        )
    ax.plot(places, [table.settings["chance"] for table in tables], "--", color="tab:red", linewidth=1, label="chance")
    ax.set_xticks(places, [str(value) for value in values])
    ax.set(title=f"recall ({first.settings['recall']})", xlabel=key, ylabel=f"{metric}, 95 % interval", ylim=(0, 1.02))
    ax.legend(fontsize=7)


def _draw_layers(ax: Any, layers: Sequence[dict[str, float]]) -> None:
    for adapter in sorted({row.get("adapter", 0) for row in layers}):
        rows = [row for row in layers if row.get("adapter", 0) == adapter]
        x = [row["layer"] for row in rows]
        first = adapter == 0
        ax.plot(x, [row["mean_beta"] for row in rows], "o-", color="tab:green", markersize=3,
                label="mean write gate β" if first else None)  # fmt: skip
        ax.plot(x, [row["output_ratio"] for row in rows], "s--", color="tab:orange", markersize=3,
                label="||Δo|| / ||o||" if first else None)  # fmt: skip
    ax.set(title="Layers", xlabel="layer", ylim=(0, None))
    ax.legend(fontsize=8)
