"""`dla submit` of the real trainer (torchrun, gloo, two nodes) on a real Slurm."""

import json
import re
from pathlib import Path

from tests.support.slurm.lab import Cluster, until
from tests.support.slurm.real import STEPS, curve, submit, text_of, until_attempt_steps, write_inputs


def test_a_run_that_was_warned_requeued_and_resumed_equals_an_uninterrupted_one(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path, data)
    broken, whole = (tmp_path / "runs" / name for name in ("broken", "whole"))
    first = submit(cluster, broken, inputs, 2)
    first.wait_log("training on")
    cluster.run("scancel", "--batch", "--signal=USR1", first.number)  # as --signal=B:USR1@N near the limit
    second = submit(cluster, whole, write_inputs(tmp_path, data, preflight=True), 2)
    for job, run in ((first, broken), (second, whole)):
        assert job.wait() == "COMPLETED", text_of(run)
    assert (first.info()["Restarts"], second.info()["Restarts"]) == ("1", "0")
    resumed = re.search(r"from \S*step_(\d+) at step (\d+)", text_of(broken))
    assert resumed and 1 <= int(resumed[1]) == int(resumed[2]) < STEPS, text_of(broken)
    assert curve(broken) == curve(whole) and len(curve(whole)) == STEPS
    record = json.loads((whole / "submissions.jsonl").read_text())
    assert record["jobs"] == [second.number] and "--nodes=2" in record["argv"] and record["versions"]["torch"]
    assert record["environment"]["DLA_RUN_DIR"] == str(whole)
    verdict = whole / "preflight" / f"{second.number}.0" / "group" / "verdict.json"
    assert not any(json.loads(verdict.read_text()).values()), text_of(whole)


def test_a_lost_nodes_trainer_cannot_write_over_the_new_attempt(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    """A node loses its daemon, not its processes, and Slurm restarts the job elsewhere: two trainers, one run."""
    run = tmp_path / "runs" / "fenced"
    job = submit(cluster, run, write_inputs(tmp_path, data, steps=100_000, save_every=1, keep_checkpoints=3), 1)
    old = run / "logs" / f"{job.number}.0"
    until("the first step", lambda: curve(run), activity=job.log_bytes)
    (node,) = (p.stem for p in old.glob("n*.log"))
    cluster.kill_slurmd(node)
    try:
        claim = run / "attempt"
        until("the new attempt's claim", lambda: f'"{job.number}.1"' in claim.read_text(), activity=job.log_bytes)
        fenced = until("the old attempt's end", lambda: list((run / "exits" / f"{job.number}.0").glob("*.json")))
        record = json.loads(fenced[0].read_text())
        assert record["exitcode"] == 2 and f"attempt {job.number}.1" in record["message"], record
        until_attempt_steps(run, f"{job.number}.1")
        assert job.state == "RUNNING", text_of(run)  # the old batch script did not touch it
    finally:
        cluster.run("scancel", job.number)
        cluster.start_node(node)
