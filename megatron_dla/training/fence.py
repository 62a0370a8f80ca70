"""One writer for each run directory, named in the file `attempt`; no other process may publish checkpoints there.

A job whose node was lost is restarted elsewhere while its old processes may still run. The newer attempt takes over the
directory; the older one checks before it publishes, and exits. Standard library only: launchers import this.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_dla.errors import ConfigError, FenceError
from megatron_dla.files import parse_json, write_json

ATTEMPT = "attempt"
BEAT_S = 5.0  # how often the holder touches its claim
LEASE_S = 30.0  # a claim on another machine that was not touched for this long is dead
ABANDONED_S = 86400.0  # or for this long, by the clock: clocks differ, and are set, by less
LOCK_S = 60.0  # a healthy process holds the lock for less


def node_name() -> str:
    """Name of this machine in the scheduler, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def attempt_id() -> str:
    """`DLA_ATTEMPT` from the launcher ("JOB.RESTART" under Slurm), else an id from this machine and process.

    Raises:
        ConfigError: it is not a file name.
    """
    if given := os.environ.get("DLA_ATTEMPT"):
        if not re.fullmatch(r"[\w-][\w.-]*", given):
            raise ConfigError(f"DLA_ATTEMPT = {given!r} is not a file name: use letters, digits, '.', '-' and '_'")
        return given
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()  # torchrun's ranks have one agent
    return f"{node_name()}.{pid}.{process_start(pid)}"


def process_start(pid: int) -> int | None:
    """Start time of a process on this machine in clock ticks since boot; None if it has ended (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # after the name, which may hold ")"
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True)
class Claim:
    """The writer of a run directory: the attempt and its rank 0 (`started`: of `process_start`)."""

    attempt: str
    host: str = ""
    pid: int = 0
    started: int | None = 0
    released: bool = False

    def supersedes(self, other: Claim) -> bool | None:
        """Whether this is a later attempt of the other's job (False: an earlier one); None for unrelated runs."""
        mine, theirs = (re.fullmatch(r"(\d+)\.(\d+)", claim.attempt) for claim in (self, other))
        if self.attempt == other.attempt:
            return True
        if mine is None or theirs is None or mine[1] != theirs[1]:
            return None
        return int(mine[2]) > int(theirs[2])

    def __str__(self) -> str:
        return f"attempt {self.attempt}" + (f" (process {self.pid} on {self.host})" if self.host else "")


def read_claim(run_dir: Path) -> Claim | None:
    """The claim in a run directory, if any."""
    try:
        text = (run_dir / ATTEMPT).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    try:
        claim = Claim(**parse_json(text))
        types = {"attempt": str, "host": str, "pid": int, "started": int | None, "released": bool}
        if wrong := [name for name, kind in types.items() if not isinstance(getattr(claim, name), kind)]:
            raise TypeError(wrong)
        return claim
    except (ValueError, TypeError):
        return Claim(text[:100]) if text else None  # written by hand or by a script: the id alone; or damaged


class Fence:
    """This process's claim on a run directory; rank 0 only.

    Args:
        run_dir: exists. attempt: of `attempt_id`.
    """

    def __init__(self, run_dir: Path, attempt: str) -> None:
        self.run_dir = run_dir
        self.mine = Claim(attempt, node_name(), os.getpid(), process_start(os.getpid()))
        self._ended = threading.Event()

    def claim(self) -> None:
        """Become the directory's writer, replacing an earlier attempt of the same job or a dead run.

        Raises:
            FenceError: a later attempt of the same job has claimed it, or another run is alive.
        """
        holder = read_claim(self.run_dir)
        if holder is not None:
            later = self.mine.supersedes(holder)
            if later is False:
                raise FenceError(f"{str(self.run_dir)!r} belongs to {holder}: this one, {self.mine.attempt}, is older")
            if later is None and self._alive(holder):
                raise FenceError(
                    f"{str(self.run_dir)!r} is in use by {holder}: wait for it, stop it, or choose another run.name"
                )
        with self._locked():
            if (now := read_claim(self.run_dir)) != holder:
                raise FenceError(f"{str(self.run_dir)!r} was taken by {now} just now: this run may not write there")
            write_json(self.run_dir / ATTEMPT, asdict(self.mine))
        self._ended.clear()
        threading.Thread(target=self._keep_touching, daemon=True, name="fence").start()

    def check(self) -> None:
        """Raises FenceError unless this process is still the directory's writer."""
        if (holder := read_claim(self.run_dir)) != self.mine:
            raise FenceError(
                f"{str(self.run_dir)!r} was taken over by {holder or 'a process that removed the claim'}: attempt "
                f"{self.mine.attempt} ends here and publishes nothing"
            )

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Check, and block a newer attempt's claim until the body has published."""
        with self._locked():
            self.check()
            yield

    def release(self) -> None:
        """Mark the claim as released, if it is still this process's."""
        self._ended.set()
        with self._locked():
            if read_claim(self.run_dir) == self.mine:
                write_json(self.run_dir / ATTEMPT, asdict(replace(self.mine, released=True)))

    def _keep_touching(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a shared file system may be away for a while
                if read_claim(self.run_dir) != self.mine:
                    return
                os.utime(self.run_dir / ATTEMPT)

    def _alive(self, holder: Claim) -> bool:
        """By the process table on this machine; for another machine, wait for a touch: clocks may differ."""
        if holder.released:
            return False
        if holder.host == self.mine.host:
            return process_start(holder.pid) == holder.started
        path = self.run_dir / ATTEMPT
        first, waited_from = path.stat().st_mtime, time.monotonic()
        if time.time() - first > ABANDONED_S:
            return False
        print(f"waiting up to {LEASE_S:.0f} s to see whether {holder} is alive", flush=True)
        while time.monotonic() - waited_from < LEASE_S:
            time.sleep(0.5)
            if path.stat().st_mtime != first:
                return True
        return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.run_dir / ".lock").open("w") as file:
            deadline = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:  # its holder hangs, perhaps on a lost node
                        break
                    time.sleep(0.05)
                except OSError:  # a file system without locks: only the checks protect
                    break
            yield
