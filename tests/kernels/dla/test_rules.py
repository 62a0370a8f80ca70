"""Every rule of boundaries and merges: all forms follow the float64 recurrence, wherever the tokens are."""

from dataclasses import replace

import pytest
import torch

from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention, partition
from megatron_dla.kernels.dla.debug import forced_replay
from megatron_dla.kernels.dla.naive import naive_attention
from megatron_dla.kernels.dla.rules import BOUNDARIES, MERGES, Controls, draw, head_key, pair_of
from tests.support.dla_cases import Case, assert_same, cut, decoded, gradients

RULES = {
    **{f"{merge} merges": (merge, Controls(seed=5, layer=3)) for merge in MERGES},
    "random boundaries": ("density", Controls("random", rate=0.3, seed=7, layer=1)),
    "every 4": ("equal_counts", Controls("every", every=4)),
    "random boundaries and merges": ("random", Controls("random", rate=0.4, seed=1, first_head=6)),
    "every 3, oldest": ("oldest", Controls("every", every=3)),
    "random boundaries, ward": ("ward", Controls("random", rate=0.3)),
}
FIELDS = ("start", "count", "live", "position")
each_rule = pytest.mark.parametrize("rule", RULES)
each_backbone = pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])


def rule_of(name: str, case: Case) -> dict:
    merge, controls = RULES[name]
    return dict(tau=case.tau, capacity=case.capacity, merge=merge, controls=controls)


def decided(x: dict) -> tuple:
    return x["k"], x["v"], x["g"], x.get("beta")


def test_the_rules_here_are_all() -> None:
    assert {merge for merge, _ in RULES.values()} == set(MERGES)
    assert {controls.boundary for _, controls in RULES.values()} == set(BOUNDARIES)


@each_rule
@each_backbone
def test_decisions_outputs_and_gradients_are_the_recurrences(rule: str, delta: bool) -> None:
    case = Case("rules", T=40, capacity=4, tau=1.0, documents=(13, 40, 55), delta=delta, seed=3, topic=5)
    x, options = case.make(), rule_of(rule, case) | {"cu_seqlens": case.cu_seqlens}
    want, partition_, _ = naive_attention(**x, **options)
    got = partition(*decided(x), **options)
    assert torch.equal(got.start, partition_.start) and torch.equal(got.death, partition_.death)
    torch.testing.assert_close(got.score, partition_.score, atol=1e-6, rtol=0)
    assert (got.death < case.T).sum() > 5  # merges happened
    if options["merge"] != "ward":
        assert forced_replay(*(None if y is None else y.detach() for y in decided(x)), got, **options) == []
    out, _ = dla_attention(**x, **options, chunk_size=16)
    assert_same(out, want, "output")
    cotangent = torch.randn_like(want)
    reference = gradients(want, x, cotangent)
    for name, grad in gradients(out, x, cotangent).items():
        assert_same(grad, reference[name], f"d{name}")


def test_the_rules_differ() -> None:
    case = Case("rules", T=60, capacity=4, tau=1.0, topic=5)
    args = decided(case.make())
    found = {name: partition(*args, **rule_of(name, case)) for name in RULES}
    deaths = {tuple(one.death.flatten().tolist()) for one in found.values()}
    assert len(deaths) == len(RULES)


@each_rule
@each_backbone
@pytest.mark.parametrize("prefill", [0, 11])
def test_decoding_is_the_full_pass(rule: str, delta: bool, prefill: int) -> None:
    case = Case("decode", T=30, capacity=4, tau=1.0, delta=delta, topic=4)
    x, options = {name: y.detach() for name, y in case.make().items()}, rule_of(rule, case)
    full, _, want = naive_attention(**x, **options)
    out, cache = decoded(case, x, options, prefill)
    assert_same(out, full, "output")
    for name in FIELDS:
        assert torch.equal(getattr(cache, name), getattr(want, name)), name
    assert_same(cache.states, want.states, "states")


@each_rule
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_pieces_are_the_full_pass(rule: str, backend: str) -> None:
    case = Case("pieces", T=34, B=1, capacity=3, tau=1.0, topic=5)
    x, options = {name: y.detach() for name, y in case.make().items()}, rule_of(rule, case)
    full, _, want = naive_attention(**x, **options)
    outs, cache = [], None
    for a, b in ((0, 13), (13, 14), (14, 34)):
        piece = cut(x, a, b)
        if cache is not None and options["merge"] != "ward":
            part = partition(*decided(piece), **options, cache=cache)
            assert forced_replay(*decided(piece), part, **options, cache=cache) == []
        out, cache = dla_attention(**piece, **options, cache=cache, return_cache=True, backend=backend, chunk_size=16)
        outs.append(out)
    assert_same(torch.cat(outs, 1), full, "output")
    for name in FIELDS:
        assert torch.equal(getattr(cache, name), getattr(want, name)), name


@each_rule
def test_padding_and_packing_change_no_decision(rule: str) -> None:
    """A document's decisions are the same alone, behind padding, and behind another document; decoding goes on so."""
    case = Case("places", T=48, B=1, capacity=3, tau=1.0, topic=5)
    x, options = {name: y.detach() for name, y in case.make().items()}, rule_of(rule, case)
    tail = cut(x, 20, 48)
    alone = partition(*decided(tail), **options)
    packed = partition(*decided(x), **options, cu_seqlens=torch.tensor([0, 20, 48]))
    assert torch.equal(alone.start, packed.start[:, 20:])
    died = alone.death[alone.start] < 28
    assert torch.equal(torch.where(died, alone.death[alone.start] + 20, 48), packed.death[:, 20:][alone.start])
    want, _ = dla_attention(**tail, **options)
    padded, cache = dla_attention(**cut(x, 0, 40), **options, padding=torch.tensor([20]), return_cache=True)
    outs = [padded[:, 20:]] + [decode_step(**cut(x, t, t + 1), cache=cache, **options)[0] for t in range(40, 48)]
    assert_same(torch.cat(outs, 1), want, "output")


@pytest.mark.parametrize("name", ["random boundaries", "random merges", "random boundaries and merges"])
def test_heads_decide_alike_at_every_layout(name: str) -> None:
    case = Case("heads", T=40, H=4, G=4, capacity=3, tau=0.5)
    args, options = decided(case.make()), rule_of(name, case)
    whole = partition(*args, **options)
    own = options["controls"].from_head(2)
    part = partition(*(None if y is None else y[:, :, 2:] for y in args), **options | {"controls": own})
    assert torch.equal(whole.start[:, :, 2:], part.start) and torch.equal(whole.death[:, :, 2:], part.death)
    for other in (replace(own, first_head=1), replace(own, layer=9), replace(own, seed=99)):
        found = partition(*(None if y is None else y[:, :, 2:] for y in args), **options | {"controls": other})
        assert not torch.equal(found.death, part.death)


def test_random_numbers() -> None:
    """They look random, and stay what they are: exported models and checkpoints depend on them."""
    numbers = torch.stack([draw(head_key(3, layer, 0, 0), torch.arange(8192)) for layer in range(8)])
    assert int(numbers.min()) >= 0 and int(numbers.max()) < 2**32
    share = numbers.double() / 2**32
    assert (share.mean(1) - 0.5).abs().max() < 0.02 and (share.std(1) - 12**-0.5).abs().max() < 0.01
    assert (torch.corrcoef(share) - torch.eye(8)).abs().max() < 0.05
    after = torch.stack([torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1] for x in share])
    assert after.abs().max() < 0.05
    counts = pair_of(numbers[0], 5).bincount()
    assert len(counts) == 4 and (counts - 2048).abs().max() < 150
    assert draw(head_key(0, 0, 0, 0), torch.arange(3)).tolist() == [draw(head_key(0, 0, 0, 0), t) for t in range(3)]
    assert [draw(head_key(5, 2, 7, 1), t) for t in (0, 1, 10**6)] == PINNED


PINNED = [2998530240, 1324192600, 797775386]


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_random_boundaries_have_their_rate(rate: float) -> None:
    case = Case("rate", T=6000, B=1, H=2, Dk=2, Dv=2)
    found = partition(*decided(case.make()), tau=0.0, capacity=4, controls=Controls("random", rate=rate))
    assert (found.boundary_rate() - rate).abs().max() < 0.01


@pytest.mark.parametrize("rule", ["every 4", "random boundaries", "oldest merges", "random merges"])
def test_replay_reports_a_control_that_is_not_followed(rule: str) -> None:
    case = Case("corrupt", T=60, B=1, H=1, capacity=4, tau=1.0, topic=5)
    args, options = [None if y is None else y.detach() for y in decided(case.make())], rule_of(rule, case)
    good = partition(*args, **options)
    assert forced_replay(*args, good, **options) == []
    if options["controls"].boundary != "information":
        t = int(good.start[0, 30:, 0].int().argmax()) + 30
        start = good.start.clone()
        start[0, t, 0] = False
        wrong = forced_replay(*args, replace(good, start=start), **options)
        assert (t, "no start") in [(v.position, v.kind) for v in wrong]
    else:
        other = partition(*args, **options | {"merge": "equal_counts"})
        assert "victim" in {v.kind for v in forced_replay(*args, other, **options)}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"merge": "newest"}, "merge must be one of"),
        ({"controls": Controls("never")}, "controls.boundary must be one of"),
        ({"controls": Controls("random", rate=1.5)}, "controls.rate must be in"),
        ({"controls": Controls("every", every=0)}, "controls.every must be at least 1"),
        ({"controls": Controls("every"), "tau": 3.0, "capacity": 1}, "capacity must be at least 2"),
        ({"controls": Controls("every"), "tau": torch.ones(2, requires_grad=True)}, "boundaries by information"),
    ],
)
def test_bad_rules_are_named(change: dict, message: str) -> None:
    case = Case("errors", T=20)
    x = case.make()
    if "capacity" in change:
        x["slot_weights"] = x["slot_weights"][..., :1]
    with pytest.raises(ValueError, match=message):
        dla_attention(**{**x, **case.rule, **change})


def test_decoding_compiles_into_one_graph() -> None:
    case = Case("compiled", T=24, tau=1.1, capacity=3)
    x = {name: y.detach() for name, y in case.make().items()}
    options = rule_of("random boundaries and merges", case)
    torch.compiler.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    cache = SlotCache.empty(case.B, case.H, case.capacity, case.Dk, case.Dv, dtype=torch.float64)
    plain = cache.clone()
    with torch.no_grad():
        for t in range(case.T):
            got, _ = compiled(**cut(x, t, t + 1), cache=cache, **options)
            want, _ = decode_step(**cut(x, t, t + 1), cache=plain, **options)
            assert_same(got, want, "output")
    assert (plain.live == case.capacity).any() and torch.equal(plain.start, cache.start)
