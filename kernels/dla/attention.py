"""The public entry points: `partition`, `dla_attention`, `decode_step`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache as once
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .arrays import compute_dtype, lanes, unlanes
from .autocast import without_autocast
from .cache import EMPTY, Partition, SlotCache
from .chunk import ChunkDLA
from .content import content_weights
from .decode import decode_one, recurrent_partition
from .documents import begin_of_document, document_starts
from .fenwick import fenwick_partition, weights_by_recency
from .partition import torch_partition
from .rules import FENWICK, INFORMATION, Controls, check_rule, needs_positions, positions

BACKENDS = ("auto", "naive", "torch", "triton")
TAU_TEMPERATURE = 0.1  # width of the surrogate sigmoid of a learned threshold


@once
def _optional(name: str) -> ModuleType | str:
    """A module of Triton kernels or the oracle's, or why it cannot be imported.

    By name, not by an import statement: this file is part of exported models, those modules are not.
    """
    try:
        return importlib.import_module(f"megatron_dla.kernels.dla.{name}")
    except ImportError as error:
        return str(error)


def kernels_missing() -> str:
    """Why the Triton kernels cannot be imported on this machine ('' if they can)."""
    module = _optional("triton_attention")
    return module if isinstance(module, str) else ""


def _kernel(name: str, function: str) -> Callable[..., Any]:
    """A function of such a module.

    Raises:
        ValueError: the module cannot be imported.
    """
    module = _optional(name)
    if isinstance(module, str):
        raise ValueError(f"{function} cannot be imported here ({module}): use backend='torch'")
    return getattr(module, function)


def _choose(backend: str, k: Tensor, v: Tensor, capacity: int) -> str:
    """`auto` resolved; ValueError where `triton` was asked for and cannot be used."""
    if backend not in ("auto", "triton") or (backend == "auto" and not v.is_cuda):
        return "torch" if backend == "auto" else backend
    module = _optional("triton_attention")
    reason = module if isinstance(module, str) else module.unsupported(k, v, capacity)
    if not reason:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot be used here: {reason}; use backend='torch'")
    return "torch"


def _check(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *, tau, capacity: int, merge: str, controls: Controls,
    backend: str,
) -> None:  # fmt: skip
    """Shapes and values that a caller can get wrong: ValueError with the argument, the value and what is needed."""
    if v.ndim != 4 or k.ndim != 4 or k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k and v must be [B, T, G, Dk] and [B, T, H, Dv], got {tuple(k.shape)}, {tuple(v.shape)}")
    B, T, H, _ = v.shape
    if B == 0 or T == 0:
        raise ValueError(f"B and T must be at least 1, got {B} and {T}")
    if H % k.shape[2]:
        raise ValueError(f"heads ({H}) must be a multiple of the q/k groups ({k.shape[2]})")
    for name, x in (("g", g), ("beta", beta)):
        if x is not None and x.shape != (B, T, H):
            raise ValueError(f"{name} must be [B, T, H] = {(B, T, H)}, got {tuple(x.shape)}")
    if isinstance(tau, Tensor) and tau.ndim and tau.shape != (H,):
        raise ValueError(f"tau must be a number or a tensor [H] = [{H}], got {tuple(tau.shape)}")
    never = not isinstance(tau, Tensor) and tau > 2 and controls.boundary == "information"  # no score reaches it
    if capacity < (1 if never else 2):
        raise ValueError(f"capacity must be at least 2 (a merge needs two slots; 1 with a tau above 2), got {capacity}")
    check_rule(merge, controls)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def _check_cu_seqlens(cu_seqlens: Tensor | None, tokens: int) -> None:
    if cu_seqlens is None:
        return
    ends = cu_seqlens.tolist()
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or ends != sorted(ends):
        raise ValueError(f"cu_seqlens must rise from 0 to B * T = {tokens} without falling, got {ends}")


def _check_cache(cache: SlotCache | None, batch: int, k: Tensor, v: Tensor, capacity: int) -> None:
    wanted = (batch, v.shape[2], capacity, k.shape[-1], v.shape[-1])
    if cache is not None and tuple(cache.states.shape) != wanted:
        raise ValueError(f"cache.states must be [B, H, capacity, Dk, Dv] = {wanted}, got {tuple(cache.states.shape)}")


def _check_partition(part: Partition | None, v: Tensor, cache: SlotCache | None) -> None:
    if part is None:
        return
    if part.start.shape != v.shape[:3]:
        raise ValueError(f"partition.start must be [B, T, H] = {tuple(v.shape[:3])}, got {tuple(part.start.shape)}")
    if cache is not None and part.cache_death is None:
        raise ValueError("partition.cache_death is missing: compute the partition with the same cache")


def _by_position(
    v: Tensor, tau: float | Tensor, capacity: int, merge: str, controls: Controls, cu_seqlens: Tensor | None,
    cache: SlotCache | None,
) -> dict[str, Any]:  # fmt: skip
    """What a form of the recurrence needs to know of its rule: thresholds (by token, [B, T, H], where a control sets
    them), merge, and the pairs [B, T, H] that merge where they are not the cheapest."""
    if not needs_positions(merge, controls):
        return dict(tau=tau, merge=merge, pairs=None)
    B, T, H, _ = v.shape
    where = positions(document_starts(cu_seqlens, B, T, v.device), H, cache)
    return dict(tau=controls.thresholds(tau, where), merge=merge, pairs=controls.pairs(merge, capacity, where))


@without_autocast
def partition(
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int,
    merge: str = "density",
    controls: Controls = INFORMATION,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    backend: str = "auto",
) -> Partition:
    """Decide where slots open and which starts die (no gradient), per sequence and head.

    Args:
        k, v, g, beta, cu_seqlens: as `dla_attention`.
        tau: boundary threshold on the information score in [0, 2], a float or [H]. At most 0: every token opens a
            slot; above 2: only a document's first.
        capacity: K, at least 2 (1 with a tau above 2).
        merge: neighbours that merge in a full cache: those with the least summed score a token (`density`, eq 16),
            whose union raises the squared error least (`ward`), with the fewest tokens (`equal_counts`), the oldest
            (`oldest`) or any (`random`). `fenwick`: the hierarchy of Log-Linear Attention, of `capacity` levels.
        controls: boundaries other than by information, and the seed of random ones and of random merges.
        cache: memory before the first token; only without `cu_seqlens`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check(k, v, g, beta, tau=tau, capacity=capacity, merge=merge, controls=controls, backend=backend)
    _check_cu_seqlens(cu_seqlens, v.shape[0] * v.shape[1])
    if cu_seqlens is not None and cache is not None:
        raise ValueError("partition: give either cu_seqlens or cache (call it once a document to continue several)")
    _check_cache(cache, v.shape[0], k, v, capacity)
    if backend == "naive":
        lam = v.new_zeros(*v.shape[:3], capacity)
        naive = _kernel("naive", "naive_attention")
        with torch.no_grad():
            return naive(
                k, k, v, g, lam, beta, tau=tau, capacity=capacity, merge=merge, controls=controls,
                cu_seqlens=cu_seqlens, cache=cache,
            )[1]  # fmt: skip
    if merge == FENWICK:
        return fenwick_partition(v, capacity, cu_seqlens, cache)
    want_lo = isinstance(tau, Tensor) and tau.requires_grad
    with torch.no_grad():
        rule = _by_position(v, tau, capacity, merge, controls, cu_seqlens, cache)
    if merge == "ward":
        del rule["pairs"]
        return recurrent_partition(k, v, g, beta, **rule, capacity=capacity, cu_seqlens=cu_seqlens, cache=cache)
    triton = _choose(backend, k, v, capacity) == "triton"
    decide = _kernel("triton_partition", "triton_partition") if triton else torch_partition
    return decide(k, v, g, beta, **rule, capacity=capacity, cu_seqlens=cu_seqlens, cache=cache, want_lo=want_lo)


_decide = partition  # `dla_attention` has an argument of that name


def _by_document(
    inputs: list[Tensor], beta: Tensor | None, cu_seqlens: Tensor, cache: SlotCache | None, rule: dict[str, Any]
) -> tuple[Tensor, SlotCache]:
    """Run the documents of a packed row one by one, each with its own cache: exact, and rarely worth being fast.

    `inputs`: q, k, v, g, slot_weights.
    """
    B, T = inputs[2].shape[:2]
    flat = [x.reshape(1, B * T, *x.shape[2:]) for x in (*inputs, *([] if beta is None else [beta]))]
    outs, caches = [], []
    ends = cu_seqlens.tolist()
    if missing := set(range(0, B * T, T)) - set(ends):
        raise ValueError(f"cu_seqlens must name every row start where a cache is used; {min(missing)} is missing")
    for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        if a == b:
            raise ValueError(f"cu_seqlens: document {i} is empty; drop it, or call without a cache")
        one = None if cache is None else cache.select(torch.tensor([i], device=cache.live.device))
        out, last = dla_attention(*(x[:, a:b] for x in flat), cache=one, return_cache=True, **rule)
        assert last is not None
        outs.append(out)
        caches.append(last)
    return torch.cat(outs, 1).view(B, T, *outs[0].shape[2:]), SlotCache.concatenate(caches)


def _padding_borders(padding: Tensor, batch: int, tokens: int) -> Tensor:
    """`cu_seqlens` of rows whose padding is a document of its own: what is left over of it is never read.

    Raises:
        ValueError: of another shape, or out of range.
    """
    if padding.shape != (batch,) or bool(((padding < 0) | (padding >= tokens)).any()):
        raise ValueError(f"padding must be [B] = [{batch}] of 0 to T - 1 = {tokens - 1}, got {padding.tolist()}")
    rows = torch.arange(0, batch * tokens + 1, tokens, device=padding.device)
    return torch.cat([rows, rows[:-1] + padding]).unique()


@without_autocast
def dla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int = 30,
    merge: str = "density",
    controls: Controls = INFORMATION,
    partition: Partition | None = None,
    cu_seqlens: Tensor | None = None,
    padding: Tensor | None = None,
    cache: SlotCache | None = None,
    return_cache: bool = False,
    backend: str = "auto",
    chunk_size: int | None = None,
    tau_temperature: float = TAU_TEMPERATURE,
    sharpness: Tensor | None = None,
    keep_states: bool = False,
) -> tuple[Tensor, SlotCache | None]:
    """Dynamic Linear Attention over a sequence (arXiv 2606.10650, eqs 13-18).

    Args:
        q, k: [B, T, G, Dk], G divides H (head h reads group h // (H / G)); q is already scaled.
        v: [B, T, H, Dv]. g: [B, T, H], log decay, <= 0. beta: [B, T, H] in [0, 1] selects the gated delta rule
            (k should have norm <= 1); None is the additive (Mamba-2) form.
        slot_weights: [B, T, H, capacity], readout weight of each slot by recency (0 = the open slot), or
            of each level with merge="fenwick".
        tau: boundary threshold, float or [H]; a tensor that requires a gradient gets the straight-through one.
        merge, controls: as `partition`.
        partition: decisions to follow instead of taking them (recomputation, teacher forcing).
        cu_seqlens: int [n + 1], document borders over the flattened B * T tokens; memory is empty at each. Best on the
            host: it is read there, and a tensor on a GPU makes the host wait.
        padding: int64 [B], tokens at the head of each row that are not part of it (k, v and q are finite there): the
            memory is empty after them, and the returned cache is that of the rows. Not with cu_seqlens or a cache.
        cache: memory before the first token; with `cu_seqlens`, one entry a document, as is the returned one.
            Gradients flow into `cache.states` and out of the returned cache's.
        backend: `naive` (float64 recurrence), `torch` (chunkwise), `triton` (GPU kernels; on a CPU only under Triton's
            interpreter), `auto` (`triton` on a GPU where it takes the inputs, else `torch`).
        chunk_size: tokens a chunk of the `torch` backend; changes the speed and the rounding, not the result. None: 128
            where it pays, with states of at least 64 x 64, else 64; 16 for rows as short as that.
        sharpness: [H], multiplies the slot weights by a factor that says how well a slot's keys match the query, see
            `content.py`; None: by none. Caches then hold `keys`.
        keep_states: the `triton` backend keeps the slot states of the forward pass for the backward one, which then
            does not compute them again: 2 K Dk Dv bytes (bf16; else 4) a block of tokens and head. Of Gated DeltaNet
            also the inverses of its tiles and its blocks' transitions. The same bits.

    Returns:
        out [B, T, H, Dv] in v's dtype (states and decisions are fp32, or float64 for float64 inputs), and the final
        cache if `return_cache`, else None.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check(k, v, g, beta, tau=tau, capacity=capacity, merge=merge, controls=controls, backend=backend)
    B, T, H, Dv = v.shape
    if q.shape != k.shape:
        raise ValueError(f"q and k must have the same shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    if slot_weights.shape != (B, T, H, capacity):
        raise ValueError(f"slot_weights must be {(B, T, H, capacity)}, got {tuple(slot_weights.shape)}")
    if padding is not None:
        if cu_seqlens is not None or cache is not None:
            raise ValueError("dla_attention: give padding without cu_seqlens and without a cache")
        cu_seqlens = _padding_borders(padding, B, T)
    _check_cu_seqlens(cu_seqlens, B * T)
    learned = isinstance(tau, Tensor) and tau.requires_grad
    if sharpness is not None:
        if sharpness.shape != (H,):
            raise ValueError(f"sharpness must be [H] = [{H}], got {tuple(sharpness.shape)}")
        if learned or merge == FENWICK:
            raise ValueError("sharpness works without a tau that requires a gradient and without merge='fenwick'")
    if cache is not None and (cache.keys is None) != (sharpness is None):
        raise ValueError(f"cache.keys is {'missing: needed' if cache.keys is None else 'set: for use'} with sharpness")
    if learned and (cache is not None or merge != "density" or controls.boundary != "information"):
        raise ValueError(
            "a tau that requires a gradient works with merge='density', boundaries by information and without an "
            "incoming cache"
        )
    if learned and backend == "naive":
        raise ValueError("backend='naive' has no gradient for tau: use 'torch'")
    if chunk_size is None:
        chunk_size = 128 if min(k.shape[-1], Dv) >= 64 else 64
        chunk_size = 16 if T <= 16 else chunk_size  # a short row would be padded to it
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if cu_seqlens is not None and padding is None and (cache is not None or return_cache):
        if partition is not None:
            raise ValueError("with cu_seqlens and a cache the partition cannot be given")
        rule: dict[str, Any] = dict(
            tau=tau, capacity=capacity, merge=merge, controls=controls, backend=backend, chunk_size=chunk_size,
            tau_temperature=tau_temperature, sharpness=sharpness, keep_states=keep_states,
        )  # fmt: skip
        out, last = _by_document([q, k, v, g, slot_weights], beta, cu_seqlens, cache, rule)
        return out, last if return_cache else None
    _check_cache(cache, B, k, v, capacity)
    _check_partition(partition, v, cache)
    if backend == "naive":
        out, _, final = _kernel("naive", "naive_attention")(
            q, k, v, g, slot_weights, beta, tau=tau, capacity=capacity, merge=merge, controls=controls,
            partition=partition, cu_seqlens=cu_seqlens, cache=cache, sharpness=sharpness,
        )  # fmt: skip
        final.states, final.info = final.states.to(compute_dtype(v)), final.info.to(compute_dtype(v))
        final.keys = None if final.keys is None else final.keys.to(compute_dtype(v))
        return out.to(v.dtype), final if return_cache else None
    if merge == FENWICK:
        slot_weights = weights_by_recency(slot_weights, cu_seqlens, cache)
    backend = _choose(backend, k, v, capacity)
    if partition is None:
        partition = _decide(
            k, v, g, beta, tau=tau, capacity=capacity, merge=merge, controls=controls, cu_seqlens=cu_seqlens,
            cache=cache, backend=backend,
        )  # fmt: skip
    if learned and partition.lo is None:
        raise ValueError("partition.lo is missing: compute the partition with the tau that requires a gradient")
    keys = None
    if sharpness is not None:
        borders = document_starts(cu_seqlens, B, T, v.device)
        slot_weights, keys = content_weights(q, k, slot_weights, sharpness, partition, borders, cache)
    if backend == "triton":
        attend = partial(
            _kernel("triton_attention", "triton_attention"), q, k, v, g, slot_weights, beta, part=partition,
            cu_seqlens=cu_seqlens, tau=tau, temperature=tau_temperature, keep_states=keep_states,
        )  # fmt: skip
        if cache is None and not return_cache:
            return attend()[0], None
    resets = document_starts(cu_seqlens, B, T, v.device).repeat_interleave(H, dim=0)
    slots, slot_death, states = _incoming(cache, partition, k, v, capacity)
    if backend == "triton":
        out, final = attend(cache=cache, slot_death=slot_death, states=states, want_final=return_cache)
        return out, _final_cache(final, partition, resets, slots, slot_death, cache, keys) if return_cache else None
    start, death, score = (_flat(x) for x in (partition.start, partition.death, partition.score))
    lo = None if partition.lo is None else _flat(partition.lo)
    tau_lanes = torch.as_tensor(tau, device=v.device, dtype=states.dtype).expand(H).repeat(B)
    inputs = [None if x is None else lanes(x, H, states.dtype) for x in (q, k, v, g, slot_weights, beta)]
    decisions = (start, death, score, lo, resets, slots, slot_death)
    out, final = ChunkDLA.apply(*inputs, states, tau_lanes, decisions, chunk_size, tau_temperature)
    out = unlanes(out, B).to(v.dtype)
    return out, _final_cache(final, partition, resets, slots, slot_death, cache, keys) if return_cache else None


def _flat(x: Tensor) -> Tensor:
    """[B, T, H] -> [N, T], N = B * H."""
    return x.transpose(1, 2).flatten(0, 1)


def _incoming(
    cache: SlotCache | None, part: Partition, k: Tensor, v: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The cache in lanes and recency order: positions (-1 = open, EMPTY = none) [N, K], deaths [N, K], states."""
    N, T, device = v.shape[0] * v.shape[2], v.shape[1], v.device
    dtype = compute_dtype(v)
    if cache is None:
        slots = torch.full((N, capacity), EMPTY, dtype=torch.int64, device=device)
        states = torch.zeros((), dtype=dtype, device=device).expand(N, capacity, k.shape[-1], v.shape[-1])
        return slots, torch.full_like(slots, T), states
    assert part.cache_death is not None
    recency = torch.arange(capacity, device=device).expand(N, -1)
    source = cache.live.view(N, 1) - 1 - recency
    there, source = source >= 0, source.clamp(min=0)
    slots = torch.where(there, -1 - recency, EMPTY)
    slot_death = torch.where(there, part.cache_death.view(N, capacity).long().gather(1, source), T)
    states = cache.states.flatten(0, 1).to(dtype)
    index = source[..., None, None].expand(-1, -1, *states.shape[2:])
    return slots, slot_death, states.gather(1, index) * there[..., None, None]


def _final_cache(
    final: Tensor, part: Partition, resets: Tensor, slots: Tensor, slot_death: Tensor, cache: SlotCache | None,
    keys: Tensor | None,
) -> SlotCache:  # fmt: skip
    """A `SlotCache` from the states after the last token ([N, K, Dk, Dv] by recency) and the partition's scalars."""
    B, T, H = part.start.shape
    N, K = slots.shape
    device = final.device
    before = part.start.new_zeros(B, dtype=torch.int64) if cache is None else cache.position
    begin = begin_of_document(resets)[:, -1:]
    old = slots.flip(1)  # oldest first; EMPTY ones lead
    old_alive = (slot_death.flip(1) >= T) & (old >= begin) & (old > EMPTY)
    row = torch.arange(T, device=device).expand(N, -1)
    row_alive = _flat(part.start) & (_flat(part.death) >= T) & (row >= begin)
    alive = torch.cat([old_alive, row_alive], 1)  # [N, K + T], in the order of time
    slot = alive.long().cumsum(1) - 1  # the chronological slot that holds each inherited slot and each token
    weight = torch.cat([old > EMPTY, torch.ones_like(row, dtype=torch.bool)], 1)
    weight &= torch.cat([old, row], 1) >= begin
    counts = torch.ones_like(slot)
    starts = torch.cat([old, row + before.repeat_interleave(H)[:, None]], 1)
    if cache is not None:
        source = (cache.live.view(N, 1) - K + torch.arange(K, device=device)).clamp(min=0)
        counts[:, :K] = cache.count.view(N, K).gather(1, source)
        starts[:, :K] = cache.start.view(N, K).gather(1, source)
    slot = torch.where(weight, slot, K)
    count = counts.new_zeros(N, K + 1).scatter_add_(1, slot, counts)[:, :K]
    if part.final_info is None:
        infos = torch.cat([final.new_zeros(N, K), _flat(part.score).to(final.dtype)], 1)
        if cache is not None:
            infos[:, :K] = cache.info.view(N, K).gather(1, source).to(final.dtype)
        info = infos.new_zeros(N, K + 1).scatter_add_(1, slot, infos)[:, :K]
    else:
        info = part.final_info.view(N, K).to(final.dtype)
    start = torch.full_like(count, EMPTY)
    start = torch.nn.functional.pad(start, (0, 1)).scatter_(1, torch.where(alive, slot, K), starts)[:, :K]
    live = alive.sum(1)
    source = live[:, None] - 1 - torch.arange(K, device=device)
    states = final.gather(1, source.clamp(min=0)[..., None, None].expand_as(final)) * (source >= 0)[..., None, None]
    shape = (B, H, K)
    return SlotCache(
        states=states.view(*shape, *final.shape[2:]), start=start.reshape(shape).contiguous(),
        count=count.reshape(shape).contiguous(), info=info.reshape(shape).contiguous(),
        live=live.view(B, H), position=before + T, keys=keys,
    )  # fmt: skip


@without_autocast
def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    slot_weights: Tensor,
    cache: SlotCache,
    beta: Tensor | None = None,
    *,
    tau: float | Tensor,
    capacity: int = 30,
    merge: str = "density",
    controls: Controls = INFORMATION,
    backend: str = "auto",
    sharpness: Tensor | None = None,
) -> tuple[Tensor, SlotCache]:
    """One token (T = 1) on a cache, which is changed in place; cost and memory do not depend on the context.

    Arguments as `dla_attention` (`naive` is `torch` here: one step of the recurrence). No gradient. Returns out
    [B, 1, H, Dv] and the same cache.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    _check(k, v, g, beta, tau=tau, capacity=capacity, merge=merge, controls=controls, backend=backend)
    if q.shape != k.shape:
        raise ValueError(f"q and k must have the same shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape[1] != 1:
        raise ValueError(f"decode_step takes one token (T = 1), got T = {v.shape[1]}; use dla_attention for more")
    if slot_weights.shape != (*v.shape[:3], capacity):
        raise ValueError(f"slot_weights must be {(*v.shape[:3], capacity)}, got {tuple(slot_weights.shape)}")
    _check_cache(cache, v.shape[0], k, v, capacity)
    if merge == FENWICK or sharpness is not None:  # several slots merge at once; weights need the decision
        with torch.no_grad():
            out, after = dla_attention(
                q, k, v, g, slot_weights, beta, tau=tau, capacity=capacity, merge=merge, controls=controls, cache=cache,
                return_cache=True, backend=backend, sharpness=sharpness,
            )  # fmt: skip
        assert after is not None
        cache.load_state_dict(after.state_dict())
        return out, cache
    with torch.no_grad():
        rule = _by_position(v, tau, capacity, merge, controls, None, cache)
    triton = merge != "ward" and _choose(backend, k, v, capacity) == "triton"
    step = _kernel("triton_decode", "triton_decode") if triton else decode_one
    return step(q, k, v, g, slot_weights, cache, beta, **rule), cache
