"""What each recipe gives and costs: a table, JSON and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from megatron_dla.ablation.plan import Ablation
from megatron_dla.ablation.run import COLUMNS, read_result
from megatron_dla.files import parse_json, write_json

JSON_NAME, PICTURE_NAME = "ablation.json", "ablation.png"
GAIN = "memory"
SHOWN = ("overrides", "seeds", "parameters", "seconds", "versions", "machine", "date", "points", "tables")


def collect(ablation: Ablation) -> dict[str, Any]:
    """Everything that the report shows, of the recipes that have ended."""
    found = {name: read_result(ablation, name) for name in ablation.recipes}
    ended = {name: record for name, record in found.items() if record is not None}
    return {
        "name": ablation.config.name,
        "recipes": {name: {key: record[key] for key in SHOWN} for name, record in ended.items()},
        "planned": len(found),
    }


def table_text(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = [["recipe", *COLUMNS, "parameters", "seconds of training"], ["---"] * (len(COLUMNS) + 3)]
    for name, recipe in results["recipes"].items():
        points = [_show(recipe["points"][column]) for column in COLUMNS]
        seconds = f"{statistics.mean(recipe['seconds']):,.0f}"
        rows.append([name, *points, f"{recipe['parameters']:,}", seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _show(point: dict[str, float] | None) -> str:
    if point is None:
        return "-"
    mean, low, high = (round(point[key], 3) + 0.0 for key in ("mean", "low", "high"))  # no -0.000
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """`ablation.json`, and `ablation.png` drawn from it alone, where there is a point to draw. Returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / JSON_NAME, results, indent=1)
    again = parse_json((out / JSON_NAME).read_bytes())
    return [out / JSON_NAME, *([draw(again, out / PICTURE_NAME)] if _harms(again) else [])]


def _harms(results: dict[str, Any]) -> list[str]:
    """Kinds of harm that a recipe has a point for."""
    points = [recipe["points"] for recipe in results["recipes"].values()]
    return [name for name in COLUMNS if name.startswith("harm") and any(p[name] and p[GAIN] for p in points)]


def draw(results: dict[str, Any], path: Path) -> Path:
    """Memory over each kind of harm, a point with its intervals for every recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recipes, harms = results["recipes"], _harms(results)
    figure, axes = plt.subplots(1, len(harms), figsize=(6.5 * len(harms), 5), constrained_layout=True, squeeze=False)
    for ax, harm in zip(axes.flat, harms, strict=True):
        for number, (name, recipe) in enumerate(recipes.items()):
            x, y = recipe["points"][harm], recipe["points"][GAIN]
            if x is None or y is None:
                continue
            color = plt.get_cmap("tab20")(number % 20)
            ax.plot([x["low"], x["high"]], [y["mean"]] * 2, color=color, linewidth=1)
            ax.plot([x["mean"]] * 2, [y["low"], y["high"]], color=color, linewidth=1)
            ax.plot(x["mean"], y["mean"], "o", color=color, label=name)
        ax.axvline(0, color="gray", linewidth=1)
        ax.set(xlabel=f"{harm} (left is better)", ylabel="kept - shuffled, right answers (up is better)")
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
