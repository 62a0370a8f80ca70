"""Log-Linear Attention as a partition: every form follows the level recurrence of the paper (arXiv 2506.04761)."""

import math

import pytest
import torch
from torch import Tensor

from megatron_dla.kernels.dla import decode_step, dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_attention
from megatron_dla.kernels.dla.rules import EVERY_TOKEN, FENWICK
from tests.support.dla_cases import Case, assert_same, cut, decoded, gradients

each_backbone = pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
DOCUMENTS = (13, 40, 55, 56)


def rule(case: Case, **more) -> dict:
    return dict(tau=0.0, capacity=case.capacity, merge=FENWICK, controls=EVERY_TOKEN, **more)


def published(x: dict[str, Tensor], ends: list[int], levels: int) -> Tensor:
    """The token loop of the paper: before a token, the levels up to its lowest set bit move into the next one; the
    transition acts on all; level 0 is written. The last level keeps what it has."""
    v, H = x["v"], x["v"].shape[2]
    B, T = v.shape[:2]
    q, k = (x[name].repeat_interleave(H // x[name].shape[2], dim=2) for name in "qk")
    outs = []
    for b in range(B):
        for h in range(H):
            states: list[Tensor] = []
            for t in range(T):
                if b * T + t in ends or t == 0:
                    states, begin = [v.new_zeros(k.shape[-1], v.shape[-1])] * levels, t
                position = t - begin
                if position:
                    into = min((position & -position).bit_length(), levels - 1)
                    states = [v.new_zeros(states[0].shape)] * into + [sum(states[: into + 1])] + states[into + 1 :]
                kt, strength = k[b, t, h], x["beta"][b, t, h] if "beta" in x else None
                if strength is not None:
                    states = [s - strength * torch.outer(kt, kt @ s) for s in states]
                states = [x["g"][b, t, h].exp() * s for s in states]
                write = torch.outer(kt, v[b, t, h])
                states[0] = states[0] + (write if strength is None else strength * write)
                weights = x["slot_weights"][b, t, h]
                outs.append(sum(w * (q[b, t, h] @ s) for w, s in zip(weights, states, strict=True)))
    return torch.stack(outs).view(B, H, T, -1).transpose(1, 2)


CASES = [
    Case("enough levels", T=40, capacity=7),
    Case("the last level fills", T=40, capacity=4, documents=DOCUMENTS),
    Case("two levels", T=21, capacity=2, documents=(21, 30)),
    Case("three levels, one document", T=40, capacity=3, B=1),
]


@each_backbone
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_outputs_and_gradients_are_those_of_the_levels(case: Case, delta: bool, backend: str) -> None:
    case = Case(**{**case.__dict__, "delta": delta, "seed": 4})
    x, ends = case.make(), [] if case.cu_seqlens is None else case.cu_seqlens.tolist()
    want = published(x, ends, case.capacity)
    out, _ = dla_attention(**x, **rule(case, cu_seqlens=case.cu_seqlens), backend=backend, chunk_size=16)
    assert_same(out, want, "output")
    cotangent = torch.randn_like(want)
    reference = gradients(want, x, cotangent)
    for name, grad in gradients(out, x, cotangent).items():
        assert_same(grad, reference[name], f"d{name}")


@each_backbone
def test_the_partition_is_the_recurrences(delta: bool) -> None:
    case = Case("decisions", T=70, capacity=5, documents=DOCUMENTS, delta=delta)
    x = {name: y.detach() for name, y in case.make().items()}
    _, want, _ = naive_attention(**x, **rule(case, cu_seqlens=case.cu_seqlens))
    got = partition(x["k"], x["v"], x["g"], x.get("beta"), **rule(case, cu_seqlens=case.cu_seqlens))
    ends = [*DOCUMENTS, case.B * case.T]
    end = torch.tensor([min(e for e in ends if e > i) for i in range(case.B * case.T)]).view(case.B, case.T, 1)
    end = end - torch.arange(case.B)[:, None, None] * case.T
    assert bool(got.start.all()) and bool(want.start.all())
    alive = [torch.where(p.death < end, p.death, case.T) for p in (got, want)]  # a document's end ends its slots anyway
    assert torch.equal(*alive) and (alive[0] < case.T).sum() > 100


def test_levels_are_the_highest_bit_that_differs() -> None:
    """Token s is read at level floor(log2(t xor s)) + 1, by its own definition: one-hot values, no decay."""
    T, levels = 37, 9
    one = torch.ones(1, T, 1, 1, dtype=torch.float64)
    for s in (0, 5, 16):
        v = torch.zeros(1, T, 1, 1, dtype=torch.float64)
        v[0, s] = 1
        weights = torch.arange(1.0, levels + 1, dtype=torch.float64).expand(1, T, 1, levels)
        options = dict(tau=0.0, capacity=levels, merge=FENWICK, controls=EVERY_TOKEN)
        out, _ = dla_attention(one, one, v, 0 * one[..., 0], weights, **options)
        want = [0 if t < s else 1 if t == s else math.floor(math.log2(t ^ s)) + 2 for t in range(T)]
        assert out.flatten().tolist() == want


@each_backbone
@pytest.mark.parametrize("prefill", [0, 1, 11, 16])
def test_decoding_is_the_full_pass(delta: bool, prefill: int) -> None:
    case = Case("decode", T=40, capacity=5, delta=delta)
    x, options = {name: y.detach() for name, y in case.make().items()}, rule(case)
    want = published(x, [], case.capacity)
    assert_same(decoded(case, x, options, prefill)[0], want, "output")


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_pieces_and_padding_are_the_full_pass(backend: str) -> None:
    case = Case("pieces", T=48, B=1, capacity=4)
    x, options = {name: y.detach() for name, y in case.make().items()}, rule(case)
    want, outs, cache = published(x, [], case.capacity), [], None
    for a, b in ((0, 13), (13, 14), (14, 48)):
        out, cache = dla_attention(**cut(x, a, b), **options, cache=cache, return_cache=True, backend=backend)
        outs.append(out)
    assert_same(torch.cat(outs, 1), want, "output")
    want = published(cut(x, 20, 48), [], case.capacity)
    padded, cache = dla_attention(
        **cut(x, 0, 40), **options, padding=torch.tensor([20]), return_cache=True, backend=backend
    )
    outs = [padded[:, 20:]] + [decode_step(**cut(x, t, t + 1), cache=cache, **options)[0] for t in range(40, 48)]
    assert_same(torch.cat(outs, 1), want, "output")


@pytest.mark.parametrize("change", [dict(controls=EVERY_TOKEN.__class__("every", every=2)), dict(controls=None)])
def test_other_boundaries_are_refused(change: dict) -> None:
    case = Case("errors", T=20)
    options = {name: y for name, y in (rule(case) | change).items() if y is not None}
    with pytest.raises(ValueError, match="merge='fenwick' needs controls"):
        dla_attention(**case.make(), **options)
