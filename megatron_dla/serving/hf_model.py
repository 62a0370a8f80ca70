"""δ-mem on a Hugging Face causal language model: hooks around each self-attention, nothing of transformers edited.

The hooks are stateless: a call passes its states in and returns the new ones, so that any number of sessions, threads
and adapters share one model. Per layer, with x the input of the attention (after the layer norm):

    query  = q_proj(x) + Δq       before the query's norm and RoPE (NoPE layers: before nothing)
    output = o_proj(...) + Δo
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import DeltaMemory, MemoryControl, MemoryInputs, MemoryState, ScanResult
from megatron_dla.errors import CheckpointError, ConfigError
from megatron_dla.hf.families import FAMILIES, check_servable

States = dict[int, MemoryState]
"""State of each layer that has a memory, by layer number."""
_CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, before
_CALL = "delta_mem_call"  # the keyword argument that takes a call through transformers' layers to the hooks


@dataclass
class LayerStats:
    """One layer in one call.

    Attributes:
        mean_beta, mean_keep: write and keep gate over the written tokens (nan: none written), see `half_life`.
        written: number of writes.
        output_ratio: ||Δo|| / ||o|| over all valid tokens together. state_norm: mean Frobenius norm of the new states.
    """

    mean_beta: float
    mean_keep: float
    written: int
    output_ratio: float
    state_norm: float


@dataclass
class DeltaMemOutput:
    """logits [B, T or logits_to_keep, V]; the states after the call (attached to the graph); the key/value cache;
    statistics by layer, if asked for."""

    logits: Tensor
    states: States
    past_key_values: Any
    stats: dict[int, LayerStats]


@dataclass
class _Call:
    """Inputs of one forward pass for the hooks, and their results."""

    owner: DeltaMemModel
    states: States
    inputs: MemoryInputs
    control: MemoryControl
    backend: str
    wants_stats: bool
    after: States = field(default_factory=dict)
    stats: dict[int, LayerStats] = field(default_factory=dict)


@dataclass
class _Open:
    """One self-attention between its two hooks."""

    memory: DeltaMemory
    call: _Call
    result: ScanResult


class DeltaMemModel(nn.Module):
    """An adapter on a model; made by `attach`. Its parameters and state dict are the adapter's alone.

    Attributes:
        base: the Hugging Face model (frozen; no submodule of this one). config. memories: by layer number as text.
    """

    base: Any

    def __init__(self, base: nn.Module, config: DeltaMemConfig, memories: dict[int, DeltaMemory]) -> None:
        super().__init__()
        self.__dict__["base"] = base
        self.config = config
        self.memories = nn.ModuleDict({str(layer): memory for layer, memory in memories.items()})
        self._open = threading.local()
        self._unfinished: States = {}
        self._hooks: list[Any] = []
        for layer, attention in enumerate(_attentions(base)):
            self._hook(layer, attention)

    # ---- hooks

    def _hook(self, layer: int, attention: Any) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            call = kwargs.get(_CALL)
            if call is None or call.owner is not self:
                return None
            if str(layer) in self.memories and call.control.off and not call.wants_stats:
                call.after[layer] = call.states[layer]
            elif str(layer) in self.memories:
                hidden = args[0] if args else kwargs["hidden_states"]
                self._open.now = self._read_and_write(layer, call, hidden)
            return args, {key: value for key, value in kwargs.items() if key != _CALL}

        def steer_query(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            now = getattr(self._open, "now", None)
            if now is None:
                return None
            return output + now.memory.delta_q(now.result.reads, output.dtype, now.call.control.scale)

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            now, self._open.now = getattr(self._open, "now", None), None
            if now is None or output is None:  # None: the attention raised
                return None
            return (self._steer_output(layer, now, output[0]), *output[1:])

        self._hooks.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(attention.register_forward_hook(after, always_call=True))
        if "q_proj" in self.config.target_modules:
            self._hooks.append(attention.q_proj.register_forward_hook(steer_query))

    def _read_and_write(self, layer: int, call: _Call, x: Tensor) -> _Open:
        memory, freeze, state = self.memory(layer), call.control.freeze, call.states[layer]
        result = memory.scan(memory.project(x), state, call.inputs, freeze=freeze, backend=call.backend)
        call.after[layer] = result.state
        return _Open(memory, call, result)

    def _steer_output(self, layer: int, now: _Open, output: Tensor) -> Tensor:
        delta = torch.zeros_like(output)
        if "o_proj" in self.config.target_modules:
            delta = now.memory.delta_o(now.result.reads, output, now.call.control.scale)
        if now.call.wants_stats:
            now.call.stats[layer] = _layer_stats(self.config, now, output, delta)
        return output + delta

    def detach(self) -> nn.Module:
        """Remove the hooks; returns the base model, which stays frozen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.base

    def stay_on(self) -> nn.Module:
        """Let direct calls of `base`, and its `generate`, read and write too; returns it. Sequences start with an empty
        memory; a call that continues a key/value cache continues from the states after the last one. Until `detach`."""

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if _CALL in kwargs:
                return None
            ids = args[0] if args else kwargs.get("input_ids")
            ids = kwargs["inputs_embeds"] if ids is None else ids
            mask, caches = kwargs.get("attention_mask"), (kwargs.get(name) for name in _CACHE_NAMES)
            continues = any(cache is not None and cache.get_seq_length() > 0 for cache in caches)
            states = self._unfinished if continues else self.initial_states(ids.shape[0])
            inputs = MemoryInputs(valid=None if mask is None else mask[:, -ids.shape[1] :].bool())
            call = _Call(self, states, inputs, MemoryControl(), "auto", False)
            self._unfinished = call.after
            return args, kwargs | {_CALL: call}

        self._hooks.append(self.base.model.register_forward_pre_hook(begin, with_kwargs=True))
        return self.base

    # ---- use

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have a memory."""
        return [int(name) for name in self.memories]

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    def initial_states(self, batch: int) -> States:
        """Zeros for `batch` sequences: fp32, float64 if the model is."""
        dtype = torch.float64 if self.base.dtype == torch.float64 else torch.float32
        memories = {layer: self.memory(layer) for layer in self.layers}
        return {
            layer: memory.initial_state(batch, memory.beta_bias.device, dtype) for layer, memory in memories.items()
        }

    def memory(self, layer: int) -> DeltaMemory:
        """The parameters of a layer that has a memory."""
        return self.memories[str(layer)]  # type: ignore[return-value]

    def finish(self, states: States) -> States:
        """With writes by message, the states after writing the open message; else the states themselves."""
        return {layer: self.memory(layer).finish(state) for layer, state in states.items()}

    def forward(
        self,
        input_ids: Tensor,
        *,
        states: States | None = None,
        inputs: MemoryInputs | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        control: MemoryControl | None = None,
        stats: bool = False,
        backend: str = "auto",
    ) -> DeltaMemOutput:
        """One call of the model, a pure function of its arguments (but the cache, which grows in place).

        Args:
            input_ids: int64 [B, T]. states: before the first token; None = zeros. They are not changed in place.
            inputs: which tokens write, reset or are padding. Without `inputs.valid`, `attention_mask` marks padding.
            attention_mask: [B, past + T], 1 = a token, 0 = padding on any side; without `position_ids` these count
                the tokens. None = no padding.
            logits_to_keep: only the last n positions go through the head; 0 = all.
            control: evaluation switches. stats: fill `DeltaMemOutput.stats` (synchronises with the device).

        Raises:
            ValueError: states of another batch size or adapter; writes by message without message ids.
        """
        B, T = input_ids.shape
        states = self.initial_states(B) if states is None else states
        if set(states) != set(self.layers) or any(state.S.shape[0] != B for state in states.values()):
            rows = sorted({state.S.shape[0] for state in states.values()})
            raise ValueError(
                f"states of layers {sorted(states)} and {rows} rows do not fit: want layers {self.layers}, {B} rows"
            )
        inputs = MemoryInputs() if inputs is None else inputs
        if attention_mask is not None:
            if inputs.valid is None:
                inputs = replace(inputs, valid=attention_mask[:, -T:].bool())
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -T:]
        call = _Call(self, states, inputs, control or MemoryControl(), backend, stats)
        out = self.base(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **{_CALL: call},
        )  # fmt: skip
        return DeltaMemOutput(out.logits, call.after, out.past_key_values, call.stats)

    def tensors(self) -> dict[int, dict[str, Tensor]]:
        """Parameters by layer, detached, under their published names."""
        return {layer: {name: p.detach() for name, p in self.memory(layer).named_parameters()} for layer in self.layers}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[int, dict[str, Tensor]]) -> None:
        """Copy parameters in. Raises CheckpointError naming a missing, unknown or misshapen one; then none is."""
        wanted = self.tensors()
        if set(tensors) != set(wanted):
            raise CheckpointError(f"the adapter has layers {sorted(tensors)}, this model takes {sorted(wanted)}")
        for layer, parameters in wanted.items():
            found = tensors[layer]
            if odd := sorted(set(found) ^ set(parameters)):
                raise CheckpointError(f"layer {layer} of the adapter: {', '.join(odd)} missing or unknown")
            for name, parameter in parameters.items():
                if found[name].shape != parameter.shape:
                    raise CheckpointError(
                        f"layer {layer} of the adapter: {name} is {list(found[name].shape)}, this model wants "
                        f"{list(parameter.shape)}: it was trained on another model"
                    )
        for layer, parameters in wanted.items():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[layer][name])


def attach(
    base: nn.Module, config: DeltaMemConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> DeltaMemModel:
    """Put a new adapter on `base`, which is frozen in place and otherwise behaves as before when called directly.

    Args:
        base: a causal language model of transformers, of one of `FAMILIES`. seed: of the adapter's start.
        dtype: of the adapter's parameters; the mathematics of the state is fp32 anyway.

    Raises:
        CheckpointError: the model is not supported.
        ConfigError: `config.layers_to_transform` names a layer that the model does not have.
    """
    values: dict[str, Any] = base.config.to_dict() if hasattr(base, "config") else {}  # type: ignore[union-attr,operator]
    ours = [kind.__name__ for kind in type(base).__mro__ if kind.__name__ in FAMILIES.values()]
    check_servable(values | {"architectures": ours[:1] or [type(base).__name__]}, "the base model's config")
    attentions = _attentions(base)
    if wrong := sorted(set(config.layers_to_transform or ()) - set(range(len(attentions)))):
        raise ConfigError(
            f"delta_mem.layers_to_transform has {wrong[0]}: the model has layers 0 to {len(attentions) - 1}"
        )
    base.requires_grad_(False)
    memories = {}
    for layer, attention in enumerate(attentions):
        if config.carries(layer):
            q, o = attention.q_proj.weight, attention.o_proj.weight
            memory = DeltaMemory(config, q.shape[1], q.shape[0], dtype=dtype, device=q.device)
            memory.initialise(seed, f"layers.{layer}", q, o)
            memories[layer] = memory
    return DeltaMemModel(base, config, memories)


def select_states(states: States, rows: Tensor | Sequence[int]) -> States:
    """Batch rows of the states, in that order: forking ([0, 0]), shuffling (a permutation)."""
    return {layer: state.select(torch.as_tensor(rows, device=state.S.device)) for layer, state in states.items()}


def _attentions(base: Any) -> list[Any]:
    return [layer.self_attn for layer in base.model.layers]


def _layer_stats(config: DeltaMemConfig, now: _Open, output: Tensor, delta: Tensor) -> LayerStats:
    with torch.no_grad():
        result, valid = now.result, now.call.inputs.valid
        beta = result.beta[result.written].double().mean().item()
        if valid is not None:
            output, delta = output[valid], delta[valid]
        ratio = delta.double().norm() / output.double().norm().clamp_min(1e-30)
        keep = result.keep[result.written].double().mean().item()
        norm = result.state.S.double().flatten(-2).norm(dim=-1).mean().item()
        return LayerStats(beta, keep, int(result.written.sum()), ratio.item(), norm)
