"""Reports which rank of an attempt failed first, on which node and why; the batch script prints it after each attempt.

Ranks write exits/ATTEMPT/rankR.json when they fail. A rank that was killed cannot, but torchrun's summary in the log of
its node names it. Standard library only: this runs on the host, beside the batch script, outside any container.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_dla.errors import BAD_INPUT, STOPPED
from megatron_dla.files import parse_json

LAST_LINES = 15  # of the log, printed below the failure
SUMMARY = re.compile(
    r"time +: (?P<time>\S+)\s+host +: \S+\s+rank +: (?P<rank>\d+).*?\s+exitcode +: (?P<code>-?\d+)", re.MULTILINE
)
# how `dla` prints bad input; a rank that fails before it knows its run directory writes no record
REFUSAL = re.compile(r"^dla(?: train)?: (?P<message>.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Exit:
    """How a rank ended. `code`: negative for the signal that killed it. `order`: sorts by time within one source."""

    rank: int
    node: str
    code: int
    message: str
    order: str

    @property
    def _blame(self) -> int:
        """Smaller is more likely to be the cause: after one rank fails, the others fail too or are terminated."""
        if self.code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return 4
        if self.code == STOPPED:
            return 3
        return 0 if self.code < 0 else 1 if self.code == BAD_INPUT else 2

    def __str__(self) -> str:
        text = f"rank {self.rank} on node {self.node} ended with exit code {self.code}"
        if self.code < 0:
            hint = "; out of memory?" if self.code == -signal.SIGKILL else ""
            return f"{text} ({signal.Signals(-self.code).name}{hint})"
        return f"{text}: {self.message}" if self.message else text


def log_dir(run_dir: Path, attempt: str) -> Path:
    return run_dir / "logs" / attempt


def find_exits(run_dir: Path, attempt: str) -> list[Exit]:
    """The known exits of an attempt's ranks, the most likely cause first."""
    found = []
    for path in (run_dir / "exits" / attempt).glob("rank*.json"):
        try:
            record = parse_json(path.read_bytes())
            found.append(
                Exit(
                    int(record["rank"]), str(record["host"]), int(record["exitcode"]), str(record.get("message", "")),
                    f"{float(record.get('time', 0)):018.6f}",
                )
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue  # incomplete: its node died while writing
    known = {exit.rank for exit in found}
    for path in log_dir(run_dir, attempt).glob("*.log"):
        text = re.sub(r"^ *\d+: ?", "", path.read_text(errors="replace"), flags=re.MULTILINE)  # srun --label
        for match in SUMMARY.finditer(text):
            if (rank := int(match["rank"])) not in known:
                known.add(rank)
                code = int(match["code"])
                messages = REFUSAL.findall(text) if code == BAD_INPUT else []
                found.append(Exit(rank, path.stem, code, messages[-1] if messages else "", match["time"]))
    return sorted(found, key=lambda exit: (exit._blame, exit.order, exit.rank))


def report(run_dir: Path, attempt: str) -> int:
    """Print the cause; returns 2 (bad input), 75 (stopped after a checkpoint) or 1 (anything else)."""
    logs = log_dir(run_dir, attempt)
    watchdog = logs / "watchdog.log"
    if watchdog.is_file() and (text := watchdog.read_text(errors="replace").strip()):
        print(f"watchdog: {text}")
    exits = find_exits(run_dir, attempt)
    if not exits:
        print(f"FAILED: no rank recorded why it ended; the logs of the nodes are in {logs}")
        return 1
    cause = exits[0]
    if cause.code == STOPPED:
        print("stopped after a checkpoint")
        return STOPPED
    log = logs / f"{cause.node}.log"
    print(f"FAILED: {cause}\nlog of the node: {log}")
    if log.is_file():
        for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]:
            print(f"  | {line}")
    return BAD_INPUT if cause.code == BAD_INPUT else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_dla.launch.failure", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", required=True, help="JOB.RESTART")
    args = parser.parse_args(argv)
    code = report(args.run_dir, args.attempt)
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
