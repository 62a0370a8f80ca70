"""Causal softmax core attention on PyTorch SDPA, with packed documents kept apart, context-parallel by heads.

Megatron's local DotProductAttention materialises the scores and supports neither packed rows nor context parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.parallel.context import HeadExchange


class CoreAttention(MegatronModule):
    """core_attention slot of Megatron's SelfAttention: q [S, B, H, D], k and v [S, B, G, D] -> [S, B, H * D].

    Under context parallelism S is this rank's part; rotary positions are already in q and k.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type: str, *, pg_collection=None, **_: object
    ) -> None:
        super().__init__(config=config)
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
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = self._attend(q, k, v, packed_seq_params).transpose(1, 2).flatten(2)
        return (out if self.exchange is None else self.exchange.to_tokens(out)).transpose(0, 1).contiguous()

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, packed_seq_params) -> Tensor:
        """[B, heads, S, D] of whole rows."""
        B, _, S, _ = q.shape
        mask = None
        if packed_seq_params is not None and packed_seq_params.cu_seqlens_q is not None:
            document = document_starts(packed_seq_params.cu_seqlens_q, B, S, q.device).long().cumsum(1)
            mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class ContiguousRotary(nn.Module):
    """Megatron's rotary embedding, cut contiguously over the context-parallel ranks (Megatron cuts zig-zag)."""

    def __init__(self, inner: nn.Module, cp: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.inner, self.cp = inner, cp
        self.get_rotary_seq_len = inner.get_rotary_seq_len

    def forward(self, max_seq_len: int, **_: object) -> Tensor:
        """Angles [S / cp, 1, 1, D] of this rank's tokens; `max_seq_len` counts whole rows."""
        return self.inner.get_emb(max_seq_len).chunk(self.cp.size())[self.cp.rank()]  # type: ignore[operator]
