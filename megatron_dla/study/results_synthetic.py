"""What the finished cells of a study's synthetic tasks say."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_dla.study.results import difference, made
from megatron_dla.study.run_synthetic import best_rate, read_result
from megatron_dla.study.synthetic import SyntheticCell, SyntheticStudy, memory_size

KEPT = ("rate", "seed", "accuracy", "check_accuracy", "steps", "curve", "seconds", "diverged", "machine", "date")


def collect_synthetic(study: SyntheticStudy | None) -> dict[str, Any]:
    """Everything that the report shows of the synthetic tasks; {} where there are none, or no cell has ended."""
    if study is None:
        return {}
    tasks = {name: _task(study, name) for name in study.tasks}
    done = sum(len(arm["cells"]) for task in tasks.values() for arm in task["arms"].values())
    if not done:
        return {}
    return {
        "reference": study.reference,
        "made": made(cell for task in tasks.values() for arm in task["arms"].values() for cell in arm["cells"]),
        "cells": {"done": done, "planned": sum(study.count_cells(arm) for _, arm in study.groups())},
        "overrides": study.config.arms,
        "tasks": tasks,
    }


def _task(study: SyntheticStudy, name: str) -> dict[str, Any]:
    task = study.tasks[name]
    lengths = [str(length) for length in sorted(task.eval_lengths)]
    arms = {arm: _arm(study, name, arm, lengths) for arm in study.arms}
    reference = arms[study.reference]["results"]
    for key, arm in arms.items():
        same = key == study.reference
        arm["difference"] = {n: None if same else difference(arm["results"][n], reference[n]) for n in lengths}
    config = study.cell_config(SyntheticCell(name, study.reference, 0.0, 0)).plain()["task"]
    return {"config": config, "lengths": lengths, "arms": arms}


def _arm(study: SyntheticStudy, task: str, name: str, lengths: list[str]) -> dict[str, Any]:
    best, rates = best_rate(study, task, name), study.rates[name]
    cells = study.first_cells(task, name) + ([] if best is None else study.later_cells(task, name, best))
    records = [found for cell in cells if (found := read_result(study, cell)) is not None]
    chosen = [record for record in records if record["rate"] == best and "accuracy" in record]
    results = {n: {record["seed"]: record["accuracy"][n] for record in chosen} for n in lengths}
    model = study.cell_config(cells[0]).model
    return {
        "best_rate": best,
        "rate_at_edge": best is not None and len(rates) > 1 and best in (min(rates), max(rates)),
        "results": results,
        "mean": {n: statistics.mean(found.values()) if found else None for n, found in results.items()},
        "range": {n: [min(found.values()), max(found.values())] if found else None for n, found in results.items()},
        "steps": statistics.median(record["steps"] for record in chosen) if chosen else None,
        "parameters": chosen[0]["parameters"] if chosen else None,
        "memory": memory_size(model, study.tasks[task].length),
        "cells": [{key: record[key] for key in KEPT if key in record} for record in records],
    }
