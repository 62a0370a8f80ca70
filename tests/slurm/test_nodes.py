"""slurm/pretrain.sbatch on a real Slurm, the ranks played by a stub: nodes that are bad, lost, or lost and alive."""

import re

import scenarios
from lab import Cluster
from scenarios import start


def test_a_power_cut_moves_the_job_to_another_node(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=100)
    lost = run.training(steps=11)[1]
    cluster.power_cut(lost)
    try:
        run.ended("COMPLETED")
        assert run.resumed_at(1) >= 10 and lost not in run.nodes(1)
    finally:
        cluster.start_node(lost)


def test_a_lost_node_that_lives_leaves_the_new_attempt_alone(cluster: Cluster) -> None:
    run = start(cluster, STUB_STEPS=150, STUB_DEAF=1)
    lost = run.training(steps=11)[0]  # the batch script's own node
    cluster.kill_slurmd(lost)
    try:
        run.ended("COMPLETED", 60)
        assert run.job.info()["Restarts"] == "1" and lost not in run.nodes(1)
        assert "a newer attempt of this job runs" in run.job.log(), run.text()
    finally:
        cluster.start_node(lost)


def test_a_hot_spare_takes_a_bad_nodes_place(cluster: Cluster) -> None:
    run = start(cluster, nodes=3, DLA_WANT_NODES=2, STUB_BAD="0:always")
    log = run.ended("COMPLETED")
    bad = re.search(r"bad nodes: (\w+) ", log)
    assert bad and bad[1] not in run.nodes(0) and len(run.nodes(0)) == 2 and run.job.info()["Restarts"] == "0"


def test_a_bad_node_is_left_out_of_the_next_attempt(cluster: Cluster) -> None:
    scenarios.bad_node_is_left_out(cluster)


def test_a_job_whose_nodes_are_all_bad_suspects_the_set_up(cluster: Cluster) -> None:
    run = start(cluster, STUB_BAD="all:always")
    log = run.ended("FAILED")
    assert "look for the fault in the set-up" in log and run.job.info()["Restarts"] == "0" and not run.nodes(0)
