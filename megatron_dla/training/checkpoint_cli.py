"""`dla checkpoint`: list, verify and prune the checkpoints of a run. Needs no torch and no Megatron."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dla.checkpoint.find import (
    COMPLETE,
    DAMAGED,
    checkpoint_dir,
    half_deleted,
    remove,
    remove_leftovers,
    step_directories,
)
from megatron_dla.checkpoint.integrity import damaged_error, find_faults
from megatron_dla.checkpoint.retention import Retention, apply_retention, prune
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.training.fence import Fence, attempt_id


def add_checkpoint_parser(subparsers: Any) -> None:
    """Add `checkpoint` and its actions to an argparse subparsers object; `func(args)` gives the exit code."""
    parser = subparsers.add_parser("checkpoint", help="list, verify and prune the checkpoints of a run")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, function, text in (
        ("list", _list, "one line a checkpoint: bytes, validation loss, why it is kept"),
        ("verify", _verify, "compare every file with its checksum; exit code 1 names the files that differ"),
        ("prune", _prune, "delete what the run's config does not keep, and what is damaged or left over"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("run", help="run directory" + (", or a step_N directory" if name == "verify" else ""))
        if name == "prune":
            action.add_argument(
                "--keep", type=int, help="newest to keep, at least 1 (default: as the run's config says)"
            )
            action.add_argument("--dry-run", action="store_true", help="say what would be deleted")
        action.set_defaults(func=function)


def _steps(run: Path) -> list[Path]:
    if steps := step_directories(run):
        return steps
    raise CheckpointError(f"{str(run)!r} has no checkpoints: give a run directory")


def _retention(run: Path) -> Retention:
    from megatron_dla.config import load_config

    config = load_config(str(run / "config.yaml"), [])
    section = config.checkpoint
    return Retention(config.training.keep_checkpoints, section.keep_every, section.keep_best, tuple(section.permanent))


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _list(args: argparse.Namespace) -> int:
    run = Path(args.run)
    kept = {x.path: x for x in apply_retention(run, _retention(run))}
    for path in _steps(run):
        line = f"{path.name:<16} {_size(path):>16,} bytes"
        if path not in kept:
            print(f"{line}  no {COMPLETE}: incomplete or damaged")
            continue
        entry = kept[path]
        loss = "" if entry.val_loss is None else f"  val_loss {entry.val_loss:.4f}"
        print(f"{line}{loss}  {', '.join(entry.reasons) or 'not kept by the config'}")
    for path in sorted(checkpoint_dir(run).glob(f"*{DAMAGED}")):
        print(f"{path.name:<16} {_size(path):>16,} bytes  set aside as damaged")
    return 0


def _verify(args: argparse.Namespace) -> int:
    given = Path(args.run)
    paths = [given] if (given / COMPLETE).is_file() else _steps(given)
    code = 0
    for path in paths:
        faults = find_faults(path)
        for fault in faults:
            print(f"{path}: {fault}")
            code = 1
        if not faults:
            print(f"{path}: whole")
    return code


def _prune(args: argparse.Namespace) -> int:
    run = Path(args.run)
    _steps(run)
    rule = _retention(run)
    if args.keep is not None:
        if args.keep < 1:
            raise UserError(f"--keep {args.keep}: must be at least 1")
        rule = replace(rule, newest=args.keep)
    entries = apply_retention(run, rule)
    gone, kept = ([x.path for x in entries if bool(x.reasons) == stays] for stays in (False, True))
    faults = {path: find_faults(path) for path in kept} if gone else {}
    if faults and all(faults.values()):  # then one of the others may be the only whole one
        path, found = list(faults.items())[-1]
        raise damaged_error(path, found, "restore it, or delete it, before others are deleted")
    damaged = sorted(checkpoint_dir(run).glob(f"step_*{DAMAGED}"))
    left = [*half_deleted(run), *checkpoint_dir(run).glob("step_*.partial")]
    for path in (*gone, *damaged, *left):
        print(f"{'would delete' if args.dry_run else 'deleting'} {path}")
    if args.dry_run:
        return 0
    fence = Fence(run, attempt_id())
    fence.claim()  # refused while the run is alive: it prunes by itself
    try:
        with fence.publishing():
            remove_leftovers(run)
            problems = [*prune(run, rule), *filter(None, map(remove, damaged))]
    finally:
        fence.release()
    for problem in problems:
        print(f"warning: {problem}")
    return 1 if problems else 0
