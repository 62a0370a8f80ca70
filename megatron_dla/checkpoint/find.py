"""Where a run's checkpoints are, and what is left of old ones. Needs no torch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_dla.errors import CheckpointError

LAYOUT, COMPLETE = "layout.json", "complete.json"
PARTIAL, DAMAGED = ".partial", ".damaged"  # endings: never published, or on the way out; set aside


def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _steps(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every `step_N`, whatever is in it, oldest first."""
    matches = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in checkpoint_dir(run_dir).glob("step_*"))
    return sorted((int(match[1]), path) for match, path in matches if match and path.is_dir())


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint with a marker, oldest first."""
    return [(step, path) for step, path in _steps(run_dir) if (path / COMPLETE).is_file()]


def step_directories(run_dir: Path) -> list[Path]:
    """Directories that are a checkpoint or were one, oldest first; without those of `half_deleted`."""
    gone = half_deleted(run_dir)
    return [path for _, path in _steps(run_dir) if path not in gone]


def half_deleted(run_dir: Path) -> list[Path]:
    """`step_N` without a marker beside a newer checkpoint: left by a version that deleted the marker first."""
    complete = complete_checkpoints(run_dir)
    newest = complete[-1][0] if complete else -1
    return [path for step, path in _steps(run_dir) if step < newest and not (path / COMPLETE).exists()]


def remove(path: Path) -> str:
    """Delete a checkpoint, whose name is free at once; a link is removed and not followed.

    Returns what could not be deleted and why; "" if it is gone. The next start tries again.
    """
    try:
        if path.is_symlink():
            path.unlink()
            return ""
        if not path.name.endswith(PARTIAL):
            gone = path.with_name(f"{path.name}.deleted{PARTIAL}")
            shutil.rmtree(gone, ignore_errors=True)
            path = path.rename(gone)
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{str(path)!r} could not be deleted ({error.strerror})"
    return ""


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, in place of one that was set aside before; returns its new name."""
    kept = path.with_name(path.name + DAMAGED)
    remove(kept)
    return path.rename(kept)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what no process needs any more: unpublished and half-deleted checkpoints. For the run's only writer."""
    for path in [*checkpoint_dir(run_dir).glob(f"step_*{PARTIAL}"), *half_deleted(run_dir)]:
        remove(path)


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
