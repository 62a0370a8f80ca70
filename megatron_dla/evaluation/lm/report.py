"""Tables, JSON and the figure of a comparison of language models."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dla.evaluation.lm.items import Task
from megatron_dla.evaluation.lm.perplexity import Perplexity, by_position, perplexity_units
from megatron_dla.evaluation.lm.runner import Outcome
from megatron_dla.evaluation.report import JSON_NAME, PICTURE_NAME, plain
from megatron_dla.evaluation.stats import bootstrap_mean
from megatron_dla.evaluation.table import Table
from megatron_dla.files import write_text

DEPTHS = 5  # rows of the depth pictures
MAX_LINES = 20  # models in a picture


def task_table(task: Task, outcomes: dict[str, Outcome]) -> Table:
    """Of one task: models as conditions, each later model minus the first where both have the same items.

    Models with other tokenizers have other windows and prompts, so that nothing can be paired: `settings.paired`.
    """
    values = {}
    for model, outcome in outcomes.items():
        if isinstance(task, Perplexity):
            values[model] = perplexity_units(outcome.values)
        else:
            values[model] = {m: np.array([float(value[m]) for value in outcome.values]) for m in task.metrics}
    first, *others = outcomes
    keys = {model: [item.key for item in outcome.items] for model, outcome in outcomes.items()}
    paired = [model for model in others if keys[model] == keys[first]]
    settings = {**task.settings, "paired": paired}
    if task.chance is not None:
        settings["chance"] = task.chance
    return Table(task.name, task.unit, task.metrics, values, [(model, first) for model in paired], settings)


def task_summary(task: Task, outcomes: dict[str, Outcome], table: Table, seed: int) -> dict[str, Any]:
    """The table as JSON values, with the breakdowns: by position, by length, by length and depth."""
    out = table.summary(seed)
    out.pop("layers")
    if isinstance(task, Perplexity):
        out["perplexity"] = {m: float(np.exp(found["nats"].mean())) for m, found in table.values.items()}
        out["by_position"] = {model: by_position(outcome.values) for model, outcome in outcomes.items()}
        return out
    for name in ("length", "depth"):
        found = {model: by_place(outcome, task.metrics[0], name, seed) for model, outcome in outcomes.items()}
        if any(found.values()):
            out[f"by_{name}"] = found
    return out


def by_place(outcome: Outcome, metric: str, name: str, seed: int = 0) -> list[dict[str, Any]]:
    """Mean of a metric with its interval by `length`, or by length and fifth of the `depth`."""
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for item, value in zip(outcome.items, outcome.values, strict=True):
        if name in item.about:
            length = item.about["length"]
            depth = -1 if name == "length" else min(int(item.about["depth"] * DEPTHS), DEPTHS - 1)
            groups[length, depth].append(value[metric])
    rows = []
    for (length, depth), values in sorted(groups.items()):
        row = {"length": length, **bootstrap_mean(np.array(values), seed=seed, resamples=2000).to_dict()}
        rows.append(row if name == "length" else row | {"depth": (depth + 0.5) / DEPTHS})
    return rows


def lengths_text(summaries: Sequence[dict[str, Any]]) -> str:
    """Tasks by length, one table a model, in percent; empty where no task has lengths."""
    blocks = []
    with_lengths = [summary for summary in summaries if "by_length" in summary]
    for model in with_lengths[0]["by_length"] if with_lengths else ():
        lengths = sorted({row["length"] for summary in with_lengths for row in summary["by_length"][model]})
        rows = [[model, *(f"{length:,}" for length in lengths)]]
        for summary in with_lengths:
            means = {row["length"]: 100 * row["mean"] for row in summary["by_length"][model]}
            rows.append([summary["task"], *(f"{means[x]:.1f}" if x in means else "-" for x in lengths)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        blocks.append("\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ))  # fmt: skip
    return "\n\n".join(blocks)


def write_report(out: Path, summaries: Sequence[dict[str, Any]], about: dict[str, Any]) -> list[Path]:
    """Write eval.json and eval.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / JSON_NAME
    write_text(path, json.dumps(plain({**about, "tasks": list(summaries)}), indent=2) + "\n")
    return [path, draw(out / PICTURE_NAME, summaries)]


def draw(path: Path, summaries: Sequence[dict[str, Any]]) -> Path:
    """Panels: bits a byte by position; tasks without lengths; accuracy by length; by length and depth of each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(summaries)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 3.8 * rows), constrained_layout=True, squeeze=False
    )
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (function, *arguments) in zip(axes.flat, panels, strict=False):
        function(ax, *arguments)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panels(summaries: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    panels: list[tuple[Any, ...]] = [(_draw_positions, summary) for summary in summaries if "by_position" in summary]
    flat = [summary for summary in summaries if "by_position" not in summary and "by_length" not in summary]
    panels += [(_draw_tasks, flat)] if flat else []
    lengths = [summary for summary in summaries if "by_length" in summary]
    panels += [(_draw_lengths, lengths)] if lengths else []
    deep = [summary for summary in summaries if "by_depth" in summary]
    panels += [(_draw_depths, deep, model) for model in (list(deep[0]["by_depth"])[:MAX_LINES] if deep else ())]
    return panels


def _draw_positions(ax: Any, summary: dict[str, Any]) -> None:
    for model, rows in summary["by_position"].items():
        ax.plot([row["from"] for row in rows], [row["bits_per_byte"] for row in rows], "o-", markersize=3, label=model)
    ax.set_xscale("log", base=2)
    ax.set(title=summary["task"], xlabel="tokens of context", ylabel="bits per byte")
    ax.legend(fontsize=8)


def _draw_tasks(ax: Any, summaries: Sequence[dict[str, Any]]) -> None:
    models = list(summaries[0]["conditions"])
    for number, model in enumerate(models):
        for y, summary in enumerate(summaries):
            metric = next(iter(summary["conditions"][model]))
            found = summary["conditions"][model][metric]
            place = y + 0.6 * ((number + 0.5) / len(models) - 0.5)
            ax.plot([found["low"], found["high"]], [place] * 2, color=f"C{number % 10}", linewidth=2)
            ax.plot(found["mean"], place, "o", color=f"C{number % 10}", label=model if y == 0 else None)
            if "chance" in summary["settings"] and number == 0:
                ax.plot([summary["settings"]["chance"]] * 2, [y - 0.4, y + 0.4], "r--", linewidth=1)
    ax.set_yticks(range(len(summaries)), [summary["task"] for summary in summaries])
    ax.invert_yaxis()
    ax.set(title="Questions (chance dashed)", xlabel="accuracy, 95 % interval")
    ax.legend(fontsize=8)


def _draw_lengths(ax: Any, summaries: Sequence[dict[str, Any]]) -> None:
    """One line a model, the mean over tasks; of a single model one thin line a task beside it."""
    models = list(summaries[0]["by_length"])
    for model in models:
        points: dict[int, list[float]] = defaultdict(list)
        for summary in summaries:
            rows = summary["by_length"][model]
            for row in rows:
                points[row["length"]].append(row["mean"])
            if len(models) == 1 and len(summaries) > 1:
                ax.plot([r["length"] for r in rows], [r["mean"] for r in rows], linewidth=0.8, label=summary["task"])
        x = sorted(points)
        ax.plot(x, [np.mean(points[length]) for length in x], "o-", linewidth=2, label=model)
    ax.set_xscale("log", base=2)
    ax.set(title=f"Mean of {len(summaries)} task(s)", xlabel="tokens", ylabel="accuracy", ylim=(-0.03, 1.03))
    ax.legend(fontsize=6)


def _draw_depths(ax: Any, summaries: Sequence[dict[str, Any]], model: str) -> None:
    cells: dict[tuple[int, float], list[float]] = defaultdict(list)
    for summary in summaries:
        for row in summary["by_depth"][model]:
            cells[row["length"], row["depth"]].append(row["mean"])
    lengths = sorted({length for length, _ in cells})
    depths = [(i + 0.5) / DEPTHS for i in range(DEPTHS)]
    grid = [[np.mean(cells[x, y]) if (x, y) in cells else np.nan for x in lengths] for y in depths]
    image = ax.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    ax.set_yticks(range(DEPTHS), [f"{depth:.0%}" for depth in depths])
    ax.set(title=f"{model}: mean of {len(summaries)} task(s)", xlabel="tokens", ylabel="depth")
    ax.figure.colorbar(image, ax=ax, label="accuracy")
