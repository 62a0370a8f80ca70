"""naive = materialised = torch chunkwise: outputs, decisions and every gradient in float64."""

import dataclasses

import pytest
import torch

from megatron_dla.kernels.dla import Partition, chunk, dla_attention, partition
from megatron_dla.kernels.dla.naive import naive_attention
from tests.support.dla_cases import CASES, Case, assert_same, gradients, random_case
from tests.support.materialised import materialised_attention

ONE_SLOT = Case("one slot, gdn", tau=3.0, capacity=1, documents=(70, 130, 200), delta=True)  # nothing opens a second
ALL = (
    *CASES,
    *(random_case(100 + i) for i in range(12)),
    ONE_SLOT,
    dataclasses.replace(ONE_SLOT, name="one slot", delta=False),
)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_naive_materialised_torch_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "WINDOW", 64)  # tokens: states, slots and gradients cross windows
    monkeypatch.setattr(chunk, "PAIRS", 3 * 64 * case.chunk_size)  # lanes in groups of three
    monkeypatch.setattr(chunk, "ELEMENTS", 3 << 10)  # and chunks alone or a few together
    x = case.make()
    want, decided, _ = naive_attention(**x, **case.rule)
    got_partition = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    assert torch.equal(got_partition.start, decided.start)
    assert torch.equal(got_partition.death, decided.death)
    torch.testing.assert_close(got_partition.score, decided.score, atol=1e-6, rtol=0)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    chunkwise, _ = dla_attention(**x, **case.rule, chunk_size=case.chunk_size, backend="torch")
    quadratic = materialised_attention(**x, partition=decided, cu_seqlens=case.cu_seqlens)
    reference = gradients(want, x, cotangent)
    for name, out in (("torch", chunkwise), ("materialised", quadratic)):
        assert_same(out, want, f"{name} output")
        for key, grad in gradients(out, x, cotangent).items():
            assert_same(grad, reference[key], f"{name} d{key}")


def test_cases_cover_what_they_claim() -> None:
    by_name = {case.name.rsplit(" (", 1)[0]: case for case in CASES}
    decide = {}
    for name, case in by_name.items():
        x = case.make()
        decide[name] = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    assert (decide["topics with merges"].death < 150).sum() > 20
    assert decide["no boundary"].start.sum() == decide["no boundary"].start[:, :1].sum()
    assert decide["every token a boundary"].start.all()
    assert decide["capacity 30 exceeded"].start.sum(1).min() > 30


def plain_backbone(q, k, v, g, beta=None):
    """Independent oracle: one state, no slots (linear attention with decay, or the gated delta rule)."""
    B, T, H, Dv = v.shape
    q, k = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k))
    state, out = v.new_zeros(B, H, k.shape[-1], Dv), []
    for t in range(T):
        state = state * g[:, t].exp()[..., None, None]
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhd,bhde->bhe", k[:, t], state))
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], value)
        out.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(out, 1)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("case", [c for c in CASES if not c.documents][:12], ids=lambda c: c.name)
def test_unit_slot_weights_are_the_backbone(case: Case, backend: str) -> None:
    x = case.make()
    ones = torch.ones_like(x.pop("slot_weights"))
    want = plain_backbone(**x)
    got, _ = dla_attention(**x, slot_weights=ones, **case.rule, backend=backend, chunk_size=case.chunk_size)
    assert_same(got, want, "output")
    cotangent = torch.randn_like(want)
    reference = gradients(want, x, cotangent)
    for key, grad in gradients(got, x, cotangent).items():
        assert_same(grad, reference[key], f"d{key}")


@pytest.mark.parametrize("delta", [False, True])
def test_chunk_size_does_not_matter(delta: bool) -> None:
    case = Case("chunks", T=100, delta=delta, documents=(40, 100, 133))
    x = case.make()
    reference, _ = dla_attention(**x, **case.rule, chunk_size=64)
    for size in (8, 16, 128):
        got, _ = dla_attention(**x, **case.rule, chunk_size=size)
        assert_same(got, reference, f"chunk {size}")


@pytest.mark.parametrize("delta", [False, True])
def test_documents_do_not_see_each_other(delta: bool) -> None:
    case = Case("leak", T=96, B=1, delta=delta, documents=(37, 64))
    x = {name: t.detach() for name, t in case.make().items()}
    before, _ = dla_attention(**x, **case.rule)
    first = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    for name in ("k", "v", "q", "g"):
        x[name][:, 36] *= 1.5  # the last token of the first document
    after, _ = dla_attention(**x, **case.rule)
    second = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    for name in ("start", "death", "score"):
        assert torch.equal(getattr(first, name)[:, 37:], getattr(second, name)[:, 37:]), name
    assert torch.equal(before[:, 37:], after[:, 37:])
    assert not torch.equal(before[:, 36], after[:, 36])
    separate = []
    for a, b in ((0, 37), (37, 64), (64, 96)):
        part = {name: t[:, a:b] for name, t in x.items()}
        separate.append(dla_attention(**part, tau=case.tau, capacity=case.capacity)[0])
    assert_same(after, torch.cat(separate, 1), "packed = separate")


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_follows_given_decisions(delta: bool, dtype: torch.dtype, limit: float) -> None:
    case = Case("dtypes", T=120, delta=delta, seed=5)
    x = {name: t.detach().to(dtype) for name, t in case.make().items()}
    want, decided, _ = naive_attention(**x, **case.rule)
    got, _ = dla_attention(**x, **case.rule, partition=decided)
    assert got.dtype == dtype
    error = ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()
    assert error < limit


@pytest.mark.parametrize("delta", [False, True])
def test_fp32_decisions_are_right_or_within_the_margin(delta: bool) -> None:
    """Forced replay: follow the fp32 decisions in float64; a boundary may differ only where |I - tau| < 1e-3."""
    case = Case("replay", T=400, B=1, delta=delta, seed=9, tau=1.2)
    x = {name: t.detach().float() for name, t in case.make().items()}
    decided = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
    _, replay, _ = naive_attention(**x, **case.rule, partition=decided)
    wrong = (replay.score >= case.tau) != decided.start
    assert ((replay.score - case.tau).abs()[wrong] < 1e-3).all()
    corrupted = dataclasses.replace(decided, start=decided.start.clone())
    clear = (decided.score[0, :, 0] - case.tau) * decided.start[0, :, 0]
    clear[0] = 0  # a document's first token opens a slot whatever its score
    corrupted.start[0, int(clear.argmax()), 0] = False
    _, replay, _ = naive_attention(**x, **case.rule, partition=corrupted)
    wrong = (replay.score >= case.tau) != corrupted.start
    assert not ((replay.score - case.tau).abs()[wrong] < 1e-3).all()


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_ward_merges_agree(backend: str) -> None:
    for delta in (False, True):
        case = Case("ward", T=80, delta=delta, documents=(50, 90), seed=2, tau=1.0, capacity=4)
        x = case.make()
        want, decided, _ = naive_attention(**x, **case.rule, merge="ward")
        density = partition(x["k"], x["v"], x["g"], x.get("beta"), **case.rule)
        assert not torch.equal(density.death, decided.death)
        args = x["k"], x["v"], x["g"], x.get("beta")
        got = partition(*args, **case.rule, merge="ward", backend=backend)
        assert torch.equal(got.start, decided.start) and torch.equal(got.death, decided.death)
        out, _ = dla_attention(**x, **case.rule, merge="ward", backend=backend)
        assert_same(out, want, "ward output")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"capacity": 1}, "capacity must be at least 2"),
        ({"merge": "newest"}, "merge must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"tau": torch.ones(3)}, "tau must be a number or a tensor"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens must rise from 0 to B"),
        ({"g": torch.zeros(2, 3)}, "g must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"partition": Partition(*[torch.zeros(2, 9, 2)] * 3)}, r"partition.start must be"),
        ({"slot_weights": torch.ones(2, 20, 2, 4)}, "slot_weights must be"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    case = Case("errors", T=20)
    with pytest.raises(ValueError, match=message):
        dla_attention(**{**case.make(), **case.rule, **change})


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_second_derivative(delta: bool) -> None:
    """Of the torch path, whose backward is made of operations that autograd can record (gradient penalties)."""
    torch.manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.rand(1, 20, 2, *shape, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(new(4) - 0.5, dim=-1) for _ in "qk")
    v, g, lam, beta = new(3) - 0.5, -new() * 0.1, new(3), new()
    decided = partition(k, v, g, beta if delta else None, tau=1.2, capacity=3)
    assert decided.start.sum() > 4 and (decided.death < 20).any()  # slots open and merge
    inputs = [x.requires_grad_() for x in (q, k, v, g, lam, *([beta] if delta else []))]

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return dla_attention(*x, tau=1.2, capacity=3, partition=decided, chunk_size=8, backend="torch")[0]

    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)
