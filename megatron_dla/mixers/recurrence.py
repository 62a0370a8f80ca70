"""The DLA recurrence as the mixers call it: its tensors and its settings as types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_dla.kernels.dla import Partition, SlotCache, dla_attention, partition


class Inputs(NamedTuple):
    """Tensors of the recurrence, as in `dla_attention`; `beta` is None on the Mamba-2 backbone."""

    q: Tensor  # [B, T, G, Dk]
    k: Tensor  # [B, T, G, Dk]
    v: Tensor  # [B, T, H, Dv]
    g: Tensor  # [B, T, H]
    slot_weights: Tensor  # [B, T, H, K]
    beta: Tensor | None  # [B, T, H]

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*(None if x is None else function(x) for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SlotRule:
    """When a slot opens and which slots merge, as in `dla_attention`, and the backend that computes it."""

    tau: float | Tensor
    capacity: int
    merge: str
    backend: str = "auto"

    def partition(self, inputs: Inputs, cu_seqlens: Tensor | None = None, cache: SlotCache | None = None) -> Partition:
        """Where slots open and which die; `cu_seqlens` and `cache` exclude each other."""
        return partition(
            inputs.k, inputs.v, inputs.g, inputs.beta, tau=self.tau, capacity=self.capacity, merge=self.merge,
            cu_seqlens=cu_seqlens, cache=cache, backend=self.backend,
        )  # fmt: skip

    def attend(
        self,
        inputs: Inputs,
        decided: Partition,
        cu_seqlens: Tensor | None = None,
        cache: SlotCache | None = None,
        *,
        return_cache: bool = False,
    ) -> tuple[Tensor, SlotCache | None]:
        """Outputs [B, T, H, Dv] under a partition, and the slots after the last token if `return_cache`."""
        return dla_attention(
            *inputs, tau=self.tau, capacity=self.capacity, merge=self.merge, partition=decided,
            cu_seqlens=cu_seqlens, cache=cache, return_cache=return_cache, backend=self.backend,
        )  # fmt: skip
