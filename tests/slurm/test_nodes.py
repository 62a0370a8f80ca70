"""slurm/pretrain.sbatch on a real Slurm, with simulated ranks: nodes that are bad, lost, or lost but running."""

import re
from pathlib import Path

from tests.support.slurm import scenarios
from tests.support.slurm.lab import Cluster
from tests.support.slurm.scenarios import start


def test_a_power_cut_moves_the_job_to_another_node(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=100_000, STUB_AFTER=20)
    lost = run.training(steps=11)[1]
    cluster.power_cut(lost)
    try:
        run.ended("COMPLETED")
        assert run.resumed_at(1) >= 10 and lost not in run.nodes(1)
    finally:
        cluster.start_node(lost)


def test_a_lost_node_that_still_runs_does_not_disturb_the_new_attempt(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=100_000, STUB_DEAF=1)
    lost = run.training(steps=11)[0]  # the batch script's own node
    cluster.kill_slurmd(lost)
    try:
        assert lost not in run.training(1)
        run.job.wait_log(r"\.0\] a newer attempt")
        info = run.job.info()
        assert (info["JobState"], info["Restarts"]) == ("RUNNING", "1"), run.text()
    finally:
        cluster.run("scancel", run.job.number)
        cluster.start_node(lost)


def test_a_hot_spare_takes_a_bad_nodes_place(cluster: Cluster) -> None:
    run = start(cluster, nodes=3, DLA_WANT_NODES=2, STUB_BAD="0:always")
    log = run.ended("COMPLETED")
    bad = re.search(r"bad nodes: (\w+) ", log)
    assert bad and bad[1] not in run.nodes(0) and len(run.nodes(0)) == 2 and run.job.info()["Restarts"] == "0"
    first = run.nodes(0)[0]  # not the first of the job, which is bad
    assert f" master={first}:" in run.node_log(0, first).splitlines()[0], run.text()


def test_a_bad_node_is_excluded_from_the_next_attempt(cluster: Cluster) -> None:
    scenarios.bad_node_is_left_out(cluster)


def test_a_chain_resumes_without_the_bad_node(cluster: Cluster) -> None:
    first = start(cluster, scenarios.SCRIPT, "--no-requeue", "--hold", STUB_BAD="1")
    chain = [first]
    for place in (2, 3):
        after = f"--dependency=afterany:{chain[-1].job.number}"
        options = ("--no-requeue", after)
        chain.append(start(cluster, scenarios.SCRIPT, *options, DLA_CHAIN=place, DLA_RUN_DIR=first.dir))
    for run in chain:
        run.dir = first.dir
    cluster.run("scontrol", "release", first.job.number)
    log = first.ended("FAILED")
    bad = re.search(r"bad nodes: (\w+) ", log)
    assert bad and first.job.info()["ExitCode"] == "75:0", log
    chain[1].ended("COMPLETED")
    assert bad[1] not in chain[1].nodes(0) and len(chain[1].nodes(0)) == 2, chain[1].text()
    assert chain[2].job.info()["ExcNodeList"] == bad[1]  # depends on the second, and is updated as well
    chain[2].ended("COMPLETED")


def test_an_unknown_name_in_bad_nodes_is_ignored(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "007"
    run_dir.mkdir()
    (run_dir / "bad_nodes").write_text("gone17  # sold\nnot a name\n")
    run = start(cluster, STUB_BAD="1", DLA_RUN_DIR=run_dir)
    run.dir = run_dir
    log = run.ended("COMPLETED")
    bad = re.search(r"bad nodes: (\w+) ", log)
    assert bad and run.job.info()["ExcNodeList"] == bad[1], log
    assert "'gone17'" in log and "'not a name'" in log and bad[1] not in run.nodes(1)
    assert run.steps() == [10, 20, 30, 40]  # in 007, not in 7


def test_a_job_whose_nodes_are_all_bad_is_not_requeued(cluster: Cluster) -> None:
    run = start(cluster, STUB_BAD="all:always")
    run.ended("FAILED")
    info = run.job.info()
    assert (info["Restarts"], info["ExitCode"]) == ("0", "1:0") and not run.nodes(0), run.text()
