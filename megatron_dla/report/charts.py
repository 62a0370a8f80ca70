"""The curves of a run: which there are, and what they show."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_dla.metrics.names import layer_mean
from megatron_dla.report.files import number
from megatron_dla.report.record import Record

MOST_POINTS = 500  # of a curve; more are thinned out to the extremes of each piece
Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """`style`: line, faint (what another curve smooths), dots, or dashed. `layer`: place from 0 (first) to 1 (last)."""

    name: str
    points: list[Point]
    style: str = "line"
    layer: float | None = None


@dataclass
class Chart:
    """`kind`: how numbers are written, plain, percent or power. `zero`: the axis begins at 0. `note`: by the title."""

    title: str
    unit: str
    curves: list[Curve] = field(default_factory=list)
    kind: str = "plain"
    zero: bool = False
    log: bool = False
    note: str = ""


def series(
    metrics: Iterable[dict[str, Any]], key: str | Callable[[dict[str, Any]], Any], scale: float = 1
) -> list[Point]:
    """(step, value) where the value is a finite number."""
    get = key if callable(key) else lambda m: m.get(key)
    return [(m["step"], value * scale) for m in metrics if (value := number(get(m))) is not None]


def make_charts(record: Record) -> list[Chart]:
    """Those for which the run has logged anything."""
    m = record.metrics
    charts = [
        _loss(m),
        Chart("Held-out text", "bits per byte", [Curve("held out", series(m, "val_bpb"), "dots")]),
        _parts("Held-out loss by source", "nats per token", m, "val_loss_by_source", "dots"),
        Chart("Learning rate", "", [Curve("learning rate", series(m, "lr"))], kind="power", zero=True),
        _norm(m),
        _layers("Boundary rate by layer", "share of tokens", m, "boundary_rate_by_head", kind="percent"),
        _layers("Merges of the newest two slots by layer", "share of merges", m, "newest_merge_share_by_layer",
                kind="percent"),
        _parts("Slots by their tokens", "share of slots at row ends", m, "slot_sizes", "line", "percent"),
        _parts("Readout weight by slot", "mean; 0 = newest", m, "slot_weights", "line"),
        _layers("Slots in use by layer", "slots", m, "slots_by_layer", zero=True),
        _layers("Write gate by layer", "", m, "gate_by_layer"),
        _layers("Half-life of the memory by layer", "tokens", m, "half_life_by_layer"),
        Chart("Speed", "tokens per second, all devices", _smoothed("tokens/s", series(m, "tokens_per_s")), zero=True),
        Chart("MFU", "share of the dense bf16 peak", [Curve("MFU", series(m, "mfu"))], kind="percent", zero=True),
        Chart("Time waiting for data", "share of the step", [Curve("waiting", series(m, "data_wait_share"))],
              kind="percent", zero=True),
        Chart("Memory", "GB", [
            Curve("peak of rank 0", series(m, "memory_gb")),
            Curve("active", series(m, "memory_active_gb")),
            Curve("reserved", series(m, "memory_reserved_gb"), "dashed"),
        ], zero=True),
        _parts("Data mix", "share of the tokens", m, "mix", "line", "percent", note="since the present weights began"),
        Chart("Padding and cut documents", "share", [
            Curve("padding", series(m, "padding_share")), Curve("documents cut", series(m, "cut_share"), "dashed"),
        ], kind="percent", zero=True),
    ]  # fmt: skip
    for chart in charts:
        chart.curves = [curve for curve in chart.curves if curve.points]
    flat = ("Padding and cut documents",)  # not worth the room where nothing is padded or cut
    return [
        x for x in charts if x.curves and not (x.title in flat and not any(y for c in x.curves for _, y in c.points))
    ]


def _loss(m: list[dict[str, Any]]) -> Chart:
    curves = _smoothed("training", series(m, "loss"))
    chart = Chart("Loss", "nats per token", [*curves, Curve("held out", series(m, "val_loss"), "dots")])
    if len(curves) > 1:
        chart.note = "bold: mean over a fiftieth of the run"
    return chart


def _norm(m: list[dict[str, Any]]) -> Chart:
    points = series(m, "grad_norm")
    values = [y for _, y in points if y > 0]
    chart = Chart("Gradient norm", "before clipping", [Curve("gradient norm", points)], zero=True)
    if values and max(values) > 50 * statistics.median(values):
        chart.log, chart.zero = True, False
        chart.curves = [Curve("gradient norm", [(x, y) for x, y in points if y > 0])]
    return chart


def _smoothed(name: str, points: list[Point]) -> list[Curve]:
    """A noisy curve, faint, under its running mean; a short one as it is."""
    width = len(points) // 50
    if width < 2:
        return [Curve(name, points)]
    sums, total = [0.0], 0.0
    for _, y in points:
        total += y
        sums.append(total)
    mean = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - width // 2), min(len(points), i + width // 2 + 1)
        mean.append((x, (sums[high] - sums[low]) / (high - low)))
    return [Curve(f"{name}, each step", points, "faint"), Curve(name, mean)]


def _layers(title: str, unit: str, m: list[dict[str, Any]], key: str, kind: str = "plain", zero: bool = False) -> Chart:
    """One curve a layer: the mean of its heads."""
    rows = [x[key] for x in m if isinstance(x.get(key), list)]
    count = max(map(len, rows), default=0)
    chart = Chart(title, unit, kind=kind, zero=zero)
    for layer in range(count):

        def value(x: dict[str, Any], layer: int = layer) -> Any:
            found = x.get(key)
            return layer_mean(found[layer]) if isinstance(found, list) and layer < len(found) else None

        chart.curves.append(Curve(f"layer {layer}", series(m, value), layer=layer / max(1, count - 1)))
    return chart


def _parts(
    title: str, unit: str, m: list[dict[str, Any]], key: str, style: str, kind: str = "plain", note: str = ""
) -> Chart:
    """One curve a key of a mapping."""
    names = list(dict.fromkeys(name for x in m if isinstance(x.get(key), dict) for name in x[key]))
    chart = Chart(title, unit, kind=kind, note=note)
    for name in names:

        def value(x: dict[str, Any], name: str = name) -> Any:
            found = x.get(key)
            return found.get(name) if isinstance(found, dict) else None

        chart.curves.append(Curve(str(name), series(m, value), style))
    return chart


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the least and the greatest value of each piece, in order; ends stay."""
    if len(points) <= most:
        return points
    size = -(-len(points) * 2 // most)
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        piece = points[start : min(start + size, len(points) - 1)]
        kept += sorted({min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])})
    return [*kept, points[-1]]
