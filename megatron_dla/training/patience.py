"""Early stopping: a run ends once its held-out loss has not fallen for some validations."""

from __future__ import annotations

import math
from typing import Any


class Patience:
    """Counts the validations since the lowest `val_loss`.

    Args:
        limit: of them, after which the run is over; 0: never.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.best, self.since = math.inf, 0

    def see(self, val_loss: float) -> None:
        """A validation; a loss that is not a number counts as one that is not lower."""
        better = val_loss < self.best
        self.best, self.since = (val_loss, 0) if better else (self.best, self.since + 1)

    @property
    def over(self) -> bool:
        return 0 < self.limit <= self.since

    def describe(self) -> str:
        return f"no val_loss below {self.best:.4f} in {self.since} validations (training.patience)"

    def state_dict(self) -> dict[str, Any]:
        """Empty before the first validation, and without a limit."""
        return {"best": self.best, "since": self.since} if self.limit and math.isfinite(self.best) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint; empty: of a run that had no limit, whose validations do not count."""
        if state:
            self.best, self.since = float(state["best"]), int(state["since"])
