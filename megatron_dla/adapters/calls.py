"""One forward pass through a model with memories: its inputs for all layers, and the result of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dla.adapters.memory import MemoryControl, MemoryInputs, MemoryState


@dataclass
class LayerResult:
    """Result of one layer's memory on whole rows: the same on every rank that shares them."""

    state: MemoryState
    """After the last token. Attached to the graph, except under full recomputation."""
    gate: Tensor
    """Mean write gate over the tokens (messages) written, fp32 or fp64 scalar, detached; 0 without any."""
    keep: Tensor
    """Mean keep gate, likewise; 1 without any."""
    writes: Tensor
    """Number of tokens (messages) written, int64 scalar."""
    steering: Tensor | None = None
    """|delta_o| / |o| over all tokens except padding, if the call measures it."""


@dataclass
class MemoryCall:
    """Accompanies one forward pass (recomputation in its backward pass included); layers count from 0.

    States are explicit: modules hold none. Under full recomputation the states of `results` are detached and
    the initial ones may not carry a gradient: train in packed rows, [write | read] in one forward pass.
    """

    inputs: MemoryInputs = field(default_factory=MemoryInputs)
    """Flags [B, T] of whole rows, also under context parallelism."""
    states: Mapping[int, MemoryState] | None = None
    """Initial state of each layer; None, or a layer without an entry: empty. Their gradient, if a caller needs it, is
    partial on ranks that split the sequence (sequence or context parallel): sum it over them."""
    control: MemoryControl = field(default_factory=MemoryControl)
    gate_target: float = 0.05
    gate_weight: float = 0.0
    """Strength of the gate regulariser, see `penalise`; its mean is over this call's tokens."""
    measure: bool = False
    """Fill `LayerResult.steering` (costs a small all-reduce per layer where the sequence is split)."""
    results: dict[int, LayerResult] = field(default_factory=dict)
    divergence: Tensor | None = None
    """From the frozen model, summed over the tokens of this rank that shall stay as they are."""

    def __post_init__(self) -> None:
        self._cotangent: Tensor | None = None

    @property
    def off(self) -> bool:
        """Whether this is a pass of the plain backbone: no correction, no write, no state, and no `results`."""
        return self.control.off and not self.states

    def replays(self, layer: int) -> bool:
        """Whether this is a recomputation of `layer`, whose result is kept.

        Raises:
            ValueError: the call was used for a second forward pass.
        """
        if layer not in self.results:
            return False
        if torch._C._current_graph_task_id() < 0:  # not inside a backward pass
            raise ValueError("a MemoryCall is for one forward pass: create a new one with states=call.states_out()")
        return True

    def states_out(self) -> dict[int, MemoryState]:
        """States after the pass: the `states` of the call that continues it."""
        return {layer: result.state for layer, result in self.results.items()}

    def penalty(self) -> Tensor:
        """gate_weight * mean over layers of (mean gate - gate_target)^2, detached."""
        gates = torch.stack([result.gate for result in self.results.values()])
        return self.gate_weight * (gates - self.gate_target).square().mean()

    def penalise(self, loss: Tensor) -> Tensor:
        """The scalar loss plus `penalty()`, whose gradient enters the graph in each layer, so that it survives
        recomputation; the loss must depend on this call's forward pass.

        Context-parallel ranks, whose losses are summed, each add it (as data-parallel ranks do).
        """
        return _AddPenalty.apply(loss, self.penalty().to(loss.dtype), self)

    def attach(self, output: Tensor, gate: Tensor, copies: int) -> Tensor:
        """`output`, through which the penalty on a layer's mean gate gets its gradient.

        Args:
            copies: ranks whose gradients of this same gate will be summed.
        """
        if not self.gate_weight or not gate.requires_grad:
            return output
        return _SendBack.apply(output, (gate - self.gate_target).square(), self, copies)


class _AddPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, penalty: Tensor, call: MemoryCall) -> Tensor:
        ctx.call = call
        return loss + penalty

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.call._cotangent = gradient  # before any layer's backward: the loss depends on them
        return gradient, None, None


class _SendBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, excess: Tensor, call: MemoryCall, copies: int) -> Tensor:
        ctx.call, ctx.copies = call, copies
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        call, excess = ctx.call, None
        if call._cotangent is not None:
            excess = call._cotangent * (call.gate_weight / len(call.results) / ctx.copies)
        return gradient, excess, None, None
