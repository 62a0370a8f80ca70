"""slurm/pretrain.sbatch on a real Slurm, with simulated ranks: what happens at each failure."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.support.slurm import scenarios
from tests.support.slurm.lab import Cluster, until
from tests.support.slurm.scenarios import start


def test_every_node_gets_its_rank_and_the_rendezvous_address(cluster: Cluster) -> None:
    run = start(cluster)
    run.ended("COMPLETED")
    nodes = run.nodes(0)
    assert len(set(nodes)) == 2
    for rank, node in enumerate(nodes):
        line = run.node_log(0, node).splitlines()[0]
        assert line.startswith(f"{rank}: start node={rank} host={node} ") and " nnodes=2 nproc=8 " in line
        assert f" master={nodes[0]}:{20000 + int(run.job.number) % 10000} " in line
        assert "gpus=0,1,2,3,4,5,6,7 cache=True" in line
    assert run.steps() == [10, 20, 30, 40]


def test_time_limit_warning_saves_requeues_and_resumes(cluster: Cluster) -> None:
    scenarios.warning_saves_requeues_and_resumes(cluster)


def test_a_crash_resumes_from_the_newest_checkpoint(cluster: Cluster) -> None:
    run = start(cluster, STUB_CRASH="21:1:1")
    log = run.ended("COMPLETED")
    assert run.resumed_at(1) == 20 and "FAILED: rank 8" in log and not (run.dir / "failures").exists()


def test_a_crash_ends_the_whole_job_and_names_the_rank(cluster: Cluster) -> None:
    scenarios.crash_ends_the_job(cluster)


def test_a_killed_rank_is_named_from_torchruns_summary(cluster: Cluster) -> None:
    run = start(cluster, STUB_CRASH="5:1:-9:always", DLA_MAX_FAILURES=1)
    log = run.ended("FAILED")
    assert re.search(rf"rank 8 .*{run.nodes(0)[1]} .*code -9.*SIGKILL", log), log


def test_a_crash_loop_gives_up_with_the_reason(cluster: Cluster) -> None:
    run = start(cluster, STUB_CRASH="11:1:1:always", DLA_MAX_FAILURES=2)
    log = run.ended("FAILED")
    # the first attempt reaches a checkpoint at step 10; the next two do not get further
    assert run.job.info()["Restarts"] == "2" and (run.dir / "failures").read_text() == "2\n", log
    assert log.count("FAILED: rank 8") == 3


def test_bad_input_is_not_tried_again(cluster: Cluster) -> None:
    run = start(cluster, STUB_CRASH="5:0:2:always")
    run.ended("FAILED")
    info = run.job.info()
    assert (info["Restarts"], info["ExitCode"]) == ("0", "2:0")


@pytest.mark.parametrize("warned", [False, True])
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, warned: bool) -> None:
    scenarios.cancelled_stays_cancelled(cluster, warned=warned)


def test_halt_saves_and_does_not_come_back(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=100_000, STUB_SAVE=100_000)
    run.training()
    (run.dir / "halt").touch()
    run.ended("COMPLETED")
    assert len(run.steps()) == 1 and run.job.info()["Restarts"] == "0"
    again = start(cluster, DLA_RUN_DIR=run.dir)
    assert f"{run.dir}/halt" in again.ended("COMPLETED") and len(run.steps()) == 1


@pytest.mark.parametrize(
    "name,value",
    [
        ("DLA_WANT_NODES", 3),
        ("DLA_RUN_DIR", ""),
        ("DLA_PREFLIGHT", "no"),
        ("DLA_MAX_FAILURES", "abc"),
        ("DLA_NPROC", 0),
    ],
)
def test_a_wrong_setting_is_refused_at_once(cluster: Cluster, name: str, value: object) -> None:
    run = start(cluster, **{name: value})
    assert f"{name} = '{value}'" in run.ended("FAILED") and not run.dir.exists()
    assert run.job.info()["ExitCode"] == "2:0"


def test_halt_before_the_first_step_is_no_failure(cluster: Cluster) -> None:
    run = start(cluster, STUB_HALT="preflight")
    run.ended("COMPLETED")
    assert not run.nodes(0)
    assert not (run.dir / "failures").exists() and run.job.info()["Restarts"] == "0"


def test_halt_after_the_ranks_have_ended_is_obeyed(cluster: Cluster) -> None:
    run = start(cluster, STUB_CRASH="5:1:7", STUB_HALT="report")
    log = run.ended("FAILED")
    info = run.job.info()
    assert (info["Restarts"], info["ExitCode"]) == ("0", "1:0"), run.text()
    assert "rank 8 on node" in log and not (run.dir / "failures").exists()


def test_halt_is_checked_last(cluster: Cluster, tmp_path: Path) -> None:
    """It is created while the script queries the controller for the job's state."""
    slow = tmp_path / "scontrol"
    slow.write_text(
        '#!/bin/sh\ncase "$*" in *"show job"*) [ ! -e "$DLA_RUN_DIR/failures" ] || touch "$DLA_RUN_DIR/halt" ;; esac\n'
        f'exec {shutil.which("scontrol")} "$@"\n'
    )
    slow.chmod(0o755)
    run = start(cluster, STUB_CRASH="5:1:7", PATH=f"{tmp_path}:{os.environ['PATH']}")
    run.ended("FAILED")
    info = run.job.info()
    assert (info["Restarts"], info["ExitCode"]) == ("0", "1:0") and (run.dir / "halt").exists(), run.text()


def test_a_job_cancelled_after_its_ranks_have_ended_stays_cancelled(cluster: Cluster) -> None:
    """TERM arrives after the script has checked for it: only the job's state in Slurm is left."""
    run = start(cluster, STUB_CRASH="5:1:7", STUB_REPORT=600)
    until("the report", (run.dir / "reporting").exists, activity=run.job.log_bytes)
    cluster.run("scancel", run.job.number)
    run.ended("CANCELLED")
    run.job.wait_log("not requeued: ")
    assert run.job.info()["Restarts"] == "0", run.text()


def test_a_preflight_that_srun_cannot_start_blames_no_node(cluster: Cluster) -> None:
    run = start(cluster, DLA_SRUN_ARGS="--gres=gpu:99", DLA_MAX_FAILURES=1)
    log = run.ended("FAILED")
    assert "preflight started on no node" in log and not (run.dir / "bad_nodes").read_text(), run.text()


def test_no_node_is_bad_if_none_responds(cluster: Cluster) -> None:
    run = start(cluster, DLA_EXEC_PREFIX="/no/such/program")
    run.ended("FAILED")
    info = run.job.info()
    assert (info["Restarts"], info["ExitCode"]) == ("0", "1:0"), run.text()
    assert not (run.dir / "bad_nodes").read_text() and not (run.dir / "failures").exists(), run.text()


def test_preflight_by_hand_names_what_is_missing(cluster: Cluster, tmp_path: Path) -> None:
    script = scenarios.ROOT / "slurm" / "preflight.sbatch"
    for options, env, code, words in (
        ((), {}, "2:0", "DLA_RUN_DIR = ''"),
        (("--nodes=2",), {"DLA_RUN_DIR": tmp_path, "DLA_PYTHON": "/nope"}, "3:0", "DLA_PYTHON = /nope"),
    ):
        job = cluster.submit(script, *options, env=env)
        assert job.wait() == "FAILED" and job.info()["ExitCode"] == code and words in job.log(), job.log()
    assert not (tmp_path / "bad_nodes").exists()


def test_a_job_of_a_finished_run_ends_at_once(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=2)
    run.ended("COMPLETED")
    again = start(cluster, DLA_RUN_DIR=run.dir)
    assert f"{run.dir}/done" in again.ended("COMPLETED") and not list((run.dir / "logs").glob(f"{again.job.number}.*"))


def test_a_job_that_may_not_requeue_exits_with_75(cluster: Cluster) -> None:
    run = start(cluster, scenarios.SCRIPT, "--no-requeue", STUB_STEPS=100_000)
    run.training()
    run.warn()
    run.ended("FAILED")
    assert run.job.info()["ExitCode"] == "75:0" and run.steps()
