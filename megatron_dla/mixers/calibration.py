"""Thresholds set to a rate of boundaries: in the first steps of a run tau moves to a quantile of each head's scores.

The scores depend on the boundaries, hence on tau, so this is an iteration: one quantile a step, averaged over the
steps. Counts are whole numbers in fixed bins, so that every rank of any layout gets the same thresholds. Between two
steps there is no state but tau itself, which checkpoints hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dla.kernels.dla import Partition
from megatron_dla.kernels.dla.cache import FIRST_SCORE

BINS = 2048
WIDTH = 2 / BINS  # scores are in [0, 2]
LEAST_STEP = 0.1  # of the way to the newest quantile


class ScoreCounts:
    """How many tokens had which score: int64 [H, BINS]."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.counts = torch.zeros(heads, BINS, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, decided: Partition, first: int) -> None:
        """Of the heads from `first` on; first tokens of documents, which open a slot at any tau, do not count."""
        score = decided.score.flatten(0, 1).T  # [H, B * T]
        begins = decided.start.flatten(0, 1).T & ((score - FIRST_SCORE).abs() < 1e-6)
        bins = (score / WIDTH).long().clamp(0, BINS - 1)
        bins = bins + BINS * torch.arange(len(bins), device=bins.device)[:, None]
        bins = torch.where(begins, len(bins) * BINS, bins).flatten()
        counts = torch.bincount(bins, minlength=len(score) * BINS + 1)[:-1]
        self.counts[first : first + len(score)] += counts.view(-1, BINS)


def threshold_for_rate(counts: Tensor, rate: float) -> Tensor:
    """float64 [H]: the score that a share `rate` of the tokens reaches; NaN of a head without tokens.

    Args:
        counts: int64 [H, BINS]. Inside a bin the scores count as spread evenly.
    """
    above = counts.flip(1).cumsum(1).flip(1)  # tokens in a bin and those over it
    wanted = rate * above[:, :1].double()
    last = (above >= wanted).sum(1, keepdim=True) - 1  # the bin in which the share is reached
    held, over = counts.gather(1, last), above.gather(1, last) - counts.gather(1, last)
    part = (wanted - over) / held.clamp(min=1)
    tau = (last + 1 - part.clamp(0, 1)) * WIDTH
    return torch.where(above[:, :1] > 0, tau, torch.nan).squeeze(1)


class Calibrated(Protocol):
    """A mixer whose `tau`, fp32 [H local], is set here."""

    tau: torch.nn.Parameter
    scores: ScoreCounts | None


def begin_step(mixers: Sequence[Calibrated]) -> None:
    """Count the scores of a step."""
    for mixer in mixers:
        mixer.scores = ScoreCounts(len(mixer.tau), mixer.tau.device)


@torch.no_grad()
def end_step(mixers: Sequence[Calibrated], step: int, rate: float, group: dist.ProcessGroup) -> None:
    """Move each tau by the scores of the step after `step` finished ones (a collective), and count no longer.

    The first step sets tau to the quantile; later ones move it by a share that falls to `LEAST_STEP`.

    Args:
        group: ranks that have other tokens, or other heads, of the same tensor-parallel rank.
    """
    counts = torch.stack([mixer.scores.counts for mixer in mixers if mixer.scores is not None])
    dist.all_reduce(counts, group=group)
    for mixer, of_layer in zip(mixers, counts, strict=True):
        wanted = threshold_for_rate(of_layer, rate)
        moved = mixer.tau + (wanted - mixer.tau) * max(1 / (step + 1), LEAST_STEP)
        mixer.tau.copy_(torch.where(wanted.isnan(), mixer.tau, moved))
        mixer.scores = None
