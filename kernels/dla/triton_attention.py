"""The `triton` backend behind `dla_attention`: shapes and records in, kernels, shapes and records out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.launch import compute_capability, on_device
from . import triton_launch
from .cache import Partition, SlotCache, beyond_kernels
from .documents import document_starts
from .triton_chunk import TritonDLA
from .triton_launch import LaunchPlan
from .triton_layout import NEVER, make_layout
from .triton_tables import to_line
from .triton_threshold import threshold_gradient

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(k: Tensor, v: Tensor, capacity: int) -> str:
    """Why the kernels cannot take these inputs ('' if they can)."""
    if v.dtype not in DTYPES:
        return f"dtype {v.dtype} (use bf16, fp16 or fp32)"
    return beyond_kernels(k.shape[-1], v.shape[-1], capacity)


def _line(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """[B, T, ...] -> contiguous [B * T, ...]."""
    if x is None:
        return None
    return x.to(dtype or x.dtype).contiguous().flatten(0, 1)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None,
    *,
    part: Partition,
    cu_seqlens: Tensor | None,
    tau: float | Tensor,
    temperature: float,
    cache: SlotCache | None = None,
    slot_death: Tensor | None = None,
    states: Tensor | None = None,
    want_final: bool = False,
    keep_states: bool = False,
    tile: int | None = None,
    tiles: int | None = None,
    window_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `dla_attention`, checked, with the partition taken.

    Args:
        slot_death: int [B * H, K] by recency, states: fp32 [B * H, K, Dk, Dv] by recency: the incoming cache.
        tile, tiles, window_rows: tokens a tile, tiles a block, rows a window (speed and memory only); None chooses.

    Returns:
        out [B, T, H, Dv], and the final states [B * H, K, Dk, Dv] fp32 by recency if `want_final` (of each row's last
        document), else an empty tensor.
    """
    B, T, H, Dv = v.shape
    G, Dk, K = k.shape[2], k.shape[3], slot_weights.shape[-1]
    small = v.dtype != torch.bfloat16 or (beta is not None and compute_capability(v.device) < 90)
    tile = tile or (triton_launch.WIDE_TILE if small else triton_launch.TILE)
    tiles = tiles or (triton_launch.TILES if v.dtype == torch.bfloat16 else triton_launch.WIDE_TILES)
    plan = LaunchPlan(v.dtype, Dk, Dv, H, G, K, beta is not None, tile=tile, tiles=tiles)
    layout = make_layout(B, T, cu_seqlens, plan.block, window_rows or plan.window_rows, v.device, tile)
    incoming = None
    if cache is not None:
        assert slot_death is not None and states is not None
        offset = torch.arange(B, device=v.device).view(B, 1, 1) * T
        death = slot_death.view(B, H, K)
        death = torch.where(death >= T, NEVER, death + offset)
        incoming = (cache.live.to(torch.int32).contiguous(), death.to(torch.int32).contiguous())
        states = states.view(B, H, K, Dk, Dv)
    learned = tau if isinstance(tau, Tensor) and tau.requires_grad else None

    def threshold(dlam: Tensor, lam: Tensor, tau: Tensor) -> Tensor:
        begin = torch.arange(T, device=v.device) * document_starts(cu_seqlens, B, T, v.device)
        begin = begin.cummax(1).values.repeat_interleave(H, dim=0)

        def lanes(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(0, 1)

        assert part.lo is not None
        dlam, lam = (lanes(x.float().view(B, T, H, K)) for x in (dlam, lam))
        start, death, lo, score = (lanes(x) for x in (part.start, part.death, part.lo, part.score))
        lane_tau = tau.float().expand(H).repeat(B)
        per_lane = threshold_gradient(dlam, lam, start, death, lo, score, begin, lane_tau, temperature)
        per_head = per_lane.view(B, H).sum(0)
        return (per_head if tau.ndim else per_head.sum()).to(tau.dtype)

    inputs = (
        _line(q, v.dtype), _line(k, v.dtype), _line(v), _line(g), _line(slot_weights), _line(beta),
        states if cache is not None else None, learned,
    )  # fmt: skip
    with on_device(v):
        out, final = TritonDLA.apply(
            *inputs, plan, layout, to_line(part.death, part.start), incoming, threshold, want_final, keep_states
        )
    return out.view(B, T, H, Dv), final[layout.last_segments].flatten(0, 1) if want_final else final
