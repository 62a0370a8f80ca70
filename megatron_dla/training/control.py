"""The files in runs/NAME that control and report a run.

stop, halt       made by a user or launcher: save after the current step and exit with 75; `halt` also prevents restarts
done             the last step is saved: {step, time, attempt}; a later start exits with 0
attempt          the run that may write here (see `fence`)
events.jsonl     what happened to the run, a line an event: {event, step, attempt, time, ...}, see `RunControl.event`
heartbeat.json   rank 0's last step, and what it does since (a key of `DOING`): {step, doing, time, attempt, host, pid}
ranks/ATTEMPT/rankR.json   where each rank runs: {rank, host, pid, time}
exits/ATTEMPT/rankR.json   why a rank exited with an error: {rank, host, exitcode, message, time}
stacks/ATTEMPT/rankR.txt   all threads of a rank, appended each time it gets SIGUSR2
.launch/ATTEMPT  errors that ranks pass to their launcher, which removes it

Times are Unix seconds. Standard library only: launchers import this too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from traceback import format_exception_only

from megatron_dla.checkpoint.find import remove_leftovers
from megatron_dla.errors import BAD_INPUT, FenceError, UserError, is_wrong_path
from megatron_dla.files import FULL, parse_json, write_json
from megatron_dla.training.fence import Fence, attempt_id, node_name

STOP, HALT, DONE, HEARTBEAT, EVENTS = "stop", "halt", "done", "heartbeat.json", "events.jsonl"
RANKS, EXITS, STACKS, LAUNCH = "ranks", "exits", "stacks", ".launch"
DOING = {"step": "after step", "save": "in the save of step", "validate": "in the validation of step",
         "rewind": "in the rewind after step", "waiting_save": "in the save of step"}  # fmt: skip
REASONS = {1: "the file `stop`", 2: "the file `halt`", 3: "a newer attempt"}  # larger: the number of a signal


def stop_mark(run_dir: Path) -> str:
    """Identity of the file `stop`, which changes when it is made again or touched; "" without one."""
    try:
        found = (run_dir / STOP).stat()
    except OSError:
        return ""
    return f"{found.st_ino}.{found.st_mtime_ns // 10**9}.{found.st_mtime_ns % 10**9:09d}"


def exit_code(error: BaseException) -> int:
    """Exit code of `dla` for an exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return BAD_INPUT if isinstance(error, UserError) or is_wrong_path(error) else 1


class RunControl:
    """The control files as one rank uses them. Only the records are written by every rank; the other methods do nothing
    on ranks other than 0.

    Use it as a context manager after `claim`; leaving it releases the directory.

    Args:
        run_dir: runs/NAME. rank: of the whole run.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.run_dir, self.rank, self.attempt = run_dir, rank, attempt_id()
        self.fence: Fence | None = None
        self._lost, self._beaten, self._doing = False, -1.0, ""

    def already_done(self, steps: int) -> bool:
        """Whether an earlier attempt finished all `steps`.

        Raises:
            UserError: there is a `halt` file.
        """
        try:
            if parse_json((self.run_dir / DONE).read_bytes())["step"] >= steps:
                return True
        except (OSError, ValueError, KeyError, TypeError):
            pass  # missing or damaged: the checkpoints tell the last saved step
        if (self.run_dir / HALT).exists():
            raise UserError(f"{str(self.run_dir / HALT)!r} says that this run must not start: remove it to resume")
        return False

    def claim(self) -> str:
        """Take the run directory and delete unfinished checkpoints of earlier attempts.

        Returns the attempt's name; without a launcher that sets one, all ranks must use rank 0's.

        Raises:
            FenceError: another run writes in the directory.
        """
        if self.rank == 0:
            self.fence = Fence(self.run_dir, self.attempt)
            self.fence.claim()
            (self.run_dir / DONE).unlink(missing_ok=True)
            # a launcher says what it found: a newer file asks this attempt to stop, which was starting then
            if "DLA_ATTEMPT" not in os.environ or os.environ.get("DLA_STALE_STOP") == stop_mark(self.run_dir):
                (self.run_dir / STOP).unlink(missing_ok=True)
            remove_leftovers(self.run_dir)
            self._remove_files_of_the_dead()
        return self.attempt

    def _remove_files_of_the_dead(self) -> None:
        """What attempts that were killed had no time to remove: errors for a launcher, halves of atomic writes."""
        for path in (self.run_dir / LAUNCH).glob("*"):
            if path.name != self.attempt:
                shutil.rmtree(path, ignore_errors=True)
        halves = [path for path in self.run_dir.glob("*/*/.*.part") if path.parent.name != self.attempt]
        for path in (*self.run_dir.glob(".*.part"), *halves):
            path.unlink(missing_ok=True)

    def release(self) -> None:
        if self.fence is not None:
            self.fence.release()

    def __enter__(self) -> RunControl:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def publishing(self) -> contextlib.AbstractContextManager[None]:
        """Context in which rank 0 may change checkpoints. Raises FenceError if the directory was taken over."""
        assert self.fence is not None, "claim the run directory first"
        return self.fence.publishing()

    def check(self) -> None:
        """Raises FenceError on rank 0 if the directory was taken over."""
        if self.fence is not None:
            self.fence.check()

    def event(self, event: str, step: int, **values: str | int | float) -> None:
        """On rank 0: append a line to events.jsonl, where the disk has room.

        Events: start (host, processes, last_logged), fallback (path, reason), save, save_failed (reason), stop
        (reason), done.
        """
        if self.rank == 0:
            line = {"event": event, "step": step, "attempt": self.attempt, "time": time.time()} | values
            with contextlib.suppress(OSError), (self.run_dir / EVENTS).open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def doing(self, what: str, step: int) -> Iterator[None]:
        """Context of what takes longer than a step; `what`: a key of `DOING`."""
        self.beat(step, what)
        yield
        self.beat(step)

    def beat(self, step: int, doing: str = "step") -> None:
        """Write the heartbeat for finished `step`, at most once a second while `doing` stays the same."""
        now = time.monotonic()
        if self.rank or (doing == self._doing and now - self._beaten < 1):
            return
        try:
            self.check()
        except FenceError:  # raised on all ranks by the save that `asked_to_stop` leads to
            self._lost = True
            return
        self._beaten, self._doing = now, doing
        values = {"step": step, "doing": doing, "attempt": self.attempt} | self._here()
        path = self.run_dir / HEARTBEAT
        try:
            write_json(path, values, fsync=False)
        except OSError as error:
            if error.errno not in FULL:
                raise
            with contextlib.suppress(OSError):
                os.utime(path)  # its time is a beat, too

    def asked_to_stop(self) -> int:
        """A key of `REASONS`, or 0."""
        if self.rank:
            return 0
        return 3 if self._lost else 2 if (self.run_dir / HALT).exists() else int((self.run_dir / STOP).exists())

    def finish(self, step: int) -> None:
        """Write `done`: the last step is saved."""
        if self.rank == 0:
            with self.publishing():
                write_json(self.run_dir / DONE, {"step": step, "time": time.time(), "attempt": self.attempt})
            self.event("done", step)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Context of every rank: record an exception in exits/ if the run directory exists; release the directory."""
        try:
            yield
        except BaseException as error:
            user = isinstance(error, UserError)
            self.record_exit(exit_code(error), str(error) if user else "".join(format_exception_only(error)))
            raise
        finally:
            self.release()

    def record_exit(self, code: int, message: str) -> None:
        """Write exits/ATTEMPT/rankR.json: exit codes of Slurm and torchrun do not tell who failed first, or why."""
        if code and self.run_dir.is_dir():
            line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
            self._record(EXITS, {"exitcode": code, "message": line})

    def open_records(self) -> None:
        """On every rank: write where it runs; from now on, SIGUSR2 dumps all stacks."""
        self._record(RANKS, {})
        path = self.run_dir / STACKS / self.attempt / f"rank{self.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = path.open("a")  # open as long as the handler may write
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def _record(self, kind: str, values: dict[str, int | str]) -> None:
        folder = self.run_dir / kind / self.attempt
        folder.mkdir(parents=True, exist_ok=True)
        record = {"rank": self.rank} | values | self._here()
        write_json(folder / f"rank{self.rank}.json", record, fsync=False)

    def _here(self) -> dict[str, int | str | float]:
        return {"host": node_name(), "pid": os.getpid(), "time": time.time()}
