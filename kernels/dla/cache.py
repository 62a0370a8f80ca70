"""The two records that every DLA entry point shares: `Partition` and `SlotCache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FIRST_SCORE = 2.0**0.5  # information score of a document's first token: orthogonal to an empty memory
EMPTY = -(2**30)  # position of a slot that does not exist
MAX_KEY_DIM, MAX_VALUE_DIM, MAX_CAPACITY = 256, 512, 64  # of the Triton kernels; the torch path has no limit


def beyond_kernels(key_dim: int, value_dim: int, capacity: int) -> str:
    """Why the Triton kernels cannot take these sizes ('' if they can). Needs no triton: plans ask, too."""
    dims = (("key_dim", key_dim, MAX_KEY_DIM), ("value_dim", value_dim, MAX_VALUE_DIM))
    sizes = (*dims, ("capacity", capacity, MAX_CAPACITY))
    return ", ".join(f"{name} = {size} (at most {limit})" for name, size, limit in sizes if size > limit)


@dataclass
class Partition:
    """Which tokens open a slot, and when the capacity rule removed that start.

    A start p is live at time t iff `start[p]` and `p <= t < death[p]`; the slot of token j at time t is, counted from
    the newest, the number of live starts after j. Computed once, stored, and reused by backward and recomputation.

    Attributes:
        start: bool [B, T, H].
        death: int32 [B, T, H], position in the row; T = never (a document's end ends its slots anyway).
        score: fp32 [B, T, H], information score in [0, 2]; sqrt(2) at a document's first token.
        lo: int32 [B, T, H] or None; the oldest token that would move if a boundary at this token were toggled
            (with a full cache, the start that would die). Only the gradient of a learned threshold reads it.
        cache_death: int32 [B, H, K] or None; death of each slot of the incoming cache (chronological), T = never.
        final_info: [B, H, K] or None; summed scores of the slots after the last token (chronological), as they were
            summed for the decisions: a sequence that is continued has the same bits, so that ties break the same way.
    """

    start: Tensor
    death: Tensor
    score: Tensor
    lo: Tensor | None = None
    cache_death: Tensor | None = None
    final_info: Tensor | None = None

    def boundary_rate(self) -> Tensor:
        """Share of tokens that open a slot, per head: fp32 [H]."""
        return self.start.float().mean(dim=(0, 1))


@dataclass
class SlotCache:
    """The K-slot memory of one layer: constant in size, whatever the length of the context.

    Slots are chronological: index 0 is the oldest, `live - 1` the open one (so recency r is slot `live - 1 - r`).

    Attributes:
        states: [B, H, K, Dk, Dv], fp32 (float64 for float64 inputs).
        start: int64 [B, H, K], absolute position of each slot's first token since the cache was empty.
        count: int64 [B, H, K], tokens held by each slot.
        info: [B, H, K], sum of the information scores of those tokens.
        live: int64 [B, H], number of slots in use.
        position: int64 [B], tokens read so far.
        keys: [B, H, K, Dk], sum of the unit keys of those tokens, or None without content-addressed slot weights.
    """

    states: Tensor
    start: Tensor
    count: Tensor
    info: Tensor
    live: Tensor
    position: Tensor
    keys: Tensor | None = None

    FIELDS: ClassVar[tuple[str, ...]] = ("states", "start", "count", "info", "live", "position")

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        capacity: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        keys: bool = False,
    ) -> SlotCache:
        """An empty memory for `batch` sequences. `keys`: for content-addressed slot weights."""
        slots = (batch, heads, capacity)
        return cls(
            states=torch.zeros(*slots, key_dim, value_dim, dtype=dtype, device=device),
            start=torch.full(slots, EMPTY, dtype=torch.int64, device=device),
            count=torch.zeros(slots, dtype=torch.int64, device=device),
            info=torch.zeros(slots, dtype=dtype, device=device),
            live=torch.zeros(batch, heads, dtype=torch.int64, device=device),
            position=torch.zeros(batch, dtype=torch.int64, device=device),
            keys=torch.zeros(*slots, key_dim, dtype=dtype, device=device) if keys else None,
        )

    @property
    def capacity(self) -> int:
        return self.states.shape[2]

    def held(self) -> Tensor:
        """int64 [B, H]: tokens of the document in memory; the oldest slot begins with it, and padding is none of it."""
        return torch.where(self.live > 0, self.position[:, None] - self.start[..., 0], 0)

    @property
    def nbytes(self) -> int:
        """Bytes held, constant over the life of the cache."""
        return sum(x.nbytes for x in self.state_dict().values())

    def state_dict(self) -> dict[str, Tensor]:
        """All fields, ready for safetensors."""
        named = {name: getattr(self, name) for name in self.FIELDS}
        return named if self.keys is None else named | {"keys": self.keys}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy `state` in; raises ValueError where a field is missing or shapes differ."""
        mine = self.state_dict()
        if set(state) != set(mine):
            wanted = sorted(mine)
            raise ValueError(f"SlotCache.load_state_dict: expected the fields {wanted}, got {sorted(state)}")
        for name, x in mine.items():
            if x.shape != state[name].shape:
                raise ValueError(
                    f"SlotCache.load_state_dict: {name} has shape {tuple(state[name].shape)}, "
                    f"this cache needs {tuple(x.shape)}: make it with the same batch, heads and capacity"
                )
        for name, x in mine.items():
            x.copy_(state[name])

    def clone(self) -> SlotCache:
        """An independent copy (fork a session)."""
        return SlotCache(**{name: x.clone() for name, x in self.state_dict().items()})

    @classmethod
    def concatenate(cls, caches: list[SlotCache]) -> SlotCache:
        """One cache for all sequences of `caches`, in their order."""
        return cls(
            **{name: torch.cat([cache.state_dict()[name] for cache in caches]) for name in caches[0].state_dict()}
        )

    def select(self, index: Tensor) -> SlotCache:
        """The sequences `index` (int64 [B']) of the batch, copied: beam search, or one document of many."""
        return SlotCache(**{name: x[index] for name, x in self.state_dict().items()})
