"""The report of a study: study.json, pictures, and one HTML page that holds both."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from megatron_dla.files import write_json, write_text
from megatron_dla.study.html import html_table, number, plots, show_difference
from megatron_dla.study.report_synthetic import RECALL, draw_recall, synthetic_section
from megatron_dla.study.results import verdict

JSON_NAME, PAGE_NAME, CURVES, FOREST = "study.json", "study.html", "curves.png", "differences.png"
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}code,pre{background:#f5f5f5;padding:.1em .3em}"
)


def write_report(results: dict[str, Any], out: Path, command: str) -> list[Path]:
    """Write all files into `out`; `command`: what runs the study again. The page needs no other file."""
    out.mkdir(parents=True, exist_ok=True)
    results = {"synthetic": {}, **results, "command": command}
    write_json(out / JSON_NAME, results, indent=1)
    again = json.loads((out / JSON_NAME).read_text())  # as somebody who has only this file
    pictures = [draw_curves(again, out / CURVES), draw_differences(again, out / FOREST)] if again["arms"] else []
    pictures += [draw_recall(again["synthetic"], out / RECALL)] if again["synthetic"] else []
    write_text(out / PAGE_NAME, page(again, pictures))
    return [out / JSON_NAME, *pictures, out / PAGE_NAME]


def table(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row an arm, best first."""
    arms = results["arms"]
    header = [
        "arm", "parameters", "learning rate", "seeds", "bits per byte", "seed spread", "difference [95 %]", "",
        "boundary rate", "tokens/s", "GB",
    ]  # fmt: skip
    rows = []
    for name in sorted(arms, key=lambda name: (arms[name]["mean"] is None, arms[name]["mean"])):
        arm, found = arms[name], arms[name]["difference"]
        rows.append(
            [
                name, number(arm["parameters"], ",.0f"),
                number(arm["best_rate"], ".1e") + (" (edge)" if arm["rate_at_edge"] else ""),
                str(len(arm["results"])), number(arm["mean"], ".4f"), number(arm["spread"], ".4f"),
                "reference" if name == results["reference"] else show_difference(found, 4), verdict(found),
                number(arm["boundary_rate"], ".3f"), number(arm["tokens_per_s"], ",.0f"),
                number(arm["memory_gb"], ".2f"),
            ]
        )  # fmt: skip
    return [header, *rows]


def page(results: dict[str, Any], pictures: list[Path]) -> str:
    """The HTML page, pictures included."""
    images = {
        path.name: f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    }
    text = _text_section(results) + images[CURVES] + images[FOREST] if results["arms"] else ""
    recall = synthetic_section(results["synthetic"]) + images[RECALL] if results["synthetic"] else ""
    arms = {name: arm["overrides"] for name, arm in results["arms"].items()}
    synthetic = results["synthetic"].get("overrides", {})
    about = {key: results[key] for key in ("machine", "versions")} | {"arms": arms, "synthetic arms": synthetic}
    title = html.escape(f"Study {results['study']}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{text}{recall}"
        f"<h2>Run it again</h2><pre>{html.escape(results['command'])}</pre>"
        f"<h2>Arms, machine, versions</h2><pre>{html.escape(json.dumps(about, indent=1))}</pre></body></html>\n"
    )


def _text_section(results: dict[str, Any]) -> str:
    done = results["cells"]
    return (
        f"<p>{done['done']} of {done['planned']} cells. Held-out bits per byte, lower is better; differences are "
        "paired by seed, with percentile bootstrap intervals over seeds, which are coarse for few seeds. "
        "Each arm has the learning rate that was best at the first seed; (edge): the best one tried was the smallest "
        f"or the largest, so a better one may lie outside.</p>{html_table(table(results))}"
    )


def draw_curves(results: dict[str, Any], path: Path) -> Path:
    """Held-out bits per byte by step: mean and range over the seeds of each arm, at its best learning rate."""
    plt = plots()
    figure, axis = plt.subplots(figsize=(9, 5), constrained_layout=True)
    for place, (name, arm) in enumerate(results["arms"].items()):
        runs = [c["held_out"] for c in arm["cells"] if c["rate"] == arm["best_rate"] and "held_out" in c]
        if not runs:
            continue
        steps = [step for step, _ in min(runs, key=len)]
        values = [[value for _, value in run[: len(steps)]] for run in runs]
        middle = [sum(column) / len(column) for column in zip(*values, strict=True)]
        color = plt.get_cmap("tab10" if len(results["arms"]) <= 10 else "tab20")(place)
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
