"""`dla run`: which rank's failure is the cause; signals; what it passes to its ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_dla.launch import local
from megatron_dla.processes import SAME_REQUEST_S, usable_cpus
from megatron_dla.tasks.run import _crowding
from megatron_dla.training.control import RunControl, stop_mark


def failure(rank: int, exitcode: int, at: int, message: str, folder: Path) -> ProcessFailure:
    path = folder / f"{rank}.json"
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": str(at)}}}))
    return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))


def test_a_rank_that_was_terminated_is_not_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Timestamps are whole seconds: the rank ended by SIGTERM may have an earlier one than the rank that failed."""
    failed = {
        0: failure(0, 2, 100, "shard train-00000 is damaged", tmp_path),
        1: failure(1, -signal.SIGTERM, 99, "ended", tmp_path),
    }

    def launch(*_: object):
        def raise_failure(*_: object) -> None:
            raise ChildFailedError("dla", failed)

        return raise_failure

    monkeypatch.setattr(local, "elastic_launch", launch)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert local.run_local(2, ["config.yaml"], tmp_path) == 2
    printed = capsys.readouterr().err
    assert "shard train-00000 is damaged" in printed and "rank 1" not in printed


def test_usr1_asks_the_ranks_of_one_attempt_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the file `stop`; the ranks know one that an earlier run left, and a refused start removes none."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    seen = []

    def launch(*_: object):
        def ranks(*_: object) -> None:
            assert os.environ["DLA_STALE_STOP"] == stop_mark(run_dir)
            control = RunControl(run_dir, 0)
            seen.append(((run_dir / "stop").exists(), control.attempt))
            with control:
                control.claim()
                seen.append(((run_dir / "stop").exists(), control.attempt))
                os.kill(os.getpid(), signal.SIGUSR1)
                control.claim()
                seen.append(((run_dir / "stop").exists(), control.attempt))

        return ranks

    monkeypatch.setattr(local, "elastic_launch", launch)
    monkeypatch.delenv("DLA_ATTEMPT", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        assert local.run_local(2, ["config.yaml"], run_dir) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [there for there, _ in seen] == [True, False, True]
    assert len(names := {name for _, name in seen}) == 1 and str(os.getpid()) in names.pop()
    assert not {"DLA_ATTEMPT", "DLA_STALE_STOP", "DLA_LAUNCHED"} & set(os.environ)
    assert not (run_dir / ".launch").exists()


# a rank that saves on SIGTERM, but takes long for it where argument 1 is "slow"
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75) if sys.argv[1] == "quick" else time.sleep(60))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("rank", ["quick", "slow", "none"])
def test_a_stop_signal_saves_and_a_second_one_ends_the_ranks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, rank: str
) -> None:
    def launch(*_: object):
        def ranks(*_: object) -> None:
            if rank == "none":
                os.kill(os.getpid(), number)
                raise AssertionError("the launcher went on without ranks")
            process = subprocess.Popen([sys.executable, "-c", SAVES, rank], stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "ready\n"
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # twice, as a closing terminal does
            if rank == "slow":
                time.sleep(1.2 * SAME_REQUEST_S)
                assert process.poll() is None
                os.kill(os.getpid(), number)
            code = process.wait(20)
            raise ChildFailedError("dla", {0: ProcessFailure(0, process.pid, code, str(tmp_path / "none"))})

        return ranks

    others, children = set(psutil.Process().children()), psutil.Process.children  # of other tests: not ranks
    monkeypatch.setattr(psutil.Process, "children", lambda self: [x for x in children(self) if x not in others])
    monkeypatch.setattr(local, "elastic_launch", launch)
    before = signal.getsignal(number), signal.getsignal(signal.SIGUSR1)
    try:
        assert local.run_local(1, ["config.yaml"], tmp_path) == (75 if rank == "quick" else 128 + number)
    finally:
        signal.signal(signal.SIGUSR1, before[1])
    assert signal.getsignal(number) == before[0]


def test_more_threads_than_cpus_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(usable_cpus()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        note = _crowding()
        assert f"{usable_cpus()} ranks x 2 threads share {usable_cpus()} CPUs" in note and "OMP_NUM_THREADS=1" in note
        torch.set_num_threads(1)
        assert _crowding() == ""
    finally:
        torch.set_num_threads(before)
