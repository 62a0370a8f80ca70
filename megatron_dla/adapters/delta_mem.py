"""δ-mem in Megatron's attention layers, by ModuleSpec: the query is steered before its norm and RoPE, the output after
its projection (arXiv 2605.12357, eq. 7-9).

Every rank of a layer's tensor- and context-parallel groups holds the whole memory and runs the same scan on whole rows:
the projections are gathered (4 R columns), not the hidden states. Only the rows of `delta_q_proj` are split, by query
heads. A scan's adjoint is linear, so where the sequence is split each rank may return its part of the reads' gradient
and the gather's backward sums them: parameters then have partial gradients, summed in the graph over tensor-parallel
ranks and with data parallelism over context-parallel ones. With whole sequences on all ranks only the query's branch is
partial, and is summed where the reads enter it.

RoPE turns queries and keys by their place in the row. Scores depend on differences of places alone and attention does
not leave a packed document, so a read segment behind its write segment attends as if its places started at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_dla.adapters.calls import LayerResult, MemoryCall
from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import DeltaMemory, MemoryInputs, ScanResult
from megatron_dla.errors import ConfigError
from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.mixers.layout import zeros
from megatron_dla.mixers.norms import HeadNorm
from megatron_dla.parallel.context import context_slice
from megatron_dla.parallel.tags import Tag, get_tag, set_tag, sum_gradient


@dataclass
class MemoryParams(PackedSeqParams):
    """Megatron's packed sequences with a MemoryCall: the one argument that its block passes to every layer
    unchanged, also in recomputation."""

    memory: MemoryCall | None = None


def with_memory(call: MemoryCall, seq_len: int, cu_seqlens: Tensor | None = None) -> MemoryParams:
    """The `packed_seq_params` of a forward pass with `call`.

    Args:
        seq_len: tokens of a whole row. cu_seqlens: as in `packed_sequence`; attention stays inside its documents, but
            memories are reset only where `call.inputs.reset` is True.
    """
    return MemoryParams("sbhd", cu_seqlens, cu_seqlens, max_seqlen_q=seq_len, max_seqlen_kv=seq_len, memory=call)


class _Steered:
    """Adds the query's correction to the input of a norm. Set before each forward pass, which clears it."""

    correction: Tensor | None = None

    def steer(self, x: Tensor) -> Tensor:
        correction, self.correction = self.correction, None
        return x if correction is None else x + correction


class SteeredHeadNorm(_Steered, HeadNorm):
    """q_layernorm of a backbone that has one; the parameter's name stays."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.steer(x))


class SteeredIdentity(_Steered, nn.Module):
    """q_layernorm of a backbone without one."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return self.steer(x)


class _SharedMemory(DeltaMemory):
    """The memory of a tensor-parallel rank; `group`: over which its replicated parameters' gradients are summed."""

    group: Any = None

    def shared(self, weight: Tensor) -> Tensor:
        return sum_gradient(weight, self.group)


class DeltaMemSelfAttention(SelfAttention):
    """Megatron's SelfAttention with a memory. Parameters: `delta_mem.*`, fp32 (float64 in a float64 model)."""

    def __init__(self, config, submodules, layer_number: int, *args: Any, delta_mem: DeltaMemConfig, **kwargs: Any):
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        tp = self.tp_group
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.delta_mem = _SharedMemory(
            delta_mem, config.hidden_size, self.query_projection_size // tp.size(),
            dtype=torch.float64 if config.params_dtype == torch.float64 else torch.float32,
            device=device,
        )  # fmt: skip
        self.delta_mem.group = tp if config.sequence_parallel else None
        replicated = Tag("replicated_sum" if config.sequence_parallel and tp.size() > 1 else "replicated")
        for name, parameter in self.delta_mem.named_parameters():
            parameter.keep_fp32 = parameter.dtype == torch.float32  # type: ignore[attr-defined]
            # the initial values need the base weights: `initialise_memories`
            set_tag(parameter, Tag("sharded") if name == "delta_q_proj" else replicated, zeros)

    @property
    def layer(self) -> int:
        """Layer number, from 0."""
        return self.layer_number - 1

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context=None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, hidden] (this rank's part of the sequence) -> (same shape, None).

        Without a MemoryCall every token writes, the memory starts empty, and is reset between packed documents.
        """
        if inference_context is not None:
            raise ValueError("δ-mem does not decode in Megatron: export the adapter and use `dla generate`")
        given = getattr(packed_seq_params, "memory", None)
        if given is not None and given.off:
            return super().forward(hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs)
        dtype, parallel, cp = hidden_states.dtype, self.config.sequence_parallel, self.pg_collection.cp
        memory, targets = self.delta_mem, self.delta_mem.config.target_modules
        call, result = self._scan_rows(hidden_states, packed_seq_params)
        reads = context_slice(result.reads.transpose(0, 1), cp, 0)  # [S / cp, B, R]
        if "q_proj" in targets:
            whole = reads if parallel else copy_to_tensor_model_parallel_region(reads, group=self.tp_group)
            correction = memory.delta_q(whole, dtype, call.control.scale)
            self.q_layernorm.correction = correction.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        output, bias = super().forward(
            hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        base = output
        if "o_proj" in targets:
            mine = context_slice(reads, self.tp_group if parallel else None, 0)
            output = output + memory.delta_o(mine, output, call.control.scale)
        gate, lost = result.mean(result.beta), result.mean(1 - result.keep).detach()
        output = call.attach(output, gate, self.tp_group.size() if parallel else 1)
        if not call.replays(self.layer):
            steering = self._steering(output - base, base, call.inputs.valid) if call.measure else None
            writes = result.written.sum()
            call.results[self.layer] = LayerResult(result.state, gate.detach(), 1 - lost, writes, steering)
        return output, bias

    def _scan_rows(self, hidden_states: Tensor, packed: PackedSeqParams | None) -> tuple[MemoryCall, ScanResult]:
        """The pass's call and the scan of whole rows."""
        raw = self.delta_mem.project(hidden_states)  # [S local, B, C]
        groups = ([self.tp_group] if self.config.sequence_parallel else []) + [self.pg_collection.cp]
        for group in groups:
            if group.size() > 1:
                raw = gather_from_sequence_parallel_region(raw, group=group)
        raw = raw.transpose(0, 1)
        B, T = raw.shape[:2]
        call = getattr(packed, "memory", None)
        if call is None:
            ends = None if packed is None else packed.cu_seqlens_q
            call = MemoryCall(MemoryInputs(reset=document_starts(ends, B, T, raw.device)))
        state = (call.states or {}).get(self.layer)
        if state is None:
            state = self.delta_mem.initial_state(B, raw.device, raw.dtype)
        elif state.S.requires_grad and self.config.recompute_granularity == "full" and self.training:
            raise ValueError(
                "a state that carries a gradient cannot enter a fully recomputed model: pack write and read segment in "
                "one row, or use training.recompute=selective"
            )
        return call, self.delta_mem.scan(raw, state, call.inputs, freeze=call.control.freeze)

    @torch.no_grad()
    def _steering(self, change: Tensor, base: Tensor, valid: Tensor | None) -> Tensor:
        """|change| / |base|, both [S local, B, hidden], over the tokens that are valid [B, S]."""
        parallel, cp = self.config.sequence_parallel, self.pg_collection.cp
        mine: Tensor | float = 1.0
        if valid is not None:
            mine = context_slice(valid.transpose(0, 1), cp, 0)
            mine = context_slice(mine, self.tp_group if parallel else None, 0)[..., None]
        sums = torch.stack([(x.double() * mine).square().sum() for x in (change, base)])
        for group in ([self.tp_group] if parallel else []) + [cp]:
            dist.all_reduce(sums, group=group)
        return (sums[0] / sums[1]).sqrt().float()

    @torch.no_grad()
    def initialise_memory(self, seed: int) -> None:
        """Draw the memory's parameters, equal at every layout, from a seed, their names and the layer's W_Q and W_O."""
        memory, tp = self.delta_mem, self.tp_group
        query, output = self._base_columns(memory.config.width)
        whole = DeltaMemory(memory.config, memory.hidden_size, self.query_projection_size)
        whole.initialise(seed, f"layers.{self.layer}", query.cpu(), output.cpu())
        for key, parameter in memory.named_parameters():
            parameter.copy_(get_tag(parameter).shard(whole.get_parameter(key), tp.rank(), tp.size()))

    def _base_columns(self, width: int) -> tuple[Tensor, Tensor]:
        """The first `width` input columns of the whole W_Q (query heads in order) and of the whole W_O."""
        qkv = _joined(self.linear_qkv.weight[:, :width], self.tp_group, 0)  # by group: its query heads, key, value
        qkv = qkv.unflatten(0, (self.config.num_query_groups, -1, self.hidden_size_per_attention_head))
        return qkv[:, :-2].flatten(0, 2), _joined(self.linear_proj.weight[:, :width], self.tp_group, 1)[:, :width]


def _joined(part: Tensor, group: Any, dim: int) -> Tensor:
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim)


def add_memories(block: TransformerBlockSubmodules, config: DeltaMemConfig) -> TransformerBlockSubmodules:
    """The block's spec, changed in place: softmax layers that `config` names get a memory.

    Raises:
        ConfigError: `delta_mem.layers_to_transform` names another layer, or the model has no softmax layer.
    """
    specs = {i: layer.submodules.self_attention for i, layer in enumerate(block.layer_specs)}
    softmax = [i for i, spec in specs.items() if spec.module is SelfAttention]
    if wrong := sorted(set(config.layers_to_transform or ()) - set(softmax)):
        raise ConfigError(
            f"delta_mem.layers_to_transform: layer {wrong[0]} is not a softmax attention layer of this model; those "
            f"are {softmax}"
        )
    if not (chosen := [i for i in softmax if config.carries(i)]):
        raise ConfigError(
            "delta_mem: no softmax attention layer to carry a memory: see model.pattern, delta_mem.layers_to_transform"
        )
    steered = {HeadNorm: SteeredHeadNorm, IdentityOp: SteeredIdentity}
    for spec in (specs[i] for i in chosen):
        spec.module, spec.params = DeltaMemSelfAttention, {**spec.params, "delta_mem": config}
        if "q_proj" in config.target_modules:
            spec.submodules.q_layernorm = steered[spec.submodules.q_layernorm]
    return block


def memory_layers(model: nn.Module) -> list[DeltaMemSelfAttention]:
    """The attention layers that carry a memory, in order."""
    return [module for module in model.modules() if isinstance(module, DeltaMemSelfAttention)]


def initialise_memories(model: nn.Module, seed: int) -> None:
    """Draw every memory's parameters, once the backbone's weights are in place (collective over tensor ranks)."""
    for layer in memory_layers(model):
        layer.initialise_memory(seed)


def freeze_backbone(model: nn.Module) -> list[str]:
    """Train only the memories; returns the names of their parameters. Call it before wrapping the model in an engine.

    Megatron's checkpoints are reentrant: a recomputed layer whose input carries no gradient would give none. So
    the embedding's output is made to carry one.
    """
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".delta_mem." in name)
        trained += [name] if parameter.requires_grad else []
    if model.config.recompute_granularity == "full":  # type: ignore[union-attr]
        model.embedding.register_forward_hook(_carry_gradient)  # type: ignore[union-attr, operator]
    return trained


def _carry_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and module.training:
        output.requires_grad_()
