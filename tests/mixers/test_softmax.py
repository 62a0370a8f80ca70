"""Softmax attention over packed rows: the flash kernel's form against the mask's."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dla.kernels.bench.ledger.record import record
from megatron_dla.mixers import softmax
from megatron_dla.mixers.softmax import CoreAttention


def one_by_one(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, most_q: int, most_k: int, **given):
    """What torch's kernel computes, sequence by sequence."""
    assert given == {"window_size": (-1, 0)} and q.shape == k.shape and torch.equal(ends_q, ends_k)
    lengths = ends_q.diff()
    assert int(lengths.min()) > 0 and most_q == most_k == int(lengths.max())
    outs = []
    for a, b in pairwise(ends_q.tolist()):
        one = [x[a:b].transpose(0, 1) for x in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("groups", [4, 2])
def test_sequences_are_the_documents(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "varlen_attn", one_by_one)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 20, n, 8, generator=gen, dtype=torch.float64) for n in (4, groups, groups))
    ends = torch.tensor([0, 7, 7, 8, 33, 40], dtype=torch.int32)  # one is empty, one crosses into the second row
    want = CoreAttention._attend(q, k, v, ends)
    torch.testing.assert_close(softmax.packed_attention(q, k, v, ends), want)


def test_a_gpu_gets_no_mask() -> None:
    S = 512
    q = torch.empty(1, S, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(1, S, 2, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with record() as recording:
        out = CoreAttention._attend(q, k, k, torch.tensor([0, 100, S]))
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
