"""A model on the engine's states: chunks of prompts, decode calls of one shape, saving and restoring.

A result must not depend on what else is computed at the time. So all decode calls have the same shape, chunks of
prompts are cut at the same places and read one at a time, and softmax attention is computed sequence by sequence. What
is left is that a row of a matrix product is computed alike in every row of it, which `rows_agree` looks at.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.serving.engine.config import EngineConfig
from megatron_dla.serving.engine.kv import PagedKeys, view
from megatron_dla.serving.engine.models import ServedModel, message_ids
from megatron_dla.serving.engine.scheduler import Sequence
from megatron_dla.serving.engine.states import State, StatePool, state_bytes


@dataclass
class Saved:
    """A sequence in host memory. Attributes: pages: by softmax layer, its keys and values."""

    state: State | None
    pages: dict[int, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return state_bytes(self.state or []) + sum(x.nbytes for pair in self.pages.values() for x in pair)


class ModelRunner:
    """A model and everything that is reserved for its sequences.

    Attributes:
        windows: of the kinds of softmax layers, each with a pool of pages; None = all tokens. pool: the states.
        token_bytes: by kind, keys and values of one token in all layers.
    """

    def __init__(self, model: ServedModel, config: EngineConfig) -> None:
        self.model, self.device = model, model.device
        with torch.no_grad():
            state, keys = model.template()
        self.windows = list(dict.fromkeys(model.windows.values()))
        self._kind = {n: self.windows.index(window) for n, window in model.windows.items()}
        self._keys = {n: PagedKeys(config.pages, keys[n]) for n in model.windows}
        self._attend = {n: one.attend for n, one in self._keys.items()}
        self.pool = StatePool(state, config.slots, config.rows)
        self.token_bytes = [
            sum(self._keys[n].token_bytes for n, kind in self._kind.items() if kind == k)
            for k in range(len(self.windows))
        ]

    def _look_at(self, rows: Items[tuple[int, Sequence]], tokens: int) -> None:
        """Set what the softmax layers of the next call write and see: (row of the batch, sequence)."""
        for kind in range(len(self.windows)):
            views = [view(row, one.tables[kind], one.length, tokens, self.device) for row, one in rows]
            for n, mine in self._kind.items():
                if mine == kind:
                    self._keys[n].now = views

    # ---- calls of the model

    @torch.no_grad()
    def read(self, sequence: Sequence, stop: int) -> Tensor | None:
        """Tokens `length` to `stop` of its prompt, onto the state in its row. At the prompt's end the logits [V] after
        it are returned."""
        request, first = sequence.request, sequence.length
        # a copy: in the pool the alignment, and with it the rounding, would depend on the row
        state = self.pool.read(sequence.row) if first else self.model.start(request)
        self._look_at([(0, sequence)], stop - first)
        messages = message_ids(request, first, stop)
        logits, after = self.model.run(
            self._tensor([request.prompt[first:stop]]), self._tensor([first]), state, self._attend,
            messages=None if messages is None else self._tensor([messages]), logits=stop == len(request.prompt),
        )  # fmt: skip
        self.pool.write(sequence.row, after)
        return None if logits is None else logits[0]

    @torch.no_grad()
    def decode(self, sequences: Items[Sequence], reading: Items[int] = ()) -> Tensor:
        """Feed the last token of each; logits [n, V] of those of one decode call (rows of the same `rows`).

        `reading`: rows of that call with states of prompts that are being read, which the call leaves as they are.
        """
        call, rows = sequences[0].row // self.pool.rows, self.pool.rows
        aside = [(row, self.pool.read(row)) for row in reading]  # the call works on all its rows
        try:
            return self._decode(sequences, call, rows)
        finally:
            for row, state in aside:
                self.pool.write(row, state)

    def _decode(self, sequences: Items[Sequence], call: int, rows: int) -> Tensor:
        places = [one.row - call * rows for one in sequences]
        ids, lengths, messages = ([[0] for _ in range(rows)], [0] * rows, [[-1] for _ in range(rows)])
        for place, one in zip(places, sequences, strict=True):
            ids[place], lengths[place] = [one.tokens[-1]], one.length
            messages[place] = list(message_ids(one.request, one.length, one.length + 1) or [-1])
        self._look_at(list(zip(places, sequences, strict=True)), 1)
        logits, after = self.model.run(
            self._tensor(ids), self._tensor(lengths), self.pool.calls[call], self._attend,
            messages=self._tensor(messages) if self.model.by_message else None,
        )  # fmt: skip
        self.pool.settle(call, after)
        assert logits is not None
        return logits[places]

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self.device)

    @torch.no_grad()
    def rows_agree(self, tokens: int = 3) -> bool:
        """Whether a decode call computes the same token alike in all its rows, bit for bit. Only before the first
        request: it leaves traces in the rows."""
        self._look_at([], 1)
        agree, lengths = True, torch.zeros(self.pool.rows, dtype=torch.int64, device=self.device)
        for token in range(tokens):
            ids = torch.full((self.pool.rows, 1), token, device=self.device)
            messages = self._tensor([[-1]] * self.pool.rows) if self.model.by_message else None
            logits, after = self.model.run(ids, lengths, self.pool.calls[0], self._attend, messages=messages)
            assert logits is not None
            self.pool.settle(0, after)
            agree &= bool((logits == logits[:1]).all())
        return agree

    # ---- copies (see `scheduler.Store`)

    def snapshot(self, sequence: Sequence) -> State:
        return self.pool.read(sequence.row)

    def begin(self, sequence: Sequence, snapshot: State) -> None:
        self.pool.write(sequence.row, snapshot)

    def save(self, sequence: Sequence) -> None:
        state = self.pool.read(sequence.row, "cpu") if sequence.length else None
        tables, length = sequence.tables, sequence.length
        pages = {n: keys.copy(tables[self._kind[n]], length, "cpu") for n, keys in self._keys.items()}
        sequence.state = Saved(state, pages)

    def load(self, sequence: Sequence) -> None:
        saved: Saved = sequence.state
        for n, pair in saved.pages.items():
            self._keys[n].paste(sequence.tables[self._kind[n]], pair)
        sequence.state = None
        if saved.state is not None:
            self.pool.write(sequence.row, saved.state)

    def move(self, sequence: Sequence, row: int) -> None:
        if sequence.length:
            self.pool.move(sequence.row, row)

    def memory(self, sequence: Sequence) -> Any:
        """What a later request may begin with, of a sequence that has been read and has a row; else None."""
        if not self.model.has_memory or not sequence.is_read or sequence.row < 0:
            return None
        return self.model.memory(self.pool.read(sequence.row))
