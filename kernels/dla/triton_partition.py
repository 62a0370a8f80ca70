"""The partition on Triton kernels: detection (in shards where batch x heads is small), then the capacity rule."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common.launch import ceil_div, on_device
from . import triton_launch
from .cache import Partition, SlotCache
from .triton_capacity import capacity_kernel, merge_rule
from .triton_chunk import block_decay, elimination
from .triton_detect import detect_kernel, detect_pairs_kernel, repair_kernel, repair_rest_kernel
from .triton_launch import PRECISION, LaunchPlan, head_values
from .triton_layout import NEVER, BlockLayout, make_layout
from .triton_open_slot import ring_size

PROGRAMS = 264  # that run at the same time: two on each processor of a large GPU
SHARD_BLOCKS = 8  # least blocks a shard
RUN_AGAIN = 3  # blocks of a shard that are run again: about two slots' tokens
NEAR = 7  # chunks before a chunk whose tokens it meets one by one: a slot that began earlier has a state


def _shard_blocks(chunks: list[int], heads: int) -> int:
    """Chunks a shard for segments of so many: those with which the GPU is done first."""
    longest = max(chunks)

    def steps(size: int) -> int:
        waves = ceil_div(heads * sum(ceil_div(n, size) for n in chunks), PROGRAMS)
        return waves * (size + (RUN_AGAIN if size < longest else 0))

    parts = range(1, min(PROGRAMS, ceil_div(longest, SHARD_BLOCKS)) + 1)
    return min((max(SHARD_BLOCKS, ceil_div(longest, n)) for n in parts), key=steps)


@lru_cache(maxsize=64)
def _shards(
    spans: tuple[tuple[int, int], ...], heads: int, tile: int, shard_blocks: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int32 [n, 3]: first token and end of every shard, and whether it continues the one before it; [n, 2]: first
    shard and shards of every segment.

    `spans`: first token and end of every segment. Cached: a copy to the device waits for the device.
    """
    if shard_blocks is None:
        shard_blocks = _shard_blocks([ceil_div(end - begin, tile) for begin, end in spans], heads)
    shards: list[tuple[int, int, int]] = []
    of_segment: list[tuple[int, int]] = []
    for begin, end in spans:
        cuts = range(begin, end, shard_blocks * tile)
        of_segment.append((len(shards), len(cuts)))
        shards += [(at, min(at + shard_blocks * tile, end), int(at > begin)) for at in cuts]
    tables = (torch.tensor(x, dtype=torch.int32, device=device) for x in (shards, of_segment))
    return next(tables), next(tables)


def triton_partition(
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
    tile: int | None = None,
    shard_blocks: int | None = None,
    near: int = NEAR,
) -> Partition:
    """The partition by any rule but `ward`; arguments as `torch_partition`, no gradient.

    `shard_blocks`: chunks that one program runs in a row; None chooses by the number of segments and heads. `near`:
    chunks after which a slot has a state. The decisions do not depend on either.
    """
    with torch.no_grad(), on_device(v):
        if v.dtype == torch.float16:  # no exact split of fp32 into fp16 terms
            k, v = k.float(), v.float()
        B, T, H, Dv = v.shape
        G, Dk = k.shape[2:]
        device, tile = v.device, tile or triton_launch.DETECT_TILE
        plan = LaunchPlan(
            torch.promote_types(k.dtype, v.dtype), Dk, Dv, H, G, capacity, True, tile=tile, tiles=1
        )  # blocks of one tile, for both backbones
        layout = make_layout(B, T, cu_seqlens, tile, 2**30, device)
        k, v, g = (x.contiguous().flatten(0, 1) for x in (k, v, g))
        beta = None if beta is None else beta.contiguous().flatten(0, 1)
        gdn = beta is not None
        cg, _ = block_decay(g, layout.blocks, tile)
        shards, of_segment = _shards(layout.spans, H, tile, shard_blocks, device)
        starts = torch.empty(H, B * T, dtype=torch.int8, device=device)
        scores, sums = (torch.empty(H, B * T, device=device) for _ in range(2))
        state = torch.empty(len(shards), H, Dk, Dv, device=device)
        opens = torch.empty(len(shards), H, dtype=torch.int32, device=device)
        infos, norms = (torch.empty(len(shards), H, device=device) for _ in range(2))
        fresh = opens
        if cache is not None:
            fresh = torch.ones(len(shards), H, dtype=torch.int32, device=device)
            infos.zero_()
            opens.fill_(-NEVER)  # before all tokens: its state is given, and with it |S|^2
            heads = of_segment[:, 0].long()
            last = (cache.live - 1).clamp(min=0)[..., None]
            open_slot = last[..., None, None].expand(B, H, 1, Dk, Dv)
            state[heads] = cache.states.gather(2, open_slot).squeeze(2).float()
            infos[heads] = cache.info.gather(2, last).squeeze(2).float()
            norms[heads] = state[heads].square().sum((-2, -1))
            fresh[heads] = (cache.live == 0).int()
        sizes = (B * T, H, H // G)
        meta: dict[str, Any] = dict(BT=tile, GDN=gdn, PREC=PRECISION)
        inner = torch.empty(B * T, H, tile, device=device)
        inv = effect = square = ring = inner
        if gdn:
            inv, effect, square = (torch.empty_like(inner) for _ in range(3))
            ring = torch.empty(len(shards), H, ring_size.fn(Dv, tile, near), device=device)
        k2, written = (torch.empty(H, B * T, device=device) for _ in range(2))
        detect_pairs_kernel[(len(layout.blocks), H)](
            k, v, g if beta is None else beta, cg, inv, effect, inner, square, k2, written, layout.blocks, *sizes,
            **meta, **elimination(tile), **plan.launch("detect_pairs", device),
        )  # fmt: skip
        if isinstance(tau, Tensor) and tau.ndim == 3:
            meta["BY_TOKEN"], taus = True, _heads_first(tau, torch.float32)
        else:
            meta["BY_TOKEN"], taus = False, head_values(tau, H, device)
        args = (
            k, v, g if beta is None else beta, cg, inv, effect, inner, square, k2, written, taus, ring, state, opens,
            infos, norms,
        )  # fmt: skip
        meta |= {"NEAR": near} | plan.detect(gdn, device)
        if meta["BY_TOKEN"]:
            meta["BK"] = min(meta["BK"], 32)  # room in registers for the thresholds
        detect_kernel[(len(shards), H)](
            *args, fresh, starts, scores, sums, shards, *sizes, HAS_CACHE=cache is not None, **meta
        )
        if len(shards) > len(of_segment):
            ends = (torch.empty_like(x) for x in (opens, opens, infos, norms))  # the first one: whether it agrees
            again = (*args, starts, scores, sums, shards, *ends)
            meta["num_stages"] = 1  # it holds more than `detect_kernel`
            repair_kernel[(len(shards), H)](*again, *sizes, **meta)
            meta |= plan.launch("repair_rest_gdn" if gdn else "repair_rest", device)
            repair_rest_kernel[(len(of_segment), H)](*again, of_segment, *sizes, **meta)
        return _capacity(plan, layout, starts, scores, sums, cache, B, want_lo, merge, pairs)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H] -> contiguous [H, B * T]."""
    return x.flatten(0, 1).T.to(dtype).contiguous()


def _capacity(
    plan: LaunchPlan,
    layout: BlockLayout,
    starts: Tensor,
    scores: Tensor,
    sums: Tensor,
    cache: SlotCache | None,
    B: int,
    want_lo: bool,
    merge: str,
    pairs: Tensor | None,
) -> Partition:
    H, K, device = plan.H, plan.K, starts.device
    T = layout.tokens // B
    death = torch.empty_like(starts, dtype=torch.int32)
    lo = torch.empty_like(death) if want_lo else death
    final_info = torch.empty(B, H, K, device=device)
    incoming, cache_death = (death, sums, sums), None
    if cache is not None:
        incoming = (cache.live.int().contiguous(), cache.count.float().contiguous(), cache.info.float().contiguous())
        cache_death = torch.empty(B, H, K, dtype=torch.int32, device=device)
    capacity_kernel[(len(layout.segments), H)](
        starts, sums, layout.segments, *incoming, torch.empty_like(death), death,
        death if cache_death is None else cache_death, lo, final_info,
        death if pairs is None else _heads_first(pairs, torch.int32), layout.tokens, H, K, T,
        HAS_CACHE=cache is not None, WANT_LO=want_lo, TILE=512, KP=max(32, plan.slots_padded),  # at least a whole warp
        **merge_rule(merge, pairs), num_warps=1,
    )  # fmt: skip

    def rows(x: Tensor) -> Tensor:
        return x.view(H, B, T).permute(1, 2, 0)

    return Partition(
        start=rows(starts.view(torch.bool)), death=rows(death), score=rows(scores), lo=rows(lo) if want_lo else None,
        cache_death=cache_death, final_info=final_info,
    )  # fmt: skip
