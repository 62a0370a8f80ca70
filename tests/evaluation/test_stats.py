"""The bootstrap against known cases: coverage, pairing, groups."""

import numpy as np
import pytest

from megatron_dla.evaluation.stats import bootstrap_mean


def test_known_cases():
    same = bootstrap_mean(np.full(7, 0.25))
    assert (same.mean, same.low, same.high, same.count) == (0.25, 0.25, 0.25, 7)
    coin = bootstrap_mean(np.array([0.0, 1.0] * 200))
    assert abs(coin.high - coin.low - 2 * 1.96 * np.sqrt(0.25 / 400)) < 0.004  # the normal approximation
    normal = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(normal, seed=3) == bootstrap_mean(normal, seed=3) != bootstrap_mean(normal, seed=4)
    assert coin.text(2) == "0.50 [0.45, 0.55]"
    narrow = bootstrap_mean(np.array([0.0, 1.0] * 200), level=0.5)
    assert coin.low < narrow.low < narrow.high < coin.high


def test_coverage():
    """Of 300 samples of 40 skewed numbers, about 95 % of the intervals hold the true mean (fewer is known of the
    percentile bootstrap at this size: 92-94 %)."""
    rng = np.random.default_rng(0)
    found = [bootstrap_mean(rng.gamma(2.0, 1.0, 40), resamples=1000, seed=i) for i in range(300)]
    assert 0.89 <= np.mean([x.low <= 2.0 <= x.high for x in found]) <= 0.97


def test_coverage_with_groups():
    """20 groups of 5 with a mean of their own each: the two-stage interval covers, the plain one does not."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(20), 5)
    hits = {"two stages": [], "plain": []}
    for i in range(200):
        values = rng.normal(0, 1, 20)[groups] + rng.normal(0, 0.3, 100)
        for name, by in (("two stages", groups), ("plain", None)):
            found = bootstrap_mean(values, by, resamples=800, seed=i)
            hits[name].append(found.low <= 0 <= found.high)
    assert 0.89 <= np.mean(hits["two stages"]) <= 0.99 and np.mean(hits["plain"]) < 0.75


def test_pairing_sees_what_the_spread_hides():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 5, 100)
    gain = base + 0.3 + rng.normal(0, 0.2, 100)
    paired = bootstrap_mean(gain - base)
    assert paired.low > 0.2 and paired.high < 0.4
    assert bootstrap_mean(gain).low < bootstrap_mean(base).high


def test_groups_of_different_sizes_are_pooled():
    values, groups = np.array([1.0, 1, 1, 4]), np.array([0, 0, 0, 1])
    found = bootstrap_mean(values, groups)
    assert found.mean == 1.75 and (found.low, found.high) == (1.0, 4.0) and found.groups == 2
    one = bootstrap_mean(values, np.zeros(4))  # a single group: an ordinary bootstrap
    assert abs(one.low - bootstrap_mean(values).low) < 0.3 and one.groups == 1


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]]])
def test_refuses(values):
    with pytest.raises(ValueError, match="values"):
        bootstrap_mean(np.array(values))
