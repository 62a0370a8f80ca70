"""The exported model on the engine's states: chunks of prompts, decode calls of one shape, saving and restoring.

A result must not depend on what else is computed at the time. So all decode calls have the same shape, chunks of
prompts are cut at the same places and read one at a time, and softmax attention is computed sequence by sequence. What
is left is that a row of a matrix product is computed alike in every row of it, which `rows_agree` looks at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dla.errors import UserError
from megatron_dla.serving.engine.config import EngineConfig
from megatron_dla.serving.engine.kv import PagedKeys, view
from megatron_dla.serving.engine.scheduler import Sequence
from megatron_dla.serving.engine.states import State, StatePool, copied, fill, state_bytes, state_of


@dataclass
class Saved:
    """A sequence in host memory. Attributes: pages: by softmax layer, its keys and values."""

    state: State
    pages: list[tuple[Tensor, Tensor] | None]

    @property
    def nbytes(self) -> int:
        pairs = [x for pair in self.pages for x in pair or ()]
        return state_bytes(self.state) + sum(x.nbytes for x in pairs)


class ModelRunner:
    """An exported model (`hf/modeling_dla.py`) and everything that is reserved for its sequences.

    Attributes:
        windows: of the kinds of softmax layers, each with a pool of pages; None = all tokens. pool: the states.
        token_bytes: by kind, keys and values of one token in all layers.

    Raises:
        UserError: the model's own code, from its directory, is older than the engine.
    """

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.model, self.config, self.device = model, config, model.device
        self._cache_class: Any = getattr(sys.modules[type(model).__module__], "DLACache", None)
        if self._cache_class is None or not hasattr(self._cache_class(1), "lengths"):
            raise UserError(
                f"{type(model).__name__} of {type(model).__module__} does not batch sequences of different lengths: "
                "load the model without trust_remote_code, or export it again"
            )
        with torch.no_grad():
            template = self._cache_class(model.config.num_layers)
            model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), past_key_values=template)
        attention = {n: layer.self_attn for n, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")}
        self.windows = list(dict.fromkeys(x.window for x in attention.values()))
        self._kind = {n: self.windows.index(x.window) for n, x in attention.items()}
        self._keys = {n: PagedKeys(config.pages, template.layers[n].keys) for n in attention}
        self._slot_cache: Any = next((type(x.slots) for x in template.layers if x.slots is not None), None)
        self.pool = StatePool(template, config.slots, config.rows)
        for cache in self.pool.caches:
            self._attach(cache)
        self.token_bytes = [
            sum(self._keys[n].token_bytes for n, kind in self._kind.items() if kind == k)
            for k in range(len(self.windows))
        ]

    def _attach(self, cache: Any) -> None:
        for n, keys in self._keys.items():
            cache.layers[n].attend = keys.attend

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
        """Tokens `length` to `stop` of its prompt. At the prompt's end its state goes to its row, and the logits [V]
        after it are returned."""
        prompt = sequence.request.prompt
        state = sequence.state
        if state is not None and stop - sequence.length == 1:  # the only call that writes to the state it gets
            state = copied(state)
        cache = self._one(state)
        cache.lengths = torch.tensor([sequence.length], device=self.device)
        self._look_at([(0, sequence)], stop - sequence.length)
        ids = torch.tensor([prompt[sequence.length : stop]], device=self.device)
        if stop < len(prompt):
            self.model.model(ids, past_key_values=cache)
            sequence.state = state_of(cache)
            return None
        logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        self.pool.write(sequence.row, state_of(cache))
        sequence.state = None
        return logits

    @torch.no_grad()
    def decode(self, sequences: Items[Sequence]) -> Tensor:
        """Feed the last token of each; logits [n, V] of those of one decode call (rows of the same `rows`)."""
        call = sequences[0].row // self.pool.rows
        places = [one.row - call * self.pool.rows for one in sequences]
        ids, lengths = [0] * self.pool.rows, [0] * self.pool.rows
        for place, one in zip(places, sequences, strict=True):
            ids[place], lengths[place] = one.tokens[-1], one.length
        cache = self.pool.caches[call]
        cache.lengths = torch.tensor(lengths, device=self.device)
        self._look_at(list(zip(places, sequences, strict=True)), 1)
        logits = self.model(torch.tensor(ids, device=self.device)[:, None], past_key_values=cache).logits[:, -1]
        self.pool.settle(call)
        return logits[places]

    @torch.no_grad()
    def rows_agree(self, tokens: int = 3) -> bool:
        """Whether a decode call computes the same token alike in all its rows, bit for bit. Only before the first
        request: it leaves traces in the rows."""
        self._look_at([], 1)
        cache, agree = self.pool.caches[0], True
        cache.lengths = torch.zeros(self.pool.rows, dtype=torch.int64, device=self.device)
        for token in range(tokens):
            ids = torch.full((self.pool.rows, 1), token, device=self.device)
            logits = self.model(ids, past_key_values=cache).logits
            self.pool.settle(0)
            agree &= bool((logits == logits[:1]).all())
        return agree

    # ---- copies (see `scheduler.Store`)

    def _one(self, state: State | None) -> Any:
        """A cache of one sequence on these tensors; an empty one without."""
        cache = self._cache_class(self.model.config.num_layers)
        if state is not None:
            for layer, tensors in zip(cache.layers, state, strict=True):
                fill(layer, tensors, self._slot_cache)
        self._attach(cache)
        return cache

    def snapshot(self, sequence: Sequence) -> State:
        return sequence.state  # not copied: calls replace it

    def save(self, sequence: Sequence) -> None:
        state = self.pool.read(sequence.row, "cpu") if sequence.is_read else sequence.state
        pages = [
            self._keys[n].copy(sequence.tables[self._kind[n]], "cpu") if n in self._keys else None
            for n in range(self.model.config.num_layers)
        ]
        sequence.state = Saved(state or [], pages)

    def load(self, sequence: Sequence) -> None:
        saved: Saved = sequence.state
        for n, pair in enumerate(saved.pages):
            if pair is not None:
                self._keys[n].paste(sequence.tables[self._kind[n]], pair)
        sequence.state = None
        if sequence.is_read:
            self.pool.write(sequence.row, saved.state)
        elif saved.state:
            sequence.state = copied(saved.state, self.device)

    def move(self, sequence: Sequence, row: int) -> None:
        if sequence.is_read:
            self.pool.move(sequence.row, row)
