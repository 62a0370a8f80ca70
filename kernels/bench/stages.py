"""Stages: each is run, timed and reported as PASS, FAIL or SKIP with a reason; a failure does not stop later ones."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"


class Skipped(Exception):  # noqa: N818, an outcome and not an error
    """This machine cannot run the stage; the message is the reason."""


class CheckFailed(Exception):  # noqa: N818
    """A measured value exceeds its tolerance; the message has both."""


@dataclass
class Result:
    """One stage: its outcome, the reason where it did not pass, and what it measured."""

    stage: str
    outcome: str
    seconds: float
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Stages:
    """Runs stages in order and prints as it goes."""

    def __init__(self, total: int, out: TextIO | None = None) -> None:
        self.total, self.out = total, sys.stdout if out is None else out
        self.results: list[Result] = []
        self.facts: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """One indented line of detail."""
        print(f"    {text}", file=self.out, flush=True)

    def run(self, name: str, stage: Callable[[], None], needs: str | None = None) -> Result:
        """Run one stage, or skip it if the stage `needs` did not pass. The stage puts numbers into `self.facts`."""
        print(f"[{len(self.results) + 1}/{self.total}] {name}", file=self.out, flush=True)
        self.facts = {}
        begin, outcome, reason = time.monotonic(), PASS, ""
        try:
            before = next((r for r in self.results if r.stage == needs), None)
            if before is not None and before.outcome != PASS:
                raise Skipped(f"it needs '{needs}', which did not pass")
            stage()
        except Skipped as error:
            outcome, reason = SKIP, str(error)
        except CheckFailed as error:
            outcome, reason = FAIL, str(error)
        except Exception as error:  # the next stages are still worth running
            traceback.print_exc(file=self.out)
            outcome, reason = FAIL, f"{type(error).__name__}: {error}".splitlines()[0]
        result = Result(name, outcome, round(time.monotonic() - begin, 1), reason, self.facts)
        self.results.append(result)
        print(f"    {outcome} in {result.seconds:.1f} s{': ' + reason if reason else ''}", file=self.out, flush=True)
        return result

    def summary(self) -> bool:
        """Print all outcomes; True if nothing failed."""
        print("\nsummary", file=self.out)
        for r in self.results:
            print(f"  {r.outcome:4} {r.stage} ({r.seconds:.1f} s){': ' + r.reason if r.reason else ''}", file=self.out)
        failed = sum(r.outcome == FAIL for r in self.results)
        print(
            f"{failed} of {len(self.results)} stages failed" if failed else "nothing failed", file=self.out, flush=True
        )
        return not failed

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self.results]
