"""The page: one HTML file that asks the network for nothing."""

from __future__ import annotations

import time
from collections import Counter
from html import escape as html_escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from megatron_dla import __version__
from megatron_dla.console import escaped
from megatron_dla.files import write_text
from megatron_dla.report.charts import make_charts, series
from megatron_dla.report.files import number
from megatron_dla.report.record import Record, read_record
from megatron_dla.report.svg import clock, draw, draw_timeline, short
from megatron_dla.resources import resource

# whatever stands in a run's files, a browser loads nothing from elsewhere
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run to `out` (default: report.html in its directory); returns the file's path.

    Raises:
        UserError: `run_dir` is no run directory.
        OSError: the page cannot be written.
    """
    path = run_dir / "report.html" if out is None else out
    write_text(path, render(read_record(run_dir)), fsync=False)
    return path


def esc(text: object) -> str:
    return html_escape(escaped(str(text)))


def head(package: str, title: str) -> str:
    """A page up to its body, with the style of a package; `title` is HTML."""
    style = resource(f"{package}/style.css").read_text()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="generator" content="megatron-dla {__version__}">
<title>{title}</title>
<style>
{style}</style>
</head>"""


def render(record: Record) -> str:
    """The whole page."""
    charts = "".join(draw(chart, i) for i, chart in enumerate(make_charts(record)))
    none = '<p class="card empty">No step is logged yet.</p>'
    tone, words = record.status
    script = resource("report/script.js").read_text()
    return f"""{head("report", f"{esc(record.name)}: training report")}
<body>
<main>
<header><h1>{esc(record.name)}</h1><span class="status {tone}">{words}</span>
<p class="about">{_about(record)}</p></header>
<dl class="tiles">{_tiles(record)}</dl>
<h2>Time line</h2>
{_timeline(record)}
<h2>Curves</h2>
<div class="grid-of-charts">{charts or none}</div>
{_mix(record)}
<h2>Configuration and versions</h2>
<div class="two">{_config(record)}<div class="card">{_versions(record)}</div></div>
<footer>Written by <code>dla report</code> (megatron-dla {__version__}) on {_date(record.now)}.
{_unreadable(record)}</footer>
</main>
<script>
{script}</script>
</body>
</html>
"""


def _count(number: Any, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _unreadable(record: Record) -> str:
    return f"{_count(record.unreadable, 'line')} of metrics.jsonl could not be read." if record.unreadable else ""


def _about(record: Record) -> str:
    """Model, rows and machine in one line."""
    model, data, training = (record.section(name) for name in ("model", "data", "training"))
    backbone = record.section("backbone").get("dir")
    words = []
    if model:
        names = {"mamba2": "Mamba-2", "gdn": "Gated DeltaNet"}
        words.append(f"DLA on {names.get(str(model.get('backbone')), model.get('backbone'))}")
        words.append(f"{_count(model.get('num_layers'), 'layer')} ({model.get('pattern')})")
        words.append(f"hidden size {model.get('hidden_size')}")
    elif backbone:
        words.append(f"δ-mem adapter on {Path(str(backbone)).name}")
    if training:
        rows = f"{training.get('global_batch_size')} rows a step"
        words.append(f"{rows} of {data['seq_len']} tokens" if "seq_len" in data else rows)
    if (size := record.command.get("world_size")) is not None:
        kinds = ", ".join(_devices(record.command)) or "CPU"
        words.append(f"{_count(size, 'process', 'processes')} on {record.command.get('host')} ({kinds})")
    return " · ".join(esc(word) for word in words)


def _devices(command: dict[str, Any]) -> dict[str, int]:
    """GPU -> how many the first machine has."""
    found = command.get("devices")
    return dict(Counter(map(str, found))) if isinstance(found, list) else {}


def _tiles(record: Record) -> str:
    """Progress, losses, speed, time and faults."""
    m = record.metrics
    last = {key: value for line in m for key, value in line.items() if value is not None}
    of = f" of {record.steps:,}" if record.steps else ""
    share = min(1.0, record.step / record.steps) if record.steps else 0.0
    bar = f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>' if record.steps else ""
    tiles = [("Steps", f"{record.step:,}", f"{of} ({share:.0%})" if of else "", bar)]
    if (tokens := number(last.get("tokens"))) is not None:
        epoch = number(last.get("epoch"))
        tiles.append(("Tokens", short(tokens), f"{epoch:.2f} epochs" if epoch is not None else "", ""))
    if record.trained:
        losses = [y for _, y in series(m, "loss")]
        tiles.append(("Training loss", f"{losses[-1]:.4f}", f"first {losses[0]:.4f}", ""))
    if held_out := series(m, "val_loss"):
        step, best = min(held_out, key=lambda p: p[1])
        tiles.append(("Held-out loss", f"{held_out[-1][1]:.4f}", f"best {best:.4f} at step {step:,.0f}", ""))
    if bits := series(m, "val_bpb"):
        tiles.append(("Bits per byte", f"{bits[-1][1]:.4f}", f"first {bits[0][1]:.4f}", ""))
    for title, key, kind in (
        ("Tokens per second", "tokens_per_s", "plain"),
        ("MFU", "mfu", "percent"),
        ("Waiting for data", "data_wait_share", "percent"),
    ):
        if values := [y for _, y in series(m, key)]:
            tiles.append((title, short(median(values), kind), "median of the log steps", ""))
    times = [t for x in m if (t := number(x.get("time"))) is not None] + [e.time for e in record.events if e.time]
    if len(set(times)) > 1:
        starts = sum(event.kind == "start" for event in record.events)
        tiles.append(("Wall-clock time", clock(max(times) - min(times)), _count(starts, "start"), ""))
    faults = sum(event.tone == "bad" for event in record.events)
    tiles.append(("Faults", str(faults), "see the time line" if faults else "none recorded", ""))
    return "".join(
        f'<div class="tile"><dt>{esc(title)}</dt><dd>{esc(value)}<small>{esc(small)}</small></dd>{extra}</div>'
        for title, value, small, extra in tiles
    )


def _timeline(record: Record) -> str:
    if not record.events:
        return '<p class="card empty">No event is recorded.</p>'
    progress = [(t, float(m["step"])) for m in record.metrics if (t := number(m.get("time"))) is not None]
    picture = draw_timeline(record.events, progress)
    first = min((event.time for event in record.events if event.time is not None), default=0.0)
    rows = "".join(
        f'<tr><td class="t">{_date(e.time) if e.time is not None else "unknown"}</td>'
        f'<td class="n">{clock(e.time - first) if e.time is not None else ""}</td>'
        f'<td class="n">{"" if e.step is None else f"{e.step:,}"}</td>'
        f'<td class="t {e.tone}"><b class="tone">{esc(e.title)}</b></td><td>{esc(e.text)}</td></tr>'
        for e in record.events
    )
    few = " open" if len(record.events) <= 12 else ""
    legend = (
        '<div class="legend"><span>triangle: start</span><span>diamond: save</span><span>square: stop</span>'
        "<span>left triangle: fallback</span><span>cross: fault</span><span>tick: done</span></div>"
    )
    drawn = (
        f"<figcaption><b>Steps and events</b><span class=unit>over wall-clock time</span></figcaption>{legend}{picture}"
    )
    return (
        f"<figure>{drawn if picture else ''}<details{few}><summary>{_count(len(record.events), 'event')}</summary>"
        '<div class="scroll"><table class="events"><thead><tr><th>time</th><th class="n">after</th>'
        f'<th class="n">step</th><th>event</th><th></th></tr></thead><tbody>{rows}</tbody>'
        "</table></div></details></figure>"
    )


def wanted_mix(data: dict[str, Any], tokens: float) -> dict[str, float]:
    """Share of each source that the config asks for after `tokens`."""
    sources, stages = data.get("sources"), data.get("stages")
    weights: dict[str, Any] = {
        name: source.get("weight", 1.0) if isinstance(source, dict) else None
        for name, source in (sources.items() if isinstance(sources, dict) else ())
    }
    for stage in stages if isinstance(stages, list) else ():
        begins = number(stage.get("from_tokens")) if isinstance(stage, dict) else None
        if begins is not None and begins < tokens and isinstance(stage.get("weights"), dict):
            weights = dict(stage["weights"])
    numbers = {str(name): number(weight) or 0.0 for name, weight in weights.items()}
    total = sum(numbers.values())
    return {name: weight / total for name, weight in numbers.items()} if total > 0 else {}


def _mix(record: Record) -> str:
    """Realised and wanted share of each source."""
    mixed = [m for m in record.metrics if isinstance(m.get("mix"), dict)]
    if not mixed:
        return ""
    last = mixed[-1]
    wanted = wanted_mix(record.section("data"), number(last.get("tokens")) or 0.0)
    epochs = last["source_epochs"] if isinstance(last.get("source_epochs"), dict) else {}
    rows = []
    for name in dict.fromkeys([*last["mix"], *wanted]):
        share, want, passes = number(last["mix"].get(name)) or 0.0, wanted.get(str(name)), number(epochs.get(name))
        line = f'<b style="left:{100 * want:.1f}%"></b>' if want is not None else ""
        rows.append(
            f'<tr><td>{esc(name)}</td><td><span class="share"><i style="width:{100 * min(share, 1):.1f}%"></i>'
            f'{line}</span></td><td class="n">{share:.2%}</td>'
            f'<td class="n">{"" if want is None else f"{want:.2%}"}</td>'
            f'<td class="n">{"" if passes is None else f"{passes:.3f}"}</td></tr>'
        )
    return (
        '<h2>Data mix</h2><div class="card"><table><thead><tr><th>source</th><th>share of the tokens; line: wanted</th>'
        '<th class="n">realised</th><th class="n">wanted</th><th class="n">epochs</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _config(record: Record) -> str:
    if not record.config:
        return '<p class="card empty">config.yaml is missing or damaged.</p>'
    text = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
    return f'<div class="card scroll"><pre id="config">{esc(text)}</pre></div>'


def _versions(record: Record) -> str:
    command = record.command
    rows = {
        "command": " ".join(map(str, command["argv"])) if isinstance(command.get("argv"), list) else None,
        "git": command.get("git"), "host": command.get("host"), "processes": command.get("world_size"),
        "CPUs": command.get("cpu_count"),
        "devices": ", ".join(f"{n} x {name}" for name, n in _devices(command).items()),
        **(command["versions"] if isinstance(command.get("versions"), dict) else {}),
    }  # fmt: skip
    found = {name: value for name, value in rows.items() if value not in (None, "")}
    if not found:
        return '<p class="empty">command.json is missing or damaged.</p>'
    lines = "".join(f'<tr><th class="t">{esc(name)}</th><td>{esc(value)}</td></tr>' for name, value in found.items())
    return f"<table><tbody>{lines}</tbody></table>"
