"""States of constant size: the pool of the sequences that are held, and copies of one sequence's state.

A state is what the model keeps of a sequence between calls beside keys and values: of an exported model the slots of
its `SlotCache`s and the tails of the convolutions, of a δ-mem its matrices. Shapes are those of a template.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = list[dict[str, Tensor]]
"""By layer: its tensors [B, ...], none for a softmax layer."""


def copied(state: State, device: torch.device | str | None = None) -> State:
    """A copy, on `device`."""
    return [
        {name: x.clone() if device is None else x.to(device, copy=True) for name, x in layer.items()} for layer in state
    ]


def state_bytes(state: State) -> int:
    return sum(x.nbytes for layer in state for x in layer.values())


class StatePool:
    """One row a sequence, in tensors that are allocated once.

    Decode calls work in place on views of `rows` neighbouring rows, so that no state is gathered or scattered.

    Attributes:
        row_bytes: of one sequence. nbytes: of all rows, to a multiple of `rows`.
        calls: by decode call, views of its rows.
    """

    def __init__(self, template: State, slots: int, rows: int) -> None:
        calls = -(-slots // rows)
        self.rows = rows
        self._pool = [
            {name: x.new_zeros(calls * rows, *x.shape[1:]) for name, x in layer.items()} for layer in template
        ]
        self.nbytes = state_bytes(self._pool)
        self.row_bytes = self.nbytes // (calls * rows)
        self.calls = [self._views(n * rows, (n + 1) * rows) for n in range(calls)]

    def _views(self, first: int, last: int) -> State:
        return [{name: x[first:last] for name, x in layer.items()} for layer in self._pool]

    def settle(self, call: int, after: State) -> None:
        """After a decode call: what the model did not change in place goes into the pool."""
        for mine, theirs in zip(self.calls[call], after, strict=True):
            for name, x in mine.items():
                if theirs[name] is not x:
                    x.copy_(theirs[name])

    def write(self, row: int, state: State) -> None:
        for mine, theirs in zip(self._pool, state, strict=True):
            for name, x in mine.items():
                x[row : row + 1].copy_(theirs[name])

    def read(self, row: int, device: torch.device | str | None = None) -> State:
        """A copy."""
        return copied(self._views(row, row + 1), device)

    def move(self, source: int, target: int) -> None:
        for layer in self._pool:
            for x in layer.values():
                x[target].copy_(x[source])

    def open_slots(self, rows: list[int]) -> tuple[int, int]:
        """Slots of these rows that hold tokens, and all of them, over layers and heads; 0, 0 without slots."""
        layers = [layer for layer in self._pool if "live" in layer]
        live = sum(int(layer["live"][rows].sum()) for layer in layers)
        return live, sum(len(rows) * layer["start"][0].numel() for layer in layers)
