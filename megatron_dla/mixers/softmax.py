"""Causal softmax core attention on PyTorch's kernels, with packed documents kept apart, context-parallel by heads.

Megatron's local DotProductAttention materialises the scores and supports neither packed rows nor context parallelism.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from megatron_dla.kernels.dla.documents import document_borders, document_starts
from megatron_dla.parallel.context import HeadExchange

# longest rows that are computed in fp32: torch's bf16 backward kernel for CPUs takes up to five times as long there
FP32_ON_CPU = 256


@lru_cache(maxsize=16)
def _on_device(borders: tuple[int, ...], device: torch.device) -> Tensor:
    """One copy for all layers of a model."""
    return torch.tensor(borders, dtype=torch.int32, device=device)


def takes_packed(q: Tensor, cu_seqlens: Tensor) -> bool:
    """Whether `packed_attention` takes q [B, S, heads, D]: on a GPU, in bf16 or fp16, with borders on the host."""
    low = q.dtype in (torch.bfloat16, torch.float16)
    return low and q.device.type != "cpu" and cu_seqlens.device.type == "cpu" and q.shape[-1] in range(8, 257, 8)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None = None) -> Tensor:
    """Causal attention inside each document on the flash kernel for sequences of many lengths: no mask.

    q [B, S, heads, D], k and v [B, S, groups, D] -> [B, S, heads, D]; `cu_seqlens` over the flattened B * S tokens.
    """
    B, S, heads, _ = q.shape
    borders = document_borders(cu_seqlens, B, S)
    ends, longest = _on_device(borders, q.device), max(b - a for a, b in pairwise(borders))
    if k.shape[2] != heads:  # torch 2.11 knows no groups here
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1 if window is None else window - 1, 0))
    assert isinstance(out, Tensor)
    return out.unflatten(0, (B, S))


class CoreAttention(MegatronModule):
    """core_attention slot of Megatron's SelfAttention: q [S, B, H, D], k and v [S, B, G, D] -> [S, B, H * D].

    Under context parallelism S is this rank's part; rotary positions are already in q and k. `window`: tokens that a
    query sees, itself included; None: all before it.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type: str, *, pg_collection=None,
        window: int | None = None, **_: object,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.window = window
        cp = None if pg_collection is None else pg_collection.cp
        self.exchange = HeadExchange(cp) if cp is not None and cp.size() > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *, packed_seq_params=None, **_: object
    ) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [B, S, heads, D]
        if self.exchange is not None:
            units, size = [x.shape[2] for x in (q, k, v)], q.shape[-1]
            exchanged = self.exchange.to_heads([x.flatten(2) for x in (q, k, v)], units)
            q, k, v = (x.unflatten(-1, (-1, size)) for x in exchanged)
        ends = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        out = self._attend(q, k, v, ends, self.window).flatten(2)
        return (out if self.exchange is None else self.exchange.to_tokens(out)).transpose(0, 1).contiguous()

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int | None = None) -> Tensor:
        """[B, S, heads, D] of whole rows."""
        B, S = q.shape[:2]
        mask = None
        if window is not None and window < S and cu_seqlens is None:
            cu_seqlens = torch.arange(0, B * S + 1, S)
        if cu_seqlens is not None:
            if takes_packed(q, cu_seqlens):
                return packed_attention(q, k, v, cu_seqlens, window)
            document = document_starts(cu_seqlens, B, S, q.device).long().cumsum(1)
            mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
            if window is not None:
                mask = mask.triu(1 - window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped, dtype = k.shape[1] != q.shape[1], q.dtype
        if dtype == torch.bfloat16 and q.device.type == "cpu" and S <= FP32_ON_CPU:
            q, k, v = (x.float() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return out.to(dtype).transpose(1, 2)


class ContiguousRotary(nn.Module):
    """Megatron's rotary embedding, cut contiguously over the context-parallel ranks (Megatron cuts zig-zag)."""

    def __init__(self, inner: nn.Module, cp: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.inner, self.cp = inner, cp
        self.get_rotary_seq_len = inner.get_rotary_seq_len

    def forward(self, max_seq_len: int, **_: object) -> Tensor:
        """Angles [S / cp, 1, 1, D] of this rank's tokens; `max_seq_len` counts whole rows."""
        return self.inner.get_emb(max_seq_len).chunk(self.cp.size())[self.cp.rank()]  # type: ignore[operator]
