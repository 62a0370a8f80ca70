"""A hung and then a killed rank of the real trainer on a real Slurm: found, named, ended."""

import json
import time
from pathlib import Path

from tests.support.slurm.lab import Cluster
from tests.support.slurm.real import submit, text_of, until_attempt_steps, write_inputs


def test_a_hung_and_a_killed_rank_end_their_attempt_and_are_named(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config, profile = write_inputs(tmp_path, data, steps=100_000)
    profile.write_text(profile.read_text() + "max_failures: 2\nhang_timeout: 20\n")
    run = tmp_path / "runs" / "hung"
    job = submit(cluster, run, (config, profile), 2)
    for attempt, signal in enumerate(("STOP", "KILL")):
        until_attempt_steps(run, f"{job.number}.{attempt}")
        rank = json.loads((run / "ranks" / f"{job.number}.{attempt}" / "rank1.json").read_text())
        cluster.run("kill", f"-{signal}", rank["pid"])
        started = time.monotonic()
        job.wait_log(rf"\[{job.number}.{attempt}\] the ranks have ended")
        if signal == "KILL":
            assert time.monotonic() - started < 60
            assert job.wait() == "FAILED", text_of(run)
            log = job.log()
            assert f"rank 1 on node {rank['host']} ended with exit code -9 (SIGKILL" in log, text_of(run)
            assert f"{run}/logs/{job.number}.1/{rank['host']}.log" in log and "giving up" in log
        else:
            hang = json.loads((run / "exits" / f"{job.number}.0" / "hang.json").read_text())
            assert {r["rank"] for r in hang["ranks"]} == {0, 1}, hang
            assert (run / "stacks" / f"{job.number}.0" / "rank0.txt").read_text(), text_of(run)
            job.wait_log("watchdog: hang: nothing for 2[0-9] s after step")
