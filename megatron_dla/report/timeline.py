"""What happened to a run, from the files that its starts left behind."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dla.checkpoint.find import COMPLETE, DAMAGED, checkpoint_dir, complete_checkpoints
from megatron_dla.errors import STOPPED
from megatron_dla.launch.failure import find_exits
from megatron_dla.report.files import number, read_json, read_lines
from megatron_dla.training.control import DONE, EVENTS, EXITS, RANKS

ANOMALIES = "anomalies.jsonl"
# kind -> (title, how it ended: good, busy, warn or bad)
KINDS = {
    "start": ("start", "busy"),
    "save": ("save", "plain"),
    "save_failed": ("save failed", "bad"),
    "fallback": ("fallback to an older checkpoint", "warn"),
    "repeat": ("steps repeated", "warn"),
    "anomaly": ("anomaly", "bad"),
    "stop": ("stop", "warn"),
    "exit": ("error", "bad"),
    "hang": ("hang", "bad"),
    "lost": ("end without a record", "bad"),
    "done": ("done", "good"),
}


@dataclass(frozen=True)
class Event:
    """`time`: Unix seconds, None where no file tells it. `step`: finished ones, None where it is not known."""

    kind: str
    step: int | None
    time: float | None
    text: str = ""
    attempt: str = ""

    @property
    def title(self) -> str:
        return KINDS[self.kind][0]

    @property
    def tone(self) -> str:
        return KINDS[self.kind][1]


def find_events(run_dir: Path, metrics: Sequence[dict[str, Any]], again: Sequence[tuple[int, int]]) -> list[Event]:
    """All events, by time.

    Args:
        metrics: by step. again: (from, to) where metrics.jsonl goes back itself.
    """
    written = list(_written(run_dir))
    known = {event.kind for event in written}
    found = written + [event for event in _older(run_dir) if event.kind not in known]
    attempts = {path.name for folder in (EXITS, RANKS) for path in (run_dir / folder).glob("*") if path.is_dir()}
    for attempt in sorted(attempts):
        found += _ended(run_dir, attempt)
    times = [(t, m["step"]) for m in metrics if (t := number(m.get("time"))) is not None]
    found += [_anomaly(line, times) for line in read_lines(run_dir / ANOMALIES)[0]]
    for last, step in again:
        found.append(Event("repeat", step, _time_of(step, times), f"from step {last} back to {step}"))
    for path in sorted(checkpoint_dir(run_dir).glob(f"step_*{DAMAGED}")) if "fallback" not in known else ():
        digits = path.name.removeprefix("step_").split(".")[0]
        text = f"{path.name} was set aside"
        found.append(Event("fallback", int(digits) if digits.isdecimal() else None, _changed(path), text))
    found += _lost(found, times)
    return sorted(found, key=lambda event: (event.time is None, event.time or 0.0, event.step or 0))


def _written(run_dir: Path) -> Iterator[Event]:
    """events.jsonl."""
    for line in read_lines(run_dir / EVENTS)[0]:
        kind, step = str(line.get("event")), number(line.get("step"))
        if kind not in KINDS:
            continue
        last = number(line.get("last_logged"))
        text = str(line.get("reason", ""))
        if kind == "start":
            text = "from the beginning" if not step else f"resumed at step {step:.0f}"
            text += f", {line.get('processes')} processes on {line.get('host')}" if "host" in line else ""
            if step is not None and last is not None and last > step:
                text += f"; steps {step + 1:.0f} to {last:.0f} are repeated"
        elif kind == "fallback":
            text = f"{line.get('path')} is damaged ({text})"
        yield Event(
            kind, None if step is None else int(step), number(line.get("time")), text, str(line.get("attempt", ""))
        )


def _older(run_dir: Path) -> Iterator[Event]:
    """Of versions without events.jsonl: what the control files and checkpoints tell."""
    for path in sorted((run_dir / RANKS).glob("*/rank0.json")):
        record = read_json(path)
        yield Event("start", None, number(record.get("time")), f"on {record.get('host')}", path.parent.name)
    for step, path in complete_checkpoints(run_dir):
        yield Event("save", step, _changed(path / COMPLETE))
    if (run_dir / DONE).is_file():
        record = read_json(run_dir / DONE)
        last = number(record.get("step"))
        attempt = str(record.get("attempt", ""))
        yield Event("done", None if last is None else int(last), number(record.get("time")), "", attempt)


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _ended(run_dir: Path, attempt: str) -> Iterator[Event]:
    """How an attempt ended, by the records of its ranks and of its watchdog."""
    hang = read_json(run_dir / EXITS / attempt / "hang.json")
    if hang:
        step, ranks = number(hang.get("step")), hang.get("ranks")
        places = ", ".join(
            f"rank {rank.get('rank')} on {rank.get('host')} in {rank.get('at')}"
            for rank in (ranks if isinstance(ranks, list) else [])[:4]
            if isinstance(rank, dict)
        )
        text = f"no step for {hang.get('silent_s')} s: {places}"
        yield Event("hang", None if step is None else int(step), number(hang.get("time")), text, attempt)
        return
    causes = [one for one in find_exits(run_dir, attempt) if one.code != STOPPED]
    if causes:
        record = read_json(run_dir / EXITS / attempt / f"rank{causes[0].rank}.json")
        yield Event("exit", None, number(record.get("time")), str(causes[0]), attempt)


def _anomaly(line: dict[str, Any], times: Sequence[tuple[float, int]]) -> Event:
    found = number(line.get("step"))
    step = None if found is None else int(found)
    words = [str(line.get("kind", "anomaly"))]
    words += [f"loss {line['loss']}"] if line.get("loss") is not None else []
    words += [str(line["action"])] if line.get("action") is not None else []
    time = number(line.get("time"))
    if time is None and step is not None:
        time = _time_of(step, times)
    return Event("anomaly", step, time, ", ".join(words))


def _time_of(step: int, times: Sequence[tuple[float, int]]) -> float | None:
    """When a step was logged, or the first one after it."""
    place = bisect.bisect_left([known for _, known in times], step)
    return times[min(place, len(times) - 1)][0] if times else None


def _lost(events: Sequence[Event], times: Sequence[tuple[float, int]]) -> Iterator[Event]:
    """Attempts that another one followed though nothing tells how they ended: they, or their node, were killed."""
    starts = sorted((e for e in events if e.kind == "start" and e.time is not None), key=lambda e: e.time or 0.0)
    for start, following in zip(starts, starts[1:], strict=False):
        begin, end = start.time or 0.0, following.time or 0.0
        inside = [e for e in events if e.time is not None and begin <= e.time <= end and e is not following]
        if any(e.kind in ("stop", "exit", "hang", "done") for e in inside):
            continue
        seen = [e.time for e in inside if e.time is not None] + [t for t, _ in times if begin <= t <= end]
        known = [e.step for e in inside if e.step is not None] + [step for t, step in times if begin <= t <= end]
        yield Event(
            "lost", max(known, default=None), max(seen, default=begin), "killed, or its node was lost", start.attempt
        )
