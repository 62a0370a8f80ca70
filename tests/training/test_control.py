"""Control files: stop, halt and done; one writer a run directory; records of where ranks are and why they ended."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_dla.errors import ConfigError, FenceError, UserError
from megatron_dla.files import write_json
from megatron_dla.training import fence as fences
from megatron_dla.training.control import RunControl, exit_code, stop_mark
from megatron_dla.training.fence import Claim, Fence, attempt_id, read_claim
from tests.support import tiny, train_workers


def claimed(run_dir: Path, attempt: str) -> Fence:
    fence = Fence(run_dir, attempt)
    fence.claim()
    return fence


def write_claim(run_dir: Path, **values) -> None:
    write_json(run_dir / "attempt", values)


def test_a_later_start_of_the_same_job_takes_over_and_the_earlier_one_never_comes_back(tmp_path: Path) -> None:
    old = claimed(tmp_path, "77.9")
    new = claimed(tmp_path, "77.10")
    new.check()
    with pytest.raises(FenceError, match=r"taken over by attempt 77\.10 \(process \d+ on .*77\.9 ends here"):
        old.check()
    with pytest.raises(FenceError), old.publishing():
        pytest.fail("the loser publishes")
    old.release()  # must not touch the winner's claim
    new.check()
    new.release()
    with pytest.raises(FenceError, match=r"belongs to attempt 77\.10.*77\.9, is older"):
        Fence(tmp_path, "77.9").claim()


def test_two_jobs_at_once_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = claimed(tmp_path, "80.0")
    with pytest.raises(FenceError, match=r"in use by attempt 80\.0 .*run\.name"):
        Fence(tmp_path, "81.0").claim()
    first.check()
    first.release()
    claimed(tmp_path, "81.0").release()


def test_a_dead_process_on_this_machine_does_not_hold_the_directory(tmp_path: Path) -> None:
    code = "import sys; from megatron_dla.training.fence import *; Fence(Path(sys.argv[1]), '90.0').claim(); input()"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while read_claim(tmp_path) is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    with pytest.raises(FenceError, match="in use"):
        Fence(tmp_path, "91.0").claim()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    claimed(tmp_path, "91.0").release()  # the killed process is still a zombie here
    process.communicate()


@pytest.mark.parametrize("clock", [600, -600])
@pytest.mark.parametrize("beating", [True, False])
def test_a_holder_on_another_machine_is_known_by_its_touches(
    tmp_path: Path, monkeypatch, capsys, beating, clock
) -> None:
    """Also where the clock of this machine is 10 minutes off."""
    monkeypatch.setattr(fences, "LEASE_S", 1.5)
    monkeypatch.setattr(fences, "BEAT_S", 0.2)
    monkeypatch.setenv("SLURMD_NODENAME", "far")
    far = claimed(tmp_path, "95.0")
    monkeypatch.setenv("SLURMD_NODENAME", "near")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + clock)
    if beating:
        with pytest.raises(FenceError, match=r"in use by attempt 95\.0 \(process \d+ on far\)"):
            Fence(tmp_path, "96.0").claim()
        far.release()
    else:
        far._ended.set()  # its touches end as in a power cut
        time.sleep(0.5)
        claimed(tmp_path, "96.0").release()
    assert "whether attempt 95.0 " in capsys.readouterr().out


def test_of_many_claims_at_once_one_holds(tmp_path: Path) -> None:
    results: list[str] = []
    start = threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        try:
            claimed(tmp_path, f"{number}.0")
            results.append(f"{number}.0")
        except FenceError:
            pass

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [read_claim(tmp_path).attempt]


def test_a_new_claim_waits_until_what_is_being_published_is_complete(tmp_path: Path) -> None:
    old = claimed(tmp_path, "5.0")
    events = []
    with old.publishing():
        thread = threading.Thread(target=lambda: (claimed(tmp_path, "5.1"), events.append("claimed")))
        thread.start()
        time.sleep(0.3)
        events.append("published")
    thread.join()
    assert events == ["published", "claimed"]


def test_claims_that_others_wrote_and_names_that_are_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "attempt").write_text("7.3\n")
    assert read_claim(tmp_path) == Claim("7.3")
    with pytest.raises(FenceError, match=r"belongs to attempt 7\.3"):
        Fence(tmp_path, "7.2").claim()
    claimed(tmp_path, "7.4").release()
    monkeypatch.setenv("DLA_ATTEMPT", "../7")
    with pytest.raises(ConfigError, match="DLA_ATTEMPT"):
        attempt_id()
    monkeypatch.delenv("DLA_ATTEMPT")
    assert str(os.getpid()) in attempt_id()


def test_done_and_halt_are_found_at_the_start(tmp_path: Path) -> None:
    control = RunControl(tmp_path, 0)
    assert not control.already_done(5)
    control.claim()
    control.finish(5)
    assert json.loads((tmp_path / "done").read_text())["step"] == 5
    assert control.already_done(5) and not control.already_done(6)
    (tmp_path / "halt").touch()
    assert control.already_done(5)  # nothing to start: halt or not
    with pytest.raises(UserError, match=r"halt' says .* remove it"):
        control.already_done(6)
    control.claim()
    assert not (tmp_path / "done").exists()
    (tmp_path / "done").write_text("{")
    (tmp_path / "halt").unlink()
    assert not control.already_done(1)
    control.release()


def test_a_request_to_stop_from_before_the_start_counts_only_under_a_launcher(tmp_path: Path, monkeypatch) -> None:
    for attempt, kept in ((None, False), ("3.1", True)):
        (tmp_path / "stop").touch()
        if attempt:
            monkeypatch.setenv("DLA_ATTEMPT", attempt)
        else:
            monkeypatch.delenv("DLA_ATTEMPT", raising=False)
        with RunControl(tmp_path, 0) as control:
            control.claim()
            assert control.asked_to_stop() == int(kept)
            assert RunControl(tmp_path, 1).asked_to_stop() == 0


def test_a_refused_start_leaves_the_request_to_stop_to_the_run_that_is_alive(tmp_path: Path, monkeypatch) -> None:
    first = claimed(tmp_path, "3.0")
    (tmp_path / "stop").touch()
    (tmp_path / ".launch" / "3.0").mkdir(parents=True)
    (tmp_path / "ranks" / "3.0").mkdir(parents=True)
    halves = [tmp_path / ".heartbeat.json.0123456789ab.part", tmp_path / "ranks" / "3.0" / ".rank0.json.0.part"]
    for path in halves:
        path.touch()
    for attempt in ("", "4.0"):
        monkeypatch.setenv("DLA_ATTEMPT", attempt)
        monkeypatch.setenv("DLA_STALE_STOP", stop_mark(tmp_path))
        with pytest.raises(FenceError):
            RunControl(tmp_path, 0).claim()
        assert all(path.exists() for path in (tmp_path / "stop", tmp_path / ".launch" / "3.0", *halves))
    first.release()
    with RunControl(tmp_path, 0) as control:
        control.claim()
    assert not (tmp_path / "stop").exists() and not list((tmp_path / ".launch").iterdir())
    assert not any(path.exists() for path in halves)


@pytest.mark.parametrize("step_s", [600, -600])
def test_a_set_clock_does_not_keep_the_heartbeat_back(tmp_path: Path, monkeypatch, step_s) -> None:
    control, now = RunControl(tmp_path, 0), time.time
    control.beat(1)
    control.beat(2)  # within a second
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 1
    with control.doing("save", 3):
        beat = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (beat["step"], beat["doing"]) == (3, "save")
    monkeypatch.setattr(time, "time", lambda: now() + step_s)
    time.sleep(1.05)
    control.beat(4)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["doing"]) == (4, "step") and abs(beat["time"] - now() - step_s) < 10


def test_a_full_disk_keeps_no_heartbeat_back(tmp_path: Path, monkeypatch) -> None:
    control, path = RunControl(tmp_path, 0), tmp_path / "heartbeat.json"
    control.beat(1)
    os.utime(path, (0, 0))
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):

        def fails(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, "no room")

        monkeypatch.setattr("megatron_dla.training.control.write_json", fails)
        control._beaten = 0.0
        with contextlib.nullcontext() if number != errno.EIO else pytest.raises(OSError):
            control.beat(2)
    assert time.time() - path.stat().st_mtime < 60 and json.loads(path.read_text())["step"] == 1


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("the key\n  is wrong"), 2, "the key; is wrong"),
        (FileNotFoundError(2, "No such file", "a.tar"), 2, "FileNotFoundError: [Errno 2] No such file: 'a.tar'"),
        (RuntimeError("NCCL"), 1, "RuntimeError: NCCL"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (SystemExit(9), 9, "SystemExit: 9"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_rank_that_fails_says_why(tmp_path: Path, monkeypatch, error, code, message) -> None:
    monkeypatch.setenv("DLA_ATTEMPT", "12.0")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    with pytest.raises(type(error)), RunControl(tmp_path, 3).recorded():
        raise error
    record = json.loads((tmp_path / "exits" / "12.0" / "rank3.json").read_text())
    assert abs(record.pop("time") - time.time()) < 10
    assert record == {"rank": 3, "exitcode": code, "message": message, "host": "n7", "pid": os.getpid()}
    with pytest.raises(type(error)), RunControl(tmp_path / "none", 3).recorded():
        raise error
    assert not (tmp_path / "none").exists()


def test_all_stacks_of_a_rank_on_usr2(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom megatron_dla.training.control import RunControl\n"
        "def stuck_here():\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "RunControl(Path(sys.argv[1]), 1).open_records()\nstuck_here()\n"
    )
    env = os.environ | {"DLA_ATTEMPT": "4.2"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=env, text=True)
    assert process.stdout.readline() == "ready\n"
    rank = json.loads((tmp_path / "ranks" / "4.2" / "rank1.json").read_text())
    assert rank["pid"] == process.pid
    os.kill(rank["pid"], signal.SIGUSR2)
    path, deadline = tmp_path / "stacks" / "4.2" / "rank1.txt", time.monotonic() + 10
    while "in stuck_here" not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.build_data(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("file", ["stop", "halt"])
def test_all_ranks_stop_at_one_step_when_the_file_appears(ranks, data, tmp_path, file) -> None:
    values = tiny.config_dict(data, tmp_path)
    for code, step, _ in ranks(2).run(train_workers.disturbed, values, 2, {file: ""}):
        assert (code, step) == (75, 2)
    run = tmp_path / "tiny"
    assert (run / "checkpoints" / "step_2" / "complete.json").exists() and not (run / "done").exists()
    beat = json.loads((run / "heartbeat.json").read_text())
    assert beat["attempt"] == read_claim(run).attempt and beat["step"] == 2
    assert read_claim(run).released
    (run / file).unlink()
    ranks(2).run(train_workers.train, values)
    assert json.loads((run / "done").read_text())["step"] == 5


WINNER = json.dumps({"attempt": "9.1", "host": "n2", "pid": 1, "started": 2})


def test_the_loser_of_a_run_directory_ends_at_the_next_heartbeat(ranks, data, tmp_path) -> None:
    values = tiny.config_dict(data, tmp_path)
    for code, step, error in ranks(2).run(train_workers.disturbed, values, 3, {"attempt": WINNER}):
        assert code is None and step == 3
        assert "taken over by attempt 9.1 (process 1 on n2)" in error
    run = tmp_path / "tiny"
    assert not (run / "checkpoints").exists()  # not even a part of one
    assert (run / "attempt").read_text() == WINNER and not (run / "done").exists()
    assert json.loads((run / "heartbeat.json").read_text())["step"] < 3


def test_a_loser_that_is_saving_publishes_and_deletes_nothing(ranks, data, tmp_path) -> None:
    training = {"save_every": 1, "keep_checkpoints": 2}
    values = tiny.config_dict(data, tmp_path, training=training, checkpoint={"background": False})
    for code, step, error in ranks(2).run(train_workers.disturbed, values, 3, {"attempt": WINNER}, True):
        assert code is None and step == 3 and "taken over by attempt 9.1" in error
    checkpoints = tmp_path / "tiny" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_1", "step_2"]


@pytest.mark.parametrize(
    "number,code",
    [(errno.ENOENT, 2), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EIO, 1), (errno.ESTALE, 1), (errno.ENOSPC, 1)],
)
def test_a_hiccup_of_the_file_system_is_no_bad_input(number: int, code: int) -> None:
    assert exit_code(OSError(number, os.strerror(number), "/shared/x")) == code
    assert exit_code(OSError(number, os.strerror(number))) == 1
