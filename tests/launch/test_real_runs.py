"""Whole runs by `dla run`, with a second start, signals, and a clock that is set, and their starts afterwards."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_dla.checkpoint.find import complete_checkpoints
from megatron_dla.processes import usable_cpus
from tests.support import tiny

pytestmark = pytest.mark.long  # six starts of torch and DeepSpeed, a minute of two CPUs
LIMIT_S = 300  # of a process that should end by itself; long, because the machine may be busy
FLOOR_S = 6  # of the watchdog, which is two minutes without this
RUN = f"""
import sys
from megatron_dla import cli
from megatron_dla.launch import watchdog
watchdog.FLOOR_S = {FLOOR_S}
sys.exit(cli.main())
"""
# in a sitecustomize.py, so that launcher and ranks have it: the wall clock is off by what a file says
CLOCK = """
import os, time
from pathlib import Path
real = time.time
def off():
    try:
        return float(Path(os.environ["DLA_TEST_CLOCK"]).read_text())
    except (OSError, ValueError):
        return 0.0
time.time = lambda: real() + off()
time.time_ns = lambda: int(time.time() * 1e9)
"""


class Starts:
    """`dla run` of one tiny run on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.dir, self.clock, self.printed = folder / "tiny", folder / "clock", folder / "printed"
        self.printed.mkdir()
        self.config = folder / "tiny.yaml"
        data = tiny.build_data(folder / "corpus")
        self.config.write_text(yaml.safe_dump(tiny.config_dict(data, folder, training={"steps": 100_000})))
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(CLOCK)
        path = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
        self.env = {"PYTHONPATH": ":".join(path), "DLA_TEST_CLOCK": str(self.clock), "OMP_NUM_THREADS": "1"}

    def start(self, *overrides: str, **env: str) -> subprocess.Popen:
        command = [sys.executable, "-c", RUN, "run", str(self.config), *overrides, "--nproc", "2"]
        new = self.printed / "new"
        with new.open("w") as out, new.with_suffix(".err").open("w") as err:  # pipes would fill, and stop the run
            process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | self.env | env)
        new.rename(self.printed / str(process.pid))
        new.with_suffix(".err").rename(self.printed / f"{process.pid}.err")
        return process

    def end(self, process: subprocess.Popen) -> tuple[str, str]:
        """What it printed to stdout and to stderr by its end."""
        process.wait(LIMIT_S)
        path = self.printed / str(process.pid)
        return path.read_text(), path.with_suffix(".err").read_text()

    def step(self) -> int:
        try:
            return json.loads((self.dir / "heartbeat.json").read_text())["step"]
        except (OSError, ValueError):
            return 0

    def goes_on(self, process: subprocess.Popen, seconds: float) -> None:
        """It makes steps for so long."""
        step, until, deadline = self.step(), time.monotonic() + seconds, time.monotonic() + LIMIT_S
        while time.monotonic() < until or self.step() <= step:
            assert process.poll() is None, self.end(process)
            assert time.monotonic() < deadline, f"no step after {self.step()}"
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen, number: signal.Signals) -> int:
        """Step of the checkpoint that it saves."""
        process.send_signal(number)
        printed, errors = self.end(process)
        assert process.returncode == 75, (printed, errors)
        ((step, _),) = complete_checkpoints(self.dir)
        assert f"after step {step}; run the same command to resume" in printed
        assert [e["reason"] for e in self.events("stop")] == ["a signal"]
        return step

    def events(self, kind: str) -> list[dict]:
        lines = map(json.loads, (self.dir / "events.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == kind]


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


def test_a_clock_that_is_set_and_a_second_start_disturb_no_run_and_sighup_saves(starts: Starts) -> None:
    first = starts.start()
    starts.goes_on(first, 0)
    until = time.monotonic() + 2 * FLOOR_S
    for off in itertools.cycle(("600", "-600", "0")):
        starts.clock.write_text(off)
        starts.goes_on(first, 0.3)
        if time.monotonic() > until:
            break
    second = starts.start()
    _, errors = starts.end(second)
    assert second.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert "in use by attempt" in errors and str(first.pid) in errors
    starts.goes_on(first, 0)
    starts.stop(first, signal.SIGHUP)
    assert len(starts.events("start")) == 1


def test_sigint_saves_and_a_finished_run_is_started_again(starts: Starts) -> None:
    process = starts.start()
    starts.goes_on(process, 0)
    last = f"training.steps={starts.stop(process, signal.SIGINT)}"
    cpus = usable_cpus()
    process = starts.start(last, OMP_NUM_THREADS=str(cpus))
    printed, errors = starts.end(process)
    assert process.returncode == 0, errors
    assert f"2 ranks x {cpus} threads share {cpus} CPUs" in printed
    before = sorted((path, path.stat().st_mtime_ns) for path in (starts.dir / "checkpoints").rglob("*"))
    again = [starts.start(last) for _ in range(4)]  # each of them as the only one, since none writes anything
    for process in again:
        printed, errors = starts.end(process)
        assert process.returncode == 0 and "is done" in printed and "SIGABRT" not in errors, errors
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (starts.dir / "checkpoints").rglob("*"))
