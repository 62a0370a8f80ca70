"""The pure-torch pieces of a DLA mixer, shared by the Megatron module and the Hugging Face model.

Self-contained (torch only): `dla convert to-hf` copies this file beside the modeling file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAU_RANGE = (0.5, 1.41)  # a learned threshold is clamped to this; outside, slots open always or never


def short_convolution(
    x: Tensor,
    weight: Tensor,
    document: Tensor | None = None,
    tail: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Causal depthwise convolution and SiLU that does not look across documents.

    Args:
        x: [B, T, C]. weight: [C, W], the last tap multiplies the current token.
        document: int [B, T], document number of each token, or None (one document a row).
        tail: [B, W - 1, C], the inputs before x (decoding); zeros if None.
        bias: [C] or None.

    Returns:
        [B, T, C].
    """
    width, T = weight.shape[1], x.shape[1]
    if tail is None:
        tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    padded = torch.cat([tail, x], 1)
    if T == 1:
        out = (padded * weight.T).sum(1, keepdim=True)
        return F.silu(out if bias is None else out + bias)
    if x.device.type == "cpu":
        weight = weight.T.contiguous().T  # strided, the taps take a CPU three times as long
    out = x * weight[:, -1]
    for back in range(1, width):
        shifted = padded[:, width - 1 - back : width - 1 - back + T]
        if document is not None and back < T:
            same = document[:, back:] == document[:, :-back]
            same = F.pad(same, (back, 0), value=True)
            shifted = shifted * same[..., None]
        out.addcmul_(shifted, weight[:, width - 1 - back])  # new memory would cost more than the product
    return F.silu(out if bias is None else out.add_(bias))


def slot_weights(raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """softplus(L * (W x) + c) in fp32: raw [..., H, K], scale and bias [H, K]."""
    return F.softplus(scale * raw.to(scale.dtype) + bias)


def clamp_tau(tau: Tensor) -> Tensor:
    """A learned threshold, clamped to `TAU_RANGE`; the gradient passes unchanged, so that it can come back."""
    return tau + (tau.clamp(*TAU_RANGE) - tau).detach()


def mamba2_inputs(value: Tensor, dt: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba-2's write and log-decay: v = dt * x and g = -exp(A_log) dt, with dt = softplus(dt + dt_bias).

    Args:
        value: [B, T, H, Dv]. dt: [B, T, H], before the softplus. A_log, dt_bias: fp32 [H].
    """
    dt = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    return value * dt[..., None].to(value.dtype), -A_log.exp() * dt


def gdn_inputs(
    q: Tensor, k: Tensor, dt: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gated DeltaNet's unit q (scaled by Dk^-1/2) and k, log-decay g and write strength beta.

    Args:
        q, k: [B, T, G, Dk]. dt, beta: [B, T, H], before softplus and sigmoid. A_log, dt_bias: fp32 [H].
    """
    q = F.normalize(q.float() if q.dtype != torch.float64 else q, dim=-1, eps=1e-6) * q.shape[-1] ** -0.5
    k = F.normalize(k.float() if k.dtype != torch.float64 else k, dim=-1, eps=1e-6)
    g = -A_log.exp() * F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    return q, k, g, torch.sigmoid(beta.to(dt_bias.dtype))


def gated_group_norm(
    out: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    groups: int,
    gate_first: bool,
    mean: Callable[[Tensor], Tensor] = lambda square: square,
) -> Tensor:
    """RMSNorm over the channels of all heads of a query/key group, gated as in `gated_head_norm`.

    Args:
        out, gate: [B, T, H, Dv]. weight: [H * Dv].
        mean: the mean squares [B, T, groups, 1] of these heads -> those of whole groups, where other ranks have heads
            of them too.
    """
    gate = F.silu(gate)
    x = out * gate if gate_first else out
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide.flatten(2).unflatten(-1, (groups, -1))
    wide = wide * torch.rsqrt(mean(wide.square().mean(-1, keepdim=True)) + eps)
    x = wide.flatten(2).to(out.dtype).mul(weight.to(out.dtype)).view_as(out)
    return x if gate_first else x * gate


def gated_head_norm(out: Tensor, gate: Tensor, weight: Tensor, eps: float, *, gate_first: bool) -> Tensor:
    """RMSNorm over each head's channels with the output gate: before it (Mamba-2) or after it (Gated DeltaNet).

    Args:
        out, gate: [B, T, H, Dv]. weight: [Dv], shared by the heads.
    """
    gate = F.silu(gate)
    if gate_first:
        return F.rms_norm(out * gate, weight.shape, weight.to(out.dtype), eps)
    return F.rms_norm(out, weight.shape, weight.to(out.dtype), eps) * gate
