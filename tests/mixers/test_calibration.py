"""Thresholds for a rate of boundaries: the quantile, what counts, and how far a step moves."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dla.kernels.dla import partition
from megatron_dla.mixers.calibration import BINS, WIDTH, ScoreCounts, end_step, threshold_for_rate
from tests.support.dla_cases import Case


@pytest.mark.parametrize("rate", [0.01, 0.25, 1.0])
def test_the_share_of_scores_that_reach_it_is_the_rate(rate: float) -> None:
    score = 2 * torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0)) ** 2
    counts = torch.stack([torch.histc(x, BINS, 0, 2) for x in score]).long()
    tau = threshold_for_rate(counts, rate)
    share = (score >= tau[:, None]).double().mean(1)
    assert (share - rate).abs().max() < 1e-3
    want = torch.quantile(score.double(), 1 - rate, dim=1)
    assert (tau - want).abs().max() < 2 * WIDTH


def test_a_head_without_tokens_keeps_its_threshold() -> None:
    assert threshold_for_rate(torch.zeros(2, BINS, dtype=torch.int64), 0.1).isnan().all()


def test_first_tokens_of_documents_do_not_count() -> None:
    case = Case("count", T=50, B=2, H=2, documents=(20, 50, 61))
    x = case.make()
    decided = partition(x["k"], x["v"], x["g"], **case.rule)
    counts = ScoreCounts(3, torch.device("cpu"))
    counts.add(decided, 1)
    assert counts.counts.sum(1).tolist() == [0, 96, 96]
    bins = (decided.score[0, 1:19, 0] / WIDTH).long().flatten().bincount(minlength=BINS)
    assert (counts.counts[1] >= bins).all()


def test_later_steps_move_by_less(ranks) -> None:
    assert ranks(1).run(moves) == [[1.5, 1.25, 0.1]]


def moves() -> list[float]:
    """Share of the way from tau = 1 to the quantile, where all scores are 1.5, at three steps."""
    found = []
    for step in (0, 1, 50):
        mixer = SimpleNamespace(tau=torch.nn.Parameter(torch.ones(1), requires_grad=False), scores=None)
        mixer.scores = ScoreCounts(1, torch.device("cpu"))
        mixer.scores.counts[0, round(1.5 / WIDTH) - 1] = 1000
        end_step([mixer], step, 1e-9, torch.distributed.group.WORLD)
        assert mixer.scores is None
        found.append(mixer.tau.item() if step < 2 else round((mixer.tau.item() - 1) / 0.5, 3))
    return found
