"""Forced replay accepts the partitions of the torch path and reports every partition corrupted in one place."""

import dataclasses

import pytest
import torch

from megatron_dla.kernels.dla import Partition, dla_attention, partition
from megatron_dla.kernels.dla.debug import Violation, forced_replay, open_scores
from tests.support.dla_cases import CASES, Case

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def decide(case: Case, dtype: torch.dtype = torch.float64, **extra) -> tuple[tuple, Partition]:
    x = {name: t.detach().to(dtype) for name, t in case.make().items()}
    args = x["k"], x["v"], x["g"], x.get("beta")
    return args, partition(*args, **{**case.rule, **extra})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_torch_partitions_pass(case: Case, dtype: torch.dtype) -> None:
    tau = torch.full((case.H,), case.tau, requires_grad=True)  # a learned threshold asks for `lo`
    args, decided = decide(case, dtype, tau=tau)
    assert decided.lo is not None
    assert forced_replay(*args, decided, **case.rule) == []


@pytest.mark.parametrize("delta", [False, True])
def test_partitions_that_continue_a_cache_pass(delta: bool) -> None:
    case = Case("continue", T=120, capacity=3, delta=delta, tau=1.0)
    x = {name: t.detach() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity}
    _, cache = dla_attention(**{name: t[:, :50] for name, t in x.items()}, **rule, return_cache=True)
    args = [None if name not in x else x[name][:, 50:] for name in ("k", "v", "g", "beta")]
    decided = partition(*args, **rule, cache=cache)
    assert decided.cache_death is not None and (decided.cache_death < 70).any()
    assert forced_replay(*args, decided, **rule, cache=cache) == []
    wrong = dataclasses.replace(decided, cache_death=torch.full_like(decided.cache_death, 70))
    assert "deaths" in kinds(forced_replay(*args, wrong, **rule, cache=cache))
    wrong = dataclasses.replace(decided, final_info=decided.final_info + 1)
    assert kinds(forced_replay(*args, wrong, **rule, cache=cache)) == {"final_info"}


def kinds(violations: list[Violation]) -> set[str]:
    return {violation.kind for violation in violations}


@pytest.mark.parametrize("delta", [False, True])
def test_one_corruption_is_reported_where_it_is(delta: bool) -> None:
    case = Case("corrupt", T=150, B=1, H=1, delta=delta, capacity=4, seed=4, tau=1.1)
    args, good = decide(case, tau=torch.full((1,), case.tau, requires_grad=True))
    T, gap = case.T, (good.score - case.tau).abs()[0, :, 0]
    fired = good.start[0, :, 0]
    starts = [t for t in range(1, T) if fired[t] and gap[t] > 0.05]
    quiet = [t for t in range(1, T) if not fired[t] and gap[t] > 0.05]
    dead = [p for p in range(T) if int(good.death[0, p, 0]) < T]
    deaths = [int(good.death[0, p, 0]) for p in dead]

    def replay(**changes: list[tuple[int, float]]) -> list[Violation]:
        fields = {}
        for name, edits in changes.items():
            fields[name] = getattr(good, name).clone()
            for t, value in edits:
                fields[name][0, t, 0] = value
        return forced_replay(*args, dataclasses.replace(good, **fields), tau=case.tau, capacity=case.capacity)

    assert len(dead) > 5 and replay() == []
    dropped = starts[len(starts) // 2]
    assert (dropped, "no start") in [(v.position, v.kind) for v in replay(start=[(dropped, False)])]
    added = quiet[len(quiet) // 2]
    assert (added, "start") in [(v.position, v.kind) for v in replay(start=[(added, True)])]
    p, at = dead[2], deaths[2]
    moved = replay(death=[(p, at + 1)])
    assert {(at, "deaths", (0, 1))} <= {(v.position, v.kind, v.numbers) for v in moved}
    assert "deaths" in kinds(replay(death=[(p, T)]))  # a merge that was not done
    idle = quiet[-1]  # no boundary, so no merge is due
    live = max(t for t in starts if t < idle)
    assert (idle, "deaths") in [(v.position, v.kind) for v in replay(death=[(live, idle)])]
    reported = []
    for other in [t for t in range(1, at) if fired[t] and int(good.death[0, t, 0]) > at]:
        swapped = replay(death=[(p, int(good.death[0, other, 0])), (other, at)])
        reported += [(v.position, v.kind) for v in swapped]
    assert (at, "victim") in reported
    assert kinds(replay(death=[(0, deaths[3]), (dead[3], T)])) & {"death of a slot that cannot merge"}
    assert "death of a token that is not a start" in kinds(replay(death=[(quiet[0], deaths[0])]))
    assert [(v.position, v.kind) for v in replay(score=[(added, 0.5)])] == [(added, "score")]
    assert (added, "score") in [(v.position, v.kind) for v in replay(score=[(added, float("nan"))])]
    assert [(v.position, v.kind) for v in replay(lo=[(T - 1, T - 1)])] == [(T - 1, "lo")]
    assert kinds(replay(start=[(0, False)], score=[(0, 1.3)])) >= {"first token is not a start", "score"}


def test_decisions_within_the_margin_are_accepted() -> None:
    case = Case("margin", T=60, B=1, H=1, capacity=60)
    args, good = decide(case)
    t = next(t for t in range(1, 60) if not good.start[0, t, 0])
    start = good.start.clone()
    start[0, t, 0] = True
    other = dataclasses.replace(good, start=start, lo=None)
    # the scores after t change with it, so they are taken from float64
    exact = open_scores(*args, start, torch.zeros(1, 60, dtype=torch.bool), None)
    other = dataclasses.replace(other, score=exact.float(), final_info=None)
    at_margin = float(good.score[0, t, 0]) + 5e-4
    wrong = forced_replay(*args, other, tau=at_margin, capacity=60)
    assert t not in [v.position for v in wrong]
    assert t in [v.position for v in forced_replay(*args, other, tau=at_margin + 1e-3, capacity=60)]
