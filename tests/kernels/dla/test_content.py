"""Content-addressed slot weights follow the token recurrence: outputs, gradients, caches, decoding."""

import pytest
import torch

from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_attention
from tests.support.dla_cases import Case
from tests.support.dla_cases import assert_same as same
from tests.support.dla_cases import gradients as gradients_of

each_backbone = pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
SHARPNESS = torch.tensor([3.0, -1.5], dtype=torch.float64)
CASES = [
    Case("merges, more than a chunk", T=90, B=1, capacity=4),
    Case("packed documents", T=45, documents=(13, 40, 45, 70, 71), tau=0.9, capacity=3, G=2),
    Case("every token a boundary", T=70, B=1, tau=0.0, capacity=3),
    Case("one slot", T=20, B=1, tau=2.5),
]


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        same(got[name].double(), want[name].double(), name)


def gradients(out: torch.Tensor, x: dict) -> dict:
    """The output and every gradient under a random cotangent."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    return {"out": out, **gradients_of(out, x, cotangent)}


def cut(x: dict, a: int, b: int) -> dict:
    return {name: y[:, a:b] for name, y in x.items()}


@each_backbone
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_those_of_the_recurrence(case: Case, delta: bool) -> None:
    case = Case(**{**vars(case), "delta": delta})
    results = []
    for form in (naive_attention, dla_attention):
        x = case.make() | {"sharpness": SHARPNESS.clone().requires_grad_()}
        results.append(gradients(form(**x, **case.rule)[0], x))
    assert_same(*results)
    assert results[0]["sharpness"].abs().min() > 1e-6 or case.tau > 2  # with one slot the factor is 1


@each_backbone
def test_a_sharpness_of_zero_changes_nothing_and_any_other_does(delta: bool) -> None:
    case = Case("", T=40, delta=delta)
    x = case.make()
    plain = dla_attention(**x, **case.rule)[0]
    assert_same({"out": dla_attention(**x, **case.rule, sharpness=0 * SHARPNESS)[0]}, {"out": plain})
    assert (dla_attention(**x, **case.rule, sharpness=SHARPNESS)[0] - plain).abs().max() > 0.1


@each_backbone
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_cache_continues(delta: bool, backend: str) -> None:
    case = Case("", T=100, capacity=4, delta=delta)
    x = {name: y.detach() for name, y in case.make().items()}
    rule = dict(tau=case.tau, capacity=case.capacity, sharpness=SHARPNESS)
    whole, end = dla_attention(**x, **rule, return_cache=True)
    assert end is not None and end.keys is not None
    outs, cache = [], None
    for a, b in ((0, 30), (30, 31), (31, 95)):
        out, cache = dla_attention(**cut(x, a, b), **rule, cache=cache, return_cache=True, backend=backend)
        outs.append(out)
    assert cache is not None
    for t in range(95, 100):
        outs.append(decode_step(**cut(x, t, t + 1), **rule, cache=cache)[0])
    assert_same({"out": torch.cat(outs, 1)}, {"out": whole})
    assert_same(cache.state_dict(), end.state_dict())


def test_gradients_flow_through_the_partition_that_is_given() -> None:
    case = Case("", T=50)
    x = case.make()
    part = partition(x["k"], x["v"], x["g"], **case.rule)
    results = [
        gradients(dla_attention(**x, **case.rule, sharpness=SHARPNESS, partition=given)[0], x) for given in (part, None)
    ]
    assert_same(*results)


def test_caches_of_the_other_kind_are_refused() -> None:
    case = Case("", T=4)
    x = {name: y.detach() for name, y in case.make().items()}
    rule = dict(tau=1.0, capacity=case.capacity)
    sizes = (case.B, case.H, case.capacity, case.Dk, case.Dv)
    for keys in (False, True):
        cache = SlotCache.empty(*sizes, dtype=torch.float64, keys=keys)
        with pytest.raises(ValueError, match=r"cache\.keys.*sharpness"):
            dla_attention(**x, **rule, cache=cache, sharpness=None if keys else SHARPNESS)
    with pytest.raises(ValueError, match=r"sharpness must be \[H\] = \[2\]"):
        dla_attention(**x, **rule, sharpness=SHARPNESS[:1])
    with pytest.raises(ValueError, match="sharpness"):
        dla_attention(**x, tau=torch.ones((), requires_grad=True), capacity=case.capacity, sharpness=SHARPNESS)
