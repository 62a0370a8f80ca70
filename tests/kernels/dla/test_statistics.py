"""Counts of a partition against a walk over its slots, token by token."""

import pytest
import torch

from megatron_dla.kernels.dla import partition
from megatron_dla.kernels.dla.statistics import count, sizes
from tests.support.dla_cases import Case


def walk(start: torch.Tensor, death: torch.Tensor, begins: set[int]) -> tuple[int, int, int, list[list[int]]]:
    """(boundaries, merges, those of the newest two, sizes oldest first after each token) of one head's row."""
    slots: list[list[int]] = []  # [opened at, tokens]
    boundaries = merges = newest = 0
    after = []
    for t in range(len(start)):
        if t in begins:
            slots = []
        for i in range(len(slots) - 1, 0, -1):
            if int(death[slots[i][0]]) == t:
                merges += 1
                newest += i == len(slots) - 1
                slots[i - 1][1] += slots.pop(i)[1]
        if start[t]:
            boundaries += 1
            slots.append([t, 0])
        slots[-1][1] += 1
        after.append([n for _, n in slots])
    return boundaries, merges, newest, after


@pytest.mark.parametrize("merge", ["density", "oldest", "random"])
@pytest.mark.parametrize("documents", [(), (30, 60, 61, 100)])
def test_counts_are_a_walk(merge: str, documents: tuple[int, ...]) -> None:
    case = Case("counts", T=60, capacity=4, tau=1.0, topic=4, documents=documents, seed=2)
    x = case.make()
    part = partition(x["k"], x["v"], x["g"], tau=case.tau, capacity=4, merge=merge, cu_seqlens=case.cu_seqlens)
    got, totals = count(part), torch.zeros(3, case.H, dtype=torch.int64)
    for b in range(case.B):
        for h in range(case.H):
            begins = {0} | {d - b * case.T for d in documents}
            *numbers, after = walk(part.start[b, :, h], part.death[b, :, h], begins)
            totals[:, h] += torch.tensor(numbers)
            if not documents:
                found = sizes(part.start[b, :, h], part.death[b, :, h], 4)
                assert [[n for n in reversed(row) if n] for row in found.tolist()] == after
    assert got.tokens.tolist() == [case.B * case.T] * case.H
    assert torch.equal(torch.stack([got.boundaries, got.merges, got.newest]), totals)
    assert (totals[1] > 5).all() and (totals[2] > 0).any() == (merge != "oldest")
