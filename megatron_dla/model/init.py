"""Initialisation that does not depend on the layout: each section is drawn whole, from a seed of its name, then cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_dla.mixers.layout import ParamSpec, named_generator
from megatron_dla.parallel.tags import Tag, get_tag, set_tag, untagged


def tag_megatron_parameters(model: nn.Module, table: Mapping[str, ParamSpec]) -> None:
    """Tag the parameters of Megatron's own modules from the table; ours tag themselves when they are built.

    Raises:
        RuntimeError: a parameter is left untagged (its gradient could be silently wrong).
    """
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "dla_tag") and name in table:
            spec = table[name]
            set_tag(parameter, Tag(spec.kind, spec.dim, spec.sections), *spec.inits)
    if missing := untagged(model):
        raise RuntimeError(f"parameters without a parallel tag: {', '.join(missing)}")


def draw(name: str, parameter: nn.Parameter, seed: int, tp_size: int) -> Tensor:
    """The whole model's initial value of a parameter, fp32 on the CPU."""
    tag, inits = get_tag(parameter), parameter.dla_inits  # type: ignore[attr-defined]
    shape = tag.full_shape(parameter.shape, tp_size)
    keys, sizes = tag.keys(name), [n for _, n in tag.sections] or [shape[tag.dim]]
    pieces = []
    for key, size, init in zip(keys, sizes, inits * (len(keys) // len(inits)), strict=True):
        piece_shape = tuple(size if i == tag.dim else n for i, n in enumerate(shape))
        pieces.append(init(piece_shape, named_generator(seed, key)))
    return torch.cat(pieces, tag.dim)


@torch.no_grad()
def initialise(model: nn.Module, seed: int, tp_rank: int, tp_size: int) -> None:
    """Draw every parameter; the same weights at every tensor-parallel size."""
    for name, parameter in model.named_parameters():
        parameter.copy_(get_tag(parameter).shard(draw(name, parameter, seed, tp_size), tp_rank, tp_size))
