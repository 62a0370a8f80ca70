"""Charts as inline SVG. Colours come from the page's style, so that it can be light or dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape

from megatron_dla.report.charts import Chart, Curve, Point, thin
from megatron_dla.report.timeline import Event

WIDTH, HEIGHT = 560, 236
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 26
COLORS = 6  # --c0 to --c5 of the style


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float, kind: str = "plain") -> str:
    """A number as an axis or a tile writes it."""
    if kind == "percent":
        return f"{100 * value:.4g}%"
    if value == 0:
        return "0"
    size = abs(value)
    if kind == "power" or size < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    for limit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


class _Axis:
    """Maps values to pixels, from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        if not high > low:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 2, high * 2) if log else (low - pad, high + pad)
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high, value = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, about: int = 5) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, about)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [10.0**p for p in powers if self.low <= 10.0**p <= self.high] or [self.low, self.high]


def _color(curve: Curve, place: int) -> str:
    if curve.layer is not None:
        return f"color-mix(in oklab, var(--last) {100 * curve.layer:.0f}%, var(--first))"
    return f"var(--c{place % COLORS})"


def _path(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{x(a)} {y(b)}" for a, b in points)


def draw(chart: Chart, number: int) -> str:
    """A figure: title, legend, curves, and the points as JSON for the page's script."""
    curves = [(curve, thin(curve.points)) for curve in chart.curves]
    xs = [a for _, points in curves for a, _ in points]
    ys = [b for _, points in curves for _, b in points]
    low, high = min(ys), max(ys)
    if chart.zero and low >= 0:
        low = 0.0
    elif not chart.log:
        low = max(low - 0.04 * (high - low), 0.0 if low >= 0 else -math.inf)
    high = high if chart.log else high + 0.06 * (high - low)
    x = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP, chart.log)
    parts = _grid(chart, x, y)
    colors = []
    place = 0
    for curve, points in curves:
        color = _color(curve, place)
        place += curve.style != "faint"
        colors.append(color)
        parts.append(_curve(curve, points, color, x, y))
    data = {
        "left": LEFT, "right": WIDTH - RIGHT, "low": x.low, "high": x.high, "kind": chart.kind,
        "curves": [[curve.name, color, [[a, float(f"{b:.6g}")] for a, b in points]]
                   for (curve, points), color in zip(curves, colors, strict=True)],
    }  # fmt: skip
    note = f'<span class="note">{escape(chart.note)}</span>' if chart.note else ""
    unit = f'<span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    return (
        f'<figure class="chart" id="chart-{number}" data-title="{escape(chart.title)}"><figcaption><b>'
        f"{escape(chart.title)}</b>{unit}{note}</figcaption>{_legend(chart, colors)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(parts)}'
        f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<script type="application/json">{_json(data)}</script></figure>'
    )


def _json(data: object) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _grid(chart: Chart, x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for value in y.ticks(4):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{escape(short(value, chart.kind))}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<text x="{LEFT - 8}" y="{bottom + 17}" text-anchor="end">step</text>')
    for value in x.ticks(6):
        if value == int(value):
            parts.append(f'<text x="{x(value)}" y="{bottom + 17}" text-anchor="middle">{escape(short(value))}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _curve(curve: Curve, points: list[Point], color: str, x: _Axis, y: _Axis) -> str:
    style = f'style="--color:{color}"'
    text = f'<path class="curve {curve.style}" {style} d="{_path(points, x, y)}"/>' if len(points) > 1 else ""
    if len(points) == 1 or (curve.style == "dots" and len(points) <= 60):
        text += "".join(f'<circle class="dot" {style} cx="{x(a)}" cy="{y(b)}" r="3.2"/>' for a, b in points)
    return text


def _legend(chart: Chart, colors: list[str]) -> str:
    if chart.curves[0].layer is not None and len(chart.curves) > 1:
        names = escape(chart.curves[0].name), escape(chart.curves[-1].name)
        return f'<div class="legend"><span>{names[0]}</span><i class="ramp"></i><span>{names[1]}</span></div>'
    if len(chart.curves) < 2:
        return '<div class="legend"></div>'
    marks = (
        f'<span class="{curve.style}"><i style="--color:{color}"></i>{escape(curve.name)}</span>'
        for curve, color in zip(chart.curves, colors, strict=True)
    )
    return f'<div class="legend">{"".join(marks)}</div>'


WIDE, TALL = 1160, 270
SHAPES = {
    "start": "M-5 -6L6 0L-5 6Z",
    "save": "M0 -4L4 0L0 4L-4 0Z",
    "stop": "M-5 -5H5V5H-5Z",
    "fallback": "M6 -6L-6 0L6 6Z",
    "repeat": "M6 -6L-6 0L6 6Z",
    "done": "M-6 0L-2 5L7 -6L-2 1Z",
}
CROSS = "M-6 -4L-4 -6L0 -2L4 -6L6 -4L2 0L6 4L4 6L0 2L-4 6L-6 4L-2 0Z"


def clock(seconds: float) -> str:
    """0:00:12, or 2 d 3:04 for long ones."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def draw_timeline(events: Sequence[Event], progress: list[tuple[float, float]]) -> str:
    """Steps over wall-clock time with the events on it; "" where fewer than two times are known.

    Args:
        progress: (Unix seconds, step) of the log steps.
    """
    placed = [(event.time, event) for event in events if event.time is not None]
    times = [t for t, _ in progress] + [t for t, _ in placed]
    if len(set(times)) < 2:
        return ""
    begin = min(times)
    steps = [s for _, s in progress] + [float(e.step) for _, e in placed if e.step is not None]
    x = _Axis(0, max(times) - begin, LEFT, WIDE - RIGHT)
    y = _Axis(0, max([*steps, 1.0]) * 1.08, TALL - BOTTOM, 22)
    parts = []
    for value in y.ticks(4):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4}" text-anchor="end">{short(value)}</text>')
    for value in _time_ticks(x.high):
        parts.append(f'<text x="{x(value)}" y="{TALL - BOTTOM + 17}" text-anchor="middle">{clock(value)}</text>')
    starts = sorted(t for t, event in placed if event.kind == "start")
    for t in starts:
        parts.append(f'<line class="begin" x1="{x(t - begin)}" x2="{x(t - begin)}" y1="16" y2="{TALL - BOTTOM}"/>')
    for piece in _pieces(sorted(progress), starts):
        points = [(t - begin, s) for t, s in thin(piece)]
        parts.append(f'<path class="curve" style="--color:var(--c0)" d="{_path(points, x, y)}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{TALL - BOTTOM}" y2="{TALL - BOTTOM}"/>')
    order = {"plain": 0, "busy": 1, "warn": 2, "bad": 3, "good": 4}
    for t, event in sorted(placed, key=lambda one: order[one[1].tone]):
        height = y(float(event.step)) if event.step is not None else y(_step_at(t, progress))
        height = 16.0 if event.kind == "start" else height
        words = f"{event.title}{f', step {event.step}' if event.step is not None else ''}, {clock(t - begin)}"
        words += f": {event.text}" if event.text else ""
        parts.append(
            f'<g class="mark {event.tone}" transform="translate({x(t - begin)} {height})">'
            f'<path d="{SHAPES.get(event.kind, CROSS)}"/><title>{escape(words)}</title></g>'
        )
    return (
        f'<svg id="timeline" viewBox="0 0 {WIDE} {TALL}" role="img" aria-label="Steps and events over time">'
        f"{''.join(parts)}</svg>"
    )


def _time_ticks(span: float) -> list[float]:
    """Round times."""
    sizes = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]
    size = next((s for s in sizes if span / s <= 9), 86400 * math.ceil(span / 86400 / 9))
    return [float(n * size) for n in range(int(span // size) + 1)]


def _pieces(progress: list[tuple[float, float]], starts: list[float]) -> list[list[tuple[float, float]]]:
    """The curve is broken where the run was."""
    edges = [-math.inf, *starts, math.inf]
    pieces = ([p for p in progress if low <= p[0] < high] for low, high in zip(edges, edges[1:], strict=False))
    return [piece for piece in pieces if piece]


def _step_at(time: float, progress: list[tuple[float, float]]) -> float:
    return max((s for t, s in progress if t <= time), default=0.0)
