"""What the finished cells of a study say: each arm's best learning rate, results, and differences to the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_dla.evaluation.stats import bootstrap_mean
from megatron_dla.study.plan import Study
from megatron_dla.study.run import METRIC, SLOTS, best_rate, text_result

KEPT = (
    "rate", "seed", "parameters", METRIC, "val_loss", "tokens", "held_out", "by_position", "loss", "boundary_rate",
    *SLOTS, "tokens_per_s", "memory_gb", "seconds", "diverged", "machine", "date",
)  # fmt: skip


def collect(study: Study) -> dict[str, Any]:
    """Everything that the report shows, from the cells that have ended; the report is drawn from this alone."""
    arms = {name: _arm(study, name) for name in study.arms}
    reference = arms[study.reference]["results"] if arms else {}
    for arm in arms.values():
        arm["difference"] = difference(arm["results"], reference) if arm["results"] is not reference else None
    questions = [
        {"question": question, "arm": arm, "control": control,
         "difference": difference(arms[arm]["results"], arms[control]["results"])}
        for question, (arm, control) in study.config.questions.items()
    ]  # fmt: skip
    versions = [c["versions"] for name in study.arms for c in _cells(study, name) if "versions" in c]
    return {
        "study": study.config.name,
        "reference": study.reference if arms else None,
        "metric": METRIC,
        "cells": {
            "done": sum(len(arm["cells"]) for arm in arms.values()),
            "planned": sum(len(study.rates(name)) + len(study.config.seeds) - 1 for name in arms),
        },
        "made": made(cell for arm in arms.values() for cell in arm["cells"]),
        "versions": versions[-1] if versions else {},
        "arms": arms,
        "questions": questions,
    }


def made(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Machines of the cells, and dates of the first and the last; cells of older versions do not say."""
    found = [cell for cell in cells if "machine" in cell and "date" in cell]
    dates = sorted(cell["date"] for cell in found)
    return {"machines": sorted({cell["machine"] for cell in found}), "dates": dates[:1] + dates[1:][-1:]}


def _cells(study: Study, name: str) -> list[dict[str, Any]]:
    """The results of an arm: all learning rates of the first seed, then the other seeds of the best one."""
    best = best_rate(study, name)
    cells = study.first_cells(name) + ([] if best is None else study.later_cells(name, best))
    return [record for cell in cells if (record := text_result(study, cell)) is not None]


def _arm(study: Study, name: str) -> dict[str, Any]:
    best, cells = best_rate(study, name), _cells(study, name)
    results = {cell["seed"]: cell[METRIC] for cell in cells if cell["rate"] == best and METRIC in cell}
    chosen = [cell for cell in cells if cell["rate"] == best and METRIC in cell]
    rates = study.rates(name)
    return {
        "overrides": study.changes[name],
        "best_rate": best,
        "rate_at_edge": best is not None and len(rates) > 1 and best in (min(rates), max(rates)),
        "results": results,
        "mean": float(np.mean(list(results.values()))) if results else None,
        "spread": float(np.std(list(results.values()), ddof=1)) if len(results) > 1 else None,
        **{key: _mean([cell.get(key) for cell in chosen]) for key in ("boundary_rate", "tokens_per_s", "memory_gb")},
        "newest_merges": _mean([share for cell in chosen for share in cell.get("newest_merge_share_by_layer") or ()]),
        **{
            key: _means([cell.get(key) or {} for cell in chosen])
            for key in ("by_position", "slot_sizes", "slot_weights")
        },
        "parameters": chosen[0]["parameters"] if chosen else None,
        "cells": [{key: cell[key] for key in KEPT if key in cell} for cell in cells],
    }


def _means(values: list[dict[str, float]]) -> dict[str, float]:
    """By key, which is a number or a range N-M; what a mapping does not have counts as 0."""
    keys = sorted({key for one in values for key in one}, key=lambda key: int(key.rstrip("+").split("-")[0]))
    return {key: sum(one.get(key, 0.0) for one in values) / len(values) for key in keys}


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else None


def difference(results: dict[int, float], reference: dict[int, float]) -> dict[str, Any] | None:
    """Mean of the paired differences over the seeds that both have, with a 95 % bootstrap interval from 2 seeds on."""
    seeds = sorted(results.keys() & reference.keys())
    if not seeds:
        return None
    values = np.array([results[seed] - reference[seed] for seed in seeds])
    found: dict[str, Any] = {"mean": float(values.mean()), "seeds": len(seeds), "low": None, "high": None}
    if len(seeds) > 1:
        interval = bootstrap_mean(values)
        found |= {"low": interval.low, "high": interval.high}
    return found


def verdict(found: dict[str, Any] | None, lower: bool = True) -> str:
    """ "better", "worse", "tie" (the interval holds 0), or "" with fewer than 3 seeds. `lower`: lower is better."""
    if found is None or found["seeds"] < 3:
        return ""
    below, above = ("better", "worse") if lower else ("worse", "better")
    return below if found["high"] < 0 else above if found["low"] > 0 else "tie"
