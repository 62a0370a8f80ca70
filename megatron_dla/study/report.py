"""The report of a study: study.json, pictures, and one HTML page that holds both."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from megatron_dla.errors import ConfigError
from megatron_dla.files import parse_json, write_json, write_text
from megatron_dla.study.figures import draw_figures
from megatron_dla.study.findings import findings
from megatron_dla.study.html import html_table, number, show_difference
from megatron_dla.study.report_synthetic import RECALL, draw_recall, synthetic_section
from megatron_dla.study.results import verdict

JSON_NAME, PAGE_NAME = "study.json", "study.html"
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
    again = parse_json((out / JSON_NAME).read_bytes())  # as somebody who has only this file
    pictures = draw_figures(again, out) if again["arms"] else []
    pictures += [draw_recall(again["synthetic"], out / RECALL)] if again["synthetic"] else []
    write_text(out / PAGE_NAME, page(again, pictures))
    return [out / JSON_NAME, *pictures, out / PAGE_NAME]


def redraw(path: Path, out: Path) -> list[Path]:
    """Write the report again from its `study.json` alone. Raises ConfigError where that is none, or damaged."""
    try:
        results = parse_json(path.read_bytes())
        page(results, [])  # before anything is written
        return write_report(results, out, results["command"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{str(path)!r} is not the {JSON_NAME} of a report, or damaged ({error!r})") from error


def table(results: dict[str, Any]) -> list[list[str]]:
    """Header and one row an arm, best first."""
    arms = results["arms"]
    header = [
        "arm", "parameters", "learning rate", "seeds", "bits per byte", "seed spread", "difference [95 %]", "",
        "boundary rate", "newest merges", "tokens/s", "GB",
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
                number(arm["boundary_rate"], ".3f"), number(arm["newest_merges"], ".3f"),
                number(arm["tokens_per_s"], ",.0f"), number(arm["memory_gb"], ".2f"),
            ]
        )  # fmt: skip
    return [header, *rows]


def page(results: dict[str, Any], pictures: list[Path]) -> str:
    """The HTML page, pictures included."""
    images = {
        path.name: f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    }
    recall = images.pop(RECALL, "")
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in findings(results))
    text = _text_section(results) + "".join(images.values()) if results["arms"] else ""
    recall = synthetic_section(results["synthetic"]) + recall if results["synthetic"] else ""
    arms = {name: arm["overrides"] for name, arm in results["arms"].items()}
    synthetic = results["synthetic"].get("overrides", {})
    about = {"runs on text": results["made"], "synthetic cells": results["synthetic"].get("made", {})}
    about |= {"versions": results["versions"], "arms": arms, "synthetic arms": synthetic}
    title = html.escape(f"Study {results['study']}")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><ul>{lines}</ul>{text}{recall}"
        f"<h2>Run it again</h2><pre>{html.escape(results['command'])}</pre>"
        f"<h2>Machines, dates, versions, arms</h2><pre>{html.escape(json.dumps(about, indent=1))}</pre></body></html>\n"
    )


def _text_section(results: dict[str, Any]) -> str:
    done = results["cells"]
    return (
        f"<p>{done['done']} of {done['planned']} cells. Held-out bits per byte, lower is better; differences are "
        "paired by seed, with percentile bootstrap intervals over seeds, which are coarse for few seeds. "
        "Each arm has the learning rate that was best at the first seed; (edge): the best one tried was the smallest "
        "or the largest, so a better one may lie outside. boundary rate: share of tokens that open a slot; newest "
        "merges: share of merges that join the newest two slots, which undoes the boundary before.</p>"
        f"{html_table(table(results))}"
    )
