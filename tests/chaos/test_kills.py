"""A cut of `make chaos`: two kills of one run, by forks of one process."""

import os
import subprocess
import sys


def test_a_run_killed_at_any_time_resumes_bit_for_bit() -> None:
    command = [
        sys.executable,
        "-m",
        "tests.chaos.kills",
        "--forked",
        "--kills",
        "2",
        "--seed",
        "1",
        "--layouts",
        "zero3",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "\n2 kills, " in done.stdout and "all resumed bit for bit" in done.stdout
