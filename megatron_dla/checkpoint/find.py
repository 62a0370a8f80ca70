"""Where a run's checkpoints are. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_dla.errors import CheckpointError

LAYOUT, COMPLETE = "layout.json", "complete.json"


def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every complete checkpoint, oldest first."""
    found = []
    for path in checkpoint_dir(run_dir).glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / COMPLETE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def resolve_checkpoint(path: str | Path) -> Path:
    """A `step_N` directory: `path` itself, or the newest complete one of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is not a directory: give a step_N directory or a run directory")
    if found := complete_checkpoints(path):
        return found[-1][1]
    if checkpoint_dir(path).is_dir() and not (path / LAYOUT).exists():
        raise CheckpointError(f"{str(path)!r} has no complete checkpoint yet: wait for the run to save one")
    return path
