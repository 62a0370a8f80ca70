"""Initialisation that does not depend on the layout: each section is drawn whole, from a seed of its name, then cut."""

from __future__ import annotations

import hashlib
import math

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from megatron_dla.config import ModelSection
from megatron_dla.mixers.dla import normal
from megatron_dla.parallel.tags import Tag, get_tag, set_tag, untagged


def tag_megatron_parameters(model: nn.Module, section: ModelSection) -> None:
    """Tag the parameters of Megatron's own modules; ours tag themselves at build.

    Raises:
        RuntimeError: a parameter is left untagged (its gradient could be silently wrong).
    """
    std = section.init_std
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or hasattr(weight, "dla_tag"):
            continue
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            gated = (("gate", section.ffn_hidden_size), ("up", section.ffn_hidden_size))
            set_tag(weight, Tag("sharded", 0, gated if name.endswith("linear_fc1") else ()), normal(std))
        elif isinstance(module, RowParallelLinear):
            set_tag(weight, Tag("sharded", 1), normal(std / math.sqrt(2 * section.num_layers)))
    if missing := untagged(model):
        raise RuntimeError(f"parameters without a parallel tag: {', '.join(missing)}")


def _seed(seed: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:7], "big")


def draw(name: str, parameter: nn.Parameter, seed: int, tp_size: int, zero_sections: tuple[str, ...] = ()) -> Tensor:
    """The whole model's value of a parameter, fp32 on the CPU."""
    tag, init = get_tag(parameter), parameter.dla_init  # type: ignore[attr-defined]
    shape = tag.full_shape(parameter.shape, tp_size)
    pieces = []
    for key, size in zip(tag.keys(name), [n for _, n in tag.sections] or [shape[tag.dim]], strict=True):
        piece_shape = torch.Size(size if i == tag.dim else n for i, n in enumerate(shape))
        piece = init(piece_shape, torch.Generator().manual_seed(_seed(seed, key)))
        pieces.append(torch.zeros_like(piece) if key.rsplit(".", 1)[-1] in zero_sections else piece)
    return torch.cat(pieces, tag.dim)


@torch.no_grad()
def initialise(model: nn.Module, section: ModelSection, seed: int, tp_rank: int, tp_size: int) -> None:
    """Draw every parameter; the same weights at every tensor-parallel size."""
    zero = ("slot",) if section.slot_weight_init == "backbone" else ()
    for name, parameter in model.named_parameters():
        full = draw(name, parameter, seed, tp_size, zero)
        parameter.copy_(get_tag(parameter).shard(full, tp_rank, tp_size))
