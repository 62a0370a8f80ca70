"""`dla submit`, `jobs`, `logs` and `cancel` on a real Slurm, with simulated ranks."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.slurm.lab import Cluster, Job
from tests.support.slurm.real import dla, write_inputs
from tests.support.slurm.scenarios import STUB, Run


@pytest.fixture
def inputs(data: Path, tmp_path: Path) -> tuple[Path, ...]:
    """Arguments of `dla submit` on two nodes, eight ranks."""
    config, profile = write_inputs(tmp_path, data)
    keys = yaml.safe_load(profile.read_text()) | {"python": str(STUB), "host_python": sys.executable}
    profile.write_text(yaml.safe_dump(keys | {"gpus_per_node": 4, "processes_per_node": 4, "preflight": True}))
    return config, "--profile", profile, "parallel.tensor_model_parallel_size=4", "training.device=auto"


def submitted(cluster: Cluster, run: Path, *arguments: object, **stub: object) -> list[Run]:
    printed = dla(cluster, "submit", *arguments, STUB_REAL_PYTHON=sys.executable, **stub)
    numbers = re.search(r"submitted +job ([\d, then]+);", printed)
    assert numbers, printed
    return [Run(Job(cluster, n), run) for n in numbers[1].split(", then ")]


@pytest.mark.parametrize(
    "profile,options,words",
    [
        ({"gpus_per_node": 16}, ["--nodes", 2], "--gpus-per-node=16"),
        ({"spare_nodes": 9}, ["--nodes", 2, "--dry-run"], "--nodes=11"),
        ({}, ["--nodes", 2, "--time", "0:30"], "time limit 0:30 is 30 s"),
        ({}, ["--nodes", 3], "data-parallel size"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(
    cluster: Cluster, inputs: tuple[Path, ...], tmp_path: Path, profile: dict, options: list[object], words: str
) -> None:
    inputs[2].write_text(yaml.safe_dump(yaml.safe_load(inputs[2].read_text()) | profile))
    printed = dla(cluster, "submit", *inputs, *options, code=2)
    assert words in printed and not (tmp_path / "runs").exists(), printed
    assert not cluster.run("squeue", "--noheader", "--name=tiny").stdout.strip()


def test_dry_run_queries_slurm_and_writes_nothing(cluster: Cluster, inputs: tuple[Path, ...], tmp_path: Path) -> None:
    printed = dla(cluster, "submit", *inputs, "--nodes", 2, "--dry-run")
    assert (
        re.search(r"slurm +Job \d+ to start at \S+ using 4 processors", printed) and "--gpus-per-node=4" in printed
    ), printed
    assert not (tmp_path / "runs").exists()


def test_a_run_is_submitted_watched_and_cancelled(
    cluster: Cluster, inputs: tuple[Path, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    runs = ("--runs", tmp_path / "runs")
    cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=repair")
    request.addfinalizer(lambda: cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME"))
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "bad_nodes").write_text("n2 # no answer\n")
    (run,) = submitted(cluster, folder, *inputs, "--nodes", 2, STUB_STEPS=100_000)
    assert not {"n1", "n2"} & set(run.training())
    assert run.job.number in dla(cluster, "submit", *inputs, "--nodes", 2, code=2)  # one job per run
    row = dla(cluster, "jobs", *runs).splitlines()[1].split()
    assert row[:4] == ["tiny", run.job.number, "RUNNING", "0"] and "step" in row
    logs = dla(cluster, "logs", "tiny", *runs)
    assert "training on" in logs and "0: start node=0" in logs
    assert str(folder / "halt") in dla(cluster, "cancel", "tiny", *runs)
    run.ended("COMPLETED")
    assert run.job.info()["Restarts"] == "0"
    assert len(run.steps()) > 0 and "not requeued" in dla(cluster, "logs", "tiny", "-f", *runs)
    shutil.rmtree(folder / "checkpoints")  # simulated ones, which dla submit would refuse
    (again,) = submitted(cluster, folder, *inputs, "--nodes", 2, STUB_STEPS=10)  # a new submission removes halt
    again.ended("COMPLETED")
    shutil.rmtree(folder / "checkpoints")
    assert "step 10" in dla(cluster, "submit", *inputs, "--nodes", 2, code=2)


def test_a_chain_resumes_where_requeue_is_not_allowed(
    cluster: Cluster, inputs: tuple[Path, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "tiny"
    first, second = submitted(
        cluster, folder, *inputs, "--nodes", 2, "--chain", 2, STUB_STEPS=100_000, STUB_SAVE=100_000, STUB_AFTER=20
    )
    first.training()
    assert second.job.state == "PENDING"
    first.warn()
    first.ended("FAILED")
    assert first.job.info()["ExitCode"] == "75:0", first.text()
    saved = first.steps()[-1]
    second.ended("COMPLETED")
    assert second.resumed_at(0) == saved and second.steps()[-1] == saved + 20
