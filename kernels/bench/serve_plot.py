"""The picture of `dla bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"generate": "#999999", "static": "#8c564b", "reserved": "#ff7f0e", "paged": "#1f77b4", "dla": "#2ca02c"}


def draw(path: Path, facts: dict[str, Any]) -> Path | None:
    """Tokens a second of the trace; bytes, decoding speed and waste over the context; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(10, 7))
    names = list(facts["trace"])
    rates = [facts["trace"][name]["tokens_per_s"] for name in names]
    bars = axes[0][0].bar(names, rates, color=[COLORS[name] for name in names])
    axes[0][0].bar_label(bars, [f"{rate:,.0f}" for rate in rates])
    axes[0][0].margins(y=0.12)  # for the numbers
    axes[0][0].set_title(f"{facts['requests']} requests, {facts['memory_bytes'] / 1e6:,.0f} MB: tokens/s", fontsize=10)
    size = f"{facts.get('contexts_memory_bytes', 0) / 1e6:,.0f} MB"
    panels = (
        (axes[0][1], "bytes_each", "MB a sequence", 1e-6), (axes[1][0], "tokens_per_s", f"tokens/s, {size}", 1.0),
        (axes[1][1], "waste", "reserved memory that holds nothing, %", 100.0),
    )  # fmt: skip
    for axis, key, title, scale in panels:
        for name in COLORS:
            points = [r for r in facts["contexts"] if r["system"] == name]
            if points:
                style = "--" if name == "static" else "-"  # systems may lie on each other
                width = 4 if name == "reserved" else 1.5
                values = [scale * r[key] for r in points]
                axis.plot(
                    [r["context"] for r in points],
                    values,
                    style,
                    marker="o",
                    markersize=4,
                    linewidth=width,
                    alpha=0.5 if name == "reserved" else 1,
                    color=COLORS[name],
                    label=name,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens of a sequence")
        if facts["contexts"]:
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=8)
        if key != "waste":
            axis.set_yscale("log")
        axis.grid(True, alpha=0.25)
    millions = " and ".join(f"{count / 1e6:.1f}M" for count in facts["parameters"].values())
    figure.suptitle(
        f"softmax and DLA models of {millions} parameters, {facts['machine']}, {facts['threads']} thread(s), torch "
        f"{facts['torch']}, {facts['date'][:10]}", fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
