"""The hang watchdog: a run that stops making steps is ended, and the location of each rank is recorded."""

import errno
import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_dla.files import write_json
from megatron_dla.launch import watchdog
from megatron_dla.launch.watchdog import NO_STACKS, place_of
from tests.support import tiny

LIMIT_S = 300  # of a process that should end by itself; long, because the machine may be busy

# two ranks train, which is an all-reduce per step; after step 2 one of them sleeps and the other waits for it
TRAINER = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from megatron_dla.training.control import RunControl

def overslept():
    time.sleep(300)

def train_step():
    dist.all_reduce(torch.ones(1))

rank = int(os.environ["RANK"])
control = RunControl(Path(sys.argv[1]), rank)
control.open_records()
control.claim()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
for step in (1, 2):
    train_step()
    control._beaten = 0
    control.beat(step)
if rank == 1:
    overslept()
train_step()
"""
# a rank without torch: open_records, a heartbeat if argument 3 is "beat", then it sleeps
SLEEPER = """
import sys, time
from pathlib import Path
from megatron_dla.training.control import RunControl

control = RunControl(Path(sys.argv[1]), int(sys.argv[2]))
control.open_records()
if sys.argv[3] == "beat":
    control.beat(7)
time.sleep(300)
"""


class Ended:
    """Ranks of a watchdog; `calls`: what it asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dump(self, _: list) -> None:
        self.calls.append("dump")

    def end(self, _: list) -> None:
        self.calls.append("end")


def line(code: str, text: str) -> int:
    return next(n for n, content in enumerate(code.splitlines(), 1) if f".{text}(" in content)


def start(code: str, *arguments: object, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=os.environ | env)


def watch(run_dir: Path, *arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_dla.launch.watchdog", "--run-dir", str(run_dir), "--attempt", "6.1"]
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=os.environ | (env or {}))


def hang_record(run_dir: Path) -> dict:
    return json.loads((run_dir / "exits" / "6.1" / "hang.json").read_text())


def test_two_ranks_one_of_which_never_joins_the_collective(tmp_path: Path) -> None:
    ranks = [start(TRAINER, tmp_path, RANK=str(rank), DLA_ATTEMPT="6.1") for rank in (0, 1)]
    pids = [rank.pid for rank in ranks]
    done = watch(tmp_path, "--timeout", 4, "--startup-timeout", LIMIT_S, "--grace", 10, "--pids", *pids)
    assert done.returncode == 4, done
    assert [rank.wait(LIMIT_S) for rank in ranks] == [-signal.SIGKILL, -signal.SIGKILL]
    record = hang_record(tmp_path)
    assert record["step"] == 2 and record["silent_s"] >= 4
    waits, sleeps = (rank["at"] for rank in record["ranks"])
    assert "all_reduce" in waits and waits.endswith(f"called from train_step (<string>:{line(TRAINER, 'all_reduce')})")
    assert sleeps == f"overslept (<string>:{line(TRAINER, 'sleep')})"
    assert [rank["pid"] for rank in record["ranks"]] == pids
    for place, rank in ((waits, 0), (sleeps, 1)):
        assert f"rank {rank} on {record['ranks'][rank]['host']}: {place}" in done.stdout


SRUN = """#!/bin/sh
echo "srun $*" >> "$LOG"
while [ "${1#-}" != "$1" ]; do case $1 in --nodelist=*) host=${1#*=} ;; esac; shift; done
[ "$host" = n2 ] && sleep 300
exec "$@"
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >> "$LOG"
"""


@pytest.mark.parametrize("beat", ["beat", "none"])
def test_a_slurm_step_is_dumped_node_by_node_and_cancelled(tmp_path: Path, beat: str) -> None:
    """srun and scancel are scripts that record their arguments; n2 does not respond. The real ones: tests/slurm."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if beat == "none":
        (run_dir / "heartbeat.json").write_text(json.dumps({"step": 99, "attempt": "6.0"}))  # of an earlier attempt
    nodes = ("n1", "n1", "n2")
    ranks = [
        start(SLEEPER, run_dir, rank, beat, DLA_ATTEMPT="6.1", SLURMD_NODENAME=node) for rank, node in enumerate(nodes)
    ]
    code = (
        f"from megatron_dla.launch import watchdog as w; w.GRACE_S = 1; raise SystemExit(w.main({arguments(run_dir)}))"
    )
    while len(list(run_dir.glob("stacks/6.1/*"))) < 3 or (beat == "beat" and "6.1" not in heartbeat(run_dir)):
        assert [rank.poll() for rank in ranks] == [None, None, None]
        time.sleep(0.02)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, env=env)
    assert done.returncode == 4, done
    assert [rank.poll() for rank in ranks] == [None, None, None]  # only Slurm ends them: scancel above does nothing
    for rank in ranks:
        rank.kill()
        rank.wait()
    first, second, last = sorted(
        (tmp_path / "log").read_text().splitlines(), key=lambda line: ("scancel" in line, line)
    )
    assert last == "scancel 55.2"
    assert "--jobid=55 --overlap" in first
    assert first.endswith(f"--nodelist=n1 kill -USR2 {ranks[0].pid} {ranks[1].pid}")
    assert second.endswith(f"--nodelist=n2 kill -USR2 {ranks[2].pid}")
    record = hang_record(run_dir)
    assert record["step"] == (7 if beat == "beat" else None)
    place = f"<module> (<string>:{line(SLEEPER, 'sleep')})"
    assert [rank["at"] for rank in record["ranks"]] == [place, place, NO_STACKS]
    lines = done.stdout.splitlines()
    assert lines[1:3] == [f"rank 2 on n2: {NO_STACKS}", f"rank 0 on n1, 1 on n1: {place}"]


def arguments(run_dir: Path) -> list[str]:
    limits = ["--timeout", "0.5", "--startup-timeout", "1", "--grace", "1"]
    return ["--run-dir", str(run_dir), "--attempt", "6.1", "--job", "55", "--step", "2", *limits]


def heartbeat(run_dir: Path) -> str:
    path = run_dir / "heartbeat.json"
    return path.read_text() if path.exists() else ""


def test_processes_that_end_by_themselves_are_no_hang(tmp_path: Path) -> None:
    process = start("import time; time.sleep(0.5)")
    done = watch(tmp_path, "--timeout", 2, "--pids", process.pid)
    assert (done.returncode, done.stdout) == (0, "")
    assert not list(tmp_path.iterdir())
    process.wait()


def test_a_slow_run_that_makes_steps_is_no_hang(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DLA_ATTEMPT", "6.1")
    times = iter(range(8))

    def ended() -> bool:
        time.sleep(0.1)
        (tmp_path / "heartbeat.json").write_text(json.dumps({"step": (step := next(times)), "attempt": "6.1"}))
        return step == 7

    dog = watchdog.Watchdog(tmp_path, "6.1", 0.5, 0.5, 1, watchdog.Processes())
    assert dog.watch(ended) == 0 and not dog.hung


@pytest.mark.parametrize("kind", ["step", "save"])
def test_without_a_timeout_it_is_ten_times_the_longest_of_a_kind(tmp_path: Path, monkeypatch, kind: str) -> None:
    """Steps take no time and one save 0.3 s: a hang in a step ends after the least time, in a save after 3 s."""
    monkeypatch.setattr(watchdog, "FLOOR_S", 0.5)
    dog = watchdog.Watchdog(tmp_path, "6.1", None, 60, 0, watchdog.Processes())
    beats = [("step", 0.1), ("step", 0.1), ("save", 0.3), ("step", 0.1), (kind, 0)]
    until, started = 0.0, time.monotonic()

    def ended() -> bool:
        nonlocal until
        if beats and time.monotonic() >= until:
            doing, pause = beats.pop(0)
            until = time.monotonic() + pause
            write_json(tmp_path / "heartbeat.json", {"step": 9 - len(beats), "doing": doing, "attempt": "6.1"})
        return time.monotonic() - started > 40

    assert dog.watch(ended) == 4
    silent = json.loads((tmp_path / "exits" / "6.1" / "hang.json").read_text())["silent_s"]
    assert silent >= (0.5 if kind == "step" else 3) and (dog.step, dog.doing) == (9, kind)


@pytest.mark.parametrize(
    "beats, least, most",
    [
        ([("step", 1, 0)], 0.3, 5),  # a resumed run after its first step
        ([("validate", 0, 0.1), ("step", 0, 0.1), ("step", 1, 0)], 0.3, 5),
        ([("validate", 0, 0.1), ("step", 0, 0)], 6, 20),  # the first step compiles
    ],
    ids=["resumed", "validated", "first"],
)
def test_a_hang_in_the_second_step_does_not_wait_for_the_limit_of_the_first(
    tmp_path: Path, monkeypatch, beats, least, most
) -> None:
    monkeypatch.setattr(watchdog, "FLOOR_S", 0.3)
    dog = watchdog.Watchdog(tmp_path, "6.1", None, 6, 0, watchdog.Processes())
    beats, until, started = list(beats), 0.0, time.monotonic()

    def ended() -> bool:
        nonlocal until
        if beats and time.monotonic() >= until:
            doing, step, pause = beats.pop(0)
            until = time.monotonic() + pause
            write_json(tmp_path / "heartbeat.json", {"step": step, "doing": doing, "attempt": "6.1"})
        return time.monotonic() - started > 40

    assert dog.watch(ended) == 4
    assert least <= json.loads((tmp_path / "exits" / "6.1" / "hang.json").read_text())["silent_s"] < most


def test_a_save_that_waits_for_its_files_has_the_time_of_a_start(tmp_path: Path, monkeypatch) -> None:
    """However short the saves before it were; and the time of a file that a full disk holds back is a beat, too."""
    monkeypatch.setattr(watchdog, "FLOOR_S", 0.3)
    dog = watchdog.Watchdog(tmp_path, "6.1", None, 4, 0, watchdog.Processes())
    beats = [("step", 0.1), ("waiting_save", 0.1), ("step", 0.1), ("waiting_save", 0)]
    until, started, path = 0.0, time.monotonic(), tmp_path / "heartbeat.json"

    def ended() -> bool:
        nonlocal until
        if beats and time.monotonic() >= until:
            doing, pause = beats.pop(0)
            until = time.monotonic() + pause
            write_json(path, {"step": 9, "doing": doing, "attempt": "6.1"})
        elif not beats and time.monotonic() - started < 2:
            os.utime(path)
        return time.monotonic() - started > 40

    assert dog.watch(ended) == 4 and time.monotonic() - started >= 6


PAUSED = """
import sys, threading, time
from pathlib import Path
from megatron_dla.launch.watchdog import Processes, Watchdog
from megatron_dla.files import write_json
def beat(step):
    write_json(Path(sys.argv[1]) / "heartbeat.json", {"step": step, "attempt": "6.1"})
beat(1)
ended = threading.Event()
dog = Watchdog(Path(sys.argv[1]), "6.1", 2, 2, 0, Processes())
thread = threading.Thread(target=dog.watch, args=(ended.is_set,))
thread.start()
while dog.step is None:
    time.sleep(0.01)
print("ready", flush=True)
sys.stdin.readline()
beat(2)
ended.set()
thread.join()
print(dog.hung, flush=True)
"""


def test_a_pause_of_the_whole_run_is_no_hang(tmp_path: Path) -> None:
    """Launcher and ranks stopped and continued together: a suspended container, another user of the machine."""
    command, pipe = [sys.executable, "-c", PAUSED, str(tmp_path)], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert process.communicate("\n", timeout=LIMIT_S)[0] == "False\n"


def test_bad_usage(tmp_path: Path) -> None:
    for wrong in (["--timeout", 1], ["--timeout", 1, "--job", 5], ["--timeout", 0, "--pids", 1]):
        assert watch(tmp_path, *wrong).returncode == 2


def test_a_dump_without_frames_has_no_place() -> None:
    assert place_of("") == NO_STACKS
    assert place_of("Thread 0x1 (most recent call first):\n  <no Python frame>\n") == NO_STACKS


def dla_run(folder: Path, **env: str) -> subprocess.Popen:
    """`dla run` of a tiny run in folder/tiny on two ranks, with a floor of 8 s and its output in a pipe."""
    config = folder / "tiny.yaml"
    data = tiny.build_data(folder / "corpus")
    config.write_text(yaml.safe_dump(tiny.config_dict(data, folder, training={"steps": 100000})))
    code = "import sys; from megatron_dla import cli; from megatron_dla.launch import watchdog; watchdog.FLOOR_S = 8; "
    command = [sys.executable, "-c", code + "sys.exit(cli.main())", "run", str(config), "--nproc", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_dla_run_ends_a_run_with_a_frozen_rank(tmp_path: Path) -> None:
    run_dir = tmp_path / "tiny"
    (tmp_path / "tmp").mkdir()
    cache = str(tmp_path / "cache")  # of all runs of a user, in TMPDIR by default
    process = dla_run(tmp_path, TMPDIR=str(tmp_path / "tmp"), TORCHINDUCTOR_CACHE_DIR=cache)
    seen = set()
    while len(seen) < 4:  # the time that a step takes is known
        seen.add(heartbeat(run_dir))
        assert process.poll() is None
        time.sleep(0.05)
    (path,) = run_dir.glob("ranks/*/rank1.json")
    frozen = json.loads(path.read_text())
    os.kill(frozen["pid"], signal.SIGSTOP)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 4, output
    assert f"rank 1 on {frozen['host']}: {NO_STACKS}" in output
    (record,) = run_dir.glob("exits/*/hang.json")
    assert not list((tmp_path / "tmp").iterdir()) and not (run_dir / ".launch").exists()
    waits, stopped = json.loads(record.read_text())["ranks"]
    assert stopped["at"] == NO_STACKS and "megatron_dla/" in waits["at"]


@pytest.mark.long
def test_dla_run_ends_a_run_whose_output_nobody_reads(tmp_path: Path) -> None:
    """Rank 0 waits in a print; the watchdog prints to the same pipe."""
    process, run_dir = dla_run(tmp_path), tmp_path / "tiny"
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
    assert process.wait(LIMIT_S) == 4
    (record,) = run_dir.glob("exits/*/hang.json")
    assert json.loads(record.read_text())["ranks"][0]["at"].startswith("print")


def test_it_tells_without_waiting_for_a_reader() -> None:
    source, sink = os.pipe()
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
    with open(source, "rb") as reading, open(sink, "w", encoding="ascii") as stream:
        watchdog.tell("a \u03b4\x1b line", stream, patience=30)
        assert os.read(source, 100) == b"a \\u03b4\\x1b line\n"
        begun = time.monotonic()
        watchdog.tell("x" * 10_000, stream, patience=0.2)
        assert time.monotonic() - begun < 20
        assert reading.read(10_001) == b"x" * 10_000 + b"\n"  # a reader who comes back gets all of it
    watchdog.tell("to nobody", None)


@pytest.mark.parametrize("stdout", ["closed", "no reader", "in memory", "none"])
def test_a_hang_ends_the_ranks_whatever_stdout_is(tmp_path: Path, monkeypatch, stdout: str) -> None:
    source, sink = os.pipe()
    os.close(source)
    stream = io.StringIO() if stdout == "in memory" else open(sink, "w")  # noqa: SIM115
    if stdout == "closed":
        stream.close()
    monkeypatch.setattr(sys, "stdout", None if stdout == "none" else stream)
    target = Ended()
    assert watchdog.Watchdog(tmp_path, "6.1", 0.1, 0.1, 0, target).watch(lambda: False) == 4
    monkeypatch.undo()
    assert target.calls == ["dump", "end"] and hang_record(tmp_path)["ranks"] == []
    if stdout == "in memory":
        assert stream.getvalue().startswith("hang: no step for") and "no rank has started" in stream.getvalue()


def test_a_full_disk_does_not_keep_the_ranks_of_a_hang_alive(tmp_path: Path, monkeypatch, capfd) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = Ended()
    monkeypatch.setattr(watchdog, "write_json", full)
    assert watchdog.Watchdog(tmp_path, "6.1", 0.1, 0.1, 0, target).watch(lambda: False) == 4
    assert target.calls == ["dump", "end"] and "hang.json" in capfd.readouterr().out


def test_a_directory_that_does_not_respond_does_not_keep_the_ranks_alive(tmp_path: Path, monkeypatch, capfd) -> None:
    """A file system that hangs: ranks are dumped, and hang.json is never written."""
    responds = threading.Event()
    monkeypatch.setattr(watchdog, "write_json", lambda *_, **__: responds.wait(LIMIT_S))
    monkeypatch.setattr(watchdog, "GRACE_S", 0.1)
    monkeypatch.setattr(watchdog, "RECORD_S", 0.1)
    target = Ended()
    assert watchdog.Watchdog(tmp_path, "6.1", 0.1, 0.1, 0, target).watch(lambda: False) == 4
    responds.set()
    assert target.calls == ["dump", "end"] and f"{tmp_path} does not respond" in capfd.readouterr().out


def test_what_runs_on_the_host_needs_the_standard_library_only() -> None:
    """On the host, outside the container, there may be no torch."""
    code = (
        "import sys, megatron_dla.launch.watchdog, megatron_dla.launch.preflight, megatron_dla.training.control\n"
        "print(sorted({'torch', 'numpy', 'psutil', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
