"""`dla jobs`, `dla logs` and `dla cancel`: a run's jobs, seen and ended by the name of its directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_dla.errors import UserError
from megatron_dla.launch.failure import log_dir
from megatron_dla.launch.slurm import JobState, SlurmError, active_jobs, call, job_state, run_jobs, submissions


def find_run(name: str, runs: Path) -> Path:
    """The directory of a run, given its path or its name under `runs`.

    Raises:
        UserError: no such run was submitted.
    """
    for path in (Path(name), runs / name):
        if submissions(path):
            return path.absolute()
    raise UserError(f"no run {name!r} was submitted here or under {str(runs)!r}: give the path of its directory")


def _progress(run_dir: Path) -> str:
    for name in ("done", "heartbeat.json"):
        try:
            beat = json.loads((run_dir / name).read_text())
            if name == "done":
                return f"done at step {int(beat['step'])}"
            return f"step {int(beat['step'])}, {max(0, time.time() - float(beat['time'])):.0f} s ago"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "-"


def list_jobs(runs: Path) -> list[list[str]]:
    """A header and one row a run: run, job, state, restarts, nodes, progress."""
    rows = [["RUN", "JOB", "STATE", "RESTARTS", "NODES", "PROGRESS"]]
    for run_dir in sorted(p for p in runs.glob("*") if submissions(p)):
        states = [job_state(job) or JobState(job, "forgotten", 0, "") for job in run_jobs(run_dir)]
        shown = [state for state in states if state.active] or states[-1:]
        for state in shown:
            rows.append([run_dir.name, state.job, state.state, str(state.restarts), state.nodes, _progress(run_dir)])
    return rows


def render(rows: list[list[str]]) -> str:
    """Columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def current_logs(run_dir: Path) -> list[Path]:
    """The newest job's log, and of its newest attempt the log of rank 0's node once there is one."""
    jobs = [job for job in run_jobs(run_dir) if (run_dir / "logs" / f"job-{job}.log").is_file()]
    if not jobs:
        return []
    logs = [run_dir / "logs" / f"job-{jobs[-1]}.log"]
    restarts = [int(p.name.split(".")[1]) for p in (run_dir / "logs").glob(f"{jobs[-1]}.*") if p.is_dir()]
    if restarts:
        attempt = log_dir(run_dir, f"{jobs[-1]}.{max(restarts)}")
        logs += [p for p in sorted(attempt.glob("*.log")) if _is_first_node(p)]
    return logs


def _is_first_node(path: Path) -> bool:
    """srun --label marks the lines of rank 0's node."""
    if path.name.startswith(("preflight-", "watchdog")):
        return False
    with path.open(errors="replace") as file:
        return file.readline().lstrip().startswith("0:")


def tail(run_dir: Path, lines: int, follow: bool) -> Iterator[str]:
    """The last `lines` of each current log; with `follow` what is added, also by later attempts, until nothing runs.

    Raises:
        UserError: the run has no log yet and nothing is to be followed.
    """
    seen: dict[Path, int] = {}
    logs = current_logs(run_dir)
    if not logs and not follow:
        raise UserError(f"{str(run_dir)!r} has no log yet: its job has not started (dla jobs)")
    while True:
        ended = follow and not active_jobs(run_dir)  # asked first: what was written before the end is still shown
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
    """Halt a run for good; returns what was done, a line each.

    A running job is asked to save a checkpoint and to end, with `now` it is ended; waiting ones leave the queue.

    Raises:
        SlurmError: Slurm does not answer or refuses; the halt file stays, so nothing will start.
    """
    (run_dir / "halt").touch()  # before any scancel: a job that ends now must not come back
    said = [f"wrote {run_dir / 'halt'}: nothing of this run starts again before dla submit"]
    for state in active_jobs(run_dir):
        if now or state.state == "PENDING":
            done = call(["scancel", state.job])
            if done.returncode:
                raise SlurmError(f"scancel {state.job}: {done.stderr.strip()}")
            said.append(f"cancelled job {state.job} ({state.state})")
        else:
            said.append(f"job {state.job} saves a checkpoint at its next step and ends (--now: at once, without one)")
    return said
