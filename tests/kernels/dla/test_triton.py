"""The Triton kernels under the interpreter (on a GPU: compiled), decisions given: outputs and every gradient.

Tiles are shrunk so that a hundred tokens cross tiles, blocks and windows; `test_real_tiles` keeps the shipped ones.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_dla.kernels.dla import Partition, SlotCache, dla_attention, partition
from megatron_dla.kernels.dla.rules import EVERY_TOKEN, FENWICK
from tests.support import triton_interpreter
from tests.support.dla_cases import Case

triton = pytest.importorskip("triton")
from megatron_dla.kernels.dla import (  # noqa: E402
    debug,
    triton_attention,
    triton_chunk,
    triton_launch,
    triton_partition,
    triton_tables,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = Case("topics with merges", T=75, B=1, capacity=4, topic=6)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 tokens, blocks of 2 tiles, windows of 3 rows; tables of live slots look 32 tokens back."""
    small = {"TILE": 16, "WIDE_TILE": 16, "TILES": 2, "WIDE_TILES": 2, "WINDOW_ROWS": 3, "WINDOW_BYTES": 0}
    for name, value in small.items():
        monkeypatch.setattr(triton_launch, name, value)
    monkeypatch.setattr(triton_tables, "LIVE_SPAN", 32)
    yield


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: x.detach().to(dtype).to(DEVICE) for name, x in case.make().items()}


def cotangent(case: Case, dtype: torch.dtype) -> torch.Tensor:
    gen = torch.Generator().manual_seed(case.seed + 77)
    return torch.randn(case.B, case.T, case.H, case.Dv, generator=gen).to(dtype).to(DEVICE)


def compare(case: Case, dtype: torch.dtype, **more) -> None:
    x = inputs_of(case, dtype)
    decide = {name: x[name].float() for name in ("k", "v", "g", "beta") if name in x}
    rule = case.rule | more
    part = partition(**decide, **rule, backend="torch")
    rule = dict(partition=part) | rule
    debug.check_all(x, cotangent(case, dtype), dtype=dtype, backend="triton", **rule)


def both(case: Case) -> list[Case]:
    return [replace(case, delta=delta, name=f"{case.name} ({'gdn' if delta else 'mamba2'})") for delta in (False, True)]


FULL = [
    *both(BASE),
    *both(replace(BASE, name="documents, strong decay", documents=(1, 20, 37, 52), decay=4.0, capacity=2)),
    *both(replace(BASE, name="every token a boundary", tau=0.0, T=40)),
    *both(replace(BASE, name="no boundary", tau=2.5, T=40, B=2, H=1)),
    *both(replace(BASE, name="one slot", tau=3.0, capacity=1, documents=(20, 37), T=40, B=2)),
    *both(replace(BASE, name="three tokens", T=3, B=4)),
    *both(replace(BASE, name="shared keys, odd dims", H=4, G=2, Dk=20, Dv=19, T=40)),
    replace(BASE, name="three heads in one program of dk (mamba2)", H=6, G=2, T=24),
]


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_all_gradients_fp32(small_tiles: None, case: Case) -> None:
    compare(case, FP32)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_blocks_of_four_tiles(small_tiles: None, monkeypatch: pytest.MonkeyPatch, delta: bool) -> None:
    """Gated DeltaNet's tiles pass up to three others; the last block of a document has any number of tiles."""
    monkeypatch.setattr(triton_launch, "WIDE_TILES", 4)
    compare(replace(BASE, T=108, H=1, delta=delta, documents=(3, 40)), FP32)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_documents_of_one_to_four_blocks_in_a_window(
    small_tiles: None, monkeypatch: pytest.MonkeyPatch, delta: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triton_launch, "WINDOW_ROWS", 64)
    compare(replace(BASE, T=200, H=1, Dk=32, Dv=32, delta=delta, documents=(20, 84, 110)), dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="counted by the interpreter")
@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_states_after_the_last_block_are_computed_only_if_wanted(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, T=32, B=3, H=1, Dk=32, Dv=32, delta=delta)  # a block each
    x = inputs_of(case, BF16)
    decided = partition(**{n: x[n] for n in ("k", "v", "g", "beta") if n in x}, **case.rule)
    counts = []
    for states in (None, torch.ones(case.B, case.H, case.capacity, case.Dk, case.Dv)):
        with triton_interpreter.loads_counted() as count:
            debug.run(
                x, cotangent(case, BF16), partition=decided, backend="triton", states_cotangent=states, **case.rule
            )
        counts.append(count)
    without, wanted = counts
    of_tokens = ("token_gradient_kernel",) if delta else ("key_gradient_kernel", "value_gradient_kernel")
    for name in ("block_states_kernel", *of_tokens):
        assert 0 < without[name] < 0.6 * wanted[name], name


LOW = [*both(replace(BASE, Dk=32, Dv=32)), *both(replace(BASE, name="documents", documents=(20, 37), Dk=32, Dv=24))]


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("case", LOW, ids=lambda case: case.name)
def test_all_gradients_16_bit(small_tiles: None, case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


WIDE = [
    *both(replace(BASE, name="wide", H=1, Dk=160, Dv=72, T=36)),
    *both(replace(BASE, name="wide values", H=1, Dk=24, Dv=330, T=24)),
]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "dtype"), zip(WIDE, (BF16, FP32, FP32, BF16), strict=True), ids=lambda x: getattr(x, "name", str(x))
)
def test_head_dims_over_several_tiles(small_tiles: None, case: Case, dtype: torch.dtype) -> None:
    compare(case, dtype)


def test_key_dims_in_two_tiles_of_the_scans(small_tiles: None) -> None:
    """States and their gradients over several blocks, merges and a window's border, with more than 128 key dims."""
    compare(replace(BASE, T=140, H=1, Dk=136, Dv=8, delta=True), BF16)


def test_two_tiles_of_queries_in_a_program(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reading slots gives dq and dlam, where blocks end with the first tile, and all key dims do not fit."""
    monkeypatch.setattr(triton_launch, "TILES", 4)
    case = replace(BASE, T=210, H=1, Dk=72, Dv=72, delta=True, documents=(20, 130))
    plan = triton_launch.LaunchPlan(BF16, case.Dk, case.Dv, case.H, case.H, case.capacity, True, tile=16, tiles=4)
    dims = plan.slot_query_gradient(torch.device(DEVICE))
    assert DEVICE != "cpu" or (dims["BQ"], dims["BK"]) == (2 * plan.tile, 64)
    compare(case, BF16)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_real_tiles(delta: bool) -> None:
    compare(replace(BASE, T=600, H=1, Dk=64, Dv=64, delta=delta, topic=25, tau=1.2), BF16)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_a_decay_to_zero_is_a_decay_to_zero(small_tiles: None, delta: bool) -> None:
    """However small g is: its sum would leave no digits to the differences between the block's other tokens."""
    case = replace(BASE, T=40, H=1, delta=delta)
    x = inputs_of(case, FP32)
    forgets = torch.arange(case.T, device=DEVICE) % 9 == 5
    decide = {name: x[name] for name in ("k", "v", "g", "beta") if name in x}
    rule = dict(case.rule, partition=partition(**decide, **case.rule, backend="torch"), backend="triton")
    zero, less = ({**x, "g": torch.where(forgets[None, :, None], g, x["g"])} for g in (-104.0, -1e6))
    want, got = (debug.run(y, cotangent(case, FP32), **rule) for y in (zero, less))
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", both(replace(BASE, T=70, H=1, documents=(3, 40))), ids=lambda case: case.name)
def test_a_hierarchy_of_levels(small_tiles: None, case: Case) -> None:
    """Several slots die at one token."""
    compare(case, FP32, merge=FENWICK, controls=EVERY_TOKEN)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_cache_in_and_out(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, T=90, B=2, H=1, delta=delta)
    x = inputs_of(case, FP32)
    rule = dict(tau=case.tau, capacity=case.capacity)
    head = {name: y[:, :50] for name, y in x.items()}
    tail = {name: y[:, 50:].contiguous() for name, y in x.items()}
    want, mid = dla_attention(**head, **rule, return_cache=True, backend="torch")
    got, cache = dla_attention(**head, **rule, return_cache=True, backend="triton")
    for name in ("start", "count", "live", "position"):
        assert torch.equal(getattr(mid, name), getattr(cache, name)), name
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache.states, mid.states, atol=1e-5, rtol=1e-4)
    part = partition(**{n: tail[n] for n in ("k", "v", "g", "beta") if n in tail}, **rule, cache=mid, backend="torch")
    weights = torch.randn(mid.states.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    debug.check_all(
        tail, cotangent(case, FP32)[:, 50:], dtype=FP32, backend="triton", **rule, partition=part, cache=mid,
        states_cotangent=weights,
    )  # fmt: skip


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_padded_rows(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, T=40, B=3, H=1, delta=delta)
    x = inputs_of(case, FP32)
    rule = dict(tau=case.tau, capacity=case.capacity, padding=torch.tensor([0, 17, 39], device=DEVICE))
    results, grads = [], []
    for backend in ("triton", "torch"):
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        out, cache = dla_attention(**leaves, **rule, return_cache=True, backend=backend)
        loss = (out * cotangent(case, FP32)).sum() + cache.states.square().sum()
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
        results.append({"out": out, **cache.state_dict()})
    for name, want in results[1].items():
        torch.testing.assert_close(results[0][name], want, atol=1e-5, rtol=1e-4)
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_slots_of_a_cache_that_merge_as_a_block_begins(small_tiles: None, delta: bool) -> None:
    """They are there before the block's first token, and gone at it."""
    case = replace(BASE, T=40, H=1, delta=delta)
    x = inputs_of(case, FP32)
    rule = dict(tau=case.tau, capacity=case.capacity)
    head, tail = ({name: y[:, part].contiguous() for name, y in x.items()} for part in (slice(4), slice(4, None)))
    _, cache = dla_attention(**head, tau=0.0, capacity=case.capacity, return_cache=True, backend="torch")
    T = case.T - 4
    opens = torch.isin(torch.arange(T, device=DEVICE), torch.tensor([0, 16, 32], device=DEVICE)).view(1, T, 1)
    part = Partition(
        start=opens, death=torch.full((1, T, 1), T, dtype=torch.int32, device=DEVICE),
        score=torch.ones(1, T, 1, device=DEVICE),
        cache_death=torch.tensor([T, 0, 16, 32], dtype=torch.int32, device=DEVICE).view(1, 1, 4),
    )  # fmt: skip
    assert cache is not None and cache.live.tolist() == [[4]]
    weights = torch.randn(cache.states.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    debug.check_all(
        tail, cotangent(case, FP32)[:, 4:], dtype=FP32, backend="triton", **rule, partition=part, cache=cache,
        states_cotangent=weights,
    )  # fmt: skip


def test_learned_threshold_of_one_token(small_tiles: None) -> None:
    case = replace(BASE, T=1, B=2)
    tau = torch.full((case.H,), case.tau, device=DEVICE, requires_grad=True)
    out, _ = dla_attention(**inputs_of(case, FP32), capacity=case.capacity, tau=tau, backend="triton")
    out.sum().backward()
    assert tau.grad is not None and not tau.grad.any()  # a first token always fires


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_learned_threshold(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, documents=(30,), T=60, capacity=3, delta=delta)
    tau = torch.full((case.H,), case.tau, device=DEVICE, requires_grad=True)
    x = inputs_of(case, FP32)
    decide = {name: x[name] for name in ("k", "v", "g", "beta") if name in x}
    rule = dict(case.rule, tau=tau)
    part = partition(**decide, **rule, backend="triton")
    debug.check_all(x, cotangent(case, FP32), dtype=FP32, backend="triton", **rule, partition=part)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_learned_threshold_of_many_inputs(small_tiles: None, seed: int, dtype: torch.dtype) -> None:
    """Its gradient is a sum of differences: what a kernel rounds too early shows on some inputs and not on others."""
    case = replace(BASE, T=24, Dv=6, capacity=2 + seed % 3, topic=3, noise=1.0, tau=1.1, delta=seed % 2 == 1, seed=seed)
    compare(case, dtype, tau=torch.full((case.H,), case.tau, device=DEVICE, requires_grad=True))


def test_fp32_keys_beside_bf16_values(small_tiles: None) -> None:
    """Queries and keys leave an L2 norm in fp32: they are rounded to the values' type, gradients come back in fp32."""
    case = replace(BASE, delta=True, T=40)
    x = inputs_of(case, BF16)
    part = partition(x["k"], x["v"], x["g"], x["beta"], **case.rule, backend="torch")
    plain = debug.run(x, cotangent(case, BF16), backend="triton", partition=part, **case.rule)
    mixed = x | {name: x[name].float() for name in ("q", "k")}
    got = debug.run(mixed, cotangent(case, BF16), backend="triton", partition=part, **case.rule)
    assert got["dq"].dtype == FP32 and torch.equal(got["o"], plain["o"])
    torch.testing.assert_close(got["dk"].to(BF16), plain["dk"])


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_same_bits_in_every_run_and_order(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, T=50, delta=delta, documents=(20,))
    x = inputs_of(case, BF16)
    rule = dict(case.rule, partition=partition(**{n: x[n] for n in ("k", "v", "g", "beta") if n in x}, **case.rule))
    first = debug.run(x, cotangent(case, BF16), backend="triton", **rule)
    if DEVICE == "cpu":
        with triton_interpreter.reversed_programs():
            second = debug.run(x, cotangent(case, BF16), backend="triton", **rule)
    else:
        second = debug.run(x, cotangent(case, BF16), backend="triton", **rule)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.skipif(DEVICE != "cpu", reason="launches are counted by the interpreter")
@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_states_that_are_kept_are_not_computed_again(small_tiles: None, delta: bool, dtype: torch.dtype) -> None:
    case = replace(BASE, T=110, B=2, H=1, Dk=32, delta=delta, documents=(20, 150))
    x = inputs_of(case, dtype)
    rule = dict(case.rule, partition=partition(**{n: x[n] for n in ("k", "v", "g", "beta") if n in x}, **case.rule))
    results, counts = [], []
    for keep in (False, True):
        with triton_interpreter.loads_counted() as count:
            results.append(debug.run(x, cotangent(case, dtype), backend="triton", keep_states=keep, **rule))
        counts.append(count)
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    scans = {"block_states_kernel", "slot_scan_kernel" if delta else "carry_states_kernel"}
    # more than half: the forward pass goes on to the ends of the windows
    assert all(0 < counts[1][name] < 0.65 * counts[0][name] for name in scans)
    if delta:  # as often forward as backward
        assert all(counts[1][name] == counts[0][name] / 2 > 0 for name in ("inverse_kernel", "transition_kernel"))


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 12, 24])
def test_a_program_adds_up_whole_shares_of_a_group(heads: int) -> None:
    """All of the group where one head gives enough programs, one or an odd share of it where it does not."""
    plan = triton_launch.LaunchPlan(BF16, 64, 64, heads, 1, 30, False)
    shares = [triton_chunk.heads_per_program(plan, programs) for programs in (1, 80, 160, 320, 1 << 14)]
    assert all(heads % share == 0 for share in shares) and shares == sorted(shares)
    assert shares[0] % 2 == 1 and shares[-1] == heads
    assert triton_chunk.heads_per_program(replace(plan, gdn=True), 1 << 14) == 1


@pytest.mark.skipif(DEVICE != "cpu", reason="counted by the interpreter")
@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_no_kernel_does_more_work_a_token_in_a_longer_document(
    small_tiles: None, delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_partition, "SHARD_BLOCKS", 32)  # one shard, which is not run again
    counts = []
    for T in (192, 384):
        case = replace(BASE, T=T, H=1, delta=delta, topic=8)
        x = inputs_of(case, FP32)
        decide = {name: x[name] for name in ("k", "v", "g", "beta") if name in x}
        rule = dict(case.rule, tau=torch.full((case.H,), case.tau, requires_grad=True), backend="triton")
        with triton_interpreter.loads_counted() as count:
            debug.run(x, cotangent(case, FP32), partition=partition(**decide, **rule), **rule)
        counts.append(count)
    short, long = counts
    assert len(short) > 12 and short.keys() == long.keys()
    growth = {name: long[name] / short[name] for name in short}
    # the first and the last block of a document have less to do; quadratic: towards 4
    assert all(factor < 2.5 for factor in growth.values()), growth


def drop_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton_attention.to_line

    def broken(death: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        line = real(death, start)
        dead = ((line > 0) & (line < triton_attention.NEVER)).nonzero()[0]
        line[tuple(dead)] = triton_attention.NEVER
        return line

    monkeypatch.setattr(triton_attention, "to_line", broken)


def shift_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton_chunk.make_tables

    def broken(*args):
        tables = real(*args)
        tables.counts[0, 0, 37] += 1  # of the second block: the first one has no slots to read
        return tables

    monkeypatch.setattr(triton_chunk, "make_tables", broken)


def skip_a_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    real = triton_chunk.block_decay

    def broken(g, *args):
        g = g.clone()
        g[33] = 0
        return real(g, *args)

    monkeypatch.setattr(triton_chunk, "block_decay", broken)


def forget_the_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    """States do not cross a window's border."""
    real = triton_chunk._incoming
    monkeypatch.setattr(
        triton_chunk,
        "_incoming",
        lambda work, states, resumed: real(work, states, None if resumed is None else 0 * resumed),
    )


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_backward_inside_autocast(small_tiles: None, delta: bool) -> None:
    case = replace(BASE, T=40, delta=delta)
    tau = torch.full((case.H,), case.tau, device=DEVICE, requires_grad=True)
    found = []
    for inside in (False, True):
        x = {name: t.requires_grad_() for name, t in inputs_of(case, FP32).items()}
        out = dla_attention(**x, **case.rule | {"tau": tau}, backend="triton")[0]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(out, [*x.values(), tau], cotangent(case, FP32)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
@pytest.mark.parametrize(
    "mutate", [drop_a_merge, shift_a_slot, skip_a_decay, forget_the_carry], ids=lambda f: f.__name__
)
def test_a_broken_kernel_is_found(small_tiles: None, monkeypatch: pytest.MonkeyPatch, mutate, delta: bool) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="failed"):
        compare(replace(BASE, H=1, delta=delta, decay=0.3), FP32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(Dk=300), "key_dim = 300 .at most 256"),
        (dict(Dv=513), "value_dim = 513 .at most 512"),
        (dict(capacity=70), "at most 64"),
    ],
)
def test_what_the_kernels_cannot_take(change: dict, message: str) -> None:
    dtype = change.pop("dtype", FP32)
    case = replace(BASE, T=4, **change)
    with pytest.raises(ValueError, match=f"backend='triton'.*{message}"):
        dla_attention(**inputs_of(case, dtype), **case.rule, backend="triton")


def test_merge_by_ward_uses_the_kernels_for_the_output(small_tiles: None) -> None:
    case = replace(BASE, T=40)
    x = inputs_of(case, FP32)
    got, _ = dla_attention(**x, **case.rule, merge="ward", backend="triton")
    want, _ = dla_attention(**x, **case.rule, merge="ward", backend="torch")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_cache_is_left_alone(small_tiles: None) -> None:
    case = replace(BASE, T=20, H=1)
    x = inputs_of(case, FP32)
    cache = SlotCache.empty(1, 1, case.capacity, case.Dk, case.Dv, device=DEVICE)
    before = cache.clone()
    dla_attention(**x, tau=case.tau, capacity=case.capacity, cache=cache, return_cache=True, backend="triton")
    for name, value in before.state_dict().items():
        assert torch.equal(value, getattr(cache, name)), name
