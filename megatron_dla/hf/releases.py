"""The releases of transformers that exports run on (copied into every exported directory; imports nothing)."""

from __future__ import annotations

# oldest admitted, pinned (constraints.txt), newest at the time of writing: tests/hf runs on each (`make test-hf`)
MINIMUM, PINNED, NEWEST = "5.17.0", "5.23.0", "5.24.0"


def check_release(found: str) -> None:
    """Raises ImportError where transformers `found` is older than `MINIMUM`."""
    release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if release < tuple(int(part) for part in MINIMUM.split(".")[:2]):
        raise ImportError(f"transformers {found} is too old for this model: pip install 'transformers>={MINIMUM}'")


def tested_range() -> str:
    """For messages and model cards."""
    return f"transformers {MINIMUM} to {NEWEST}"


__all__ = ["MINIMUM", "NEWEST", "PINNED", "check_release", "tested_range"]
