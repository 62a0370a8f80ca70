"""Causal softmax core attention on PyTorch SDPA, with packed documents kept apart.

Megatron's local DotProductAttention materialises the scores, refuses packed rows and refuses context parallelism.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dla.kernels.dla.naive import document_starts


class CoreAttention(MegatronModule):
    """core_attention slot of Megatron's SelfAttention: q [S, B, H, D], k and v [S, B, G, D] -> [S, B, H * D]."""

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, **_: object) -> None:
        super().__init__(config=config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *, packed_seq_params=None, **_: object
    ) -> Tensor:
        S, B = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        mask = None
        if packed_seq_params is not None:
            document = document_starts(packed_seq_params.cu_seqlens_q, B, S, query.device).long().cumsum(1)
            mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(S, B, -1)
