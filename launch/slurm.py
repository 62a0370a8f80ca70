"""Calls of Slurm's commands, and the launcher's records of its jobs in the run directory."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.files import parse_json

SUBMISSIONS = "submissions.jsonl"  # one object per `dla submit`: jobs, argv, environment, git state, versions
JOB_ID = re.compile(r"[0-9]+([_+][0-9]+)?")  # of a job, an array task or a part of a heterogeneous job
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED"}


class SlurmError(UserError):
    """Slurm is not installed, does not respond or refuses a request."""


@dataclass(frozen=True)
class JobState:
    """State of a job as Slurm reports it. `nodes`: its host list or, for a pending job, the reason."""

    job: str
    state: str
    restarts: int
    nodes: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def clean_environment() -> dict[str, str]:
    """The environment of this process without the variables that an outer Slurm job would pass to a new one."""
    if "SLURM_JOB_ID" not in os.environ:
        return dict(os.environ)
    foreign = re.compile(r"(SLURM|SBATCH|SRUN)_(?!CONF$)")
    return {k: v for k, v in os.environ.items() if not foreign.match(k)}


def call(argv: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        SlurmError: the command is not installed.
    """
    try:
        return subprocess.run(argv, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{argv[0]} is not installed on this machine: run this on a login node of the cluster"
        ) from error


def job_state(job: str) -> JobState | None:
    """The state from `scontrol show job`; None for an unknown job.

    Ended jobs stay known for a while (MinJobAge). Not sacct: not every cluster has it.

    Raises:
        SlurmError: the controller does not respond.
    """
    for attempt in range(5):
        done = call(["scontrol", "-o", "show", "job", job])
        if done.returncode == 0:
            fields = dict(re.findall(r"(\S+?)=(\S*)", done.stdout))
            state, nodes = fields.get("JobState", "?"), fields.get("NodeList", "")
            where = f"({fields.get('Reason', '')})" if state == "PENDING" else nodes.replace("(null)", "")
            return JobState(job, state, int(fields.get("Restarts", 0)), where)
        if "Invalid job id" in done.stderr:
            return None
        time.sleep(attempt)
    raise SlurmError(f"scontrol does not respond: {done.stderr.strip()}")


def submissions(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all `dla submit` of a run, oldest first; empty if it was never submitted.

    Raises:
        UserError: the file is damaged.
    """
    try:
        lines = (run_dir / SUBMISSIONS).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        found = [parse_json(line) | {} for line in lines if line.strip()]
        for submission in found:
            if not isinstance(jobs := submission.get("jobs"), list):
                raise ValueError(f"jobs = {jobs!r}")
            for job in jobs:
                if not isinstance(job, str) or not JOB_ID.fullmatch(job):
                    raise ValueError(f"{job!r} in jobs is no job ID")
        return found
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{str(run_dir / SUBMISSIONS)!r} is damaged ({error}): remove the line that no `dla submit` wrote"
        ) from error


def run_jobs(run_dir: Path) -> list[str]:
    """Job IDs of a run, oldest first."""
    return [job for submission in submissions(run_dir) for job in submission["jobs"]]


def active_jobs(run_dir: Path) -> list[JobState]:
    """The pending and running jobs of a run."""
    states = [job_state(job) for job in run_jobs(run_dir)]
    return [state for state in states if state is not None and state.active]


def bad_nodes(run_dir: Path) -> dict[str, str]:
    """{node: reason} of a run's bad_nodes."""
    try:
        lines = (run_dir / "bad_nodes").read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        name, _, reason = line.partition("#")
        if name.strip():
            found[name.strip()] = reason.strip()
    return found


def known_bad_nodes(run_dir: Path) -> tuple[list[str], list[str]]:
    """(names for --exclude, ignored names) of a run's bad_nodes: Slurm refuses a list with an unknown name.

    If sinfo does not respond, every single word is taken as a name.
    """
    found = list(bad_nodes(run_dir))
    if not found:
        return [], []
    try:
        known = set(call(["sinfo", "-ahN", "-o", "%N"]).stdout.split())
    except SlurmError:
        known = set()
    good = [name for name in found if re.fullmatch(r"[^\s,]+", name) and (not known or name in known)]
    return good, [name for name in found if name not in good]
