"""Softmax attention over packed rows: the flash kernel's form against the mask's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dla.kernels.bench.ledger.record import record
from megatron_dla.mixers import softmax
from megatron_dla.mixers.softmax import CoreAttention


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int, *, window_size
) -> Tensor:
    """What torch's kernel computes, sequence by sequence: key j for query i where i - window_size[0] <= j <= i."""
    before, after = window_size
    assert after == 0 and q.shape == k.shape and torch.equal(ends_q, ends_k)
    lengths = ends_q.diff()
    assert int(lengths.min()) > 0 and most_q == most_k == int(lengths.max())
    outs = []
    for a, b in pairwise(ends_q.tolist()):
        one = [x[a:b].transpose(0, 1) for x in (q, k, v)]
        behind = torch.arange(b - a)[:, None] - torch.arange(b - a)
        mask = (behind >= 0) & (behind <= (before if before >= 0 else b - a))
        outs.append(F.scaled_dot_product_attention(*one, attn_mask=mask).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize("groups", [4, 2])
def test_sequences_are_the_documents(groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "varlen_attn", one_by_one)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, n, 8, generator=gen, dtype=torch.float64) for n in (4, groups, groups))
    ends = torch.tensor([0, 7, 7, 8, 33, 40], dtype=torch.int32)  # one is empty, one crosses into the second row
    want = CoreAttention._attend(q, k, v, ends, window)
    torch.testing.assert_close(softmax.packed_attention(q, k, v, ends, window), want)


def token_loop(q: Tensor, k: Tensor, v: Tensor, ends: list[int], window: int) -> Tensor:
    """The definition, a query at a time, over the flattened rows [B, S, heads, D] with as many key heads."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    outs = []
    for t in range(len(q)):
        begin = max(*(e for e in ends if e <= t), t - window + 1)
        scores = torch.einsum("hd,shd->hs", q[t], k[begin : t + 1]) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[begin : t + 1]))
    return torch.stack(outs)


@pytest.mark.parametrize("window", [1, 5, 19, 20, 64])
@pytest.mark.parametrize("documents", [None, [0, 7, 8, 20, 33, 40]])
def test_a_window_is_the_last_tokens(window: int, documents: list[int] | None) -> None:
    gen = torch.Generator().manual_seed(1)
    q, k, v, cotangent = (torch.randn(2, 20, 2, 4, generator=gen, dtype=torch.float64) for _ in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]
    ends = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    out = CoreAttention._attend(q, k, v, ends, window)
    want = token_loop(q, k, v, documents or [0, 20, 40], window).unflatten(0, (2, 20))
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, given, cotangent) for x in (out, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("S", [40, softmax.FP32_ON_CPU, softmax.FP32_ON_CPU + 1])
def test_short_rows_in_bf16_are_rounded_once_on_a_cpu(S: int) -> None:
    gen = torch.Generator().manual_seed(2)
    q, k, v, cotangent = (torch.randn(2, S, n, 16, generator=gen).bfloat16() for n in (4, 2, 2, 4))
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = CoreAttention._attend(*given, torch.tensor([0, 7, 2 * S]))
        grads = torch.autograd.grad(out, given, cotangent.to(dtype))
        assert {x.dtype for x in (out, *grads)} == {dtype}
        results.append([x.bfloat16() for x in (out, *grads)])
    most = 0.0 if S <= softmax.FP32_ON_CPU else 0.05
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=most, atol=most)


@pytest.mark.parametrize("window", [None, 100])
def test_a_gpu_gets_no_mask(window: int | None) -> None:
    S = 512
    q = torch.empty(1, S, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(1, S, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with record() as recording:
        out = CoreAttention._attend(q, k, k, torch.tensor([0, 100, S]) if window is None else None, window)
        out.sum().backward()
    assert out.shape == q.shape and {"_varlen_attn", "_varlen_attn_backward"} <= {e.name for e in recording.events}
    assert max(e.bytes for e in recording.events) < 10 * 2 * q.numel() and not any(
        e.kind == "sync" for e in recording.events
    )


@pytest.mark.parametrize("change", [dict(dtype=torch.float32), dict(device="cpu"), dict(dim=12), dict(borders="meta")])
def test_what_goes_with_a_mask(change: dict) -> None:
    given = dict(dtype=torch.bfloat16, device="meta", dim=64, borders="cpu")
    taken = []
    for some in (given, given | change):
        q = torch.empty(1, 16, 2, some["dim"], dtype=some["dtype"], device=some["device"])
        taken.append(softmax.takes_packed(q, torch.tensor([0, 16], device=some["borders"])))
    assert taken == [True, False]
