"""The `triton` backend behind `delta_mem_scan`: how a problem is cut and launched, and its autograd function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.launch import ceil_div, on_device, power_of_two
from .triton_backward import adjoint_kernel, gradient_kernel, reverse_scan_kernel
from .triton_forward import maps_kernel, replay_kernel, scan_kernel

# padded rank: tokens a chunk; rows a program and warps of the kernels that hold M; rows and warps of those that hold
# the state; warps of the gradient kernel, which holds all rows. Tiles of 4096 numbers are 32 registers a thread.
LAUNCH = {
    8: (64, (8, 1), (8, 1), 1),
    16: (64, (16, 4), (16, 1), 1),
    32: (128, (4, 4), (32, 1), 2),
    64: (256, (1, 4), (16, 1), 4),
}
MAPS_LIMIT = 256 * 2**20  # bytes of chunk maps, which are in memory at once: longer chunks where they would need more
HISTORY_LIMIT = 256 * 2**20  # bytes of states that backward holds at once


@dataclass(frozen=True)
class ScanPlan:
    """How one problem is cut: `chunks` chunks of `chunk` tokens for each of `lanes` states."""

    batch: int
    length: int
    states: int
    rank: int
    chunk: int

    @property
    def lanes(self) -> int:
        return self.batch * self.states

    @property
    def chunks(self) -> int:
        return ceil_div(self.length, self.chunk)

    @property
    def padded(self) -> int:
        return power_of_two(self.rank, 8)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.states, self.chunks

    def rows(self, of_maps: bool) -> tuple[int, dict[str, int]]:
        """Programs over the rows of a state, and the arguments of a launch."""
        _, maps, states, _ = LAUNCH[self.padded]
        rows, warps = maps if of_maps else states
        return ceil_div(self.rank, rows), {"R": self.rank, "RP": self.padded, "RB": rows, "num_warps": warps}


def make_plan(batch: int, length: int, states: int, rank: int, chunk_size: int | None) -> ScanPlan:
    """The plan of a problem; a function of its shape alone, so that two runs add in one order."""
    chunk = chunk_size or LAUNCH[power_of_two(rank, 8)][0]
    while chunk_size is None and 4 * batch * states * ceil_div(length, chunk) * rank**3 > MAPS_LIMIT and chunk < length:
        chunk *= 2
    return ScanPlan(batch, length, states, rank, chunk)


def triton_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    reset: Tensor | None,
    write_mask: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_mem_scan`, checked; reads [B, T, N, r] and the final state [B, N, r, r], fp32."""
    B, T, N, r = v.shape
    plan = make_plan(B, T, N, r, chunk_size)
    flags = [None if x is None else x.contiguous().view(torch.uint8) for x in (reset, write_mask)]
    with on_device(v):
        return TritonScan.apply(q, k, v, beta, keep, erase, state, *flags, plan)


class _Problem:
    """Inputs made contiguous, and what of them is there."""

    def __init__(self, plan: ScanPlan, inputs: tuple[Tensor | None, ...], flags: tuple[Tensor | None, ...]) -> None:
        self.plan = plan
        self.device = next(x.device for x in inputs if x is not None)
        self.q, self.k, self.v, self.beta, *optional = (None if x is None else x.contiguous() for x in inputs)
        self.gates = [x if x is not None else self.beta for x in (*optional, *flags)]  # any pointer where there is none
        names = ("HAS_KEEP", "HAS_ERASE", "HAS_RESET", "HAS_MASK")
        self.has = {name: x is not None for name, x in zip(names, (*optional, *flags), strict=True)}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def maps(self) -> tuple[Tensor, Tensor]:
        """M [lanes, chunks - 1, r, r, r] and c [lanes, chunks - 1, r, r] of all chunks but the last."""
        plan, r = self.plan, self.plan.rank
        maps, local = (self.empty(plan.lanes, plan.chunks - 1, *(r,) * n) for n in (3, 2))
        programs, sizes = plan.rows(of_maps=True)
        maps_kernel[(plan.lanes * (plan.chunks - 1), programs)](
            self.k, self.v, self.beta, *self.gates, maps, local, *plan.sizes, BT=plan.chunk, **sizes, **self.has
        )
        return maps, local


class TritonScan(torch.autograd.Function):
    """(reads, final state); saves the inputs and the states at the chunks' starts, recomputes the rest."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, keep: Tensor | None, erase: Tensor | None,
        state: Tensor, reset: Tensor | None, write_mask: Tensor | None, plan: ScanPlan,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        problem = _Problem(plan, (q, k, v, beta, keep, erase), (reset, write_mask))
        r = plan.rank
        starts = state.detach().contiguous()
        if plan.chunks > 1:
            maps, local = problem.maps()
            starts = problem.empty(plan.lanes, plan.chunks, r, r)
            programs, sizes = plan.rows(of_maps=True)
            scan_kernel[(plan.lanes, programs)](maps, local, state.contiguous(), starts, plan.chunks, **sizes)
        reads, final = problem.empty(*q.shape), torch.empty_like(state, memory_format=torch.contiguous_format)
        programs, sizes = plan.rows(of_maps=False)
        replay_kernel[(plan.lanes * plan.chunks, programs)](
            problem.q, problem.k, problem.v, problem.beta, *problem.gates, starts, reads, final, *plan.sizes,
            BT=plan.chunk, **sizes, **problem.has,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, beta, keep, erase, reset, write_mask, starts)
        ctx.plan = plan
        return reads, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dreads: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, reset, write_mask, starts = ctx.saved_tensors
        problem = _Problem(ctx.plan, tuple(inputs), (reset, write_mask))
        with on_device(dreads):
            ends = _ends(problem, dreads.contiguous(), dfinal.contiguous())
            grads, dstate = _gradients(problem, dreads.contiguous(), starts, ends, tuple(inputs))
        return *grads, dstate, None, None, None


def _ends(problem: _Problem, dreads: Tensor, dfinal: Tensor) -> Tensor:
    """The gradient of the state after each chunk, fp32 [lanes, chunks, r, r]."""
    plan, r = problem.plan, problem.plan.rank
    if plan.chunks == 1:
        return dfinal
    local = problem.empty(plan.lanes, plan.chunks - 1, r, r)
    programs, sizes = plan.rows(of_maps=False)
    adjoint_kernel[(plan.lanes * (plan.chunks - 1), programs)](
        problem.q, problem.k, problem.beta, *problem.gates, dreads, dfinal, local, *plan.sizes,
        BT=plan.chunk, **sizes, **problem.has,
    )  # fmt: skip
    ends = problem.empty(plan.lanes, plan.chunks, r, r)
    ends[:, -1] = dfinal.view(plan.lanes, r, r)
    maps, _ = problem.maps()  # again, for they are r times the states
    programs, sizes = plan.rows(of_maps=True)
    reverse_scan_kernel[(plan.lanes, programs)](maps, local, ends, plan.chunks, **sizes)
    return ends


def _gradients(
    problem: _Problem, dreads: Tensor, starts: Tensor, ends: Tensor, inputs: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of q, k, v, beta, keep, erase (None where there is no input), and of the initial state."""
    plan, r = problem.plan, problem.plan.rank
    grads = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
    out = [problem.beta if x is None else x for x in grads]
    dstate = problem.empty(plan.batch, plan.states, r, r)
    every = plan.lanes * plan.chunks
    window = max(1, min(every, HISTORY_LIMIT // (4 * min(plan.chunk, plan.length) * r * r)))
    history = problem.empty(window, plan.chunk, r, r)
    for first in range(0, every, window):
        gradient_kernel[(min(window, every - first),)](
            problem.q, problem.k, problem.v, problem.beta, *problem.gates, dreads, starts, ends, history, *out, dstate,
            first, *plan.sizes, BT=plan.chunk, R=r, RP=plan.padded, **problem.has, num_warps=LAUNCH[plan.padded][3],
        )  # fmt: skip
    return grads, dstate
