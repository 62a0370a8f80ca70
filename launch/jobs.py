"""`dla jobs`, `dla logs` and `dla cancel`: list, follow and end the jobs of a run, given its name or directory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dla.errors import UserError
from megatron_dla.files import parse_json
from megatron_dla.launch.failure import log_dir
from megatron_dla.launch.slurm import JobState, SlurmError, active_jobs, call, job_state, run_jobs, submissions

RUNS = Path("runs")  # default of --runs


def find_run(name: str, runs: Path) -> Path:
    """The directory of a run, given its path or its name under `runs`.

    Raises:
        UserError: no run with this name was submitted.
    """
    for path in (Path(name), runs / name):
        if submissions(path):
            return path.absolute()
    raise UserError(
        f"run {name!r}: neither it nor {str(runs / name)!r} was submitted; pass the path of a run directory"
    )


def _progress(run_dir: Path) -> str:
    for name in ("done", "heartbeat.json"):
        try:
            beat = parse_json((run_dir / name).read_bytes())
            if name == "done":
                return f"done at step {int(beat['step'])}"
            return f"step {int(beat['step'])}, {max(0, time.time() - float(beat['time'])):.0f} s ago"
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return "-"


def list_jobs(runs: Path) -> list[list[str]]:
    """A header and one row per run: run, job, state, restarts, nodes, progress.

    Raises:
        UserError: `runs` is no directory; it may be missing where it is the default, before the first run.
    """
    if not runs.is_dir() and (runs != RUNS or runs.exists()):
        what = "is not a directory" if runs.exists() else "does not exist"
        raise UserError(f"--runs {str(runs)!r} {what}: pass the run.dir of the configs")
    rows = [["RUN", "JOB", "STATE", "RESTARTS", "NODES", "PROGRESS"]]
    for run_dir in sorted(p for p in runs.glob("*") if p.is_dir() and submissions(p)):
        states = [job_state(job) or JobState(job, "UNKNOWN", 0, "") for job in run_jobs(run_dir)]
        shown = [state for state in states if state.active] or states[-1:]
        for state in shown:
            rows.append([run_dir.name, state.job, state.state, str(state.restarts), state.nodes, _progress(run_dir)])
    return rows


def render(rows: list[list[str]]) -> str:
    """The rows as text, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def current_logs(run_dir: Path) -> list[Path]:
    """The log of the newest job and, once it exists, that of rank 0's node in its newest attempt."""
    jobs = [job for job in run_jobs(run_dir) if (run_dir / "logs" / f"job-{job}.log").is_file()]
    if not jobs:
        return []
    logs = [run_dir / "logs" / f"job-{jobs[-1]}.log"]
    name = re.compile(re.escape(jobs[-1]) + r"\.(0|[1-9][0-9]*)")
    folders = [path.name for path in (run_dir / "logs").iterdir() if path.is_dir()]
    restarts = [int(match[1]) for match in map(name.fullmatch, folders) if match]
    if restarts:
        attempt = log_dir(run_dir, f"{jobs[-1]}.{max(restarts)}")
        logs += [p for p in sorted(attempt.glob("*.log")) if _is_first_node(p)]
    return logs


def _is_first_node(path: Path) -> bool:
    """Whether a log is that of rank 0's node, by the prefix of `srun --label`."""
    if path.name.startswith(("preflight-", "watchdog")):
        return False
    with path.open(errors="replace") as file:
        return file.readline().lstrip().startswith("0:")


def tail(run_dir: Path, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last `lines` of each current log; with `follow`, new text too, over requeues, until no job is left.

    Raises:
        UserError: the run has no log yet and `follow` is false.
    """
    seen: dict[Path, int] = {}
    logs = current_logs(run_dir)
    if not logs and not follow:
        raise UserError(f"{str(run_dir)!r} has no log yet, its job has not started: see dla jobs, or pass --follow")
    while True:
        ended = follow and not active_jobs(run_dir)  # queried before reading, so that the last lines are not lost
        for path in current_logs(run_dir):
            with path.open(errors="replace") as file:
                file.seek(seen.get(path, 0))
                text = file.read()
                end = file.tell()
            if path not in seen:
                yield f"==> {path}"
                text = "\n".join(text.splitlines()[-lines:])
            if text:
                yield text.rstrip("\n")
            seen[path] = end
        if not follow or ended:
            return
        time.sleep(2)


def cancel(run_dir: Path, now: bool) -> list[str]:
    """Halt a run; returns what was done, one line per action.

    A running job saves a checkpoint and ends, or with `now` ends immediately; pending jobs are removed from the queue.

    Raises:
        SlurmError: Slurm does not respond or refuses; the halt file stays, so no job of the run will start.
    """
    (run_dir / "halt").touch()  # before scancel, so that a job that ends now is not requeued
    actions = [f"wrote {run_dir / 'halt'}: no job of this run starts until the next dla submit"]
    for state in active_jobs(run_dir):
        if now or state.state == "PENDING":
            done = call(["scancel", state.job])
            if done.returncode:
                raise SlurmError(f"scancel {state.job}: {done.stderr.strip()}")
            actions.append(f"cancelled job {state.job} ({state.state})")
        else:
            actions.append(f"job {state.job} saves a checkpoint after the current step and ends (--now: no checkpoint)")
    return actions
