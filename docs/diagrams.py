"""The README's two diagrams, written as SVG to docs/images/: python docs/diagrams.py

`slots.svg` draws what the float64 reference decides on a short made-up sequence; `data_flow.svg` is laid out by hand.
The output is the same on every machine: random numbers come from `random.Random`, coordinates have one decimal.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from megatron_dla.kernels.dla import partition

IMAGES = Path(__file__).parent / "images"
INK, GREY, LIGHT, RED = "#1f2933", "#64707d", "#cfd6dd", "#c2410c"
SLOTS = ("#4c78a8", "#f2a541", "#59a14f", "#b07aa1", "#76b7b2", "#e1757a", "#9c755f")

# the sequence of slots.svg: tokens of each topic, and the noise on its keys and values
TOPICS = ((7, 0.12), (8, 0.05), (6, 0.16), (7, 0.14), (6, 0.05), (8, 0.04), (6, 0.12))
CAPACITY, TAU, DECAY, DIM = 4, 1.0, 0.97, 8


class Svg:
    """A drawing in pixels, y downwards."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def rect(self, x: float, y: float, w: float, h: float, fill: str, **style: object) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}"{_style(style)}/>'
        )

    def path(self, points: list[tuple[float, float]], stroke: str = GREY, **style: object) -> None:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{line}" fill="none" stroke="{stroke}"{_style(style)}/>')

    def arrow(self, *points: tuple[float, float], **style: object) -> None:
        self.path(list(points), stroke_width=1.5, marker_end="url(#tip)", **style)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}"/>')

    def text(self, x: float, y: float, words: str, anchor: str = "start", fill: str = INK, **style: object) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}"{_style(style)}>{escape(words)}</text>'
        )

    def code(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        self.text(x, y, words, anchor, font_family="DejaVu Sans Mono, Menlo, monospace", font_size=12)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def _style(style: dict[str, object]) -> str:
    return "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())


@dataclass(frozen=True)
class Run:
    """What the reference decided: per token the score, whether it opens a slot, and when that start is merged away."""

    score: list[float]
    start: list[bool]
    death: list[int]

    def slots(self, time: int) -> list[tuple[int, int]]:
        """(first token, end) of each slot after token `time`, oldest first."""
        live = [p for p in range(time + 1) if self.start[p] and time < self.death[p]]
        return list(zip(live, [*live[1:], time + 1], strict=True))

    def density(self, first: int, end: int) -> float:
        """Information of the tokens [first, end): the sum of their scores over their number."""
        return sum(self.score[first:end]) / (end - first)


def reference_run() -> Run:
    """The float64 recurrence (Mamba-2 form, one head) on topics, each a key and a value direction with noise."""
    rng = random.Random(4)
    keys, values = [], []
    for topic, (tokens, noise) in enumerate(TOPICS):
        for _ in range(tokens):
            for rows in (keys, values):
                rows.append([float(i == topic) + noise * rng.gauss(0, 1) for i in range(DIM)])
    k, v = (torch.tensor(rows, dtype=torch.float64)[None, :, None] for rows in (keys, values))  # [1, T, 1, DIM]
    g = torch.full((1, k.shape[1], 1), math.log(DECAY), dtype=torch.float64)
    found = partition(k, v, g, tau=TAU, capacity=CAPACITY, backend="naive")
    score, start, death = (x[0, :, 0].tolist() for x in (found.score, found.start, found.death))
    return Run(score, start, death)


def slots_diagram() -> Svg:
    """Scores with the boundaries on top; below, the slots just before each boundary and at the end."""
    run = reference_run()
    total, boundaries = len(run.score), [t for t, fired in enumerate(run.start) if fired]
    left, step, top, row = 250, 12, 152, 50
    ends = [*boundaries[1:], total]
    svg = Svg(left + step * total + 22, top + row * len(ends) + 40, "Slots of one DLA head over a sequence of tokens")
    _scores(svg, run, left, step)
    rule = ("Information of two neighbours:", "sum of their scores / number of tokens.")
    merge = ("At capacity a boundary first merges", "the two with the least.")
    for i, words in enumerate(rule + merge):
        svg.text(left + step * 24, top + 16 + 17 * i, words, fill=RED if i > 1 else GREY, font_size=12)
    merged = None
    for i, end in enumerate(ends):
        y, slots = top + row * i, run.slots(end - 1)
        svg.text(10, y + 10, f"Token {boundaries[i]} opens a slot")
        count = f"{len(slots)} of K = {CAPACITY} slots"
        svg.text(10, y + 27, merged or count, fill=RED if merged else GREY, font_size=12)
        least = _slot_row(svg, run, slots, left, step, y, full=end < total and len(slots) == CAPACITY)
        merged = None if least is None else f"after the merge of the pair at {least:.2f}"
    y = top + row * len(ends) + 6
    svg.arrow((left, y), (left + step * total + 14, y))
    for t in range(0, total, 8):
        svg.text(left + step * (t + 0.5), y + 18, str(t), "middle", GREY, font_size=12)
    svg.text(left - 12, y + 18, "token", "end", GREY, font_size=12)
    return svg


def _scores(svg: Svg, run: Run, left: float, step: float) -> None:
    base, scale = 122.0, 58.0
    svg.text(10, 40, "Score of a token", font_weight="bold")
    svg.text(10, 58, "distance from the open slot", fill=GREY, font_size=12)
    svg.text(10, 88, "≥ τ: boundary, opens a slot", fill=RED, font_size=12)
    svg.text(10, 106, "< τ: joins the open slot", fill=GREY, font_size=12)
    right = left + step * len(run.score)
    svg.path([(left, base), (right, base)], LIGHT)
    svg.path([(left, base - TAU * scale), (right, base - TAU * scale)], RED, stroke_dasharray="5 4")
    svg.text(left - 8, base - TAU * scale + 4, "τ", "end", RED)
    for t, (score, fired) in enumerate(zip(run.score, run.start, strict=True)):
        x, y = left + step * (t + 0.5), base - scale * score
        svg.path([(x, base), (x, y)], RED if fired else LIGHT, stroke_width=2)
        svg.dot(x, y, 3.5, RED if fired else GREY)


def _slot_row(
    svg: Svg, run: Run, slots: list[tuple[int, int]], left: float, step: float, y: float, full: bool
) -> float | None:
    """One bar a slot. A full row also has the information of each pair of neighbours, the least marked and returned."""
    born = [t for t, fired in enumerate(run.start) if fired]
    for first, end in slots:
        svg.rect(left + step * first + 1, y, step * (end - first) - 2, 16, SLOTS[born.index(first)], rx=3)
        for t in born:
            if first < t < end:  # merged: the boundary is no more
                svg.path([(left + step * t, y + 3), (left + step * t, y + 13)], "white", stroke_dasharray="2 2")
    if not full:
        return None
    pairs = [(a, end) for (a, _), (_, end) in zip(slots, slots[1:], strict=False)]
    costs = [run.density(*pair) for pair in pairs]
    least = costs.index(min(costs))
    for i, ((_, middle), cost) in enumerate(zip(slots, costs, strict=False)):
        colour, weight = (RED, "bold") if i == least else (GREY, "normal")
        svg.text(left + step * middle, y + 36, f"{cost:.2f}", "middle", colour, font_size=12, font_weight=weight)
    a, b = (left + step * token for token in pairs[least])
    svg.path([(a + 2, y + 17), (a + 2, y + 22), (b - 2, y + 22), (b - 2, y + 17)], RED, stroke_width=2)
    return costs[least]


def _box(svg: Svg, x: float, y: float, w: float, h: float, title: str, lines: tuple[str, ...], fill: str) -> None:
    svg.rect(x, y, w, h, fill, stroke=GREY, rx=6)
    svg.text(x + w / 2, y + 22, title, "middle", font_weight="bold")
    for i, line in enumerate(lines):
        svg.text(x + w / 2, y + 41 + 16 * i, line, "middle", GREY, font_size=12)


def data_flow_diagram() -> Svg:
    """Text to a Hugging Face directory: files in white, the training run in blue, the cluster as a frame."""
    svg = Svg(860, 306, "Data flow: text, shards, model, checkpoint, Hugging Face, with Slurm around the training")
    svg.rect(258, 14, 400, 226, "#f6f8fa", stroke=GREY, stroke_dasharray="6 4", rx=10)
    svg.text(458, 36, "Slurm: preflight, requeue, resume, bad nodes", "middle", font_weight="bold")
    svg.code(458, 56, "dla submit")
    _box(svg, 10, 100, 88, 84, "Text", ("files, JSONL",), "white")
    _box(svg, 146, 100, 88, 84, "Shards", ("WebDataset,", "checksums"), "white")
    _box(svg, 276, 74, 222, 136, "Model", (), "#e3edf7")
    parts = (("mixers", "DLA, softmax, δ-mem"), ("kernels", "Triton or torch"), ("parallel", "TP, SP, CP, ZeRO"))
    for i, (name, words) in enumerate(parts):
        svg.rect(284, 104 + 34 * i, 206, 28, "white", stroke=LIGHT, rx=4)
        svg.text(292, 123 + 34 * i, name, font_size=12)
        svg.text(482, 123 + 34 * i, words, "end", GREY, font_size=12)
    _box(svg, 532, 100, 116, 84, "Checkpoint", ("any layout,", "resumes exactly"), "white")
    _box(svg, 740, 100, 110, 84, "Hugging Face", ("runs without", "Megatron"), "white")
    for a, b in ((98, 146), (234, 276), (498, 532), (648, 740)):
        svg.arrow((a + 3, 142), (b - 2, 142))
    svg.arrow((590, 184), (590, 226), (387, 226), (387, 212), stroke_dasharray="4 3")
    svg.text(488, 221, "resume", "middle", GREY, font_size=12)
    for x, words in ((122, "dla data"), (387, "dla train, dla run"), (698, "dla convert"), (798, "dla generate")):
        svg.code(x, 262, words)
    svg.code(798, 278, "dla eval")
    svg.code(798, 294, "dla chat")
    for x, y in ((122, 150), (698, 150), (798, 188), (387, 242)):
        svg.path([(x, y), (x, 248)], LIGHT)
    return svg


DIAGRAMS = {"slots.svg": slots_diagram, "data_flow.svg": data_flow_diagram}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the README's diagrams.")
    parser.add_argument("--out", type=Path, default=IMAGES, help="directory (default: docs/images)")
    out = parser.parse_args().out
    for name, draw in DIAGRAMS.items():
        draw().write(out / name)
        print(out / name)


if __name__ == "__main__":
    main()
