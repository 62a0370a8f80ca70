"""The soft gate: its limit is the hard form, its definition holds token by token, every gradient is exact."""

from dataclasses import replace

import pytest
import torch

from megatron_dla.kernels.dla import dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_soft_attention
from megatron_dla.kernels.dla.soft import interpolated_weights, soft_attention
from tests.support.dla_cases import CASES, Case, assert_same, gradients, random_case


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("documents", [(), (5, 20, 23, 37)])
def test_outputs_and_gradients_are_the_recurrences(delta: bool, documents: tuple) -> None:
    case = Case("soft", T=23, capacity=3, delta=delta, documents=documents, topic=3)
    x, tau = case.make(), torch.tensor([1.0, 1.2], dtype=torch.float64, requires_grad=True)
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **{**case.rule, "tau": tau.detach()})
    rule = {"tau": tau, "temperature": 0.3, "cu_seqlens": case.cu_seqlens}
    want = naive_soft_attention(**x, score=decided.score, **rule)
    cotangent = torch.randn_like(want)
    reference = gradients(want, x | {"tau": tau}, cotangent)
    for chunk_size in (4, 8, 64):
        got, rate = soft_attention(**x, **rule, chunk_size=chunk_size)
        assert_same(got, want, f"chunk {chunk_size}")
        for name, grad in gradients(got, x | {"tau": tau}, cotangent).items():
            assert_same(grad, reference[name], f"d{name}, chunk {chunk_size}")
    assert torch.equal(rate, decided.boundary_rate())


COLD = [replace(c, capacity=64, T=min(c.T, 60), documents=tuple(d for d in c.documents if d < 100)) for c in CASES]


@pytest.mark.parametrize("case", [c for c in COLD if c.tau > 0], ids=lambda c: c.name)
def test_cold_gates_are_the_hard_form(case: Case) -> None:
    """Without merges: capacity 64 of at most 60 tokens."""
    x = case.make()
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    assert (decided.score - case.tau).abs().min() > 1e-5 and (decided.death == case.T).all()
    hard, _ = dla_attention(**x, **case.rule)
    soft, _ = soft_attention(**x, tau=case.tau, temperature=1e-8, cu_seqlens=case.cu_seqlens, chunk_size=16)
    assert_same(soft, hard, "output")
    cotangent = torch.randn_like(hard)
    reference = gradients(hard, x, cotangent)
    for name, grad in gradients(soft, x, cotangent).items():
        assert_same(grad, reference[name], f"d{name}")


def test_beyond_the_last_slot_reads_the_last_weight() -> None:
    lam = torch.tensor([[[1.0, 2.0, 4.0]]]).double()
    r = torch.tensor([[[-0.5, 0.0, 0.25, 1.0, 1.5, 2.0, 7.0]]]).double()
    want = [1.0, 1.0, 1.25, 2.0, 3.0, 4.0, 4.0]
    assert interpolated_weights(lam, r).flatten().tolist() == want


@pytest.mark.parametrize("case", [random_case(i) for i in range(200, 206)], ids=lambda c: c.name)
def test_gradient_of_tau_by_finite_differences(case: Case) -> None:
    """The scores stay those of one partition: tau's effect on them is not differentiated."""
    x = {name: t.detach() for name, t in case.make().items()}
    tau = torch.full((case.H,), case.tau, dtype=torch.float64, requires_grad=True)
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **{**case.rule, "tau": tau.detach()})
    cotangent = torch.randn_like(x["v"])

    def loss(at: torch.Tensor) -> torch.Tensor:
        rule = {"temperature": 0.2, "cu_seqlens": case.cu_seqlens, "partition": decided, "chunk_size": 16}
        return (soft_attention(**x, tau=at, **rule)[0] * cotangent).sum()

    (got,) = torch.autograd.grad(loss(tau), tau)
    step = 1e-6 * torch.eye(case.H, dtype=torch.float64)
    want = torch.stack([(loss(tau.detach() + e) - loss(tau.detach() - e)) / 2e-6 for e in step])
    assert_same(got, want, "dtau", 1e-5)


@pytest.mark.parametrize("delta", [False, True])
def test_gradcheck(delta: bool) -> None:
    case = Case("check", T=9, B=1, Dk=3, Dv=2, capacity=3, delta=delta, documents=(4,), topic=2)
    x = case.make()
    tau = torch.tensor([1.0, 1.2], dtype=torch.float64, requires_grad=True)
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **{**case.rule, "tau": tau.detach()})

    def run(tau: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        rule = {"temperature": 0.3, "cu_seqlens": case.cu_seqlens, "partition": decided, "chunk_size": 4}
        return soft_attention(**dict(zip(x, tensors, strict=True)), tau=tau, **rule)[0]

    assert torch.autograd.gradcheck(run, (tau, *x.values()), fast_mode=True)


def test_documents_do_not_see_each_other() -> None:
    case = Case("leak", T=48, B=1, documents=(17,))
    x = {name: t.detach().float() for name, t in case.make().items()}
    rule = {"tau": 1.1, "temperature": 0.3, "cu_seqlens": case.cu_seqlens, "chunk_size": 8}
    before, _ = soft_attention(**x, **rule)
    for name in ("k", "v", "q", "g"):
        x[name][:, 16] *= 1.5
    after, _ = soft_attention(**x, **rule)
    assert torch.equal(before[:, 17:], after[:, 17:])
    assert not torch.equal(before[:, 16], after[:, 16])


def test_bad_arguments_are_named() -> None:
    x = Case("errors", T=10).make()
    with pytest.raises(ValueError, match="temperature must be positive"):
        soft_attention(**x, tau=1.0, temperature=0.0)
    x["slot_weights"] = x["slot_weights"][..., :1]
    with pytest.raises(ValueError, match="slot_weights must be"):
        soft_attention(**x, tau=1.0, temperature=0.1)
