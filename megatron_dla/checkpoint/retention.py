"""Which checkpoints of a run are kept. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dla.checkpoint.find import complete_checkpoints, remove
from megatron_dla.checkpoint.integrity import read_marker
from megatron_dla.errors import CheckpointError


@dataclass(frozen=True)
class Retention:
    """Kept are the `newest` ones (0 = all), every step that is a multiple of `every` (0 = none), the `best` ones by
    validation loss, and the steps of `permanent`."""

    newest: int
    every: int = 0
    best: int = 0
    permanent: tuple[int, ...] = ()


@dataclass(frozen=True)
class Kept:
    """A checkpoint, its validation loss if it was validated at that step, and why it is kept; no reason: it is not."""

    step: int
    path: Path
    val_loss: float | None
    reasons: tuple[str, ...]


def _val_loss(path: Path) -> float | None:
    try:
        value = read_marker(path).get("val_loss")
    except CheckpointError:
        return None
    return value if isinstance(value, float) and value == value else None


def apply_retention(run_dir: Path, rule: Retention) -> list[Kept]:
    """Every complete checkpoint of a run, oldest first, with the reasons of the rule to keep it."""
    found = [(step, path, _val_loss(path)) for step, path in complete_checkpoints(run_dir)]
    newest = {step for step, *_ in found[-rule.newest :]}
    by_loss = sorted((loss, step) for step, _, loss in found if loss is not None)
    best = {step for _, step in by_loss[: rule.best]}
    return [
        Kept(step, path, loss, tuple(
            reason
            for reason, holds in {
                "newest": step in newest,
                "every": bool(rule.every) and step % rule.every == 0,
                "best": step in best,
                "permanent": step in rule.permanent,
            }.items()
            if holds
        ))
        for step, path, loss in found
    ]  # fmt: skip


def prune(run_dir: Path, rule: Retention) -> list[str]:
    """Delete what the rule does not keep, for the run's only writer; returns what could not be deleted."""
    gone = [kept.path for kept in apply_retention(run_dir, rule) if not kept.reasons]
    return [problem for path in gone if (problem := remove(path))]
