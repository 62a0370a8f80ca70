"""Percentile bootstrap of means and paired differences, also within groups (questions of a conversation, episodes of a
training seed). B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
BLOCK = 1 << 22  # indices drawn at a time


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile interval; `count` values in `groups` groups."""

    mean: float
    low: float
    high: float
    count: int
    groups: int = 1
    level: float = 0.95

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        mean, low, high = (f"{scale * x:+.{digits}f}".lstrip("+") for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def bootstrap_mean(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean. For a paired comparison pass the differences.

    Args:
        values: [n], one number an independent unit (an episode, a window of text).
        groups: [n], the group of each value, if values of a group depend on each other (training seed, conversation).
            Groups are resampled first, then values within each; the mean is over all resampled values. With few
            groups the interval is coarse: three seeds have ten different draws.

    Raises:
        ValueError: `values` is empty or has a number that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values: must be finite numbers [n], n >= 1; got shape {list(values.shape)}")
    rng = np.random.default_rng(seed)
    if groups is None:
        members = [values]
        means = _resampled(values, resamples, rng)[0] / len(values)
    else:
        groups = np.asarray(groups)
        if groups.shape != values.shape:
            raise ValueError(f"groups {list(groups.shape)}: must have the shape of values {list(values.shape)}")
        members = [values[groups == name] for name in np.unique(groups)]
        means = _two_stage(members, resamples, rng)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values), len(members), level)


def _resampled(values: np.ndarray, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Sum of n values drawn with replacement, `draws` times, and n."""
    n = len(values)
    out = np.empty(draws)
    step = max(1, BLOCK // n)
    for at in range(0, draws, step):
        count = min(step, draws - at)
        out[at : at + count] = values[rng.integers(0, n, (count, n))].sum(1)
    return out, n


def _two_stage(members: list[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means over `resamples` draws of groups, and of values within each drawn group."""
    picked = rng.integers(0, len(members), (resamples, len(members)))
    total, count = np.zeros(resamples), np.zeros(resamples)
    for g, values in enumerate(members):
        times = (picked == g).sum(1)  # a group drawn twice is resampled twice
        for again in range(1, times.max(initial=0) + 1):
            rows = np.flatnonzero(times >= again)
            sums, n = _resampled(values, len(rows), rng)
            total[rows] += sums
            count[rows] += n
    return total / count
