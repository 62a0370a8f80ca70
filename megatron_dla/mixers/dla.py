"""The DLA mixer as a Megatron-Core module: takes the self_attention slot of a TransformerLayer by ModuleSpec.

Tensor parallel by heads: column-parallel in, row-parallel out, and no collective between. Decisions are per sequence
and head, so they need no communication and do not depend on the layout. Context parallel by heads too: an all-to-all
before the convolution and one after the recurrence; gate and norm follow the return trip, so that the gate stays home.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megatron_dla.config import ModelSection
from megatron_dla.kernels.dla import Partition, dla_attention, partition
from megatron_dla.kernels.dla.naive import document_starts
from megatron_dla.kernels.dla.soft import soft_attention
from megatron_dla.mixers import functional
from megatron_dla.mixers.chain import Chain
from megatron_dla.mixers.decisions import Decisions
from megatron_dla.mixers.norms import ones
from megatron_dla.parallel.context import HeadExchange
from megatron_dla.parallel.tags import Init, Tag, set_tag, sum_gradient


@dataclass
class DLAMixerSubmodules:
    """Specs of the linear layers around the recurrence."""

    in_proj: ModuleSpec | type = IdentityOp
    out_proj: ModuleSpec | type = IdentityOp


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(low: float, high: float) -> Init:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def dt_bias_init(low: float, high: float) -> Init:
    """softplus^-1 of a log-uniform time step (Mamba-2)."""

    def draw(shape: torch.Size, generator: torch.Generator) -> Tensor:
        span = math.log(high) - math.log(low)
        dt = torch.exp(torch.rand(shape, generator=generator) * span + math.log(low)).clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))

    return draw


def a_log_init(low: float, high: float) -> Init:
    draw = uniform(low, high)
    return lambda shape, generator: draw(shape, generator).log()


class DLAMixer(MegatronModule):
    """Dynamic Linear Attention over [S, B, hidden], on the Mamba-2 or the Gated DeltaNet backbone.

    Parameters (H heads, G query/key groups, K slots; local sizes are 1/TP of these):
        in_proj: sections gate [H Dv], value [H Dv], query [G Dk], key [G Dk], step [H], strength [H] (GDN only) and
            slot [H K]. With fewer groups than ranks, query and key move to `qk_proj`, replicated.
        conv_value, conv_query, conv_key: [channels, W]. A_log, dt_bias: fp32 [H]. D: fp32 [H] (Mamba-2 only).
        slot_scale, slot_bias: fp32 [H, K]. tau: fp32 [H], if learned. norm: [Dv], shared by the heads.

    Deviation from Mamba-2: the gated norm is per head, so that it does not depend on the tensor-parallel size.
    """

    def __init__(
        self,
        config,
        submodules: DLAMixerSubmodules,
        layer_number: int | None = None,
        *,
        model: ModelSection,
        pg_collection=None,
        cp_comm_type: str | None = None,
        backend: str = "auto",
        cp_scheme: str = "heads",
        **_: object,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None, "DLAMixer needs pg_collection"
        self.layer_number, self.model, self.backend = layer_number, model, backend
        self.tp = pg_collection.tp
        size = self.tp.size()
        shared = pg_collection.cp.size() > 1  # the rows are
        self.exchange = HeadExchange(pg_collection.cp) if shared and cp_scheme == "heads" else None
        self.chain = Chain(pg_collection.cp) if shared and cp_scheme == "chain" else None
        self.selective = config.recompute_granularity == "selective"
        self.decisions = Decisions()
        self.heads = model.num_heads // size
        self.shared_groups = model.num_groups % size != 0  # fewer groups than ranks: replicated
        self.groups = 1 if self.shared_groups else model.num_groups // size
        self.delta = model.backbone == "gdn"
        self.boundaries: Tensor | None = None  # boundary counts since the last `take_boundary_rate`, [H local]
        self.tokens = torch.zeros(0)
        self.gate_temperature: float | None = None  # soft gates in training, set by the trainer each step; None = hard
        inner, qk = model.num_heads * model.value_dim, model.num_groups * model.key_dim
        sections = [("gate", inner), ("value", inner)]
        sections += [] if self.shared_groups else [("query", qk), ("key", qk)]
        sections += [("step", model.num_heads)] + ([("strength", model.num_heads)] if self.delta else [])
        sections += [("slot", model.num_heads * model.capacity)]
        self.sections = tuple(sections)
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, sum(n for _, n in sections), config=config,
            init_method=config.init_method, gather_output=False, bias=False, skip_bias_add=False,
            tp_comm_buffer_name="fc1", tp_group=self.tp,
        )  # fmt: skip
        self.out_proj = build_module(
            submodules.out_proj, inner, config.hidden_size, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True,
            is_expert=False, tp_comm_buffer_name="fc2", tp_group=self.tp,
        )  # fmt: skip
        std = model.init_std
        set_tag(self.in_proj.weight, Tag("sharded", 0, self.sections), normal(std))
        set_tag(self.out_proj.weight, Tag("sharded", 1), normal(std / math.sqrt(2 * config.num_layers)))
        self._add_parameters(inner, qk)

    def _add_parameters(self, inner: int, qk: int) -> None:
        m, size, dtype = self.model, self.tp.size(), self.config.params_dtype
        sharded = Tag("sharded")
        conv = uniform(-(m.conv_kernel**-0.5), m.conv_kernel**-0.5)
        self.conv_value = self._parameter((inner // size, m.conv_kernel), sharded, conv, dtype)
        if self.shared_groups:
            both = Tag("replicated_sum", 0, (("query", qk), ("key", qk)))
            self.qk_proj = nn.Linear(self.config.hidden_size, 2 * qk, bias=False, dtype=dtype, device=self._device())
            set_tag(self.qk_proj.weight, both, normal(m.init_std))  # type: ignore[arg-type]
        channels, conv_tag = (qk, Tag("replicated_sum")) if self.shared_groups else (qk // size, sharded)
        self.conv_query = self._parameter((channels, m.conv_kernel), conv_tag, conv, dtype)
        self.conv_key = self._parameter((channels, m.conv_kernel), conv_tag, conv, dtype)
        H, slots = (self.heads,), (self.heads, m.capacity)
        self.A_log = self._parameter(H, sharded, a_log_init(m.a_min, m.a_max))
        self.dt_bias = self._parameter(H, sharded, dt_bias_init(m.dt_min, m.dt_max))
        if not self.delta:
            self.D = self._parameter(H, sharded, ones)
        start_as_backbone = m.slot_weight_init == "backbone"
        self.slot_scale = self._parameter(slots, sharded, ones)
        self.slot_bias = self._parameter(slots, sharded, constant(math.log(math.e - 1) if start_as_backbone else 0.0))
        if m.tau_mode == "learned":
            self.tau = self._parameter(H, sharded, constant(m.tau))
        # every rank sees only its heads, with or without sequence parallelism: the gradient is always partial
        self.norm = self._parameter((m.value_dim,), Tag("replicated_sum"), ones, dtype)

    def _device(self) -> Any:
        return "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()

    def _parameter(self, shape: tuple[int, ...], tag: Tag, init: Init, dtype=torch.float32) -> nn.Parameter:
        dtype = torch.float64 if self.config.params_dtype == torch.float64 else dtype
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device()))
        # scalars that sit in exponentials and thresholds stay fp32 in a bf16 model: see compat.import_deepspeed
        parameter.keep_fp32 = dtype == torch.float32  # type: ignore[attr-defined]
        return set_tag(parameter, tag, init)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params=None,
        inference_context=None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, hidden] (S / TP under sequence parallelism) -> (same shape, None).

        `packed_seq_params.cu_seqlens_q`, over the flattened B * S tokens of all rows, gives the document starts.
        """
        if inference_context is not None:
            raise ValueError(
                "DLAMixer does not decode inside Megatron: convert with `dla convert to-hf` and generate there"
            )
        part = dict(zip((name for name, _ in self.sections), self._project(hidden_states), strict=True))
        if self.shared_groups:
            part |= self._shared_query_key(hidden_states)
        gate = part.pop("gate").unflatten(-1, (self.heads, -1))
        out = self._core(part, None if packed_seq_params is None else packed_seq_params.cu_seqlens_q)
        weight = sum_gradient(self.norm, self.tp)
        out = functional.gated_head_norm(
            out.unflatten(-1, (self.heads, -1)), gate, weight, self.model.norm_eps, gate_first=not self.delta
        )
        return self.out_proj(out.flatten(2).transpose(0, 1).to(hidden_states.dtype))

    def _core(self, part: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """Convolution and recurrence: the projections [B, S, local size] -> [B, S, H Dv]."""
        if self.exchange is not None:
            units = [self.groups if name in ("query", "key") else self.heads for name in part]
            part = dict(zip(part, self.exchange.to_heads(list(part.values()), units), strict=True))

        def run(*tensors: Tensor) -> Tensor:
            return self._recur(dict(zip(part, tensors, strict=True)), cu_seqlens)

        if self.selective and self.training and torch.is_grad_enabled():
            out = checkpoint(run, False, *part.values())
        else:
            out = run(*part.values())
        return out if self.exchange is None else self.exchange.to_tokens(out)

    def _recur(self, part: dict[str, Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """[B, S, local heads * Dv] from whole rows of this rank's heads (chain: from its tokens of all heads)."""
        B, S = part["value"].shape[:2]
        conv, m = functional.short_convolution, self.model
        xs = [part[name] for name in ("value", "query", "key")]
        shared = (self._mine(self._shared(weight), self.groups) for weight in (self.conv_query, self.conv_key))
        weights = [self._mine(self.conv_value), *shared]
        if self.chain is not None:
            starts = self.chain.documents(cu_seqlens, B, S, xs[0].device)
            xs = self.chain.convolve(xs, weights, starts)
        else:
            starts = None if cu_seqlens is None else document_starts(cu_seqlens, B, S, xs[0].device)
            document = None if starts is None else starts.cumsum(1)
            xs = [conv(x, weight, document) for x, weight in zip(xs, weights, strict=True)]
        value, query, key = (x.unflatten(-1, (-1, n)) for x, n in zip(xs, (m.value_dim, *2 * [m.key_dim]), strict=True))
        return self._mix(query, key, value, part, cu_seqlens, starts).flatten(2)

    def _mine(self, weight: Tensor, units: int | None = None) -> Tensor:
        """The context-parallel rank's heads (or groups) of a parameter over the tensor-parallel rank's."""
        return weight if self.exchange is None else self.exchange.mine(weight, units or self.heads)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """The sections of in_proj, each [B, S, local size]."""
        packed, _ = self.in_proj(hidden_states)
        return packed.transpose(0, 1).split([n // self.tp.size() for _, n in self.sections], -1)

    def _shared_query_key(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Query and key of this rank's one group, from weights that several ranks hold alike."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=self.tp)
        query, key = sum_gradient(self.qk_proj.weight, self.tp).chunk(2)
        return {
            name: torch.nn.functional.linear(hidden_states, self._my_group(weight)).transpose(0, 1)
            for name, weight in (("query", query), ("key", key))
        }

    def _my_group(self, weight: Tensor) -> Tensor:
        """The rows [Dk, ...] of the group that this rank's heads read."""
        group = self.tp.rank() * self.model.num_groups // self.tp.size()
        return weight.unflatten(0, (self.model.num_groups, -1))[group]

    def _shared(self, weight: Tensor) -> Tensor:
        return self._my_group(sum_gradient(weight, self.tp)) if self.shared_groups else weight

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, part: dict[str, Tensor], cu_seqlens, starts) -> Tensor:
        """The recurrence: [B, S, H, Dv]."""
        m, mine = self.model, self._mine
        raw = part["slot"].unflatten(-1, (-1, m.capacity))
        weights = functional.slot_weights(raw, mine(self.slot_scale), mine(self.slot_bias))
        beta, write = None, value
        scalars = mine(self.A_log), mine(self.dt_bias)
        if self.delta:
            query, key, g, beta = functional.gdn_inputs(query, key, part["step"], part["strength"], *scalars)
        else:
            write, g = functional.mamba2_inputs(value, part["step"], *scalars)
        tau: float | Tensor = m.tau
        if m.tau_mode == "learned":
            tau = functional.hold_tau(mine(self.tau))
            tau = tau if torch.is_grad_enabled() else tau.requires_grad_()  # a recomputation will need Partition.lo
        rule = {"tau": tau, "capacity": m.capacity, "merge": m.merge, "backend": self.backend}
        inputs = (query, key, write, g, weights, beta)
        if self.chain is not None:
            out = self.chain.attend(inputs, rule, starts, self._decide)
        else:
            rule["cu_seqlens"] = cu_seqlens
            decided = self._decide(lambda: partition(key, write, g, beta, **rule))
            if self.training and self.gate_temperature is not None:
                soft = {"tau": tau, "temperature": self.gate_temperature, "cu_seqlens": cu_seqlens}
                out, _ = soft_attention(*inputs, partition=decided, **soft)
            else:
                out, _ = dla_attention(*inputs, partition=decided, **rule)
        return out if self.delta else out + mine(self.D)[:, None].to(value.dtype) * value

    def _decide(self, decide: Callable[[], Partition], first_head: int = 0) -> Partition:
        """A partition, or the one that was decided before this pass was recomputed."""

        def counted() -> Partition:
            decided = decide()
            self._count(decided.start, first_head)
            return decided

        return self.decisions.get(counted)

    @torch.no_grad()
    def _count(self, start: Tensor, first: int) -> None:
        mine = start.sum((0, 1))
        if self.exchange is not None:
            first += self.exchange.rank * len(mine)
        if self.boundaries is None:
            self.boundaries = torch.zeros(self.heads, dtype=torch.int64, device=start.device)
            self.tokens = torch.zeros_like(self.boundaries)
        self.boundaries[first : first + len(mine)] += mine
        self.tokens[first : first + len(mine)] += start.shape[0] * start.shape[1]

    def take_boundary_rate(self) -> Tensor:
        """Share of tokens that opened a slot since the last call, per local head: fp32 [H local].

        Under context parallelism a share of the sum over the group: a rank counts its heads, or its tokens, only.
        """
        assert self.boundaries is not None, "no forward pass yet"
        ranks = 1 if self.chain is None else self.chain.near.size
        rate = self.boundaries.float() / (self.tokens.clamp(min=1) * ranks)
        self.boundaries = None
        return rate
