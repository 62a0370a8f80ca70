"""The vectorised detection and the capacity walk against one step a token."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_dla.kernels.dla import SlotCache, detect, dla_attention, partition
from megatron_dla.kernels.dla.cache import FIRST_SCORE
from megatron_dla.kernels.dla.capacity import running_sums
from megatron_dla.kernels.dla.decode import recurrent_partition
from tests.support.dla_cases import random_case

NEVER, ALWAYS = 2.1, 0.0


@dataclass
class Lanes:
    """Arguments of `detect`, float64, three lanes."""

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    tau: Tensor
    resets: Tensor
    state: Tensor | None = None
    info: Tensor | None = None

    def arguments(self) -> tuple:
        return self.k, self.v, self.g, self.beta, self.tau, self.resets, self.state


def random_lanes(T: int, delta: bool, tau: float = 1.2, resets: tuple[int, ...] = (0,), seed: int = 0) -> Lanes:
    generator = torch.Generator().manual_seed(seed)
    topic = torch.rand(3, T, generator=generator) < 0.1
    index = topic.long().cumsum(1)[..., None]

    def tokens(dim: int) -> Tensor:
        base = torch.randn(3, T + 1, dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(3, T, dim, generator=generator, dtype=torch.float64)
        return base.gather(1, index.expand(-1, -1, dim)) + 0.4 * noise

    k, v = F.normalize(tokens(6), dim=-1), tokens(5)
    g, beta = -0.3 * torch.rand(3, T, generator=generator).double(), torch.rand(3, T, generator=generator).double()
    starts = torch.zeros(3, T, dtype=torch.bool)
    starts[:, list(resets)] = True
    return Lanes(k, v, g, beta if delta else None, torch.full((3,), tau, dtype=torch.float64), starts)


def one_by_one(x: Lanes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, score, summed scores [N, T] and the last state, by one step a token on the state itself."""
    N, T = x.g.shape
    state = x.k.new_zeros(N, x.k.shape[-1], x.v.shape[-1]) if x.state is None else x.state
    total = x.k.new_zeros(N) if x.info is None else x.info
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(T):
        kt, vt, reset = x.k[:, t], x.v[:, t], x.resets[:, t]
        b = torch.ones_like(x.g[:, t]) if x.beta is None else x.beta[:, t]
        s = b[:, None, None] * kt[:, :, None] * vt[:, None, :]
        norm = s.flatten(1).norm(dim=1) * state.flatten(1).norm(dim=1)
        cosine = torch.where(norm > 0, (s * state).sum((1, 2)) / norm, 0)
        score = torch.where(reset, FIRST_SCORE, (2 - 2 * cosine).clamp(min=0).sqrt())
        fired = reset | (score >= x.tau)
        total = torch.where(fired, score, total + score)
        if x.beta is not None:
            state = state - b[:, None, None] * kt[:, :, None] * (kt[:, None] @ state)
        state = torch.where(fired[:, None, None], 0, x.g[:, t].exp()[:, None, None] * state) + s
        rows.append((fired, score, total))
    return (*(torch.stack(column, 1) for column in zip(*rows, strict=True)), state)  # type: ignore[return-value]


def assert_equal(x: Lanes, size: int) -> Tensor:
    start, score, sums, _ = one_by_one(x)
    got = detect.detect(*x.arguments(), size)
    assert torch.equal(got[0], start)
    # the square root of a rounding error where the score is 0
    torch.testing.assert_close(got[1], score, atol=1e-7, rtol=1e-9)
    torch.testing.assert_close(running_sums(*got, x.info), sums, atol=1e-6, rtol=1e-9)
    return start


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 23, 64])
@pytest.mark.parametrize("tau", [NEVER, 1.3, 1.0, ALWAYS])
def test_one_chunk_and_many(delta: bool, T: int, tau: float) -> None:
    for seed in range(4):
        start = assert_equal(random_lanes(T, delta, tau, seed=seed), 8)
        if tau in (NEVER, ALWAYS):
            assert start.sum() == (3 if tau == NEVER else 3 * T)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("tau", [NEVER, 1.1])
def test_documents_start_within_chunks_and_at_their_edges(delta: bool, tau: float) -> None:
    for resets in ((0, 8, 16), (0, 7, 15), (0, 1, 2, 9, 31), (0, 12), (0, 3, 8, 9)):
        assert_equal(random_lanes(40, delta, tau, resets), 8)


@pytest.mark.parametrize("delta", [False, True])
def test_windows_of_few_chunks(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_lanes(100, delta, 1.2)
    whole = detect.detect(*x.arguments(), 8)
    monkeypatch.setattr(detect, "PAIRS", 3 * 8 * 8 * 2)
    for got, want in zip(detect.detect(*x.arguments(), 8), whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-7, rtol=0)
    assert_equal(x, 8)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("together", "many"), [(0, 1), (1 << 15, 1), (1 << 15, 3), (1 << 15, 50)])
def test_chunks_at_once_and_one_by_one(delta: bool, together: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "TOGETHER", together)
    monkeypatch.setattr(detect, "MANY", many)
    for tau in (1.0, 1.3, NEVER):  # nearly all chunks have a boundary, some, one
        for seed in range(3):
            assert_equal(random_lanes(200, delta, tau, (0, 20, 90), seed), 8)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("cut", [1, 5, 8, 13])
def test_a_state_is_continued(delta: bool, cut: int) -> None:
    x = random_lanes(60, delta, 1.25)
    whole = detect.detect(*x.arguments(), 8)
    head = Lanes(*(None if y is None else y[:, :cut] for y in (x.k, x.v, x.g, x.beta)), x.tau, x.resets[:, :cut])
    *_, sums, state = one_by_one(head)
    tail = Lanes(
        *(None if y is None else y[:, cut:] for y in (x.k, x.v, x.g, x.beta)), x.tau, x.resets[:, cut:], state,
        sums[:, -1],
    )  # fmt: skip
    assert_equal(tail, 8)
    got = detect.detect(*tail.arguments(), 8)
    assert torch.equal(got[0], whole[0][:, cut:])


@pytest.mark.parametrize("delta", [False, True])
def test_lanes_have_thresholds_of_their_own(delta: bool) -> None:
    x = random_lanes(50, delta)
    x.tau = torch.tensor([ALWAYS, 1.2, NEVER], dtype=torch.float64)
    assert_equal(x, 16)


@pytest.mark.parametrize("delta", [False, True])
def test_a_repeated_token_scores_zero_in_fp32(delta: bool) -> None:
    """Cancellation is worst there: a relative error e of the norm or the inner product gives a score of sqrt(e)."""
    x = random_lanes(300, delta, NEVER)
    x.k, x.v = x.k[:, :1].expand_as(x.k), x.v[:, :1].expand_as(x.v)
    single = [None if y is None else y.float() if y.is_floating_point() else y for y in x.arguments()]
    score = detect.detect(*single, 32)[1]
    assert score[:, 1:].max() < 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_capacity_walk_is_the_recurrence(seed: int) -> None:
    case = random_case(seed)
    x = {name: t.detach() for name, t in case.make().items()}
    args = x["k"], x["v"], x["g"], x.get("beta")
    rule = {"tau": case.tau, "capacity": case.capacity, "cu_seqlens": case.cu_seqlens}
    got = partition(*args, **rule)
    want = partition(*args, **rule, backend="naive")
    assert torch.equal(got.start, want.start) and torch.equal(got.death, want.death)
    torch.testing.assert_close(got.final_info, want.final_info, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_sums_round_as_in_decoding(dtype: torch.dtype, capacity: int) -> None:
    """Scores 0, sqrt(2) and 2 only: costs tie all the time, and which sums are equal depends on their rounding."""
    generator = torch.Generator().manual_seed(capacity)
    B, T, H = 2, 200, 2
    kind = torch.randint(0, 4, (B, T, H), generator=generator)
    k = F.one_hot(kind.clamp(max=2), 4).to(dtype) * (kind < 3)[..., None]  # three directions, and writing nothing
    v = torch.ones(B, T, H, 3, dtype=dtype) * torch.where(torch.rand(B, T, H, 1, generator=generator) < 0.3, -1, 1)
    g = torch.zeros(B, T, H, dtype=dtype)
    rule = {"tau": 1.2, "capacity": capacity}
    want = recurrent_partition(k, v, g, None, **rule, merge="density", cu_seqlens=None, cache=None)
    assert (want.death < T).sum() > 100
    got = partition(k, v, g, **rule)
    assert torch.equal(got.start, want.start) and torch.equal(got.death, want.death)
    assert torch.equal(got.final_info, want.final_info)
    # and over a cache, cut where it is full
    x = {"q": k, "k": k, "v": v, "g": g, "slot_weights": torch.ones(B, T, H, capacity, dtype=dtype)}
    _, cache = dla_attention(**{name: y[:, :77] for name, y in x.items()}, **rule, return_cache=True)
    assert isinstance(cache, SlotCache)
    later = partition(k[:, 77:], v[:, 77:], g[:, 77:], **rule, cache=cache)
    assert torch.equal(later.death + 77, want.death[:, 77:]) and torch.equal(later.final_info, want.final_info)
