"""What a run directory says about its run, however the run ended: nothing here raises for damaged files."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.masking import mask_values
from megatron_dla.report.files import number, read_json, read_lines, read_yaml
from megatron_dla.report.timeline import Event, find_events
from megatron_dla.training.control import DONE, HEARTBEAT

ALIVE_S = 600.0  # a heartbeat that is older says that the run is gone, or stands still


@dataclass
class Record:
    """A run.

    Attributes:
        metrics: one mapping a step, by step; of a step that was logged twice the later. unreadable: lines of
            metrics.jsonl that hold none. config: the resolved one, without secrets, {} where it is missing.
        command: of the last start (command.json). events: by time.
    """

    name: str
    metrics: list[dict[str, Any]]
    unreadable: int
    config: dict[str, Any]
    command: dict[str, Any]
    events: list[Event]
    beat: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    now: float = field(default_factory=time.time)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """Log steps with a loss."""
        return [m for m in self.metrics if number(m.get("loss")) is not None]

    @property
    def step(self) -> int:
        return max([m["step"] for m in self.metrics] + [int(number(self.beat.get("step")) or 0)], default=0)

    @property
    def steps(self) -> int | None:
        """Of the whole run."""
        found = self.section("training").get("steps")
        return found if isinstance(found, int) and found > 0 else None

    def section(self, name: str) -> dict[str, Any]:
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def status(self) -> tuple[str, str]:
        """(good, busy, warn or bad; a few words)."""
        if self.done:
            return "good", "done"
        ends = [event for event in self.events if event.kind in ("start", "stop", "exit", "hang")]
        last = ends[-1].kind if ends else ""
        if last == "stop":
            return "warn", "stopped, can be resumed"
        if last == "exit":
            return "bad", "ended with an error"
        if last == "hang":
            return "bad", "hung and was ended"
        beat = number(self.beat.get("time"))
        if beat is not None and self.now - beat < ALIVE_S:
            return "busy", "running"
        return "warn", "no sign of life" if self.metrics or ends else "not started"


def read_record(run_dir: Path) -> Record:
    """Read a run directory.

    Raises:
        UserError: it is none.
    """
    if not run_dir.is_dir() or not any((run_dir / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise UserError(f"{str(run_dir)!r} is no run directory: give the one that holds metrics.jsonl (runs/NAME)")
    lines, unreadable = read_lines(run_dir / "metrics.jsonl")
    by_step: dict[int, dict[str, Any]] = {}
    again: list[tuple[int, int]] = []  # (from, to) where the file goes back
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            unreadable += 1
            continue
        last = next(reversed(by_step), -1)
        if step <= last:
            again.append((last, step))
            for later in [x for x in by_step if x >= step]:
                del by_step[later]
        by_step[step] = line
    beat = read_json(run_dir / HEARTBEAT)
    name = run_dir.resolve().name
    config = mask_values(read_yaml(run_dir / "config.yaml"))
    metrics = list(by_step.values())
    events = find_events(run_dir, metrics, again)
    return Record(
        name, metrics, unreadable, config, mask_values(read_json(run_dir / "command.json")), events, beat,
        (run_dir / DONE).is_file(),
    )  # fmt: skip
