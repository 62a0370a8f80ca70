"""The DLA mixer as a Megatron-Core module: takes the self_attention slot of a TransformerLayer by ModuleSpec.

Tensor parallel by heads: column-parallel in, row-parallel out, and no collective between, but for a norm over heads of
several ranks. Partitions are per sequence and head, so they need no communication and do not depend on the layout.
Context parallel by heads too: an all-to-all before the convolution and one after the recurrence; gate and norm come
after the second, so the gate is never moved and a norm over several heads sees them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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

from megatron_dla.kernels.dla import Partition
from megatron_dla.kernels.dla.documents import document_starts
from megatron_dla.kernels.dla.rules import Controls, SlotRule
from megatron_dla.kernels.dla.soft import soft_attention
from megatron_dla.mixers import around, functional
from megatron_dla.mixers.calibration import ScoreCounts
from megatron_dla.mixers.chain import Chain
from megatron_dla.mixers.decisions import Decisions
from megatron_dla.mixers.layout import FP32_PARAMETERS, ParamSpec, dla_parameters
from megatron_dla.mixers.recurrence import Inputs, attend, decide
from megatron_dla.mixers.statistics import SlotStatistics
from megatron_dla.parallel.context import HeadExchange
from megatron_dla.parallel.sums import sum_over
from megatron_dla.parallel.tags import Tag, set_tag, set_without_gradient, sum_gradient

if TYPE_CHECKING:
    from megatron_dla.config import ModelSection


@dataclass
class DLAMixerSubmodules:
    """Specs of the linear layers around the recurrence."""

    in_proj: ModuleSpec | type = IdentityOp
    out_proj: ModuleSpec | type = IdentityOp


class DLAMixer(MegatronModule):
    """Dynamic Linear Attention over [S, B, hidden], on the Mamba-2 or the Gated DeltaNet backbone.

    Parameters: see `layout.dla_parameters`; those that are sharded have 1/TP of their size here.
    Deviation from Mamba-2: the gated norm is per head by default, so that it needs no communication
    (`model.gated_norm=group`: Mamba-2's own).
    """

    table = staticmethod(dla_parameters)
    delta: bool | None = None  # Gated DeltaNet's recurrence, else Mamba-2's; None: what the config says
    reports_boundaries = True  # counted in the boundary rate of a run

    conv_value: nn.Parameter
    conv_query: nn.Parameter
    conv_key: nn.Parameter
    conv_value_bias: nn.Parameter
    conv_query_bias: nn.Parameter
    conv_key_bias: nn.Parameter
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    slot_scale: nn.Parameter
    slot_bias: nn.Parameter
    sharpness: nn.Parameter
    tau: nn.Parameter
    norm: nn.Parameter

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
        split = pg_collection.cp.size() > 1  # rows over context-parallel ranks
        self.exchange = HeadExchange(pg_collection.cp) if split and cp_scheme == "heads" else None
        self.chain = Chain(pg_collection.cp) if split and cp_scheme == "chain" else None
        self.selective = config.recompute_granularity == "selective"
        self.keep_states = False  # see `build_model`
        self.decisions = Decisions()
        self.heads = model.num_heads // size
        self.shared_groups = model.num_groups % size != 0  # fewer groups than ranks: replicated
        self.groups = 1 if self.shared_groups else model.num_groups // size
        if self.delta is None:
            self.delta = model.backbone == "gdn"
        # since the last `take_boundary_rate`: boundaries [H local], and (first head, heads) -> tokens
        self.boundaries: Tensor | None = None
        self.tokens: Counter[tuple[int, int]] = Counter()
        self.scores: ScoreCounts | None = None  # counted in training, while tau is calibrated
        self.statistics: SlotStatistics | None = None  # counted in training, in steps that are logged
        self.gate_temperature: float | None = None  # soft gates in training, set by the trainer each step; None = hard
        table = self.table(model, size)
        self.sections = table["in_proj.weight"].sections
        self.in_proj = build_module(
            submodules.in_proj, config.hidden_size, table["in_proj.weight"].shape[0], config=config,
            init_method=config.init_method, gather_output=False, bias=False, skip_bias_add=False,
            tp_comm_buffer_name="fc1", tp_group=self.tp,
        )  # fmt: skip
        self.out_proj = build_module(
            submodules.out_proj, table["out_proj.weight"].shape[1], config.hidden_size, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True,
            is_expert=False, tp_comm_buffer_name="fc2", tp_group=self.tp,
        )  # fmt: skip
        if self.shared_groups:
            rows, columns = table["qk_proj.weight"].shape
            dtype, device = config.params_dtype, self._device()
            self.qk_proj = nn.Linear(columns, rows, bias=False, dtype=dtype, device=device)
        for name, spec in table.items():
            parameter = self.get_parameter(name) if "." in name else self._add_parameter(name, spec)
            set_tag(parameter, Tag(spec.kind, spec.dim, spec.sections), *spec.inits)
        if "tau" in table and model.tau_mode == "calibrated":
            set_without_gradient(self.tau)

    def _device(self) -> Any:
        return "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()

    def _add_parameter(self, name: str, spec: ParamSpec) -> nn.Parameter:
        dtype = self.config.params_dtype
        if name in FP32_PARAMETERS and dtype != torch.float64:
            dtype = torch.float32
        shape = spec.local_shape(self.tp.size())
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=self._device()))
        parameter.keep_fp32 = dtype == torch.float32  # type: ignore[attr-defined]  # see compat.import_deepspeed
        self.register_parameter(name, parameter)
        return parameter

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
        part = self._project(hidden_states)
        if self.shared_groups:
            part |= self._shared_query_key(hidden_states)
        gate = part.pop("gate").unflatten(-1, (self.heads, -1))
        out, value = self._core(part, None if packed_seq_params is None else packed_seq_params.cu_seqlens_q)
        out = self._norm(out.unflatten(-1, (self.heads, -1)), gate, value, part.gradient)
        return self.out_proj(out.flatten(2).transpose(0, 1).to(hidden_states.dtype))

    def _norm(self, out: Tensor, gate: Tensor, value: Tensor | None, gradient: Any = None) -> Tensor:
        """The gated norm of this rank's tokens, [B, S, H, Dv]; with a value, after Mamba-2's skip."""
        eps, gate_first = self.model.norm_eps, not self.delta
        D = None if self.delta else self.D
        if self.model.gated_norm == "head":
            weight = sum_gradient(self.norm, self.tp)
            return around.gated_head_norm(
                out, gate, weight, eps, self.backend, gate_first=gate_first, value=value,
                D=None if value is None else D, gradient=gradient,
            )  # fmt: skip
        out = around.with_skip(out, value, D)
        mean = {"mean": self._mean_over_ranks} if self.shared_groups else {}
        return functional.gated_group_norm(out, gate, self.norm, eps, groups=self.groups, gate_first=gate_first, **mean)

    def _mean_over_ranks(self, square: Tensor) -> Tensor:
        """[B, S, 1, 1] of this rank's heads, averaged over the ranks with heads of the same group."""
        groups, size = self.model.num_groups, self.tp.size()
        mine = self.tp.rank() * groups // size
        place = torch.arange(groups, device=square.device) == mine
        sums = sum_over(square[..., 0] * place, self.tp)  # [B, S, groups]
        return sums[..., mine, None, None] * (groups / size)

    def _core(self, part: dict[str, Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolution and recurrence: the projections [B, S, local size] -> [B, S, H Dv], and the values of a skip that
        is still to be added."""
        if self.exchange is not None:
            units = [self.groups if name in ("query", "key") else self.heads for name in part]
            part = dict(zip(part, self.exchange.to_heads(list(part.values()), units), strict=True))
        recomputed = self.selective and self.training and torch.is_grad_enabled()
        if not recomputed and self.exchange is None:
            out, value = self._recur(part, cu_seqlens)
            return out.flatten(2), value

        def run(*tensors: Tensor) -> Tensor:
            out, value = self._recur(dict(zip(part, tensors, strict=True)), cu_seqlens)
            return around.with_skip(out, value, None if value is None else self._local(self.D)).flatten(2)

        out = checkpoint(run, False, *part.values()) if recomputed else run(*part.values())
        return (out if self.exchange is None else self.exchange.to_tokens(out)), None

    def _recur(self, part: dict[str, Tensor], cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, S, H, Dv] of whole rows of this rank's heads (chain: of its tokens of all heads), and a skip's values."""
        B, S = part["value"].shape[:2]
        halo, starts, device = 0, None, part["value"].device
        if self.chain is not None:
            starts = self.chain.documents(cu_seqlens, B, S, device)
            part, borders, halo = self.chain.with_halo(part, self.model.conv_kernel - 1, starts)
        else:
            borders = starts = None if cu_seqlens is None else document_starts(cu_seqlens, B, S, device, copy=False)
        inputs, value = self._inputs(part, borders, halo)
        return self._mix(inputs, cu_seqlens, starts), value

    def _inputs(self, part: dict[str, Tensor], starts: Tensor | None, halo: int) -> tuple[Inputs, Tensor | None]:
        """`around.recurrence_inputs` with this mixer's parameters."""
        local = self._local
        shared = [local(self._shared(weight), self.groups) for weight in (self.conv_query, self.conv_key)]
        biases: list[Tensor | None] = [None] * 3
        if self.model.conv_bias:
            by_group = (local(self._shared(x), self.groups) for x in (self.conv_query_bias, self.conv_key_bias))
            biases = [local(self.conv_value_bias), *by_group]
        slots = [local(self.slot_scale), local(self.slot_bias)] if "slot" in part else []
        gates = [local(self.A_log), local(self.dt_bias), *slots]
        parameters = around.Parameters([local(self.conv_value), *shared], biases, *gates)
        delta = bool(self.delta)
        return around.recurrence_inputs(part, parameters, self.model, starts, halo, self.backend, delta=delta)

    def _local(self, weight: Tensor, units: int | None = None) -> Tensor:
        """The heads (or groups) of this context-parallel rank, of a parameter of the tensor-parallel rank."""
        return weight if self.exchange is None else self.exchange.local(weight, units or self.heads)

    def _project(self, hidden_states: Tensor) -> around.Sections:
        """The sections of in_proj, each [B, S, local size]."""
        packed, _ = self.in_proj(hidden_states)
        sizes = {name: n // self.tp.size() for name, n in self.sections}
        return around.sections(packed.transpose(0, 1), sizes, self.backend)

    def _shared_query_key(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Query and key of this rank's one group, from replicated weights."""
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

    def _mix(self, inputs: Inputs, cu_seqlens: Tensor | None, starts: Tensor | None) -> Tensor:
        """The recurrence: [B, S, H, Dv]."""
        rule = replace(self._rule(), keep_states=self.keep_states)
        if self.statistics is not None and self.training:
            self.statistics.add_weights(inputs.slot_weights, self._first_head())
        if self.chain is not None:
            return self.chain.attend(inputs, rule, starts, self._partition)
        decided = self._partition(0, lambda: decide(inputs, rule, cu_seqlens))
        if self.statistics is not None and self.training:
            self.statistics.add_sizes(decided, starts, self._first_head())
        if self.training and self.gate_temperature is not None:
            out, _ = soft_attention(
                *inputs, tau=rule.tau, temperature=self.gate_temperature, partition=decided, cu_seqlens=cu_seqlens
            )
        else:
            out, _ = attend(inputs, rule, decided, cu_seqlens)
        return out

    def _rule(self) -> SlotRule:
        """How slots open and merge."""
        m = self.model
        tau: float | Tensor = m.tau
        if m.tau_mode == "calibrated":
            tau = self._local(self.tau)
        if m.tau_mode == "learned":
            tau = functional.clamp_tau(self._local(self.tau))
            tau = tau if torch.is_grad_enabled() else tau.requires_grad_()  # a recomputation will need Partition.lo
        sharpness = self._local(self.sharpness) if m.slot_weights == "content" else None
        return SlotRule(tau, m.capacity, m.merge, self._controls(), self.backend, sharpness)

    def _controls(self) -> Controls:
        """Of the heads at hand, which have the same random numbers at every layout."""
        m, first = self.model, self.tp.rank() * self.heads + self._first_head()
        layer = (self.layer_number or 1) - 1
        return Controls(m.boundary, m.boundary_rate, m.boundary_every, m.control_seed, layer, first)

    def _first_head(self) -> int:
        """Number, among those of the tensor-parallel rank, of the first head that this rank has whole rows of."""
        return 0 if self.exchange is None else self.exchange.rank * (self.heads // self.exchange.size)

    def _partition(self, first_head: int, compute: Callable[[], Partition]) -> Partition:
        """The computed partition of the heads from `first_head` on, or the kept one where this pass is recomputed."""

        def counted() -> Partition:
            decided = compute()
            first = first_head + self._first_head()
            if self.reports_boundaries:
                self._count(decided.start, first)
            if self.scores is not None and self.training:
                self.scores.add(decided, first)
            if self.statistics is not None and self.training:
                self.statistics.add(decided, first)
            return decided

        return self.decisions.get(counted)

    @torch.no_grad()
    def _count(self, start: Tensor, first: int) -> None:
        opened = start.sum((0, 1))
        if self.boundaries is None:
            self.tokens.clear()
        self.tokens[first, len(opened)] += start.shape[0] * start.shape[1]
        if self.boundaries is None and len(opened) == self.heads:
            self.boundaries = opened
            return
        if self.boundaries is None:
            self.boundaries = torch.zeros(self.heads, dtype=torch.int64, device=start.device)
        self.boundaries[first : first + len(opened)].add_(opened)

    def take_boundary_rate(self) -> Tensor:
        """Share of tokens that opened a slot since the last call, per local head: fp32 [H local].

        Under context parallelism a share of the sum over the group: a rank counts its heads, or its tokens, only.
        """
        assert self.boundaries is not None, "no forward pass yet"
        ranks = 1 if self.chain is None else self.chain.ranks.size
        rate = self.boundaries.float()
        for (first, heads), tokens in self.tokens.items():
            rate[first : first + heads] /= tokens * ranks
        self.boundaries = None
        return rate
