"""The exact partition in torch: where slots open, and which starts the capacity rule removes.

Two passes. Detection (`detect`) does not depend on the capacity, because a full cache merges only among the slots that
are already there. The capacity pass (`capacity`) needs three scalars a segment (start, tokens, summed score).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arrays import compute_dtype, lanes, unlanes
from .cache import Partition, SlotCache
from .capacity import apply_capacity
from .detect import detect
from .documents import document_starts


def torch_partition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int,
    merge: str = "density",
    pairs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    want_lo: bool = False,
    chunk_size: int = 32,
) -> Partition:
    """The partition by any rule but `ward`; arguments as `partition` (the public entry point), no gradient.

    Args:
        tau: also [B, T, H], for each token its own. pairs: [B, T, H], see `Controls.pairs`.
        want_lo: also compute `Partition.lo`, which the gradient of a learned threshold needs (`density` only).
    """
    with torch.no_grad():
        B, T, H, _ = v.shape
        resets = document_starts(cu_seqlens, B, T, v.device).repeat_interleave(H, dim=0)
        tau = torch.as_tensor(tau, dtype=compute_dtype(v), device=v.device)
        lane_tau = lanes(tau, H, tau.dtype) if tau.ndim == 3 else tau.expand(H).repeat(B)
        state, dtype = None, compute_dtype(v)
        if cache is None:
            resets[:, 0] = True
        else:
            last = (cache.live - 1).clamp(min=0)[..., None, None, None]
            open_slot = last.expand(B, H, 1, *cache.states.shape[3:])
            state = cache.states.gather(2, open_slot).flatten(0, 2).to(dtype)
            resets[:, 0] |= cache.live.view(-1) == 0
        start, score = detect(
            lanes(k, H, dtype), lanes(v, H, dtype), lanes(g, H, dtype),
            None if beta is None else lanes(beta, H, dtype), lane_tau, resets, state, chunk_size,
        )  # fmt: skip
        lane_pairs = None if pairs is None else lanes(pairs, H, pairs.dtype)
        done = apply_capacity(start, score, resets, capacity, cache, merge=merge, pairs=lane_pairs, want_lo=want_lo)
        death, cache_death, lo, final_info = done
        return Partition(
            start=unlanes(start, B),
            death=unlanes(death, B),
            score=unlanes(score.float(), B),
            lo=None if lo is None else unlanes(lo, B),
            cache_death=cache_death.view(B, H, capacity),
            final_info=final_info.view(B, H, capacity),
        )
