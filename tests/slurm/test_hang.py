"""A rank of the real trainer hangs, then one is killed, on a real Slurm: both are detected, named and ended."""

import json
import re
from pathlib import Path

import yaml

from tests.support.slurm.lab import Cluster
from tests.support.slurm.real import submit, text_of, until_attempt_steps, write_inputs


def test_a_hung_and_a_killed_rank_end_their_attempt_and_are_named(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    config, profile = write_inputs(tmp_path, data, steps=100_000)
    keys = yaml.safe_load(profile.read_text()) | {"max_failures": 2, "hang_timeout": 30}
    profile.write_text(yaml.safe_dump(keys))
    run = tmp_path / "runs" / "hung"
    job = submit(cluster, run, (config, profile), 2)
    for attempt, signal in enumerate(("STOP", "KILL")):
        until_attempt_steps(run, f"{job.number}.{attempt}")
        rank = json.loads((run / "ranks" / f"{job.number}.{attempt}" / "rank1.json").read_text())
        cluster.run("kill", f"-{signal}", rank["pid"])
        job.wait_log(rf"\[{job.number}.{attempt}\] the ranks have ended")
        if signal == "KILL":
            assert job.wait() == "FAILED", text_of(run)
            log = job.log()
            assert re.search(rf"rank 1 .*{rank['host']} .*code -9.*SIGKILL", log), text_of(run)
            assert f"{run}/logs/{job.number}.1/{rank['host']}.log" in log and (run / "failures").read_text() == "2\n"
            assert not (run / "exits" / f"{job.number}.1" / "hang.json").exists()  # it did not take the watchdog
        else:
            hang = json.loads((run / "exits" / f"{job.number}.0" / "hang.json").read_text())
            assert {r["rank"] for r in hang["ranks"]} == {0, 1}, hang
            assert (run / "stacks" / f"{job.number}.0" / "rank0.txt").read_text(), text_of(run)
            assert hang["silent_s"] >= 30 and hang["step"] is not None
            job.wait_log("watchdog: hang: ")
