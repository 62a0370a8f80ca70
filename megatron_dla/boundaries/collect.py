"""Run an exported model over a text, and keep what each head decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.config import LETTERS
from megatron_dla.errors import UserError
from megatron_dla.kernels.dla import Partition
from megatron_dla.kernels.dla.statistics import Counts, count, sizes


@dataclass
class Head:
    """One head of one layer over the text of T tokens.

    Attributes:
        start, merged: positions that opened a slot, and for each when it became a part of an older one (T = never).
        score: information score of every token, [T]. weight: readout weight by recency, mean over the tokens with such
            a slot, [K]. size: tokens in a slot by recency, likewise. final: sizes after the last token, oldest first.
        counts: `kernels.dla.statistics.Counts` of this head, as numbers.
    """

    layer: int
    head: int
    start: list[int]
    merged: list[int]
    score: list[float]
    weight: list[float]
    size: list[float]
    final: list[int]
    counts: dict[str, int]


@dataclass
class Record:
    """Texts of the tokens, and the heads of all layers that open slots. `capacity`: slots a head."""

    tokens: list[str]
    heads: list[Head]
    capacity: int
    rule: str


def tokenise(tokenizer: Any, text: str, limit: int) -> tuple[list[int], list[str]]:
    """Ids of the first `limit` tokens, and the piece of the text that each one stands for ("" inside a character).

    Raises:
        UserError: the text has fewer than two tokens.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = found["input_ids"][:limit], found["offset_mapping"][:limit]
    if len(ids) < 2:
        raise UserError(f"--text: {len(ids)} tokens: give a text of two at least")
    pieces, end = [], 0
    for a, b in places:
        pieces.append(text[max(a, end) : b])
        end = max(end, b)
    return ids, pieces


@torch.no_grad()
def collect(model: Any, ids: list[int], pieces: list[str]) -> Record:
    """What the heads of a model in eval mode do on one row.

    Raises:
        UserError: no layer of the model opens slots.
    """
    config, layers, heads = model.config, model.model.layers, []
    found: dict[int, tuple[Partition, Tensor]] = {}

    def keep(number: int):
        def hook(mixer: Any, args: tuple, _: Any) -> None:
            x, memory, _ = args
            weights, _ = mixer._slots(mixer._project(x))
            found[number] = memory.decided, weights[0].double()  # [T, H, K]

        return hook

    slotted = [n for n, letter in enumerate(config.layer_letters) if LETTERS[letter].slots]
    if not slotted:
        raise UserError(
            f"layer_letters = {config.layer_letters}: no layer of this model opens slots (pattern letter D)"
        )
    hooks = [layers[n].mixer.register_forward_hook(keep(n)) for n in slotted]
    try:
        device = next(model.parameters()).device
        model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
    finally:
        for one in hooks:
            one.remove()
    for n in slotted:
        part, weights = found[n]
        counts = count(part)
        heads += [_head(n, h, part, weights[:, h], counts, config.capacity) for h in range(config.num_heads)]
    rule = f"boundary {config.boundary}, merge {config.merge}, tau {config.tau:g} ({config.tau_mode})"
    return Record(pieces, heads, config.capacity, rule)


def _head(layer: int, head: int, part: Partition, weights: Tensor, counts: Counts, capacity: int) -> Head:
    start, death = part.start[0, :, head], part.death[0, :, head].long()
    by_slot = sizes(start, death, capacity)  # [T, K]
    there = by_slot > 0
    often = there.sum(0).clamp(min=1)
    return Head(
        layer, head, start.nonzero().flatten().tolist(), death[start].tolist(),
        [round(x, 4) for x in part.score[0, :, head].tolist()],
        ((weights * there).sum(0) / often).tolist(), (by_slot.sum(0) / often).tolist(),
        [n for n in reversed(by_slot[-1].tolist()) if n],
        {name: int(value[head]) for name, value in vars(counts).items()},
    )  # fmt: skip
