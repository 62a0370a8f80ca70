"""The pictures of a study on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dla.study.html import plots

CURVES, FOREST, POSITIONS, SLOTS = "curves.png", "differences.png", "positions.png", "slots.png"


def draw_figures(results: dict[str, Any], out: Path) -> list[Path]:
    """Those for which the results have numbers."""
    arms = results["arms"].values()
    paths = [draw_curves(results, out / CURVES), draw_differences(results, out / FOREST)]
    paths += [draw_positions(results, out / POSITIONS)] if any(arm["by_position"] for arm in arms) else []
    return paths + ([draw_slots(results, out / SLOTS)] if any(arm["slot_sizes"] for arm in arms) else [])


def _color(plt: Any, results: dict[str, Any], name: str) -> Any:
    """The same in all pictures."""
    names = list(results["arms"])
    return plt.get_cmap("tab10" if len(names) <= 10 else "tab20")(names.index(name))


def draw_curves(results: dict[str, Any], path: Path) -> Path:
    """Held-out bits per byte by step: mean and range over the seeds of each arm, at its best learning rate."""
    plt = plots()
    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    for name, arm in results["arms"].items():
        runs = [c["held_out"] for c in arm["cells"] if c["rate"] == arm["best_rate"] and "held_out" in c]
        if not runs:
            continue
        steps = [step for step, _ in min(runs, key=len)]
        values = [[value for _, value in run[: len(steps)]] for run in runs]
        middle = [sum(column) / len(column) for column in zip(*values, strict=True)]
        color = _color(plt, results, name)
        axis.plot(steps, middle, color=color, label=name)
        lows, highs = zip(*[(min(column), max(column)) for column in zip(*values, strict=True)], strict=True)
        axis.fill_between(steps, lows, highs, color=color, alpha=0.15)
    axis.set(xlabel="step", ylabel="held-out bits per byte", title="Mean and range over seeds")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_differences(results: dict[str, Any], path: Path) -> Path:
    """Each arm's difference to the reference, with its interval and the seeds."""
    plt = plots()
    reference = results["arms"][results["reference"]]["results"]
    arms = {name: arm for name, arm in results["arms"].items() if arm["difference"]}
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.45 * len(arms)), constrained_layout=True)
    for y, arm in enumerate(arms.values()):
        found = arm["difference"]
        if found["low"] is not None:
            axis.plot([found["low"], found["high"]], [y, y], color="tab:blue", linewidth=2)
        axis.plot(found["mean"], y, "o", color="tab:blue")
        each = [arm["results"][seed] - reference[seed] for seed in arm["results"] if seed in reference]
        axis.plot(each, [y] * len(each), "|", color="tab:gray", markersize=12)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.invert_yaxis()
    axis.set(xlabel=f"bits per byte minus {results['reference']} (left is better); bars: single seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_positions(results: dict[str, Any], path: Path) -> Path:
    """Mean over seeds, by the tokens of the document that were read before, minus the reference's."""
    plt = plots()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    reference = results["arms"][results["reference"]]["by_position"]
    for name, arm in results["arms"].items():
        found, color = arm["by_position"], _color(plt, results, name)
        left.plot(list(found), list(found.values()), "o-", color=color, label=name)
        same = [key for key in found if key in reference]
        right.plot(same, [found[key] - reference[key] for key in same], "o-", color=color)
    left.set(xlabel="tokens read before", ylabel="held-out bits per byte")
    right.set(xlabel="tokens read before", ylabel=f"minus {results['reference']}")
    for axis in (left, right):
        axis.tick_params(axis="x", rotation=30)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_slots(results: dict[str, Any], path: Path) -> Path:
    """Of arms with slots, at the end of training: sizes of the slots at row ends, and readout weights by slot."""
    plt = plots()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    arms = {name: arm for name, arm in results["arms"].items() if arm["slot_sizes"]}
    keys = {key for arm in arms.values() for key in arm["slot_sizes"]}
    sizes = sorted(keys, key=lambda key: int(key.rstrip("+").split("-")[0]))
    for name, arm in arms.items():
        color = _color(plt, results, name)
        left.plot(sizes, [arm["slot_sizes"].get(key, 0.0) for key in sizes], "o-", color=color, label=name)
        right.plot([int(key) for key in arm["slot_weights"]], list(arm["slot_weights"].values()), "o-", color=color)
    left.set(xlabel="tokens in a slot", ylabel="share of the slots at row ends")
    left.tick_params(axis="x", rotation=30)
    right.set(xlabel="slot, 0 = the newest", ylabel="mean readout weight")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
