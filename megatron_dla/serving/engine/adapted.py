"""Models of transformers with a δ-mem beside their attention, or without one (an adapter that has no layers).

Their attention is computed by the engine's pages: a call names an attention function that transformers looks up, and
passes no cache.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from megatron_dla.adapters.memory import MemoryInputs, MemoryState
from megatron_dla.adapters.messages import Pending
from megatron_dla.errors import UserError
from megatron_dla.serving.engine.models import Attend
from megatron_dla.serving.engine.request import Request
from megatron_dla.serving.engine.states import State
from megatron_dla.serving.hf_model import DeltaMemModel, States

_NAME = "megatron_dla_pages"
_BEFORE = torch.iinfo(torch.int64).max
"""Number of a message of an earlier request, which no message of this one continues."""
_call = threading.local()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5
    assert mask is None and scaling in (None, scale), (module, scaling)
    return _call.attend[module.layer_idx](query, key, value).transpose(1, 2), None


AttentionInterface.register(_NAME, _attention)


def to_state(states: States) -> State:
    """One dictionary a layer with a memory, in their order."""
    return [
        {"S": one.S} | ({} if one.pending is None else dict(vars(one.pending))) for _, one in sorted(states.items())
    ]


class AdaptedModel:
    """A `DeltaMemModel`. Between its calls the base model is as it was; no other thread may call it meanwhile."""

    def __init__(self, model: DeltaMemModel) -> None:
        self.model, base = model, model.base
        self.generation_config = base.generation_config
        self.vocabulary = base.get_input_embeddings().weight.shape[0]
        self.layers = len(base.model.layers)
        kinds = (
            getattr(base.config, "layer_types", None)
            or ["sliding_attention" if getattr(base.config, "sliding_window", None) else "full_attention"] * self.layers
        )
        self.windows = {
            n: base.config.sliding_window if kind == "sliding_attention" else None for n, kind in enumerate(kinds)
        }
        self._names = sorted(model.layers)
        self.has_memory = bool(self._names)
        self.by_message = self.has_memory and model.config.write == "message"
        one_call = model.config.message_read == "pre_call" or model.config.message_fallback == "token"
        self.whole_prompts = self.by_message and one_call

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check(self, request: Request) -> None:
        if request.messages is not None and not self.by_message:
            raise UserError("messages are set, but this adapter does not write by message: leave them out")
        if request.messages is None and self.by_message:
            raise UserError("messages are missing: this adapter writes by message, give the number of each token's")
        if request.memory is None:
            return
        wanted = [{name: x.shape for name, x in layer.items()} for layer in to_state(self.model.initial_states(1))]
        try:
            found = [{name: x.shape for name, x in layer.items()} for layer in to_state(request.memory)]
        except (AttributeError, TypeError):
            found = None
        if found != wanted or sorted(request.memory) != self._names:
            raise UserError("memory is not of this adapter and one sequence: give the memory that a handle had")

    def template(self) -> tuple[State, dict[int, Tensor]]:
        base = self.model.base
        dim = base.model.layers[0].self_attn.head_dim
        keys = torch.zeros(1, base.config.num_key_value_heads, 1, dim, dtype=base.dtype, device=self.device)
        return to_state(self.model.initial_states(1)), dict.fromkeys(self.windows, keys)

    def start(self, request: Request) -> State | None:
        states = self.model.initial_states(1) if request.memory is None else request.memory
        state = [{name: x.to(self.device) for name, x in layer.items()} for layer in to_state(states)]
        for layer in state:
            if "message" in layer:  # open at the end of the request before, whose numbers mean nothing here
                layer["message"] = torch.where(layer["message"] < 0, layer["message"], _BEFORE)
        return state

    def memory(self, state: State) -> States:
        states = {}
        for name, layer in zip(self._names, state, strict=True):
            pending = Pending(**{key: x for key, x in layer.items() if key != "S"}) if len(layer) > 1 else None
            states[name] = MemoryState(layer["S"], pending)
        return states

    def run(
        self, ids: Tensor, lengths: Tensor, state: State | None, attend: Attend, *, messages: Tensor | None = None,
        logits: bool = True,
    ) -> tuple[Tensor | None, State]:  # fmt: skip
        assert state is not None
        position = lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        config = self.model.base.config
        before, config._attn_implementation = config._attn_implementation, _NAME
        _call.attend = attend
        try:
            out = self.model(
                ids, states=self.memory(state), inputs=MemoryInputs(message=messages), position_ids=position,
                logits_to_keep=1,
            )  # fmt: skip
        finally:
            config._attn_implementation = before
            del _call.attend
        return out.logits[:, -1] if logits else None, to_state(out.states)
