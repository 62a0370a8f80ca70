"""Every file that the project reads, damaged and mistyped: a command works, or prints one line and exits with 2.

A cut of it runs in `make test`, all of it by `make fuzz SEED=n`. A case is made from the seed, its format and its
number alone, so the name of a failure repeats it: FUZZ_SEED=n FUZZ_CASE=format/number pytest tests/fuzz.
"""

import contextlib
import io
import os
import random
import signal
import time
import traceback
from pathlib import Path
from types import FrameType

import pytest

from megatron_dla import compat
from megatron_dla.cli import main
from megatron_dla.training import fence
from tests.fuzz.formats import FORMATS, TRAINING, Case

SEED = int(os.environ.get("FUZZ_SEED", "0"))
CASES = int(os.environ.get("FUZZ_CASES", "12"))  # of each format
ONE = os.environ.get("FUZZ_CASE", "")
LIMIT_S = 20  # of CPU time: other processes may share the machine
pytestmark = pytest.mark.usefixtures("modules_cache")
compat.install()


class Hang(BaseException):
    """A case took longer than LIMIT_S."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang("".join(traceback.format_stack(frame)[-3:]))


def outcome(case: Case) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    errors_to = io.StringIO()
    before = [signal.signal(number, _hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(10 * LIMIT_S)  # for one that waits
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors_to):
            code = main(case.argv)
    except SystemExit as error:  # argparse
        code = 2 if error.code == 2 else -1
        if code == 2:
            return ""
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
    errors = errors_to.getvalue().splitlines()
    if code not in (0, 2):
        return f"exit code {code}: {errors}"
    if code == 2 and sum(line.startswith("dla ") for line in errors) != 1:
        return f"want one line of what is wrong, got {errors}"
    if any(len(line) > 4000 or not line.isprintable() for line in errors):
        return f"a line that no terminal should get: {max(errors, key=len)[:300]!r}"
    return "accepted" if case.refused and code == 0 else ""


def run_cases(name: str, place: Path, cases: int = CASES) -> list[str]:
    """Cases of one format in `place`, or the one that is asked for; returns what is wrong, one text a case."""
    wrong, slowest = [], (0.0, "")
    numbers = [int(ONE.split("/")[1])] if ONE.startswith(f"{name}/") else range(0 if ONE else cases)
    for number in numbers:
        folder = place / str(number)
        folder.mkdir()
        case = (FORMATS | TRAINING)[name](random.Random(f"{SEED}/{name}/{number}"), folder)
        begin = time.monotonic()
        if problem := outcome(case):
            wrong.append(f"FUZZ_SEED={SEED} FUZZ_CASE={name}/{number}: {case.about} {case.argv}\n{problem}")
        slowest = max(slowest, (time.monotonic() - begin, str(number)))
    print(f"seed {SEED}, {len(numbers)} cases of {name}, {len(wrong)} wrong, slowest {slowest}")
    return wrong


def run_cases_in(name: str, place: Path, cases: int) -> list[str]:
    """The same on a rank of a pool, from `place`."""
    fence.LEASE_S = 1  # of a run of which nothing but its file is left
    with contextlib.chdir(place):
        return run_cases(name, place, cases)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_input_is_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without Slurm: commands wait for a controller that does not respond
    wrong = run_cases(name, tmp_path)
    assert not wrong, f"{len(wrong)}:\n" + "\n\n".join(wrong)


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_goes_on_from_damaged_files_or_refuses_them(name: str, tmp_path: Path, ranks) -> None:
    (wrong,) = ranks(1).run(run_cases_in, name, tmp_path, -(-CASES // 4), timeout=40 * CASES)  # a second or two each
    assert not wrong, f"{len(wrong)}:\n" + "\n\n".join(wrong)
