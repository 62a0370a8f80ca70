"""The part of a study's report on synthetic tasks: a table a task, and a picture of accuracies by length and step."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from megatron_dla.study.html import html_table, number, plots, show_difference
from megatron_dla.study.results import verdict

RECALL = "recall.png"


def synthetic_table(synthetic: dict[str, Any], name: str) -> list[list[str]]:
    """Header and one row an arm, the best at the longest rows first."""
    task = synthetic["tasks"][name]
    header = ["arm", "parameters", "memory", "learning rate", "seeds", "steps"]
    for length in task["lengths"]:
        header += [f"accuracy at {length} [range]", "difference [95 %]", ""]
    rows, arms, longest = [], task["arms"], task["lengths"][-1]
    for key in sorted(arms, key=lambda key: arms[key]["mean"][longest] or -1, reverse=True):
        arm = arms[key]
        row = [
            key, number(arm["parameters"], ",.0f"), number(arm["memory"], ",.0f"),
            number(arm["best_rate"], ".1e") + (" (edge)" if arm["rate_at_edge"] else ""),
            str(len(arm["results"][longest])), number(arm["steps"], ",.0f"),
        ]  # fmt: skip
        for length in task["lengths"]:
            found, span = arm["difference"][length], arm["range"][length]
            shown = number(arm["mean"][length], ".3f") + (f" [{span[0]:.3f}, {span[1]:.3f}]" if span else "")
            is_reference = key == synthetic["reference"]
            row += [shown, "reference" if is_reference else show_difference(found, 3), verdict(found, lower=False)]
        rows.append(row)
    return [header, *rows]


def synthetic_section(synthetic: dict[str, Any]) -> str:
    """HTML of all tasks, without the picture."""
    done = synthetic["cells"]
    parts = [
        f"<h2>Synthetic recall</h2><p>{done['done']} of {done['planned']} cells. Share of right answers by tokens of a "
        "row; training rows have the task's length. Mean and range over seeds; differences are paired by seed, with "
        "percentile bootstrap intervals over seeds, which are coarse for few seeds. memory: numbers that all layers "
        "keep of a training row. steps: of the training, which ends early where the accuracy suffices. Each arm has "
        "the learning rate that was best at the first seed.</p>"
    ]
    for name, task in synthetic["tasks"].items():
        about = ", ".join(f"{key} {value}" for key, value in task["config"].items())
        parts.append(f"<h3>{html.escape(name)}</h3><p>{html.escape(about)}</p>")
        parts.append(html_table(synthetic_table(synthetic, name)))
    return "".join(parts)


def draw_recall(synthetic: dict[str, Any], path: Path) -> Path:
    """A column a task: accuracy by length, mean and range over seeds; accuracy by step, each seed, at the best rate."""
    plt, tasks = plots(), synthetic["tasks"]
    size = (3.4 * len(tasks) + 1.6, 6.2)
    figure, axes = plt.subplots(2, len(tasks), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for (upper, lower), (name, task) in zip(axes.T, tasks.items(), strict=True):
        lengths = [int(length) for length in task["lengths"]]
        for place, (key, arm) in enumerate(task["arms"].items()):
            color = plt.get_cmap("tab10")(place % 10)
            if arm["best_rate"] is None:
                continue
            means, spans = arm["mean"].values(), arm["range"].values()
            upper.plot(lengths, means, "o-", color=color, label=key)
            upper.fill_between(lengths, *zip(*spans, strict=True), color=color, alpha=0.12)
            for cell in (cell for cell in arm["cells"] if cell["rate"] == arm["best_rate"]):
                lower.plot([p[0] for p in cell["curve"]], [p[2] for p in cell["curve"]], color=color, linewidth=1)
        upper.set(title=name, xlabel="tokens of a row", xticks=lengths, ylim=(-0.03, 1.03))
        lower.set(xlabel="step")
    axes[0, 0].set_ylabel("accuracy: mean and range of seeds")
    axes[1, 0].set_ylabel("accuracy in training, each seed")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
