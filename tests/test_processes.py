"""What processes print."""

import io
import sys

import pytest

from megatron_dla.processes import print_or_drop


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """A background save warns while the run logs: neither ends up inside the other's line."""
    pieces: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    print_or_drop("step 1")
    assert pieces == ["step 1\n"]
