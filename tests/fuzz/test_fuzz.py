"""Every file that the project reads, damaged and mistyped: a command works, or prints one line and exits with 2.

A cut of it runs in `make test`, all of it by `make fuzz SEED=n`. A case is made from the seed, its format and its
number alone, so the name of a failure repeats it: FUZZ_SEED=n FUZZ_CASE=format/number pytest tests/fuzz.
"""

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
from tests.fuzz.formats import FORMATS, Case

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


def outcome(case: Case, capsys: pytest.CaptureFixture) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    capsys.readouterr()
    before = [signal.signal(number, _hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    signal.alarm(10 * LIMIT_S)  # for one that waits
    try:
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
    errors = capsys.readouterr().err.splitlines()
    if code not in (0, 2):
        return f"exit code {code}: {errors}"
    if code == 2 and sum(line.startswith("dla ") for line in errors) != 1:
        return f"want one line of what is wrong, got {errors}"
    if any(len(line) > 4000 or not line.isprintable() for line in errors):
        return f"a line that no terminal should get: {max(errors, key=len)[:300]!r}"
    return "accepted" if case.refused and code == 0 else ""


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_input_is_read_or_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, slowest = [], (0.0, "")
    numbers = [int(ONE.split("/")[1])] if ONE.startswith(f"{name}/") else range(0 if ONE else CASES)
    for number in numbers:
        place = tmp_path / str(number)
        place.mkdir()
        case = FORMATS[name](random.Random(f"{SEED}/{name}/{number}"), place)
        begin = time.monotonic()
        if problem := outcome(case, capsys):
            wrong.append(f"FUZZ_SEED={SEED} FUZZ_CASE={name}/{number}: {case.argv}\n{problem}")
        slowest = max(slowest, (time.monotonic() - begin, str(number)))
    print(f"seed {SEED}, {len(numbers)} cases of {name}, {len(wrong)} wrong, slowest {slowest}")
    assert not wrong, f"{len(wrong)} of {len(numbers)}:\n" + "\n\n".join(wrong)
