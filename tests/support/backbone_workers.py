"""What runs on the ranks of the import tests: an imported model's logits and the gradient that flows through it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_dla.config import ParallelSection
from megatron_dla.hf import mapping
from megatron_dla.hf.backbones import build_backbone
from megatron_dla.model.gpt import packed_sequence
from megatron_dla.parallel.context import context_slice
from megatron_dla.parallel.groups import process_groups
from megatron_dla.parallel.tags import Tag, get_tag
from tests.support.workers import gathered_over, lay_out


def _cut(tag: Tag) -> tuple:
    return tag.kind == "sharded", tag.dim, tag.sections


def imported(
    hf_dir: Path, parallel: ParallelSection, ids: Tensor, cotangent: Tensor, documents: list[int]
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, vocab] and the embedding output's gradient [B, S, d], whole, of one layout."""
    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    S = ids.shape[1]
    model, section = build_backbone(hf_dir, parallel, seq_len=S)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    tags = mapping.parameter_tags(section, parallel.tensor_model_parallel_size)
    assert {name: _cut(get_tag(p)) for name, p in model.named_parameters()} == {n: _cut(tags[n]) for n in tags}
    groups, seen = process_groups(), []

    def watch(module, inputs, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    model.embedding.register_forward_hook(watch)
    packed = packed_sequence(torch.tensor(documents, dtype=torch.int32) if documents else None, S)
    logits = model(context_slice(ids, groups.cp), None, None, packed_seq_params=packed)
    mine = context_slice(cotangent, groups.cp).chunk(groups.tp.size(), -1)[groups.tp.rank()]
    logits.backward(mine)
    gradient = seen[0].grad
    if parallel.sequence_parallel:
        gradient = gathered_over(gradient, groups.tp, 0)
    whole = gathered_over(gathered_over(logits.detach(), groups.tp, -1), groups.cp, 1)
    return whole, gathered_over(gradient.transpose(0, 1), groups.cp, 1)
