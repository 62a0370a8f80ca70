"""Prefill + decode = full pass; caches chain, carry gradients, stay constant in size and survive a save."""

import pytest
import torch

from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_attention
from tests.support.dla_cases import Case, assert_same, cut

FIELDS = ("start", "count", "live", "position")


def cases() -> list[Case]:
    plain = [
        Case("merges", T=90, tau=1.1, capacity=4),
        Case("two slots, groups", T=70, capacity=2, H=4, G=2),
        Case("strong decay", T=60, decay=5.0, capacity=3),
        Case("all boundaries", T=40, tau=0.0, capacity=5),
    ]
    return [Case(**{**c.__dict__, "delta": d, "name": f"{c.name} {d}"}) for c in plain for d in (False, True)]


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("prefill", [0, 1, 37])
def test_prefill_then_decode_is_the_full_pass(case: Case, prefill: int) -> None:
    x = {name: t.detach() for name, t in case.make().items()}
    full, decided, want = naive_attention(**x, **case.rule)
    rule = {"tau": case.tau, "capacity": case.capacity}
    if prefill:
        first, cache = dla_attention(**cut(x, 0, prefill), **rule, return_cache=True, chunk_size=case.chunk_size)
        outs = [first]
    else:
        cache = SlotCache.empty(case.B, case.H, case.capacity, case.Dk, case.Dv, dtype=torch.float64)
        outs = []
    size = cache.nbytes
    for t in range(prefill, case.T):
        one = cut(x, t, t + 1)
        out, same = decode_step(**one, cache=cache, **rule)
        assert same is cache
        outs.append(out)
    assert_same(torch.cat(outs, 1), full, "output")
    assert cache.nbytes == size and (cache.position == case.T).all()
    for name in FIELDS:
        assert torch.equal(getattr(cache, name), getattr(want, name)), name
    assert_same(cache.states, want.states, "states")
    torch.testing.assert_close(cache.info, want.info, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_chunked_prefill_is_the_full_pass(case: Case, backend: str) -> None:
    x = case.make()
    full, _, want = naive_attention(**x, **case.rule)
    rule = {"tau": case.tau, "capacity": case.capacity, "backend": backend, "return_cache": True}
    outs, cache = [], None
    for a, b in ((0, 13), (13, 33), (33, case.T)):
        out, cache = dla_attention(**cut(x, a, b), **rule, cache=cache, chunk_size=16)
        outs.append(out)
    got = torch.cat(outs, 1)
    assert_same(got, full, "output")
    for name in FIELDS:
        assert torch.equal(getattr(cache, name), getattr(want, name)), name
    # the gradient flows through the caches: out of the final states and into the first piece's inputs
    cotangents = torch.randn_like(full), torch.randn_like(want.states)
    leaves = list(x.values())
    reference = torch.autograd.grad((full, want.states), leaves, cotangents)
    grads = torch.autograd.grad((got, cache.states), leaves, cotangents)
    for name, a, b in zip(x, grads, reference, strict=True):
        assert_same(a, b, f"d{name}")


def test_cached_partition_reports_the_death_of_inherited_slots() -> None:
    case = Case("inherit", T=80, tau=1.0, capacity=3)
    x = {name: t.detach() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity}
    _, cache = dla_attention(**cut(x, 0, 40), **rule, return_cache=True)
    later = cut(x, 40, 80)
    args = later["k"], later["v"], later["g"]
    for merge in ("density", "ward"):
        want = partition(*args, **rule, merge=merge, cache=cache, backend="naive")
        got = partition(*args, **rule, merge=merge, cache=cache, backend="torch")
        assert torch.equal(got.cache_death, want.cache_death) and torch.equal(got.death, want.death)
        assert (want.cache_death < 40).any()


def test_packed_documents_with_caches() -> None:
    case = Case("packed", T=60, B=1, documents=(20, 45), tau=1.0, capacity=3)
    x = {name: t.detach() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity}
    want, _ = dla_attention(**x, **case.rule)
    got, cache = dla_attention(**x, **case.rule, return_cache=True)
    assert_same(got, want, "output")
    assert cache.states.shape[0] == 3
    _, alone = dla_attention(**cut(x, 20, 45), **rule, return_cache=True)
    assert_same(cache.states[1:2], alone.states, "second document's memory")
    again, _ = dla_attention(**x, **case.rule, cache=cache)
    alone_again, _ = dla_attention(**cut(x, 20, 45), **rule, cache=alone)
    assert_same(again[:, 20:45], alone_again, "each document continues its own memory")


def test_cache_saves_forks_and_refuses_other_shapes() -> None:
    case = Case("save", T=30, capacity=3)
    x = {name: t.detach() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity}
    _, cache = dla_attention(**cut(x, 0, 20), **rule, return_cache=True)
    fork = cache.clone()
    copy = SlotCache.empty(case.B, case.H, 3, case.Dk, case.Dv, dtype=torch.float64)
    copy.load_state_dict(cache.state_dict())
    outs = [decode_step(**cut(x, 20, 21), cache=c, **rule)[0] for c in (cache, fork, copy)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert (copy.position == 21).all()
    with pytest.raises(ValueError, match="states has shape"):
        SlotCache.empty(1, case.H, 3, case.Dk, case.Dv).load_state_dict(cache.state_dict())
    with pytest.raises(ValueError, match="expected the fields"):
        copy.load_state_dict({"states": copy.states})
    with pytest.raises(ValueError, match=r"cache.states must be"):
        decode_step(**cut(x, 20, 21), cache=cache.select(torch.tensor([0])), **rule)
    with pytest.raises(ValueError, match="one token"):
        decode_step(**cut(x, 20, 22), cache=cache, **rule)


@pytest.mark.parametrize("delta", [False, True])
def test_ties_break_alike_in_all_forms(delta: bool) -> None:
    """Writes of one direction and either sign: scores are 0, sqrt(2) or 2 in any arithmetic, so costs tie exactly.

    Every boundary and every merge must be the oldest pair's in all forms. (With cosines in between, forms that sum in
    another order differ by a rounding on some processors, and such a near-tie may go either way.)
    """
    gen = torch.Generator().manual_seed(3)
    for capacity in (2, 4):
        T = 40
        sign = 2.0 * torch.randint(0, 2, (2, T, 2, 1), generator=gen).double() - 1
        k = torch.nn.functional.one_hot(torch.zeros(2, T, 2, dtype=torch.long), 5).double()
        k[0, 7], k[1, 9] = 0, 0  # tokens that write nothing
        x = {
            "q": torch.randn(2, T, 2, 5, generator=gen).double(), "k": k,
            "v": sign * torch.tensor([1.0, 0, 0]).double(), "g": torch.zeros(2, T, 2).double(),
            "slot_weights": torch.rand(2, T, 2, capacity, generator=gen).double(),
        }  # fmt: skip
        if delta:
            x["beta"] = torch.ones(2, T, 2).double()
        rule = {"tau": 1.2, "capacity": capacity}
        full, decided, _ = naive_attention(**x, **rule)
        assert ((decided.score < 1e-6) | (decided.score > 1.41)).all() and (decided.death < T).sum() > 20
        got = partition(x["k"], x["v"], x["g"], x.get("beta"), **rule)
        assert torch.equal(got.start, decided.start) and torch.equal(got.death, decided.death)
        first, cache = dla_attention(**cut(x, 0, 17), **rule, return_cache=True)
        outs = [first] + [decode_step(**cut(x, t, t + 1), cache=cache, **rule)[0] for t in range(17, T)]
        assert_same(torch.cat(outs, 1), full, "prefill + decode")


def test_packed_rows_and_their_caches_agree_on_row_borders() -> None:
    case = Case("rows", T=40, B=2, documents=(30, 40, 55), tau=1.0, capacity=3)
    x = {name: t.detach() for name, t in case.make().items()}
    plain, _ = dla_attention(**x, **case.rule)
    cached, cache = dla_attention(**x, **case.rule, return_cache=True)
    assert_same(cached, plain, "output")
    assert cache.position.tolist() == [30, 10, 15, 25]
    with pytest.raises(ValueError, match="name every row start"):
        dla_attention(**x, **case.rule | {"cu_seqlens": torch.tensor([0, 30, 80])}, return_cache=True)


@pytest.mark.parametrize("merge", ["density", "ward"])
@pytest.mark.parametrize("delta", [False, True])
def test_decoding_compiles_into_one_graph(delta: bool, merge: str) -> None:
    case = Case("compiled", T=50, tau=1.1, capacity=3, delta=delta)
    x = {name: t.detach() for name, t in case.make().items()}
    rule = {"tau": case.tau, "capacity": case.capacity, "merge": merge}
    torch.compiler.reset()
    compiled = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    cache = SlotCache.empty(case.B, case.H, case.capacity, case.Dk, case.Dv, dtype=torch.float64)
    plain = cache.clone()
    with torch.no_grad():
        for t in range(case.T):
            got, _ = compiled(**cut(x, t, t + 1), cache=cache, **rule)
            want, _ = decode_step(**cut(x, t, t + 1), cache=plain, **rule)
            assert_same(got, want, "output")
    assert (plain.live == case.capacity).any()
    for name in (*FIELDS, "info", "states"):
        torch.testing.assert_close(getattr(cache, name), getattr(plain, name), msg=name)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("delta", [False, True])
def test_padding_is_no_part_of_a_row(delta: bool, backend: str) -> None:
    case = Case("padded", T=50, B=3, tau=1.1, capacity=3, delta=delta)
    x, padding = case.make(), torch.tensor([0, 17, 49])
    rule = {"tau": case.tau, "capacity": case.capacity, "return_cache": True, "backend": backend}
    out, cache = dla_attention(**x, **rule, padding=padding, chunk_size=16)
    assert out.isfinite().all() and (cache.position == case.T).all()
    cotangent = torch.randn_like(cache.states)
    got = torch.autograd.grad((out[1, 17:].sum(), cache.states), (x["v"], x["k"]), (torch.tensor(1.0), cotangent))
    for row, skip in enumerate(padding.tolist()):
        alone, own = dla_attention(**{name: t[row : row + 1, skip:] for name, t in x.items()}, **rule, chunk_size=16)
        assert_same(out[row, skip:], alone[0], "output")
        assert_same(cache.states[row], own.states[0], "states")
        for name in ("count", "live"):
            assert torch.equal(getattr(cache, name)[row], getattr(own, name)[0]), name
        assert torch.equal(cache.start[row], torch.where(own.start[0] < 0, own.start[0], own.start[0] + skip))
        torch.testing.assert_close(cache.info[row], own.info[0], atol=1e-6, rtol=0)
        loss = (own.states * cotangent[row]).sum() + (alone.sum() if row == 1 else 0)
        want = torch.autograd.grad(loss, (x["v"], x["k"]))
        for a, b in zip(got, want, strict=True):
            assert_same(a[row], b[row], "gradient")
            assert not a[row, :skip].any()


@pytest.mark.parametrize("padding", [[0, 20], [-1, 0], [0], [0, 3, 4]])
def test_padding_out_of_range_is_named(padding: list[int]) -> None:
    x = Case("padded", T=20).make()
    with pytest.raises(ValueError, match=r"padding must be \[B\] = \[2\]"):
        dla_attention(**x, tau=1.0, capacity=5, padding=torch.tensor(padding))
