"""docs/reliability.md: every promise names tests that exist, and as many cases as it says."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = r"`(tests/[\w/.]+::\w+)`"


def rows() -> list[list[str]]:
    """[promise, tests, measured] of each line of the table."""
    lines = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_promise_names_tests_that_exist_and_a_figure() -> None:
    assert len(rows()) >= 25
    for promise, tests, measured in rows():
        named = re.findall(r"tests/[\w/.]+", tests)
        assert named and measured, promise
        assert all((ROOT / name).is_file() for name in named), promise


def test_the_numbers_of_cases_are_those_of_the_tests() -> None:
    names = list(dict.fromkeys(name for _, tests, _ in rows() for name in re.findall(NAMED, tests)))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:xdist", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = Counter(line.split("[")[0] for line in done.stdout.splitlines() if "::" in line)
    for promise, tests, measured in rows():
        if named := re.findall(NAMED, tests):
            found = re.match(r"(\d+) cases?\b", measured)
            assert found and int(found[1]) == sum(cases[name] for name in named), (promise, measured)
