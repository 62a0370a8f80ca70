"""The real trainer on the test cluster: inputs, `dla` on its login node, the files of a run."""

import re
import sys
from pathlib import Path

import yaml

from megatron_dla.metrics.sinks import read_metrics
from tests.support import tiny
from tests.support.slurm.lab import Cluster, Job, until
from tests.support.slurm.scenarios import ROOT

STEPS = 6


def dla(cluster: Cluster, *arguments: object, code: int = 0, **env: object) -> str:
    """The `dla` command on the login node; returns what it printed."""
    done = cluster.run(
        sys.executable, "-m", "megatron_dla.cli", *arguments, check=False,
        env={"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1} | env,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_inputs(folder: Path, data: Path, preflight: bool = False, **training: object) -> tuple[Path, Path]:
    small = {"steps": STEPS, "global_batch_size": 4}
    config = tiny.config_dict(data, folder / "runs", training={**small, **training})
    paths = folder / "config.yaml", folder / "profile.yaml"
    paths[0].write_text(yaml.safe_dump(config))
    profile = yaml.safe_load((ROOT / "slurm" / "profiles" / "cpu.yaml").read_text())
    profile |= {"cache_dir": str(folder / "cache")}
    paths[1].write_text(yaml.safe_dump(profile) + ("" if preflight else "preflight: false\n"))
    return paths


def text_of(run: Path) -> str:
    return "\n".join(f"== {p}\n{p.read_text(errors='replace')}" for p in sorted((run / "logs").rglob("*.log")))


def curve(run: Path) -> list[tuple[int, float, float]]:
    path = run / "metrics.jsonl"
    return [(m["step"], m["loss"], m["grad_norm"]) for m in read_metrics(path)] if path.is_file() else []


def until_attempt_steps(run: Path, attempt: str) -> None:
    """Wait for the first heartbeat of an attempt."""
    beat = run / "heartbeat.json"
    written = lambda: sum(p.stat().st_size for p in run.rglob("*.log"))  # noqa: E731
    until(f"a step of {attempt}", lambda: beat.is_file() and f'"{attempt}"' in beat.read_text(), activity=written)


def submit(cluster: Cluster, run: Path, inputs: tuple[Path, Path], nodes: int, *overrides: str) -> Job:
    config, profile = inputs
    printed = dla(cluster, "submit", config, "--profile", profile, "--nodes", nodes, f"run.name={run.name}", *overrides)
    number = re.search(r"submitted +job (\d+)", printed)
    assert number and f"dla logs -f {run}" in printed and f"layout       {nodes} processes" in printed, printed
    return Job(cluster, number[1])
