"""docs/reliability.md: every promise names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_promise_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 20
    for row in rows:
        promise, tests = row.split(" | ")[:2]
        named = re.findall(r"tests/[\w/.]+", tests)
        assert named, promise
        assert all((ROOT / name).is_file() for name in named), row
