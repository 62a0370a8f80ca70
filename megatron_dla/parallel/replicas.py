"""Check that replicas of a parameter hold the same bits (`debug.check_replicas`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dla.parallel.tags import get_tag

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(value: Tensor) -> Tensor:
    """int64 that depends on every bit and on the order: equal for equal tensors, different for almost all others."""
    bits = value.detach().contiguous().view(_BITS[value.element_size()]).flatten().long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return ((bits + 1) * (place * 2654435761 % 2147483647 + 1)).sum()


def _differ(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    return lowest != highest


@torch.no_grad()
def drifted(model: nn.Module, groups: Any) -> list[str]:
    """Names of parameters whose replicas differ (a collective).

    All parameters are compared over data x context ranks, and those that are not sharded over tensor-parallel ranks.
    Parameters partitioned by ZeRO-3 have no data-parallel replicas.
    """
    names, sums, replicated = [], [], []
    for name, parameter in model.named_parameters():
        cut = getattr(parameter, "ds_tensor", None)
        names.append(name)
        sums.append(checksum(parameter if cut is None else cut))
        replicated.append((get_tag(parameter).kind != "sharded", cut is None))
    stacked, flags = torch.stack(sums), torch.tensor(replicated, device=sums[0].device)
    bad = _differ(stacked, groups.tp) & flags[:, 0]
    bad |= _differ(stacked, groups.dp_cp) & flags[:, 1]
    return [name for name, differs in zip(names, bad.tolist(), strict=True) if differs]


def check_replicas(model: nn.Module, groups: Any, when: str) -> None:
    """Raises RuntimeError, with the parameters' names, on every rank of a group in which replicas differ."""
    if names := drifted(model, groups):
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise RuntimeError(f"replicas drifted {when}: {shown} (a gradient is not reduced over a group that shares it)")
