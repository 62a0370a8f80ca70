"""What a run does about losses and gradients that are not finite, and about spikes of the loss.

Every rank decides for itself from numbers that are equal on all of them, so all decide the same. The state is saved
with that of the data, so that a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_dla.config import AnomalySection
from megatron_dla.errors import CheckpointError
from megatron_dla.files import FULL, write_bytes
from megatron_dla.processes import print_or_drop

RECORDS = "anomalies.jsonl"
COUNTS = ("skipped", "in_a_row", "spikes_in_a_row", "records", "rewinds")
LEAST_DEVIATION = 1e-3  # of the median: losses that hardly vary must not make a spike of everything


class LossWatch:
    """Which losses are spikes, by the median of the last ones that were not.

    Args:
        window: losses that are kept. least: losses before the first judgement.
        threshold: in median absolute deviations.
    """

    def __init__(self, window: int, least: int, threshold: float, losses: Iterable[float] = ()) -> None:
        self.losses: deque[float] = deque(losses, maxlen=window)
        self.least, self.threshold = min(least, window), threshold

    def limit(self) -> float:
        """Losses above it are spikes; infinite while there are too few."""
        if len(self.losses) < self.least:
            return math.inf
        middle = median(self.losses)
        deviation = median(abs(loss - middle) for loss in self.losses)
        return middle + self.threshold * max(deviation, LEAST_DEVIATION * abs(middle))


@dataclass(frozen=True)
class Anomaly:
    """One step that is not as others.

    Attributes:
        kind: "loss" or "gradient" (not finite) or "spike". limit: of the loss, for a spike. action: "skip", "stop",
            "rewind" or "report".
    """

    kind: str
    loss: float
    grad_norm: float
    limit: float
    action: str

    def describe(self) -> str:
        then = {"report": "", "rewind": ", back to the last checkpoint without its batch"}
        what = f"the loss of {self.loss:.6g} is above {self.limit:.6g}"
        if self.kind != "spike":
            what = f"the {self.kind} is not finite"
        return f"{what}{then.get(self.action, ', its update is left out')}"


class Anomalies:
    """The policy of a run, and what it has met so far.

    Attributes:
        found: the anomaly of the last step, if it was one. skipped: steps without an update, over the run.
        left_out: batches that are passed over, by their number in the data. can_rewind: there is a checkpoint.
    """

    def __init__(self, section: AnomalySection) -> None:
        self.section, self.found = section, None
        self.skipped = self.in_a_row = self.spikes_in_a_row = self.records = self.rewinds = 0
        self.left_out: set[int] = set()
        self.can_rewind = False
        self._watch(())

    found: Anomaly | None

    def _watch(self, losses: Iterable[float]) -> None:
        section = self.section
        self.watch = LossWatch(section.window, section.min_losses, section.spike_threshold, losses)

    def judge(self, loss: float, grad_norm: float) -> bool:
        """Whether the update of a step with these numbers is left out; `found` has the reason."""
        self.found = self._find(loss, grad_norm)
        spike = self.found is not None and self.found.kind == "spike"
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if spike else 0
        dropped = self.found is not None and self.found.action != "report"
        self.skipped += dropped
        self.in_a_row = self.in_a_row + 1 if dropped else 0
        if not dropped and not spike:
            self.watch.losses.append(loss)
        if spike and not dropped and self.spikes_in_a_row >= self.section.max_consecutive:
            self.watch.losses.clear()  # no spike, but a new level, as after a change of the data
        self.records += self.found is not None
        return dropped

    def _find(self, loss: float, grad_norm: float) -> Anomaly | None:
        for kind, value in (("loss", loss), ("gradient", grad_norm)):
            if not math.isfinite(value):
                return Anomaly(kind, loss, grad_norm, math.inf, self.section.non_finite)
        limit = math.inf if self.section.spike == "off" else self.watch.limit()
        action = "skip" if self.section.spike == "rewind" and not self.can_rewind else self.section.spike
        return Anomaly("spike", loss, grad_norm, limit, action) if loss > limit else None

    def check(self, step: int) -> None:
        """Raises FloatingPointError where the run must end after `step`."""
        if self.found is None or self.found.action == "report":
            return
        text = f"step {step}: {self.found.describe()}"
        if self.found.action == "stop":
            raise FloatingPointError(f"{text} (anomalies.non_finite = stop): lower optimizer.lr or check the data")
        if self.found.action == "rewind":
            if self.rewinds >= self.section.max_rewinds:
                raise FloatingPointError(
                    f"step {step}: another spike of the loss after {self.rewinds} rewinds (anomalies.max_rewinds = "
                    f"{self.section.max_rewinds}): lower optimizer.lr or check the data"
                )
            return
        if self.in_a_row >= self.section.max_consecutive:
            raise FloatingPointError(
                f"{text}, for the {self.in_a_row}th step in a row (anomalies.max_consecutive = "
                f"{self.section.max_consecutive}): lower optimizer.lr, or check the data and the last checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        lists = {"losses": list(self.watch.losses), "left_out": sorted(self.left_out)}
        return {name: getattr(self, name) for name in COUNTS} | lists

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result; an empty one, of older checkpoints, is a start."""
        try:
            for name in COUNTS:
                setattr(self, name, int(state.get(name, 0)))
            self.left_out = {int(number) for number in state.get("left_out", ())}
            self._watch(float(loss) for loss in state.get("losses", ()))
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of anomalies in data_state.json is damaged ({error})") from error

    def rewind(self, state: dict[str, Any], batch: int) -> None:
        """Continue from a checkpoint's `state` without `batch`; what was left out before stays so."""
        left_out, rewinds, records = self.left_out | {batch}, self.rewinds + 1, self.records
        self.load_state_dict(state)
        self.left_out, self.rewinds, self.records = left_out, rewinds, records


class Records:
    """`anomalies.jsonl` in the run directory; for rank 0.

    Args:
        kept: lines of an earlier attempt that stay: those before the checkpoint that the run resumes from.
    """

    def __init__(self, run_dir: Path, kept: int) -> None:
        self.path = run_dir / RECORDS
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)[:kept]
            write_bytes(self.path, b"".join(lines))

    def write(self, step: int, anomaly: Anomaly, batch: dict[str, Any]) -> None:
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(anomaly).items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values, **batch}) + "\n")
        except OSError as error:
            if error.errno not in FULL:
                raise
            print_or_drop(f"warning: {str(self.path)!r}: {error.strerror}: step {step} is not in it")
