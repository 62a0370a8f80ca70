"""Runs the cells of a study one after another; a study that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dla.config import AdapterRunConfig, RunConfig, dump_config, load_config, to_dict
from megatron_dla.errors import BAD_INPUT, STOPPED, ConfigError, UserError
from megatron_dla.files import parse_json, write_json
from megatron_dla.machine import made_here
from megatron_dla.metrics.meters import clock
from megatron_dla.metrics.sinks import read_metrics
from megatron_dla.model.counts import count_parameters
from megatron_dla.processes import PARENT, StopSignals
from megatron_dla.study.plan import Cell, Study
from megatron_dla.study.record import TEXT, Keys, check_record, damaged
from megatron_dla.study.variants import named, of_part
from megatron_dla.tasks.run import check_run, make_task, versions
from megatron_dla.training.control import EXITS

CELL = "cell.json"
LOG = "output.log"
METRIC = "val_bpb"
# of the last step that is logged
SLOTS = ("boundary_rate_by_head", "newest_merge_share_by_layer", "slot_sizes", "slot_weights")
DIVERGED = "FloatingPointError"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Launch = Callable[[RunConfig, int, Path], int]


class Progress:
    """The lines of the cells of a study that have ended. `total`: cells in all. `word`: what they are called."""

    def __init__(self, total: int, word: str = "cell") -> None:
        self.total, self.done, self.word = total, 0, word
        self.seconds: list[float] = []  # of the cells that this process ran

    def skip(self, cells: int) -> None:
        """Count cells that will not run."""
        self.done += cells

    def show(self, cell: str, value: str, seconds: float | None) -> None:
        """The line of a cell; `seconds`: None where its result was there."""
        self.done += 1
        self.seconds += [] if seconds is None else [seconds]
        words = [f"{self.word} {self.done}/{self.total}", cell, value, "found" if seconds is None else clock(seconds)]
        if self.seconds:
            words.append(f"eta {clock(statistics.mean(self.seconds) * (self.total - self.done))}")
        print(" | ".join(words), flush=True)


class StudyRunner:
    """Runs a study, or the arms of one task of it.

    Args:
        part: (i, n): this is task i of n. launch: trains a config and returns the exit code.
    """

    def __init__(self, study: Study, part: tuple[int, int] = (0, 1), launch: Launch | None = None) -> None:
        self.study, self.launch = study, launch or launch_run
        self.arms = of_part(study.arms, part)
        self.progress = Progress(sum(len(study.rates(arm)) + len(study.config.seeds) - 1 for arm in self.arms))

    def run(self) -> int:
        """0, or 75 where a signal stopped it.

        Raises:
            UserError: a config of an arm cannot run (before anything starts), or a run failed other than by diverging.
        """
        for arm in self.arms:
            if not self.study.arms[arm].training.eval_every:
                raise ConfigError("training.eval_every = 0: a study compares the held-out loss; set it")
            with named(f"arms.{arm}"):
                check_run(self.study.run_config(self.study.first_cells(arm)[0]), self.study.config.nproc)
        for arm in self.arms:
            for cell in self.study.first_cells(arm):
                if not self._cell(cell):
                    return STOPPED
            best = best_rate(self.study, arm)
            if best is None:
                print(f"{arm}: diverged with every learning rate", flush=True)
                self.progress.skip(len(self.study.config.seeds) - 1)
                continue
            for cell in self.study.later_cells(arm, best):
                if not self._cell(cell):
                    return STOPPED
        return 0

    def _cell(self, cell: Cell) -> bool:
        """Whether its result is there: found, or made now. False: stopped by a signal."""
        place = self.study.root / cell.path
        record, seconds = text_result(self.study, cell), None
        if record is None:
            started, since = time.monotonic(), time.time()
            code = self.launch(self.study.run_config(cell), self.study.config.nproc, place)
            if code == STOPPED:
                return False
            record, seconds = self._record(cell, place, code, since), time.monotonic() - started
            write_json(place / CELL, {**record, "config": plain(self.study.run_config(cell))})
        value = record["diverged"] if "diverged" in record else f"{METRIC} {record[METRIC]:.4f}"
        self.progress.show(f"{cell.arm} lr {cell.rate:g} seed {cell.seed}", value, seconds)
        return True

    def _record(self, cell: Cell, place: Path, code: int, since: float) -> dict[str, Any]:
        config = self.study.run_config(cell)
        task = make_task(config)
        about = {
            "arm": cell.arm, "rate": cell.rate, "seed": cell.seed, "overrides": self.study.changes[cell.arm],
            "parameters": count_parameters(config.model, task.layout().vocab_size), "nproc": self.study.config.nproc,
            "versions": versions(), **made_here(),
        }  # fmt: skip
        if code:
            reasons = exit_messages(place, since)
            if reasons and reasons[-1].startswith(DIVERGED):
                return {**about, "diverged": reasons[-1]}
            why = reasons[-1] if reasons else f"exit code {code}"
            raise UserError(f"{str(place)!r}: the run failed ({why}); its output is in {str(log_path(place))!r}")
        return {**about, **summary(read_metrics(place / "metrics.jsonl"))}


def summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What a study keeps of a run: its last held-out result, curves, median speed, largest memory."""
    steps = [m for m in metrics if "loss" in m]
    held_out = [m for m in metrics if m.get(METRIC) is not None]
    return {
        METRIC: held_out[-1][METRIC],
        "val_loss": held_out[-1]["val_loss"],
        "tokens": steps[-1]["tokens"],
        "held_out": [[m["step"], m[METRIC]] for m in held_out],
        "by_position": held_out[-1].get("val_bpb_by_position"),
        "loss": [[m["step"], m["loss"]] for m in steps],
        "boundary_rate": steps[-1].get("boundary_rate"),
        **{key: steps[-1].get(key) for key in SLOTS},
        "tokens_per_s": statistics.median(m["tokens_per_s"] for m in steps),
        "memory_gb": max(m["memory_gb"] for m in steps),
        "seconds": steps[-1]["tokens"] / statistics.median(m["tokens_per_s"] for m in steps),
    }


def plain(config: RunConfig | AdapterRunConfig) -> dict[str, Any]:
    """The config as JSON gives it back, without where the run is."""
    values = json.loads(json.dumps(to_dict(config)))
    values["run"] = {"seed": values["run"]["seed"]}
    return dict(values)


def text_result(study: Study, cell: Cell) -> dict[str, Any] | None:
    """`result_of` a run on text."""
    return result_of(study.root / cell.path, cell.rate, cell.seed, plain(study.run_config(cell)))


def result_of(place: Path, rate: float, seed: int, config: dict[str, Any], keys: Keys = TEXT) -> dict[str, Any] | None:
    """The result of a cell that has ended. Raises ConfigError where it is damaged, or that of another config."""
    record = read_cell(place, keys)
    if record is None:
        return None
    if lacks := {"model", "run"} - record["config"].keys():
        raise damaged(place / CELL, f"config has no {', '.join(sorted(lacks))}")
    for key, wanted in (("rate", rate), ("seed", seed)):
        if record[key] != wanted:
            raise damaged(place / CELL, f"{key} = {record[key]!r}, but its directory is that of {wanted!r}")
    if changed := different_keys(record["config"], config):
        raise ConfigError(
            f"{str(place / CELL)!r} is the result of another config ({', '.join(changed)} changed): "
            "give the study another name, or delete the cell to run it again"
        )
    return record


def different_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """section.key of what differs; keys that only one of them has are of another version, and do not count."""
    return [
        f"{section}.{key}"
        for section in old.keys() & new.keys()
        for key in old[section].keys() & new[section].keys()
        if old[section][key] != new[section][key]
    ]


def exit_messages(place: Path, since: float) -> list[str]:
    """Why ranks of a run ended with an error, the last one last. `since`: the start of the attempt, Unix time."""
    records = [parse_json(path.read_bytes()) for path in place.glob(f"{EXITS}/*/*.json")]
    return [record["message"] for record in sorted(records, key=lambda r: r["time"]) if record["time"] >= since]


def read_cell(place: Path, keys: Keys = TEXT) -> dict[str, Any] | None:
    """The result of a cell that has ended. Raises ConfigError where it is damaged."""
    try:
        record = parse_json((place / CELL).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(place / CELL, error) from error
    return check_record(place / CELL, record, keys)


def best_rate(study: Study, arm: str) -> float | None:
    """The learning rate with the lowest result at the first seed; None where there is none (yet)."""
    found = {cell.rate: text_result(study, cell) for cell in study.first_cells(arm)}
    values = {rate: record[METRIC] for rate, record in found.items() if record and METRIC in record}
    return min(values, key=lambda rate: values[rate]) if values else None


def log_path(place: Path) -> Path:
    """Where the output of a run goes: beside its directory, which only the run itself makes."""
    return place.with_name(f"{place.name}.log")


def launch_run(config: RunConfig | AdapterRunConfig, nproc: int, place: Path) -> int:
    """Train in processes of their own; a signal to stop is passed on, and the run saves. 75 where one ended it.

    Raises UserError where the run was refused, ConfigError where one of another config was begun there.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path, log = place.with_name(f"{place.name}.yaml"), log_path(place)
    if place.is_dir() and path.exists() and (changed := different_keys(plain(load_config(path)), plain(config))):
        raise ConfigError(
            f"{str(place)!r} is a run of another config ({', '.join(changed)} changed): give another name, or delete "
            "the run to begin again"
        )
    dump_config(config, path)
    before = log.stat().st_size if log.exists() else 0
    code = run_process([sys.executable, "-m", "megatron_dla.cli", "run", str(path), "--nproc", str(nproc)], log)
    if code == BAD_INPUT:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
        raise UserError(f"{str(place)!r}: {lines[-1] if lines else 'the run was refused'}")
    # before its first checkpoint a signal ends it as it ends any process
    return STOPPED if code in {*(128 + s for s in _SIGNALS), *(-s for s in _SIGNALS)} else code


def run_process(command: list[str], log: Path) -> int:
    """Run a command in a session of its own, its output appended to `log`; signals to stop are passed on as SIGTERM.
    A `dla` command is killed if this process is. Returns its exit code, negative where a signal ended it."""
    environment = os.environ | {PARENT: str(os.getpid())}
    with log.open("ab") as out:
        run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
        with StopSignals(lambda _: run.send_signal(signal.SIGTERM), lambda _: run.send_signal(signal.SIGTERM)):
            return run.wait()
