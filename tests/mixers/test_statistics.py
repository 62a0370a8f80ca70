"""How slots are used, counted in a training step: against the partitions themselves, and the same at every layout."""

import dataclasses
import math

import pytest
import torch

from megatron_dla.config import ParallelSection
from megatron_dla.kernels.dla.statistics import sizes
from megatron_dla.mixers.statistics import LEAST, MOST, degenerate
from tests.support import workers
from tests.support.workers import BASE_SECTION

SECTION = dataclasses.replace(BASE_SECTION, num_groups=4, capacity=4, tau=1.1)
DOCUMENTS = [0, 13, 14, 48, 60, 96]  # five


@pytest.fixture
def alone(ranks):
    return ranks(2).run(workers.slot_statistics, SECTION, workers.ALONE, DOCUMENTS, 3)[0]


def test_one_process_counts_what_its_partitions_hold(alone) -> None:
    (found, rate), partitions, weights = alone
    inside = sum(int(part.start.sum()) for part in partitions) - 2 * 4 * 5  # five documents, four heads, two layers
    assert rate == pytest.approx(inside / (2 * 4 * 96)) and rate > 0.1
    for layer, (part, share) in enumerate(zip(partitions, found["newest_merge_share_by_layer"], strict=True)):
        merged = newest = 0
        for b in range(2):
            for h in range(4):
                start, death = part.start[b, :, h], part.death[b, :, h]
                opened = start.nonzero().flatten().tolist()
                for p in opened:
                    if death[p] < 48:
                        merged += 1
                        newest += max(o for o in opened if o < death[p]) == p
        assert merged > 5 and share == pytest.approx(newest / merged, abs=1e-4), layer
    bins: dict[int, int] = {}
    for part in partitions:
        for b, begin in ((0, 14), (1, 12)):  # of the last document of the row
            for h in range(4):
                last = sizes(part.start[b, begin:, h], part.death[b, begin:, h] - begin, 4)[-1].tolist()
                for n in filter(None, last):
                    bins[int(math.log2(n))] = bins.get(int(math.log2(n)), 0) + 1
    total = sum(bins.values())
    want = {"1" if n == 0 else f"{2**n}-{2 ** (n + 1) - 1}": c / total for n, c in sorted(bins.items())}
    assert found["slot_sizes"] == pytest.approx(want, abs=1e-4)
    mean = torch.stack(weights).double().mean((0, 1, 2, 3))
    assert list(found["slot_weights"].values()) == pytest.approx(mean.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "parallel", [ParallelSection(2, True), ParallelSection(context_parallel_size=2)], ids=["tp", "cp"]
)
def test_layouts_agree(ranks, alone, parallel: ParallelSection) -> None:
    for found, _, _ in ranks(2).run(workers.slot_statistics, SECTION, parallel, DOCUMENTS, 3):
        assert found[0] == alone[0][0] and found[1] == pytest.approx(alone[0][1])


def test_a_chain_counts_weights_of_all_tokens(ranks, alone) -> None:
    parallel = ParallelSection(context_parallel_size=2, cp_scheme="chain")
    for found, _, _ in ranks(2).run(workers.slot_statistics, SECTION, parallel, DOCUMENTS, 3):
        metrics, rate = found
        assert metrics["slot_weights"] == alone[0][0]["slot_weights"] and "slot_sizes" not in metrics
        assert rate == pytest.approx(alone[0][1])


def test_a_gate_that_decides_nothing_has_a_remedy() -> None:
    assert degenerate(0.3) == degenerate(MOST) == degenerate(LEAST) == ""
    assert "raise model.tau" in degenerate(0.9) and "lower model.tau" in degenerate(0.0)
