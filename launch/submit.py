"""`dla submit`: check a run for its world size, record the submission, call sbatch.

The batch script is slurm/pretrain.sbatch, unchanged: a submission sets flags of sbatch and environment variables, and
there is no template.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_dla.config import AdapterRunConfig, RunConfig, dump_config, load_config
from megatron_dla.errors import ConfigError
from megatron_dla.files import parse_json
from megatron_dla.launch.profile import Profile, check_time, load_profile
from megatron_dla.launch.slurm import SUBMISSIONS, SlurmError, active_jobs, call, clean_environment, known_bad_nodes
from megatron_dla.masking import mask_command, mask_environment
from megatron_dla.resources import resource

SCRIPT = resource("slurm/pretrain.sbatch")
RECORDED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX")  # may not include secrets


@dataclass(frozen=True)
class Request:
    """One `dla submit`. run_dir: absolute. time: "" for the profile's. chain: number of jobs, each after the last.
    checkpoint_gb: planned size of a checkpoint; 0: not known.
    """

    config: RunConfig | AdapterRunConfig
    profile: Profile
    run_dir: Path
    nodes: int
    time: str = ""
    chain: int = 1
    checkpoint_gb: float = 0.0

    @property
    def world_size(self) -> int:
        return self.nodes * self.profile.nproc


def sbatch_argv(request: Request) -> list[str]:
    """The command line of sbatch, without the dependency on the previous job of a chain."""
    profile, run_dir = request.profile, request.run_dir
    excluded = [*filter(None, [profile.exclude]), *known_bad_nodes(run_dir)[0]]
    gpus = f"--gpus-per-node={profile.gpus_per_node}" if profile.gpus_per_node else ""
    flags = {
        "--job-name": request.config.run.name,
        "--nodes": request.nodes + profile.spare_nodes,
        "--cpus-per-task": profile.cpus_per_node,
        "--mem": profile.memory,
        "--time": request.time or profile.time,
        "--partition": profile.partition,
        "--account": profile.account,
        "--qos": profile.qos,
        "--constraint": profile.constraint,
        "--exclude": ",".join(excluded),
        "--signal": f"B:USR1@{profile.save_seconds}",
        "--output": run_dir / "logs" / "job-%j.log",
    }
    return [
        "sbatch",
        "--parsable",
        "--export=ALL",  # the settings travel by the environment; SBATCH_EXPORT=NONE is a common default of sites
        *(f"{name}={value}" for name, value in flags.items() if value != ""),
        *filter(None, [f"--gres={profile.gres}" if profile.gres else gpus]),
        *([] if profile.requeue and request.chain == 1 else ["--no-requeue"]),
        *profile.sbatch_args,
        str(SCRIPT),
        str(run_dir / "config.yaml"),
    ]


def job_environment(request: Request) -> dict[str, str]:
    """Variables set for the job, in addition to the environment that sbatch passes on; empty settings are omitted."""
    profile = request.profile
    settings = {
        "DLA_RUN_DIR": request.run_dir,
        "DLA_PYTHON": profile.python or sys.executable,
        "DLA_HOST_PYTHON": profile.host_python or sys.executable,
        "DLA_WANT_NODES": request.nodes,
        "DLA_NPROC": profile.nproc,
        "DLA_MAX_FAILURES": profile.max_failures,
        "DLA_HANG_TIMEOUT": profile.hang_timeout,
        "DLA_PREFLIGHT": int(profile.preflight),
        "DLA_PREFLIGHT_TIMEOUT": profile.preflight_timeout,
        "DLA_CHECKPOINT_GB": f"{request.checkpoint_gb:.3f}" if request.checkpoint_gb else "",
        "DLA_CACHE_DIR": profile.cache_dir,
        "DLA_SITE_ENV": profile.site_env,
        "DLA_SRUN_ARGS": " ".join(profile.srun_args),
        "DLA_EXEC_PREFIX": " ".join(profile.exec_prefix),
    }
    threads = max(1, profile.cpus_per_node // profile.nproc)
    return {"OMP_NUM_THREADS": str(threads)} | profile.env | {k: str(v) for k, v in settings.items() if v != ""}


def _sbatch(argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = call(argv, clean_environment() | env)
    if done.returncode:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
        raise SlurmError(f"sbatch failed: {reason}; the command was: {shlex.join(argv)}")
    return done


def test_only(argv: list[str], env: dict[str, str]) -> str:
    """When and where Slurm would start the job, as text.

    Raises:
        SlurmError: it can never start.
    """
    done = _sbatch([argv[0], "--test-only", *argv[1:]], env)
    return (done.stdout + done.stderr).strip().removeprefix("sbatch: ")


def make_request(
    config_path: str, overrides: list[str], profile_path: str, nodes: int, limit: str = "", chain: int = 1
) -> Request:
    """Load and check what does not need Slurm or the data.

    Raises:
        UserError: with the key or option, the value and the fix.
    """
    for name, value in (("--nodes", nodes), ("--chain", chain)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    config, profile = load_config(config_path, overrides), load_profile(profile_path)
    if limit:
        check_time(limit, profile)
    if re.search(r"[\s,%]", str(run_dir := (Path(config.run.dir) / config.run.name).absolute())):
        raise ConfigError(
            f"run.dir, run.name = {str(run_dir)!r}: must have no spaces, commas or % for a job on a cluster"
        )
    return Request(config, profile, run_dir, nodes, limit, chain)


def check_free(request: Request) -> None:
    """Raises SlurmError if a job of this run is pending or running, ConfigError if the run is done."""
    if jobs := active_jobs(request.run_dir):
        listed = ", ".join(f"{job.job} ({job.state})" for job in jobs)
        name = request.config.run.name
        raise SlurmError(f"run {name!r} has jobs in the queue: {listed}; end them with dla cancel {request.run_dir}")
    try:
        step = int(parse_json((request.run_dir / "done").read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return
    if step >= request.config.training.steps:
        raise ConfigError(
            f"{str(request.run_dir)!r} is done at step {step}: raise training.steps = {request.config.training.steps}, "
            "or choose another run.name"
        )


def submit(request: Request, about: dict[str, Any]) -> list[str]:
    """Write the run directory and submit; returns the job IDs. `about` is added to the record: git state, versions.

    Raises:
        UserError: from `check_free`, repeated here under a lock against another `dla submit` of this run.
        SlurmError, OSError: sbatch refuses, or a file cannot be written; no job is left then, and the run directory is
            unchanged.
    """
    run_dir = request.run_dir
    argv, env = sbatch_argv(request), job_environment(request)
    record: dict[str, Any] = {
        "time": time.time(), "jobs": [], "argv": list(map(mask_command, argv)), "directory": os.getcwd(),
        "nodes": request.nodes, "world_size": request.world_size,
        "environment": {k: os.environ[k] for k in RECORDED if k in os.environ} | mask_environment(env), **about,
    }  # fmt: skip
    made = next((p for p in (run_dir, *run_dir.parents) if p.parent.exists() and not p.exists()), None)
    resolved, submissions = run_dir / "config.yaml", run_dir / SUBMISSIONS
    run_dir.mkdir(parents=True, exist_ok=True)
    with submissions.open("ab", buffering=0) as file:  # unbuffered: closing writes nothing after a failure
        _lock(file, run_dir)
        check_free(request)
        size = submissions.stat().st_size  # of the earlier lines
        kept: list[Path] = []  # earlier files, renamed: that needs no space on a full disk
        try:
            (run_dir / "logs").mkdir(exist_ok=True)
            for path in (resolved, *(run_dir / name for name in ("stop", "halt", "done", "failures"))):
                if path.exists():
                    kept.append(path.rename(path.with_name(f".{path.name}.before")))
            dump_config(request.config, resolved)
            record["jobs"] = _submit_chain(request, argv, env)
            line = (json.dumps(record) + "\n").encode()
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(submissions))
        except BaseException:
            _cancel(record["jobs"])  # jobs without a record
            _undo(made, resolved, submissions, size, kept)
            raise
    for path in kept:
        path.unlink()
    return record["jobs"]


def _lock(file: IO[bytes], run_dir: Path) -> None:
    """Lock a file until it is closed; does nothing on file systems without locks.

    Raises:
        SlurmError: another `dla submit` of this run holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SlurmError(
            f"another dla submit of {str(run_dir)!r} is running: wait for it, then see dla jobs"
        ) from error
    except OSError:
        pass


def _submit_chain(request: Request, argv: list[str], env: dict[str, str]) -> list[str]:
    jobs: list[str] = []
    for place in range(1, request.chain + 1):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            done = _sbatch([*argv[:2], *after, *argv[2:]], env | {"DLA_CHAIN": str(place)})
            jobs.append(_job_number(done.stdout))
        except BaseException:
            _cancel(jobs)  # the whole chain or nothing
            raise
    return jobs


def _job_number(printed: str) -> str:
    """The job in what `sbatch --parsable` printed: a line NUMBER or NUMBER;CLUSTER, maybe among lines of the site.

    Raises:
        SlurmError: there is no such line, or several.
    """
    found = re.findall(r"^\s*(\d+)(?:;\S+)?\s*$", printed, re.MULTILINE)
    if len(found) != 1:
        raise SlurmError(
            f"sbatch printed no line with a job number, but {printed.strip()[:300]!r}: the job may be in the queue, "
            "see squeue --me, and end it with scancel"
        )
    return found[0]


def _cancel(jobs: list[str]) -> None:
    if jobs:
        call(["scancel", *jobs])


def _undo(made: Path | None, resolved: Path, submissions: Path, size: int, kept: list[Path]) -> None:
    """Restore the run directory; `made` is the topmost directory that this submission created."""
    resolved.unlink(missing_ok=True)
    for path in kept:
        path.rename(path.with_name(path.name.removeprefix(".").removesuffix(".before")))
    if size:
        os.truncate(submissions, size)
    else:
        submissions.unlink()
    for path in (resolved.parent / "logs", *resolved.parents) if made is not None else ():
        with contextlib.suppress(OSError):  # not empty: another run has been added meanwhile
            path.rmdir()
        if path == made:
            break
