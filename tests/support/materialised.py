"""The quadratic form of DLA in float64: a second oracle, for short sequences."""

import torch
from torch import Tensor

from megatron_dla.kernels.dla import Partition
from megatron_dla.kernels.dla.documents import document_starts


def slot_of(partition: Partition, starts: Tensor) -> Tensor:
    """Slot (recency) of every token j at every time t: int64 [B, H, T, T], meaningful where j <= t in one document."""
    B, T, H = partition.start.shape
    t = torch.arange(T)
    document = starts.long().cumsum(1)
    alive = partition.start.permute(0, 2, 1)[:, :, None, :] & (t[None, :] <= t[:, None])
    alive = alive & (partition.death.permute(0, 2, 1)[:, :, None, :] > t[:, None])
    alive = alive & (document[:, None, :, None] == document[:, None, None, :])
    return alive.long().flip(-1).cumsum(-1).flip(-1) - alive.long()


def materialised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None = None,
    *,
    partition: Partition,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The quadratic form O = (A .* M) V: the backbone's own attention matrix times the slot-weight mask (float64)."""
    B, T, H, _ = v.shape
    q, k = (x.double().repeat_interleave(H // x.shape[2], dim=2).transpose(1, 2) for x in (q, k))
    v, decay = v.double().transpose(1, 2), g.double().transpose(1, 2).cumsum(-1)
    starts = document_starts(cu_seqlens, B, T)
    document = starts.long().cumsum(1)[:, None]
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (document[..., :, None] == document[..., None, :])
    D = (decay[..., :, None] - decay[..., None, :]).masked_fill(~visible, float("-inf")).exp()
    A = q @ k.transpose(-1, -2) * D
    if beta is not None:
        beta = beta.double().transpose(1, 2)
        L = (beta[..., None] * (k @ k.transpose(-1, -2)) * D).tril(-1)
        A = A @ torch.linalg.solve_triangular(torch.eye(T).double() + L, torch.diag_embed(beta), upper=False)
    slot = slot_of(partition, starts).clamp(max=slot_weights.shape[-1] - 1)
    M = slot_weights.double().transpose(1, 2).gather(-1, slot)
    return ((A * M) @ v).transpose(1, 2)
