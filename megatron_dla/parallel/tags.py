"""What tensor parallelism does to each parameter: one tag says how it is cut, initialised, merged and reduced.

Every parameter carries a `Tag`; `untagged` lists those that do not, and building a model with one raises. Packed
projections are named sections, never one slice, so a weight means the same at every tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Tag:
    """How a parameter lies over the tensor-parallel ranks.

    Attributes:
        kind: `sharded` (each rank holds a part), `replicated` (same value, each rank has the whole gradient), or
            `replicated_sum` (same value, each rank sees a part of the heads or tokens: gradients are summed in the
            graph, by `sum_gradient`).
        dim: the axis that is cut.
        sections: (name, size in the whole model) along `dim`, in order; empty = one section. A replicated parameter
            can have sections too.
    """

    kind: Literal["sharded", "replicated", "replicated_sum"]
    dim: int = 0
    sections: tuple[tuple[str, int], ...] = ()

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """This rank's part of the whole tensor."""
        if self.kind != "sharded" or size == 1:
            return full
        return torch.cat([part.chunk(size, self.dim)[rank] for part in self.split(full)], self.dim)

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from all ranks' parts."""
        if self.kind != "sharded" or len(parts) == 1:
            return parts[0]
        sizes = [n // len(parts) for _, n in self.sections] or [parts[0].shape[self.dim]]
        by_section = zip(*(part.split(sizes, self.dim) for part in parts), strict=True)
        return torch.cat([torch.cat(section, self.dim) for section in by_section], self.dim)

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        """The whole tensor's sections."""
        return full.split([n for _, n in self.sections], self.dim) if self.sections else (full,)

    def full_shape(self, local: torch.Size, size: int) -> torch.Size:
        """Shape in the whole model."""
        if self.kind != "sharded":
            return local
        return torch.Size(n * size if i == self.dim else n for i, n in enumerate(local))

    def keys(self, name: str) -> tuple[str, ...]:
        """Layout-free names of the sections: `a.in_proj.weight` with section `query` is `a.query`."""
        if not self.sections:
            return (name,)
        return tuple(f"{name.rsplit('.', 2)[0]}.{section}" for section, _ in self.sections)


def set_tag(parameter: nn.Parameter, tag: Tag, *inits: Init) -> nn.Parameter:
    """Attach the tag and what draws the initial values: one `Init`, or one for each section.

    Also sets the attributes that DeepSpeed and Megatron read for the gradient norm.
    """
    assert len(inits) in (1, len(tag.sections)), (tag, inits)
    parameter.dla_tag, parameter.dla_inits = tag, inits  # type: ignore[attr-defined]
    if tag.kind == "sharded":
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = tag.dim  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
    else:
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    return parameter


def get_tag(parameter: nn.Parameter) -> Tag:
    """The tag of a parameter. Raises AttributeError without one."""
    return parameter.dla_tag  # type: ignore[attr-defined, no-any-return]


def is_stored(parameter: nn.Parameter) -> bool:
    """Whether a checkpoint holds it: what is trained, and what is set without a gradient (`set_without_gradient`)."""
    return parameter.requires_grad or getattr(parameter, "dla_set", False)


def set_without_gradient(parameter: nn.Parameter) -> None:
    """Keep it out of the optimizer, and in checkpoints."""
    parameter.requires_grad_(False)
    parameter.dla_set = True  # type: ignore[attr-defined]


def untagged(model: nn.Module) -> list[str]:
    """Names of parameters without a tag."""
    return [name for name, p in model.named_parameters() if not hasattr(p, "dla_tag")]


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, group) -> Tensor:
        ctx.group = group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous().clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradient(weight: Tensor, group) -> Tensor:
    """The weight unchanged; its gradient is summed over `group`. For replicated_sum parameters.

    In the graph rather than in a hook, so that no caller (DeepSpeed, a test, another trainer) can forget it.
    """
    if group is None or group.size() == 1:
        return weight
    return _SumGradient.apply(weight, group)
