"""Ends an attempt whose heartbeat has stopped, after reporting where each of its ranks hangs.

    python -m megatron_dla.launch.watchdog --run-dir DIR --timeout S --job JOB --step STEP      (beside a Slurm step)
    python -m megatron_dla.launch.watchdog --run-dir DIR --timeout S --pids PID ...             (on this machine)

On a hang every rank dumps the stacks of its threads (SIGUSR2, see training/control.py), the location of each rank is
printed and written to exits/ATTEMPT/hang.json, and the step is cancelled or the processes are killed. Standard library
only. Exit codes: 0 the watched processes have ended, 4 they hung and were ended, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_dla.console import escaped
from megatron_dla.errors import BAD_INPUT
from megatron_dla.files import parse_json, write_json
from megatron_dla.training.control import DOING, EXITS, HEARTBEAT, RANKS, STACKS
from megatron_dla.training.fence import attempt_id, node_name, process_start

HUNG = 4  # exit code
GRACE_S = 20.0
PATIENCE_S = 2.0  # with whoever reads what is printed
RECORD_S = 10.0  # for files of the run directory
FLOOR_S = 120.0  # of timeouts that come from measured times: pauses of a file system are shorter
NO_STACKS = "no stacks: stopped, ended or not reachable"
LIBRARIES = ("site-packages", "/lib/python", "<frozen")  # in the file names of frames outside this project


@dataclass
class RankPlace:
    """A rank and the location of its main thread."""

    rank: int
    host: str
    pid: int
    at: str = NO_STACKS


def startup_timeout(timeout: float) -> float:
    """Default timeout of the first step, s: loading, compiling and tuning take longer than a step."""
    return max(1800.0, 2 * timeout)


def place_of(dump: str) -> str:
    """The main thread's location in a faulthandler dump: the innermost frame, and the innermost outside libraries."""
    threads = re.split(r"^(?:Current thread|Thread) 0x.*$", dump, flags=re.MULTILINE)
    frames = re.findall(
        r'^  File "(.*)", line (\d+) in (.*)$', threads[-1], flags=re.MULTILINE
    )  # the main thread is last
    if not frames:
        return NO_STACKS
    ours = next((frame for frame in frames if not any(part in frame[0] for part in LIBRARIES)), frames[0])
    inner, outer = ("{2} ({0}:{1})".format("/".join(f[0].split("/")[-3:]), *f[1:]) for f in (frames[0], ours))
    return inner if inner == outer else f"{inner}, called from {outer}"


def tell(text: str, stream: TextIO | None, patience: float = PATIENCE_S) -> None:
    """Print lines, but wait at most `patience` s for a reader: ranks may hang because nobody reads their pipe."""
    writer = threading.Thread(target=_write, args=(escaped(f"{text}\n"), stream), daemon=True)
    writer.start()
    writer.join(patience)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
        try:
            out = stream.fileno()
        except OSError:  # a stream in memory
            stream.write(text)
            return
        data = text.encode(stream.encoding, "backslashreplace")
        while data:  # not by stream.write, whose lock the interpreter's shutdown would wait for
            data = data[os.write(out, data) :]


class Processes:
    """Ranks on this machine. `pids`: processes to end in addition to the ranks."""

    def __init__(self, pids: list[int] | None = None) -> None:
        self.pids = pids or []

    def ended(self) -> bool:
        return bool(self.pids) and all(process_start(pid) is None for pid in self.pids)

    def dump(self, ranks: list[RankPlace]) -> None:
        for rank in ranks:
            if rank.host == node_name():
                self._signal(rank.pid, signal.SIGUSR2)

    def end(self, ranks: list[RankPlace]) -> None:
        """SIGKILL: the ranks would handle a SIGTERM only after the step that hangs."""
        for pid in [*(rank.pid for rank in ranks if rank.host == node_name()), *self.pids]:
            self._signal(pid, signal.SIGKILL)

    @staticmethod
    def _signal(pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


class SlurmStep:
    """Ranks of a step of a Slurm job, on any nodes.

    SIGUSR2 for the whole step would end torchrun, which does not handle it: `kill` on each node signals the ranks only.
    """

    def __init__(self, job: str, step: str) -> None:
        self.job, self.step = job, step

    def ended(self) -> bool:
        return False  # the batch script ends the watchdog

    def dump(self, ranks: list[RankPlace]) -> None:
        by_host = defaultdict(list)
        for rank in ranks:
            by_host[rank.host].append(str(rank.pid))
        options = [f"--jobid={self.job}", "--overlap", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=0"]
        running = [
            subprocess.Popen(
                ["srun", *options, "--gres=none", f"--nodelist={host}", "kill", "-USR2", *pids],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for host, pids in by_host.items()
        ]  # fmt: skip
        deadline = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()  # its node does not respond

    def end(self, ranks: list[RankPlace]) -> None:
        """Slurm sends SIGTERM, then after its KillWait SIGKILL."""
        subprocess.run(["scancel", f"{self.job}.{self.step}"], check=False)


class Watchdog:
    """Watches the heartbeat of one attempt.

    What counts is that the file changes, in this process's own time: no clock of any machine matters.

    Args:
        run_dir: runs/NAME. attempt: as from `attempt_id`. timeout: s between two heartbeats; None: ten times the
            longest of the last 20, at least `FLOOR_S`, for steps, saves and validations each. Before one has ended:
            `startup`, but for the second step the time of the first one with the start, at least `FLOOR_S`.
        startup: s to the first step. grace: s for the ranks to write their stacks. target: the ranks.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: str,
        timeout: float | None,
        startup: float,
        grace: float,
        target: Processes | SlurmStep,
    ) -> None:
        self.run_dir, self.attempt, self.timeout, self.startup = run_dir, attempt, timeout, startup
        self.grace, self.target = grace, target
        self.times: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self.step: int | None = None
        self.doing = "step"
        self.first_s = 0.0  # of the first step, with the start
        self.hung = False

    def watch(self, ended: Callable[[], bool]) -> int:
        """Returns 0 once `ended()` is true; on a hang, reports it, ends the ranks and returns 4."""
        pause = min(1.0, (self.timeout or FLOOR_S) / 10)
        seen, silent, last = None, 0.0, time.monotonic()
        first: int | None = None  # step that was seen first
        while True:
            now = time.monotonic()
            # where this process was stopped for a while, the ranks may have been as well
            silent, last = silent + min(now - last, 3 * pause), now
            if (beat := self._beat()) != seen:
                if seen is None or (self.doing, self.step) == ("step", first):  # the first step compiles
                    self.first_s = max(self.first_s, silent)
                else:
                    self.times[self.doing].append(silent)
                seen, silent = beat, 0.0
                self.step, self.doing = (None, "step") if seen is None else (int(seen["step"]), str(seen.get("doing")))
                first = self.step if first is None else first
            if ended():
                return 0
            if silent > (self.startup if seen is None else self._limit()):
                break
            time.sleep(pause)
        self.hung = True
        self._report(silent)
        return HUNG

    def _limit(self) -> float:
        if self.timeout is not None:
            return self.timeout
        times = self.times[self.doing]
        if self.doing == "waiting_save":  # for as long as the files take, of which the times of other saves say nothing
            return max(self.startup, *(10 * x for x in times), 0.0)
        if not times:
            return max(FLOOR_S, self.first_s) if self.doing == "step" and self.step else self.startup
        return max(FLOOR_S, 10 * max(times))

    def _beat(self) -> dict | None:
        path = self.run_dir / HEARTBEAT
        try:
            beat = parse_json(path.read_bytes())
            beat |= {"changed": path.stat().st_mtime_ns}  # on a full disk only that moves
        except (OSError, ValueError):
            return None
        return beat if beat.get("attempt") == self.attempt else None

    def _ranks(self) -> list[RankPlace]:
        found = []
        for path in (self.run_dir / RANKS / self.attempt).glob("rank*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                record = parse_json(path.read_bytes())
                found.append(RankPlace(record["rank"], record["host"], record["pid"]))
        return sorted(found, key=lambda rank: rank.rank)

    def _stacks(self, rank: RankPlace) -> str:
        try:
            return (self.run_dir / STACKS / self.attempt / f"rank{rank.rank}.txt").read_text(errors="replace")
        except OSError:
            return ""

    def _dump(self, ranks: list[RankPlace]) -> None:
        """Have the ranks write their stacks, and set where each of them is."""
        before = {rank.rank: len(self._stacks(rank)) for rank in ranks}
        self.target.dump(ranks)
        deadline, sizes = time.monotonic() + self.grace, before
        while time.monotonic() < deadline:  # until all have written and no file grows
            time.sleep(min(0.5, self.grace / 4))
            now = {rank.rank: len(self._stacks(rank)) for rank in ranks}
            if now == sizes and all(now[n] > before[n] for n in now):
                break
            sizes = now
        for rank in ranks:
            rank.at = place_of(self._stacks(rank)[before[rank.rank] :])

    def _report(self, silent: float) -> None:
        """Print and record the locations of the ranks, the rarest first; end the attempt.

        A directory or a reader that does not respond delays the end, but does not prevent it.
        """
        where = DOING.get(self.doing, DOING["step"])
        after = "before the first step" if self.step is None else f"{where} {self.step}"
        lines = [f"hang: no step for {silent:.0f} s {after} of attempt {self.attempt}"]
        ranks: list[RankPlace] = []
        record = threading.Thread(target=self._record, args=(silent, ranks, lines), daemon=True)
        record.start()
        record.join(GRACE_S + self.grace + RECORD_S)
        if record.is_alive():
            lines.append(f"{self.run_dir} does not respond: where the ranks are was not recorded")
        tell("\n".join([*lines, "ending the attempt"]), sys.stdout)
        self.target.end(ranks)

    def _record(self, silent: float, ranks: list[RankPlace], lines: list[str]) -> None:
        """Fills `ranks` and `lines`, and writes hang.json."""
        ranks += self._ranks()
        self._dump(ranks)
        places = defaultdict(list)
        for rank in ranks:
            places[rank.at].append(f"{rank.rank} on {rank.host}")
        lines += [f"rank {', '.join(who)}: {place}" for place, who in sorted(places.items(), key=lambda x: len(x[1]))]
        if not ranks:
            lines.append("no rank has started far enough to record its process")
        lines.append(f"stacks of all threads: {self.run_dir / STACKS / self.attempt}")
        folder = self.run_dir / EXITS / self.attempt
        values = {"step": self.step, "time": time.time(), "silent_s": round(silent, 1)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "hang.json", values | {"ranks": [asdict(rank) for rank in ranks]}, fsync=False)
        except OSError as error:  # a full disk
            lines.append(f"{folder / 'hang.json'} could not be written: {error.strerror}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dla.launch.watchdog", description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--timeout", type=float, required=True, help="s between two steps")
    parser.add_argument("--startup-timeout", type=float, help="s to the first step (default: 1800 or twice --timeout)")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="s for the ranks to write their stacks")
    parser.add_argument("--attempt", help="default: DLA_ATTEMPT")
    parser.add_argument("--job", help="Slurm job, with --step")
    parser.add_argument("--step", help="number of the step in the job")
    parser.add_argument("--pids", type=int, nargs="+", help="processes on this machine to watch and end")
    args = parser.parse_args(argv)
    if bool(args.job) != bool(args.step) or bool(args.job) == bool(args.pids):
        parser.error("give either --job and --step, or --pids")
    if args.timeout <= 0 or not (args.attempt or os.environ.get("DLA_ATTEMPT")):
        print(
            f"watchdog: --timeout {args.timeout:g} must be more than 0, and --attempt or DLA_ATTEMPT must be set",
            file=sys.stderr,
        )
        return BAD_INPUT
    target = SlurmStep(args.job, args.step) if args.job else Processes(args.pids)
    startup = args.startup_timeout or startup_timeout(args.timeout)
    watchdog = Watchdog(args.run_dir, args.attempt or attempt_id(), args.timeout, startup, args.grace, target)
    return watchdog.watch(target.ended)


if __name__ == "__main__":
    sys.exit(main())
