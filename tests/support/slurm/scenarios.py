"""Requirements of the batch script on a real cluster: tests run these, and test_planted.py expects them to fail."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.slurm.lab import FINAL, STALLED_S, Cluster, Job, until

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
STUB = Path(__file__).with_name("stub_python.py")


@dataclass
class Run:
    """A submitted job and its run directory."""

    job: Job
    dir: Path

    def text(self) -> str:
        """The job's log and the nodes' logs of all attempts."""
        logs = sorted((self.dir / "logs").glob("*/*.log"))
        return "\n".join([self.job.log(), *(f"== {p}\n{p.read_text(errors='replace')}" for p in logs)])

    def ended(self, state: str, stalled: float = STALLED_S) -> str:
        """Wait for the end, which must be `state`; returns the job's log."""
        got = self.job.wait(stalled)
        assert got == state, f"{got}, not {state}:\n{self.text()}"
        return self.job.log()

    def node_log(self, attempt: int, node: str) -> str:
        path = self.dir / "logs" / f"{self.job.number}.{attempt}" / f"{node}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def nodes(self, attempt: int) -> list[str]:
        """The nodes of an attempt, in the order of their rank."""
        logs = (self.dir / "logs" / f"{self.job.number}.{attempt}").glob("n*.log")
        found = [re.search(r"start node=(\d+) host=(\S+)", p.read_text()) for p in logs]
        return [m[2] for m in sorted((m for m in found if m), key=lambda m: int(m[1]))]

    def training(self, attempt: int = 0, nodes: int = 2, steps: int = 5) -> list[str]:
        """Wait until all nodes of an attempt train and rank 0 has completed `steps` steps; returns the nodes."""
        beat = self.dir / "heartbeat.json"
        mark = f'"attempt": "{self.job.number}.{attempt}"'

        def moving() -> list[str]:
            names = self.nodes(attempt)
            text = beat.read_text() if beat.is_file() else ""
            step = re.search(r'"step": (\d+)', text)
            return names if len(names) == nodes and mark in text and step and int(step[1]) >= steps else []

        try:
            return until(f"attempt {attempt} to train", moving, activity=self.job.log_bytes)
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.text()}") from None

    def resumed_at(self, attempt: int) -> int:
        found = re.search(rf"attempt={self.job.number}.{attempt} step=(\d+)", self.text())
        assert found, self.text()
        return int(found[1])

    def steps(self) -> list[int]:
        return sorted(int(p.parent.name[5:]) for p in self.dir.glob("checkpoints/step_*/complete.json"))

    def warn(self) -> None:
        """Send the signal that `--signal=B:USR1@N` sends near the time limit."""
        self.job.cluster.run("scancel", "--batch", "--signal=USR1", self.job.number)


def start(cluster: Cluster, script: Path = SCRIPT, *options: str, nodes: int = 2, **env: Any) -> Run:
    """Submit the batch script with the stub for Python."""
    run_dir = cluster.dir / "work" / f"run-{time.time_ns()}"
    environment = {
        "DLA_RUN_DIR": run_dir, "DLA_PYTHON": STUB, "STUB_REAL_PYTHON": sys.executable, "PYTHONPATH": ROOT,
        "DLA_HANG_TIMEOUT": 0, "DLA_CACHE_DIR": cluster.dir / "cache",
    }  # fmt: skip
    job = cluster.submit(
        script, f"--nodes={nodes}", "--gpus-per-node=8", "--cpus-per-task=4", "--time=10", f"--output={run_dir}.log",
        *options, args=["config.yaml", "model.tau=0.5"], env=environment | env,
    )  # fmt: skip
    return Run(job, run_dir)


def warning_saves_requeues_and_resumes(cluster: Cluster, script: Path = SCRIPT) -> None:
    run = start(cluster, script, STUB_STEPS=100_000, STUB_SAVE=100_000, STUB_AFTER=20)
    run.training()
    run.warn()
    log = run.ended("COMPLETED")
    assert run.job.info()["Restarts"] == "1"
    saved = run.steps()[0]
    assert saved >= 5 and (run.resumed_at(1), run.steps()) == (saved, [saved, saved + 20]), run.text()
    for attempt in (0, 1):  # the log of the first attempt is not lost
        assert f"[{run.job.number}.{attempt}] training on" in log, log


def crash_ends_the_job(cluster: Cluster, script: Path = SCRIPT, stalled: float = STALLED_S) -> None:
    """One rank of two fails, the other one would wait for ever: the job must end."""
    run = start(cluster, script, STUB_CRASH="5:1:7:always", STUB_STEPS=100_000, DLA_MAX_FAILURES=1)
    until("the crash", lambda: "rank 8 crashes" in run.text(), activity=run.job.log_bytes)
    log = run.ended("FAILED", stalled)
    node = run.nodes(0)[1]
    assert re.search(rf"rank 8 .*{node} .*code 7.*planted", log), log
    assert f"{run.dir}/logs/{run.job.number}.0/{node}.log" in log and "1: rank 8 crashes" in log
    assert run.job.info()["ExitCode"] != "0:0"


def cancelled_stays_cancelled(cluster: Cluster, script: Path = SCRIPT, warned: bool = False) -> None:
    # the ranks end after the script has received TERM, as the script could not know the reason otherwise
    run = start(cluster, script, STUB_STEPS=100_000, STUB_DEAF=1, STUB_TERM=8)
    run.training()
    if warned:
        run.warn()
    cluster.run("scancel", run.job.number)
    until("the end", lambda: (i := run.job.info()) and (i["JobState"] in FINAL or i["Restarts"] != "0"))
    assert run.job.info()["Restarts"] == "0", run.text()
    run.job.wait_log("not requeued.* cancelled")
    assert "FAILED" not in run.job.log() and not (run.dir / "failures").exists(), run.text()
    time.sleep(1)
    info = run.job.info()
    assert (info["JobState"], info["Restarts"]) == ("CANCELLED", "0"), run.text()


def bad_node_is_left_out(cluster: Cluster, script: Path = SCRIPT) -> None:
    """The second node fails preflight once: the job is requeued without it."""
    run = start(cluster, script, STUB_BAD="1")
    log = run.ended("COMPLETED")
    bad = re.search(r"bad nodes: (\w+) ", log)
    assert bad and run.job.info()["ExcNodeList"] == bad[1], log
    assert bad[1] not in run.nodes(1) and len(run.nodes(1)) == 2
