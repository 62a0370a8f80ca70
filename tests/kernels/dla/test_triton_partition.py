"""The partition kernels: every decision by forced replay with margins; shards and chunk sizes change none."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from megatron_dla.kernels.bench.inputs import TAU, Problem, make_inputs
from megatron_dla.kernels.dla import Partition, dla_attention, partition
from megatron_dla.kernels.dla.debug import forced_replay
from megatron_dla.kernels.dla.rules import Controls
from tests.support.dla_cases import CASES, Case

pytest.importorskip("triton")
from megatron_dla.kernels.dla import triton_capacity, triton_partition

decide = triton_partition.triton_partition
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    x = {"beta": None} | case.make()
    return {
        name: None if x[name] is None else x[name].detach().to(dtype).to(DEVICE) for name in ("k", "v", "g", "beta")
    }


def small(case: Case) -> Case:
    """One row, half the tokens: the interpreter is slow."""
    inside = tuple(end for end in case.documents if end < case.T // 2)
    return replace(case, B=1, T=max(1, case.T // 2), documents=inside)


@pytest.mark.parametrize("case", [small(case) for case in CASES], ids=lambda case: case.name)
def test_every_decision(case: Case) -> None:
    x = inputs_of(case, torch.float32)
    found = decide(**x, **case.rule, tile=16, want_lo=True)
    assert forced_replay(**x, partition=found, **case.rule) == []
    x = {name: None if y is None else y.double() for name, y in x.items()}
    want = partition(**x, **case.rule, backend="torch")
    near = (want.score - case.tau).abs().min() < 1e-4  # a near tie may fall either way
    assert near or torch.equal(found.start, want.start)
    if torch.equal(found.start, want.start) and torch.equal(found.death, want.death):
        torch.testing.assert_close(found.score, want.score.float(), atol=2e-5, rtol=0)
        torch.testing.assert_close(found.final_info, want.final_info.float(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dims", [(70, 40), (24, 330)], ids=str)
@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_16_bit_inputs_are_scored_in_fp32(dtype: torch.dtype, delta: bool, dims: tuple[int, int]) -> None:
    case = Case("wide", T=70, B=1, Dk=dims[0], Dv=dims[1], tau=1.25, delta=delta)
    x = inputs_of(case, dtype)
    found = decide(**x, **case.rule, tile=16)
    assert forced_replay(**x, partition=found, **case.rule, score_margin=1e-5) == []


@pytest.mark.parametrize("near", [1, triton_partition.NEAR], ids=["states", "tokens"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith(("topics", "packed d"))], ids=lambda c: c.name)
def test_shards_and_chunks_change_nothing(case: Case, near: int) -> None:
    case = small(replace(case, H=1, topic=22, T=260, capacity=3))  # slots that span chunks
    x = inputs_of(case, torch.float32)
    whole = decide(**x, **case.rule, tile=16, shard_blocks=1000, near=near)
    for shard in (1, 3):
        parts = decide(**x, **case.rule, tile=16, shard_blocks=shard, near=near)
        for name in ("start", "death", "score", "final_info"):
            assert torch.equal(getattr(whole, name), getattr(parts, name)), (shard, name)
    real = decide(**x, **case.rule)
    assert torch.equal(whole.start, real.start) and torch.equal(whole.death, real.death)
    torch.testing.assert_close(whole.score, real.score, atol=2e-5, rtol=0)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_slots_longer_than_what_is_met_token_by_token(delta: bool) -> None:
    """Slots of up to 12 chunks: met by their tokens and then by a state, in one shard and across shards."""
    case = Case("long", T=330, B=1, H=1, Dk=24, Dv=40, topic=100, tau=1.3, capacity=3, documents=(37,), delta=delta)
    x = inputs_of(case, torch.float32)
    exact = partition(**{name: None if y is None else y.double() for name, y in x.items()}, **case.rule)
    first = exact.start[0, :, 0].nonzero().flatten()
    assert int((first[1:] - first[:-1]).max()) > 8 * 16  # a state, and tokens of NEAR chunks
    for near, shard in ((7, 1000), (7, 3), (2, 1000), (2, 5), (1, 1)):
        found = decide(**x, **case.rule, tile=16, near=near, shard_blocks=shard)
        assert forced_replay(**x, partition=found, **case.rule, score_margin=1e-5) == []
        assert torch.equal(found.start, exact.start) and torch.equal(found.death, exact.death)
        torch.testing.assert_close(found.score, exact.score.float(), atol=2e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="at this size the interpreter takes hours")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("backbone", "dim"), [("gdn", 64), ("gdn", 128), ("mamba2", 64), ("mamba2", 128)])
def test_shards_change_nothing_as_launched_on_a_gpu(backbone: str, dim: int, dtype: torch.dtype) -> None:
    x = make_inputs(Problem(backbone, 4096, dim, 30, 4), 7, dtype=dtype, device=torch.device("cuda"))
    whole, *parts = (
        decide(x.k, x.v, x.g, x.beta, tau=TAU, capacity=30, shard_blocks=n) for n in (1 << 20, 32, 32, 32, 8)
    )
    for part in parts:
        assert torch.equal(whole.start, part.start) and torch.equal(whole.death, part.death)
        torch.testing.assert_close(whole.score, part.score, atol=2e-5, rtol=0)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_goes_on_from_a_cache(delta: bool) -> None:
    case = Case("topics", T=90, B=2, H=1, capacity=3, topic=6, delta=delta)
    x = {name: y.detach().float().to(DEVICE) for name, y in case.make().items()}
    rule = dict(tau=case.tau, capacity=case.capacity)
    _, cache = dla_attention(**{n: y[:, :50] for n, y in x.items()}, **rule, return_cache=True, backend="torch")
    tail = {"beta": None} | {name: x[name][:, 50:] for name in ("k", "v", "g", "beta") if name in x}
    for shard in (None, 1):
        found = decide(**tail, **rule, cache=cache, tile=16, shard_blocks=shard)
        assert forced_replay(**tail, partition=found, **rule, cache=cache) == []
    want = partition(**tail, **rule, cache=cache, backend="torch")
    assert torch.equal(found.cache_death, want.cache_death) and bool((found.cache_death < 40).any())


RULES = {
    "fewest tokens": dict(merge="equal_counts"),
    "oldest": dict(merge="oldest"),
    "random merges": dict(merge="random", controls=Controls(seed=3)),
    "random boundaries": dict(controls=Controls("random", rate=0.3)),
    "every 5, random merges": dict(merge="random", controls=Controls("every", every=5)),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule(name: str) -> None:
    """Packed documents in shards, and what goes on from a cache."""
    case = Case("rules", T=44, B=1, H=2, capacity=3, topic=3, delta="boundaries" in name, documents=(20, 29), tau=0.8)
    x = inputs_of(case, torch.float32)
    rule = case.rule | RULES[name]
    found = decided_by_kernels(x, rule, tile=16, shard_blocks=1)
    assert forced_replay(**x, partition=found, **rule) == []
    want = partition(**x, **rule, backend="torch")
    assert torch.equal(found.start, want.start) and torch.equal(found.death, want.death)
    assert bool((found.death < 44).any())
    del rule["cu_seqlens"]
    whole = {name: y.detach().float().to(DEVICE) for name, y in case.make().items()}
    _, cache = dla_attention(**{n: y[:, :24] for n, y in whole.items()}, **rule, return_cache=True, backend="torch")
    tail = {name: None if y is None else y[:, 24:] for name, y in x.items()}
    found = partition(**tail, **rule, cache=cache, backend="triton")
    assert forced_replay(**tail, partition=found, **rule, cache=cache) == []
    assert bool((found.cache_death < 20).any())


def decided_by_kernels(x: dict, rule: dict, **launch) -> Partition:
    """`partition` on the kernels, launched as given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_partition, "triton_partition", partial(decide, **launch))
        return partition(**x, **rule, backend="triton")


@pytest.mark.parametrize("capacity", [2, 3, 5])
def test_ties_go_to_the_oldest_pair(capacity: int) -> None:
    """Orthogonal tokens: every score is sqrt(2), every pair costs the same, and the second slot dies."""
    T = capacity + 1
    k = torch.eye(T, device=DEVICE).view(1, T, 1, T)
    g = torch.zeros(1, T, 1, device=DEVICE)
    found = decide(k, k, g, tau=1.2, capacity=capacity, tile=16, want_lo=True)
    assert found.death[0, :, 0].tolist() == [T, capacity, *[T] * (T - 2)]
    assert found.lo is not None and found.lo[0, :, 0].tolist() == [0] * capacity + [1]


def test_a_wrong_victim_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The capacity kernel fed with sums of another head merges other pairs: the replay must say so."""
    real = triton_capacity.capacity_kernel

    class Broken:
        def __getitem__(self, grid):
            return lambda starts, sums, *rest, **meta: real[grid](starts, sums.flip(0).contiguous(), *rest, **meta)

    monkeypatch.setattr(triton_partition, "capacity_kernel", Broken())
    case = Case("topics", T=75, B=1, capacity=4, topic=6)
    x = inputs_of(case, torch.float32)
    assert forced_replay(**x, partition=decide(**x, **case.rule, tile=16), **case.rule) != []


@pytest.mark.parametrize(
    ("chunks", "heads", "shards"),
    [
        ([512], 16, 16),  # one wave
        ([64] * 8, 48, 2),  # three waves of 32 chunks are done before two of 64
        ([64] * 8, 8, 4),
        ([8], 1, 1),  # what is run again would cost as much
        ([1], 1, 1),
        ([32768], 1, 263),
        ([64, 8], 256, 4),
    ],
    ids=str,
)
def test_segments_are_cut_so_that_the_gpu_is_done_first(chunks: list[int], heads: int, shards: int) -> None:
    size = triton_partition._shard_blocks(chunks, heads)
    assert -(-max(chunks) // size) == shards
