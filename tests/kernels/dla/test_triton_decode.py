"""The decode kernels against torch, token by token: outputs, states and every scalar of the cache."""

from dataclasses import replace

import pytest
import torch

from megatron_dla.kernels.dla import SlotCache, decode_step, dla_attention
from megatron_dla.kernels.dla.rules import Controls
from tests.support.dla_cases import Case

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE = Case("topics", T=24, B=2, H=2, capacity=3, topic=4, tau=1.0)
CASES = [
    replace(BASE, name="wide, groups", T=10, B=1, H=4, G=2, Dk=70, Dv=20, tau=1.2, topic=3),
    replace(BASE, name="wide values", T=8, B=1, H=1, Dk=20, Dv=330, tau=1.2, topic=3),
    BASE,
]


def token(x: dict[str, torch.Tensor], t: int) -> dict[str, torch.Tensor]:
    return {name: y[:, t : t + 1] for name, y in x.items()}


def inputs_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: y.detach().to(dtype).to(DEVICE) for name, y in case.make().items()}


def empty(case: Case) -> SlotCache:
    return SlotCache.empty(case.B, case.H, case.capacity, case.Dk, case.Dv, device=DEVICE)


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_follows_torch(case: Case, delta: bool) -> None:
    case = replace(case, delta=delta)
    x = inputs_of(case)
    want_cache, cache = empty(case), empty(case)
    rule = dict(tau=case.tau, capacity=case.capacity)
    for t in range(case.T):
        want, _ = decode_step(**token(x, t), cache=want_cache, **rule, backend="torch")
        got, _ = decode_step(**token(x, t), cache=cache, **rule, backend="triton")
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        live = torch.arange(case.capacity, device=DEVICE) < want_cache.live[..., None]
        for name in ("start", "count", "live", "position"):
            ours, theirs = getattr(cache, name), getattr(want_cache, name)
            where = live if ours.ndim == 3 else torch.ones_like(ours, dtype=torch.bool)
            assert torch.equal(ours[where], theirs[where]), (t, name)
        torch.testing.assert_close(cache.info[live], want_cache.info[live], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(cache.states[live], want_cache.states[live], atol=1e-4, rtol=1e-4)
    assert int(cache.count.sum(-1).min()) == case.T  # every token is in some slot: merges happened and lost none


@pytest.mark.parametrize("delta", [False, True], ids=["mamba2", "gdn"])
def test_goes_on_from_a_prefill(delta: bool) -> None:
    """The cache as `dla_attention` returns it, several sequences and heads."""
    case = replace(BASE, T=20, delta=delta)
    x = inputs_of(case)
    rule = dict(tau=case.tau, capacity=case.capacity)
    want, _ = dla_attention(**x, **rule, backend="torch")
    head = {name: y[:, :15] for name, y in x.items()}
    _, cache = dla_attention(**head, **rule, backend="torch", return_cache=True)
    assert cache is not None and cache.count.is_contiguous()
    cache.count = cache.count.transpose(0, 1).contiguous().transpose(0, 1)  # a view must do as well
    outs = [decode_step(**token(x, t), cache=cache, **rule, backend="triton")[0] for t in range(15, 20)]
    torch.testing.assert_close(torch.cat(outs, 1), want[:, 15:], atol=1e-4, rtol=1e-4)
    assert int(cache.count.sum(-1).min()) == int(cache.count.sum(-1).max()) == case.T


@pytest.mark.parametrize(
    "rule",
    [
        dict(merge="equal_counts"),
        dict(merge="oldest", controls=Controls("every", every=2)),
        dict(merge="random", controls=Controls("random", rate=0.5, seed=3)),
    ],
    ids=lambda rule: rule["merge"],
)
def test_every_rule(rule: dict) -> None:
    case = replace(BASE, T=20)
    x, rule = inputs_of(case), dict(tau=case.tau, capacity=case.capacity) | rule
    want_cache, cache = empty(case), empty(case)
    for t in range(case.T):
        want, _ = decode_step(**token(x, t), cache=want_cache, **rule, backend="torch")
        got, _ = decode_step(**token(x, t), cache=cache, **rule, backend="triton")
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.live, want_cache.live) and bool((cache.live == 3).all())
    assert torch.equal(cache.start, want_cache.start) and torch.equal(cache.count, want_cache.count)


def test_bf16_tokens_and_a_threshold_a_head() -> None:
    case = replace(BASE, T=12, delta=True)
    x = inputs_of(case, torch.bfloat16)
    tau = torch.tensor([0.9, 1.2], device=DEVICE)
    cache = empty(case)
    outs = [decode_step(**token(x, t), cache=cache, tau=tau, capacity=3, backend="triton")[0] for t in range(case.T)]
    want, _ = dla_attention(**x, tau=tau, capacity=3, backend="torch")
    torch.testing.assert_close(torch.cat(outs, 1), want, atol=0.05, rtol=0.02)
    assert outs[0].dtype == torch.bfloat16 and cache.states.dtype == torch.float32


def test_ties_go_to_the_oldest_pair() -> None:
    """Orthogonal tokens: every score is sqrt(2), and the first pair merges."""
    cache = SlotCache.empty(1, 1, 4, 5, 5, device=DEVICE)
    for t in range(5):
        x = torch.eye(5, device=DEVICE)[t].view(1, 1, 1, 5)
        rest = torch.zeros(1, 1, 1, device=DEVICE), torch.ones(1, 1, 1, 4, device=DEVICE)
        decode_step(x, x, x, *rest, cache, tau=1.2, capacity=4, backend="triton")
    assert cache.start.flatten().tolist() == [0, 2, 3, 4] and cache.count.flatten().tolist() == [2, 1, 1, 1]
