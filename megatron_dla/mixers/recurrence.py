"""The DLA recurrence as the Megatron mixers call it, with its tensors and its settings as types."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megatron_dla.kernels.dla import Partition, SlotCache, dla_attention, partition
from megatron_dla.kernels.dla.rules import SlotRule


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


def decide(
    inputs: Inputs, rule: SlotRule, cu_seqlens: Tensor | None = None, cache: SlotCache | None = None
) -> Partition:
    """Where slots open and which die; give `cu_seqlens` or `cache`, not both."""
    return partition(
        inputs.k, inputs.v, inputs.g, inputs.beta, tau=rule.tau, capacity=rule.capacity, merge=rule.merge,
        controls=rule.controls, cu_seqlens=cu_seqlens, cache=cache, backend=rule.backend,
    )  # fmt: skip


def attend(
    inputs: Inputs,
    rule: SlotRule,
    decided: Partition,
    cu_seqlens: Tensor | None = None,
    cache: SlotCache | None = None,
    *,
    return_cache: bool = False,
) -> tuple[Tensor, SlotCache | None]:
    """Outputs [B, T, H, Dv] under a partition, and the slots after the last token if `return_cache`."""
    return dla_attention(
        *inputs, tau=rule.tau, capacity=rule.capacity, merge=rule.merge, controls=rule.controls, partition=decided,
        cu_seqlens=cu_seqlens, cache=cache, return_cache=return_cache, backend=rule.backend, sharpness=rule.sharpness,
        keep_states=rule.keep_states,
    )  # fmt: skip
