"""Trains, exports and evaluates the recipes of an ablation; one that was stopped goes on where it was."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_dla.ablation.plan import Ablation
from megatron_dla.config import AdapterRunConfig
from megatron_dla.errors import STOPPED, ConfigError, UserError
from megatron_dla.files import parse_json, write_json
from megatron_dla.machine import made_here
from megatron_dla.metrics.sinks import read_metrics
from megatron_dla.study.record import Day, Finite, Keys, Whole, check_record, damaged
from megatron_dla.study.run import Progress, different_keys, exit_messages, launch_run, log_path, run_process
from megatron_dla.study.run import plain as plain_run
from megatron_dla.study.variants import named, of_part
from megatron_dla.tasks.run import check_run, make_task, versions

RESULT = "recipe.json"
# column of the report: (first condition, second, metric, sign), of the difference first - second
COLUMNS = {
    "memory": ("kept", "shuffled", "choice", 1),
    "memory, nats": ("kept", "shuffled", "logprob", 1),
    "harm in the prompt": ("full_adapter", "full", "choice", -1),
    "harm on text, nats": ("adapter", "base", "nats", 1),
}
_POINT = Annotated[dict[Literal["mean", "low", "high"], Finite], Field(min_length=3)]
_POINTS = Annotated[dict[Literal[tuple(COLUMNS)], _POINT | None], Field(min_length=len(COLUMNS))]  # type: ignore[misc, valid-type]
_SEEDS = Annotated[list[Whole], Field(min_length=1)]
_SECONDS = Annotated[list[Finite], Field(min_length=1)]
KEYS = Keys(
    always={
        "config": dict[str, dict[str, Any]], "overrides": dict[str, Any], "seeds": _SEEDS, "evaluate": list[str],
        "parameters": Whole, "seconds": _SECONDS, "tables": list[dict[str, Any]], "versions": dict[str, Any],
        "machine": str, "date": Day, "points": _POINTS,
    },
    ended={}, maybe={},
)  # fmt: skip
PASSED_ON = (STOPPED, -15, -2)  # a command that a signal ended


class AblationRunner:
    """Runs one recipe after another: all its seeds, then their joint evaluation. `part`: (i, n), task i of n."""

    def __init__(self, ablation: Ablation, part: tuple[int, int] = (0, 1)) -> None:
        self.ablation, self.names = ablation, of_part(ablation.recipes, part)
        self.progress = Progress(len(self.names), "recipe")

    def run(self) -> int:
        """0, or 75 where a signal stopped it.

        Raises:
            UserError: a config cannot run (before anything starts), or a command failed.
        """
        seed = self.ablation.config.seeds[0]
        self.ablation.config.evaluate.check()
        print(f"checking the configs and data of {len(self.names)} recipes", flush=True)
        for name in self.names:
            with named(f"recipes.{name}"):
                check_run(self.ablation.run_config(name, seed), self.ablation.config.nproc)
        for name in self.names:
            started, record = time.monotonic(), read_result(self.ablation, name)
            found = record is not None
            if record is None:
                record = self._train_and_evaluate(name)
                if record is None:
                    return STOPPED
                write_json(self.ablation.root / name / RESULT, record)
            shown = [f"{key} {round(point['mean'], 3) + 0.0:+.3f}" for key, point in record["points"].items() if point]
            self.progress.show(name, ", ".join(shown), None if found else time.monotonic() - started)
        return 0

    def _train_and_evaluate(self, name: str) -> dict[str, Any] | None:
        """The result of a recipe; None where a signal stopped it."""
        ablation, adapters = self.ablation, []
        base = ablation.recipes[name].backbone.dir
        for seed in ablation.config.seeds:
            place, since = ablation.place(name, seed), time.time()
            code = launch_run(ablation.run_config(name, seed), ablation.config.nproc, place)
            if code == STOPPED:
                return None
            if code:
                why = (exit_messages(place, since) or [f"exit code {code}"])[-1]
                raise UserError(f"{str(place)!r}: the run failed ({why}); its output is in {str(log_path(place))!r}")
            adapters.append(place.with_name(f"{place.name}_adapter"))
            shutil.rmtree(adapters[-1], ignore_errors=True)  # of before the stop: of fewer steps, or half of one
            if not _dla(place, "convert", "adapter", str(place), str(adapters[-1])):
                return None
        out = ablation.root / name / "eval"
        options = ablation.config.evaluate.options()
        if not _dla(out, "eval", base, "--adapter", *map(str, adapters), *options, "--out", str(out)):
            return None
        return self._record(name, parse_json((out / "eval.json").read_bytes())["tasks"])

    def _record(self, name: str, tables: list[dict[str, Any]]) -> dict[str, Any]:
        ablation = self.ablation
        runs = [read_metrics(ablation.place(name, seed) / "metrics.jsonl") for seed in ablation.config.seeds]
        task = make_task(ablation.run_config(name, ablation.config.seeds[0]))
        return {
            "overrides": ablation.config.recipes[name], "seeds": list(ablation.config.seeds),
            "config": plain(ablation.recipes[name]), "evaluate": ablation.config.evaluate.options(),
            "nproc": ablation.config.nproc, "versions": versions(), **made_here(),
            "parameters": task.trained_parameters,
            "seconds": [sum(m["step_s"] * _steps(run, i) for i, m in enumerate(run) if "step_s" in m) for run in runs],
            "points": {column: find_point(tables, *what) for column, what in COLUMNS.items()}, "tables": tables,
        }  # fmt: skip


def _steps(metrics: list[dict[str, Any]], number: int) -> int:
    """Steps that a line of the metrics is the mean of."""
    before = [m["step"] for m in metrics[:number] if "step_s" in m]
    return int(metrics[number]["step"] - (before[-1] if before else 0))


def _dla(place: Path, *arguments: str) -> bool:
    """Run a command beside a run. False: a signal ended it. Raises UserError with its last line where it failed."""
    log = log_path(place)
    code = run_process([sys.executable, "-m", "megatron_dla.cli", *arguments], log)
    if code in PASSED_ON:
        return False
    if code:
        lines = log.read_text(errors="replace").splitlines()
        raise UserError(f"{str(place)!r}: {lines[-1] if lines else f'exit code {code}'}; see {str(log)!r}")
    return True


def plain(config: AdapterRunConfig) -> dict[str, Any]:
    """The config as JSON gives it back, without name, place and seed of the run."""
    return {section: keys for section, keys in plain_run(config).items() if section != "run"}


def read_result(ablation: Ablation, name: str) -> dict[str, Any] | None:
    """The result of a recipe that has ended. Raises ConfigError where it is damaged, or of another config."""
    path = ablation.root / name / RESULT
    try:
        record = check_record(path, parse_json(path.read_bytes()), KEYS)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, error) from error
    changed = different_keys(record["config"], plain(ablation.recipes[name]))
    changed += ["seeds"] if record["seeds"] != list(ablation.config.seeds) else []
    changed += ["evaluate"] if record["evaluate"] != ablation.config.evaluate.options() else []
    if changed:
        raise ConfigError(
            f"{str(path)!r} is the result of another config ({', '.join(changed)} changed): give the ablation another "
            "name, or delete the directory of the recipe to run it again"
        )
    return record


def find_point(
    tables: list[dict[str, Any]], first: str, second: str, metric: str, sign: int
) -> dict[str, float] | None:
    """Mean and 95 % interval of a difference in the tables of `dla eval`; None where it was not evaluated."""
    for row in (row for table in tables for row in table["differences"]):
        if (row["first"], row["second"], row["metric"]) == (first, second, metric):
            low, high = sorted((sign * row["low"], sign * row["high"]))
            return {"mean": sign * row["mean"], "low": low, "high": high}
    return None
