"""Where results go: a line a measurement on the console, one JSON file, one plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_dla.machine import processor

from .sweep import Record

COLUMNS = (
    ("backbone", 8), ("D", 4), ("T", 8), ("K", 3), ("method", 20), ("fwd ms", 16), ("fwd+bwd ms", 16), ("us/token", 9),
    ("peak GB", 8), ("of floor", 9), ("partition", 10), ("rate", 7), ("slots", 6),
)  # fmt: skip


def header() -> str:
    return " ".join(name.rjust(width) for name, width in COLUMNS)


def _spread(record: Record, name: str) -> str:
    if f"{name}_ms" not in record:
        return "-"
    low, high = record[f"{name}_spread_ms"]
    ms = record[f"{name}_ms"]
    return f"{ms:.4g} ±{50 * (high - low) / ms:.0f}%"


def _per_token_us(record: Record) -> float:
    ms = record["both_ms"] if "both_ms" in record else record["forward_ms"]
    return 1e3 * ms / record["tokens"]


def table_line(record: Record) -> str:
    """One row of the table; an error takes the place of what it prevented."""

    def number(name: str, form: str, scale: float = 1.0) -> str:
        value = record.get(name)
        return "-" if value is None else format(value * scale if scale != 1.0 else value, form)

    if record["kind"] == "decode":
        start = (
            f"decode {record['backbone']} D={record['dim']} K={record['capacity']} context {record['context']:>8,}: "
        )
        if "error" in record:
            return start + record["error"]
        size = f"cache {record['cache_bytes'] / 1e6:.2f} MB, {record['live_slots']:.1f} slots"
        return start + f"{record['token_ms']:.4g} ms/token, {size}, {record['token_floor_share']:.1%} of the floor"
    name = "both" if "both_ms" in record else "forward"
    cells = [
        record["backbone"], str(record["dim"]), str(record["tokens"]), number("capacity", "d"), record["method"],
        _spread(record, "forward"), _spread(record, "both"),
        f"{_per_token_us(record):.3g}" if "forward_ms" in record else "-",
        number(f"{name}_peak_bytes", ".3g", 1e-9), number(f"{name}_floor_share", ".1%"),
        number("partition_share", ".0%"), number("boundary_rate", ".4f"), number("live_slots", ".1f"),
    ]  # fmt: skip
    line = " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return line + (f"  {record['error']}" if "error" in record else "")


def version(name: str) -> str | None:
    """Of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and command: what a number needs to mean something."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["dla", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}, {processor()}",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fla": version("flash-linear-attention") or version("fla-core"),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {"gpu": p.name, "gpu_memory_gb": round(p.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        facts |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
    return facts


def write_json(path: Path, facts: dict[str, Any]) -> Path:
    """Write `facts`; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return path


def draw(path: Path, records: list[Record], title: str) -> Path | None:
    """Time over length, and time a token, log-log, a panel a backbone and head dim; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    done = [r for r in records if r["kind"] == "attention" and "forward_ms" in r]
    panels = sorted({(r["backbone"], r["dim"]) for r in done})
    if not panels:
        return None
    figure, axes = plt.subplots(2, len(panels), figsize=(5 * len(panels), 8), squeeze=False, sharex=True)
    name = "both_ms" if any("both_ms" in r for r in done) else "forward_ms"
    for column, (backbone, dim) in enumerate(panels):
        mine = [r for r in done if r["dim"] == dim and (r["backbone"] == backbone or r["method"] == "sdpa")]
        for row, value in enumerate(_curves(name)):
            axis = axes[row][column]
            _draw_panel(axis, mine, name, value)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(True, which="both", alpha=0.2)
        axes[0][column].set_title(f"{backbone}, D = {dim}")
        axes[0][column].legend(fontsize=7)
        axes[1][column].set_xlabel("tokens")
    what = "forward + backward" if name == "both_ms" else "forward"
    axes[0][0].set_ylabel(f"{what}, ms")
    axes[1][0].set_ylabel(f"{what}, us a token")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _curves(name: str) -> tuple[Callable[[Record], float], Callable[[Record], float]]:
    return (lambda r: r[name]), (lambda r: 1e3 * r[name] / r["tokens"])


def _draw_panel(axis: Any, records: list[Record], name: str, value: Callable[[Record], float]) -> None:
    for method, capacity in sorted({(r["method"], r.get("capacity", 0)) for r in records}):
        points = [r for r in records if (r["method"], r.get("capacity", 0)) == (method, capacity) and name in r]
        if points:
            label = f"{method}, K = {capacity}" if capacity else method
            axis.plot([r["tokens"] for r in points], [value(r) for r in points], marker="o", markersize=3, label=label)
