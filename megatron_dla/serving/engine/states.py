"""States of constant size: the pool of the sequences that decode, and copies of one sequence's state.

A state is what the recurrent layers of the exported model keep between calls, the slots of a `SlotCache` and the tail
of the convolutions. Their shapes are read off a cache that the model filled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = list[dict[str, Tensor]]
"""By layer: its tensors [1, ...], empty for a softmax layer."""


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """A `LayerMemory`'s state by name."""
    slots = {} if layer.slots is None else layer.slots.state_dict()
    return slots if layer.tail is None else slots | {"tail": layer.tail}


def state_of(cache: Any) -> State:
    """A cache's state, not copied."""
    return [tensors_of(layer) for layer in cache.layers]


def copied(state: State, device: torch.device | str | None = None) -> State:
    """A copy, on `device`."""
    return [
        {name: x.clone() if device is None else x.to(device, copy=True) for name, x in layer.items()} for layer in state
    ]


def fill(layer: Any, tensors: dict[str, Tensor], slot_cache: Any) -> None:
    """Put tensors, not copied, into a `LayerMemory`."""
    slots = {name: x for name, x in tensors.items() if name != "tail"}
    layer.slots = slot_cache(**slots) if slots else None
    layer.tail = tensors.get("tail")


def state_bytes(state: State) -> int:
    return sum(x.nbytes for layer in state for x in layer.values())


class StatePool:
    """One row a sequence, in tensors that are allocated once.

    Decode calls work in place on views of `rows` neighbouring rows, so that no state is gathered or scattered.

    Attributes:
        row_bytes: of one sequence. nbytes: of all rows, to a multiple of `rows`.
        caches: by decode call, the model's cache on views of its rows.
    """

    def __init__(self, template: Any, slots: int, rows: int) -> None:
        calls = -(-slots // rows)
        self.rows = rows
        self._pool = [
            {name: x.new_zeros(calls * rows, *x.shape[1:]) for name, x in tensors_of(layer).items()}
            for layer in template.layers
        ]
        slot_cache = next((type(layer.slots) for layer in template.layers if layer.slots is not None), None)
        self.nbytes = state_bytes(self._pool)
        self.row_bytes = self.nbytes // (calls * rows)
        self.caches = [type(template)(len(template.layers)) for _ in range(calls)]
        for call, cache in enumerate(self.caches):
            for layer, tensors in zip(cache.layers, self._view(call), strict=True):
                fill(layer, tensors, slot_cache)

    def _view(self, call: int) -> State:
        first = call * self.rows
        return [{name: x[first : first + self.rows] for name, x in layer.items()} for layer in self._pool]

    def settle(self, call: int) -> None:
        """After a decode call: what the model replaced (tails) goes back into the pool."""
        for layer, tensors in zip(self.caches[call].layers, self._view(call), strict=True):
            if "tail" in tensors:
                tensors["tail"].copy_(layer.tail)
                layer.tail = tensors["tail"]

    def write(self, row: int, state: State) -> None:
        for mine, theirs in zip(self._pool, state, strict=True):
            for name, x in mine.items():
                x[row : row + 1].copy_(theirs[name])

    def read(self, row: int, device: torch.device | str | None = None) -> State:
        """A copy."""
        return copied([{name: x[row : row + 1] for name, x in layer.items()} for layer in self._pool], device)

    def move(self, source: int, target: int) -> None:
        for layer in self._pool:
            for x in layer.values():
                x[target].copy_(x[source])

    def open_slots(self, rows: list[int]) -> tuple[int, int]:
        """Slots of these rows that hold tokens, and all of them, over layers and heads."""
        live = [layer["live"][rows].sum() for layer in self._pool if "live" in layer]
        every = sum(len(rows) * layer["start"][0].numel() for layer in self._pool if "start" in layer)
        return int(sum(live)), every
