"""Runs the cells of a study's synthetic tasks, each a process of its own on one core."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dla.errors import STOPPED, UserError
from megatron_dla.files import parse_json, write_json
from megatron_dla.machine import made_here
from megatron_dla.study.record import SYNTHETIC, damaged
from megatron_dla.study.run import CELL, Progress, log_path, result_of, run_process
from megatron_dla.study.synthetic import CellConfig, SyntheticCell, SyntheticStudy
from megatron_dla.study.variants import of_part
from megatron_dla.tasks.run import versions

Launch = Callable[[CellConfig, Path], dict[str, Any] | None]


class SyntheticRunner:
    """Runs the synthetic tasks, or those pairs of a task and an arm that are in one part.

    Args:
        part: (i, n): this is task i of n. launch: trains a cell; its record, or None where a signal stopped it.
    """

    def __init__(self, study: SyntheticStudy, part: tuple[int, int] = (0, 1), launch: Launch | None = None) -> None:
        self.study, self.launch = study, launch or launch_cell
        self.groups = of_part(study.groups(), part)
        self.later = len(study.config.seeds) - 1
        self.progress = Progress(sum(study.count_cells(arm) for _, arm in self.groups))

    def run(self) -> int:
        """0, or 75 where a signal stopped it. Raises UserError where a cell failed other than by diverging."""
        for task, arm in self.groups:
            for cell in self.study.first_cells(task, arm):
                if not self._cell(cell):
                    return STOPPED
            best = best_rate(self.study, task, arm)
            if best is None:
                print(f"{task}, {arm}: diverged with every learning rate", flush=True)
                self.progress.skip(self.later)
                continue
            for cell in self.study.later_cells(task, arm, best):
                if not self._cell(cell):
                    return STOPPED
        return 0

    def _cell(self, cell: SyntheticCell) -> bool:
        """Whether its result is there: found, or made now. False: stopped by a signal."""
        place, config = self.study.root / cell.path, self.study.cell_config(cell)
        record, seconds = read_result(self.study, cell), None
        if record is None:
            started = time.monotonic()
            found = self.launch(config, place)
            if found is None:
                return False
            about = {"task": cell.task, "arm": cell.arm, "rate": cell.rate, "seed": cell.seed, "versions": versions()}
            about |= made_here()
            record, seconds = {**about, **found, "config": config.plain()}, time.monotonic() - started
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / CELL, record)
        accuracies = [f"{value:.3f} at {length}" for length, value in record.get("accuracy", {}).items()]
        value = record["diverged"] if "diverged" in record else "accuracy " + ", ".join(accuracies)
        self.progress.show(f"{cell.task} {cell.arm} lr {cell.rate:g} seed {cell.seed}", value, seconds)
        return True


def best_rate(study: SyntheticStudy, task: str, arm: str) -> float | None:
    """The learning rate with the best accuracy at the first seed, on rows that are not those of the results; of those
    that reached `training.stop_at` the one with the fewest steps. None where there is none (yet)."""
    enough, found = study.arms[arm][1].stop_at, {}
    for cell in study.first_cells(task, arm):
        record = read_result(study, cell)
        if record and "accuracy" in record:
            found[cell.rate] = (min(record["check_accuracy"], enough), -record["steps"])
    return max(found, key=lambda rate: found[rate]) if found else None


def read_result(study: SyntheticStudy, cell: SyntheticCell) -> dict[str, Any] | None:
    """The result of a cell that has ended. Raises ConfigError where it is damaged, lacks a length of its task, or is
    that of another config."""
    place = study.root / cell.path
    record = result_of(place, cell.rate, cell.seed, study.cell_config(cell).plain(), SYNTHETIC)
    if record and "accuracy" in record:
        for length in study.tasks[cell.task].eval_lengths:
            if str(length) not in record["accuracy"]:
                raise damaged(place / CELL, f"accuracy = {record['accuracy']}: it has no length {length}")
    return record


def launch_cell(config: CellConfig, place: Path) -> dict[str, Any] | None:
    """Train in a process of its own, which ends with this one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "cell.json", Path(folder) / "result.json"
        write_json(given, config.plain())
        command = [sys.executable, "-m", "megatron_dla.study.cell", str(given), str(result), str(os.getpid())]
        code = run_process(command, log_path(place))
        if code == -signal.SIGTERM:
            return None
        if code:
            raise UserError(f"{str(place)!r}: the cell failed (exit code {code}); see {str(log_path(place))!r}")
        return dict(parse_json(result.read_bytes()))
