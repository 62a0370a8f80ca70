"""The learned threshold's straight-through gradient against its definition, token by token."""

import pytest
import torch

from megatron_dla.kernels.dla import dla_attention, partition
from megatron_dla.kernels.dla import threshold as threshold_module
from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.kernels.dla.naive import naive_attention
from megatron_dla.kernels.dla.threshold import threshold_gradient
from tests.support.dense_threshold import dense_threshold_gradient, random_problem
from tests.support.dla_cases import CASES, Case, assert_same, random_case
from tests.support.materialised import slot_of


def by_definition(case: Case, x: dict, decided, cotangent: torch.Tensor, tau: torch.Tensor, temperature: float):
    """dtau from the formula of kernels/dla/threshold.py, with four loops: [H]."""
    weights = x["slot_weights"]
    out, _ = dla_attention(**{**x, "slot_weights": weights}, **case.rule, partition=decided)
    (dlam,) = torch.autograd.grad(out, weights, cotangent)
    lam, K = weights.detach(), case.capacity
    starts = document_starts(case.cu_seqlens, case.B, case.T)
    starts[:, 0] = True
    document = starts.long().cumsum(1)
    slot = slot_of(decided, starts)
    dtau = torch.zeros(case.H, dtype=torch.float64)
    for b in range(case.B):
        for h in range(case.H):
            for p in range(case.T):
                if starts[b, p]:
                    continue
                toggle, fired = 0.0, bool(decided.start[b, p, h])
                for t in range(p, case.T):
                    if document[b, t] != document[b, p] or (fired and t >= decided.death[b, p, h]):
                        continue
                    mine = (document[b] == document[b, t]) & (torch.arange(case.T) <= t)
                    for j in range(int(decided.lo[b, p, h]), p):
                        s = int(slot[b, h, t, j])
                        other = s - 1 if fired else s + 1
                        if other >= K:
                            continue
                        size = int((mine & (slot[b, h, t] == s)).sum())
                        step = (lam[b, t, h, s] - lam[b, t, h, other]) * (1 if fired else -1)
                        toggle += float(dlam[b, t, h, s] * step) / size
                soft = torch.sigmoid((decided.score[b, p, h].double() - tau[h]) / temperature)
                dtau[h] -= toggle * soft * (1 - soft) / temperature
    return dtau


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("documents", [(), (17, 30, 41)])
def test_gradient_equals_its_definition(delta: bool, documents: tuple) -> None:
    case = Case("tau", T=30, capacity=3, delta=delta, documents=documents, topic=4, tau=1.1)
    x = case.make()
    tau = torch.tensor([1.1, 1.2], dtype=torch.float64, requires_grad=True)
    rule = {"capacity": case.capacity, "cu_seqlens": case.cu_seqlens}
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), tau=tau, **rule)
    out, _ = dla_attention(**x, tau=tau, partition=decided, **rule, tau_temperature=0.2)
    cotangent = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, tau, cotangent, retain_graph=True)
    want = by_definition(case, x, decided, cotangent, tau.detach(), 0.2)
    assert (decided.death < case.T).any() and not decided.start.all()
    assert_same(got, want, "dtau", 1e-6)  # the stored score is fp32
    alone, _ = dla_attention(**x, tau=tau, **rule, tau_temperature=0.2)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("case", [*CASES, *(random_case(i) for i in range(20))], ids=lambda c: c.name)
def test_linear_pass_equals_the_dense_definition(case: Case) -> None:
    args = random_problem(case)
    assert_same(threshold_gradient(*args), dense_threshold_gradient(*args), "dtau", 1e-12)


def test_cases_have_fired_and_unfired_toggles_and_partial_ranges() -> None:
    """What the comparison above would be blind without."""
    _, _, start, death, lo, _, begin, _, _ = random_problem(CASES[0])
    T = start.shape[1]
    assert (start & (death < T)).any() and (~start).any()
    full = lo > begin.clamp(min=0)  # with a full cache only a part of the tokens moves
    assert (full & start).any() and (full & ~start).any()


def test_lanes_are_independent_of_their_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    args = random_problem(Case("groups", T=60, B=3, documents=(40, 90)))
    whole = threshold_gradient(*args)
    monkeypatch.setattr(threshold_module, "ELEMENTS", 1)
    assert_same(threshold_gradient(*args), whole, "dtau", 1e-13)


def test_fp32_weights_cost_no_digits() -> None:
    args = random_problem(Case("fp32", T=300, B=1, topic=5), torch.float32)
    double = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    got = threshold_gradient(*args)
    assert got.dtype == torch.float32
    assert_same(got.double(), dense_threshold_gradient(*double), "dtau", 1e-6)


@pytest.mark.parametrize("case", [Case("a", tau=1.0, T=120), Case("b", tau=1.1, T=90, documents=(30, 70, 140))])
def test_lowest_moved_token_matches_the_oracle(case: Case) -> None:
    x = case.make()
    tau = torch.full((case.H,), case.tau, dtype=torch.float64, requires_grad=True)
    rule = {**case.rule, "tau": tau}
    got = partition(x["k"], x["v"], x["g"], **rule)
    _, want, _ = naive_attention(**x, **{**rule, "tau": tau.detach()})
    assert torch.equal(got.lo, want.lo)
    assert got.lo.max() > 0


def test_gradient_pulls_tau_towards_the_teacher() -> None:
    """A student with another tau than its teacher (1.0): the mean gradient has the right sign on both sides."""
    case = Case("teacher", T=96, B=40, H=1, capacity=8, tau=1.0, topic=4, noise=0.8, decay=0.02)
    x = {name: t.detach() for name, t in case.make().items()}
    weights = torch.rand(8, generator=torch.Generator().manual_seed(1)).double() * 2
    x["slot_weights"] = weights.expand_as(x["slot_weights"]).contiguous()
    target, _ = dla_attention(**x, tau=case.tau, capacity=8)
    gradient = {}
    for student in (0.7, 1.1):
        tau = torch.tensor([student], dtype=torch.float64, requires_grad=True)
        out, _ = dla_attention(**x, tau=tau, capacity=8)
        error = (out - target).square().mean((1, 2, 3)) / target.square().mean((1, 2, 3))
        gradient[student] = torch.autograd.grad(error.sum(), tau)[0].item()
    assert gradient[0.7] < 0 < gradient[1.1], gradient


def test_needs_the_density_rule_and_no_cache() -> None:
    case = Case("refuse", T=20)
    x = case.make()
    tau = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"merge='density'.*without an incoming cache"):
        dla_attention(**x, tau=tau, capacity=case.capacity, merge="ward")
    plain = partition(x["k"], x["v"], x["g"], tau=1.0, capacity=case.capacity)
    with pytest.raises(ValueError, match=r"partition.lo is missing"):
        dla_attention(**x, tau=tau, capacity=case.capacity, partition=plain)
