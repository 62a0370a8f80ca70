"""What the engine needs of a model, and exported models; `adapted.py` has the others.

A call takes the state of its rows and returns the state after it; keys and values go through `attend`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dla.errors import UserError
from megatron_dla.serving.engine.request import Request
from megatron_dla.serving.engine.states import State

Attend = Mapping[int, Callable[[Tensor, Tensor, Tensor], Tensor]]
"""By softmax layer: rotated queries, and keys and values of the new tokens -> output, all [B, heads, T, D]."""


class ServedModel(Protocol):
    """Attributes: windows: by softmax layer, the tokens that a query sees, None = all. layers: of all kinds.
    vocabulary: rows of the embedding. generation_config: transformers'. has_memory: a δ-mem. by_message: it needs
    `Request.messages`. whole_prompts: what it computes depends on where calls are cut, so a prompt is one call."""

    windows: dict[int, int | None]
    layers: int
    vocabulary: int
    has_memory: bool
    by_message: bool
    whole_prompts: bool
    generation_config: Any

    @property
    def device(self) -> torch.device: ...

    def check(self, request: Request) -> None:
        """Raises UserError for what this model cannot serve."""

    def template(self) -> tuple[State, dict[int, Tensor]]:
        """A state of one sequence, and keys [1, G, S, D] by softmax layer, for shapes and dtypes."""

    def start(self, request: Request) -> State | None:
        """Before the first token; None: empty."""

    def run(
        self, ids: Tensor, lengths: Tensor, state: State | None, attend: Attend, *, messages: Tensor | None = None,
        logits: bool = True,
    ) -> tuple[Tensor | None, State]:  # fmt: skip
        """Feed ids [B, T] after `lengths` [B] tokens; messages [B, T], see `Request`.

        Returns:
            Logits [B, V] after the last token, if asked for; the state after it: tensors that were changed in place, or
            new ones.
        """

    def memory(self, state: State) -> Any:
        """What a later request may begin with (`Request.memory`), of one sequence."""


class ExportedModel:
    """A model of `hf/modeling_dla.py`.

    Raises:
        UserError: its code, from its directory, is older than the engine.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, model.config.num_layers
        self.generation_config = model.generation_config
        self.has_memory = self.by_message = self.whole_prompts = False
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self._cache: Any = getattr(sys.modules[type(model).__module__], "DLACache", None)
        if self._cache is None or not hasattr(self._cache(1), "lengths"):
            raise UserError(
                f"{type(model).__name__} of {type(model).__module__} does not batch sequences of different lengths: "
                "load the model without trust_remote_code, or export it again"
            )
        attention = {n: getattr(layer, "self_attn", None) for n, layer in enumerate(model.model.layers)}
        self.windows = {n: x.window for n, x in attention.items() if x is not None}
        self._slots: Any = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check(self, request: Request) -> None:
        for name in ("memory", "messages"):
            if getattr(request, name) is not None:
                raise UserError(f"{name} is set: only a model with a δ-mem takes it, leave it out")

    def template(self) -> tuple[State, dict[int, Tensor]]:
        cache = self._cache(self.layers)
        self.model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), past_key_values=cache)
        self._slots = next((type(layer.slots) for layer in cache.layers if layer.slots is not None), None)
        return [_tensors(layer) for layer in cache.layers], {n: cache.layers[n].keys for n in self.windows}

    def start(self, request: Request) -> State | None:
        return None

    def run(
        self, ids: Tensor, lengths: Tensor, state: State | None, attend: Attend, *, messages: Tensor | None = None,
        logits: bool = True,
    ) -> tuple[Tensor | None, State]:  # fmt: skip
        cache = self._cache(self.layers)
        cache.lengths = lengths
        for n, layer in enumerate(cache.layers):
            layer.attend = attend.get(n)
            if state is not None and state[n]:
                layer.tail = state[n]["tail"]
                layer.slots = self._slots(**{name: x for name, x in state[n].items() if name != "tail"})
        if logits:
            out = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        else:
            self.model.model(ids, past_key_values=cache)
        return out if logits else None, [_tensors(layer) for layer in cache.layers]

    def memory(self, state: State) -> Any:
        raise AssertionError("no δ-mem")


def _tensors(layer: Any) -> dict[str, Tensor]:
    """State of a recurrent layer's `LayerMemory`; nothing of a softmax layer's."""
    return {} if layer.slots is None else layer.slots.state_dict() | {"tail": layer.tail}


def message_ids(request: Request, first: int, last: int) -> Sequence[int] | None:
    """Numbers of the messages of tokens `first` to `last`; generated ones are a message of their own."""
    if request.messages is None:
        return None
    answer = max(request.messages) + 1
    prompt = request.messages[first:last]
    return [*prompt, *[answer] * (last - first - len(prompt))]
