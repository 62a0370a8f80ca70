"""Tasks of lm-eval by name (their data comes from the network or a cache), or from its YAML files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Item, Task, Values
from megatron_dla.evaluation.lm.models import Subject

TOKENS_A_ROW = 512  # assumed of lm-eval's batches, which count rows


@cache
def _index() -> Any:
    """lm-eval's list of its tasks: it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class Harness(Task):
    """One task or group of lm-eval, measured by lm-eval itself; of a group the questions of all its tasks.

    Only metrics that are means over questions are taken. It resumes as a whole.

    Raises:
        UserError: lm-eval is not installed, or has no such task, or cannot get its data.
    """

    unit = "questions"

    def __init__(self, given: str, limit: int = 0, budget: int = 8192) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"--lm-eval {given} needs lm-eval, which is not installed: pip install 'megatron-dla[eval]'"
            )
        super().__init__(Path(given).stem if given.endswith(".yaml") else given, {"limit": limit})
        self.metrics = ()
        self._given, self._limit, self._rows = given, limit, max(1, budget // TOKENS_A_ROW)
        from lm_eval.tasks import get_task_dict

        try:
            get_task_dict([given], _index())
        except Exception as error:  # of the hub, the data library, the parser, ...
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--lm-eval {given}: no such task, or no data for it ({what})") from error

    def items(self, subject: Subject) -> list[Item]:
        return [Item("all", 1, None)]

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=self._rows, device=str(subject.device)
        )
        out: Any = simple_evaluate(
            model, tasks=[self._given], limit=self._limit or None, log_samples=True, bootstrap_iters=0,
            task_manager=_index(),
        )  # fmt: skip
        means = {
            name: [m["metric"] for m in config.get("metric_list", []) if m.get("aggregation", "mean") == "mean"]
            for name, config in out["configs"].items()
        }
        found = {}
        for name, rows in out["samples"].items():
            first = rows[0]["filter"] if rows else None
            for row in rows:
                if row["filter"] == first:
                    values = {m: float(row[m]) for m in row["metrics"] if m in means[name]}
                    found[f"{name}/{row['doc_id']}/{row['doc_hash'][:8]}"] = values
        return [found]

    def finish(self, items: list[Item], values: list[Values]) -> tuple[list[Item], list[Values]]:
        (found,) = values
        shared = [m for m in next(iter(found.values())) if all(m in value for value in found.values())]
        self.metrics = tuple(shared)
        return [Item(key, 1, None) for key in sorted(found)], [found[key] for key in sorted(found)]
