"""Bugs planted in the batch script: each must make its test fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.slurm import scenarios
from tests.support.slurm.lab import Cluster

# name: (text, its replacement, the scenario that must fail, and how)
PLANTED: dict[str, tuple[str, str, Callable[[Cluster, Path], None], type[Exception]]] = {
    "no kill-on-bad-exit": (
        "--kill-on-bad-exit=1 --wait=60",
        "--kill-on-bad-exit=0",
        lambda cluster, script: scenarios.crash_ends_the_job(cluster, script, stalled=15),
        TimeoutError,
    ),
    "requeue on TERM": (
        "then cancelled=1; fi' TERM",
        'then stopping=1 end=0; scontrol requeue "$SLURM_JOB_ID"; fi\' TERM',
        scenarios.cancelled_stays_cancelled,
        AssertionError,
    ),
    "no append": ("#SBATCH --open-mode=append", "#", scenarios.warning_saves_requeues_and_resumes, AssertionError),
    "bad node not excluded": ('ExcNodeList="$2"', 'Comment="$2"', scenarios.bad_node_is_left_out, AssertionError),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(cluster: Cluster, tmp_path: Path, name: str) -> None:
    text, bug, scenario, error = PLANTED[name]
    whole = scenarios.SCRIPT.read_text()
    assert whole.count(text) == 1, f"{text!r} is no longer in the batch script: plant {name!r} elsewhere"
    script = tmp_path / "pretrain.sbatch"
    script.write_text(whole.replace(text, bug))
    with pytest.raises(error):
        scenario(cluster, script)
