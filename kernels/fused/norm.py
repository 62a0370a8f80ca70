"""`gated_norm`: RMSNorm over each head's channels with its output gate and Mamba-2's skip, as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.launch import ceil_div, on_device, power_of_two
from .packed import PackedGradient
from .sums import sum_rows
from .triton_norm import norm_backward_kernel, norm_forward_kernel

TILE = 4096  # elements of a forward tile
BACKWARD_TILE = 2048
TILES = 8  # a program of the backward pass


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, gate_first: bool, gradient: PackedGradient | None, out: Tensor, gate: Tensor,
        weight: Tensor, skip: Tensor | None, D: Tensor | None,
    ):  # fmt: skip
        B, T, H, DV = out.shape
        out, weight = out.contiguous(), weight.contiguous()
        if gate.stride(-1) != 1 or gate.stride(-2) != DV:
            gate = gate.contiguous()
        skip = None if skip is None else skip.contiguous()
        ctx.eps, ctx.gate_first, ctx.gradient = eps, gate_first, gradient
        ctx.save_for_backward(out, gate, weight, skip, D)
        y, (block, columns) = torch.empty_like(out), _block(DV, TILE)
        with on_device(out):
            norm_forward_kernel[(H, ceil_div(T, block), B)](
                out, out if skip is None else skip, out if D is None else D, gate, weight, y, T, *gate.stride()[:2],
                eps, H, DV, HAS_SKIP=skip is not None, GATE_FIRST=gate_first, BT=block, BV=columns, num_warps=4,
            )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # type: ignore[override]
        out, gate, weight, skip, D = ctx.saved_tensors
        B, T, H, DV = out.shape
        dy, dx = dy.contiguous(), torch.empty_like(out)
        if ctx.gradient is None:
            dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        else:
            dgate = ctx.gradient.part("gate", gate).unflatten(-1, (H, DV))
        dskip = None if skip is None else torch.empty_like(skip)
        block, columns = _block(DV, BACKWARD_TILE)
        programs = ceil_div(T, TILES * block)
        dweight = torch.empty(B * programs, H, DV, dtype=torch.float32, device=out.device)
        dD = None if D is None else torch.empty(B * programs, H, dtype=torch.float32, device=out.device)
        with on_device(out):
            norm_backward_kernel[(H, programs, B)](
                out, out if skip is None else skip, out if D is None else D, gate, weight, dy, dx,
                dx if dskip is None else dskip, dgate, dweight, dweight if dD is None else dD, T, *gate.stride()[:2],
                *dgate.stride()[:2], ctx.eps, H, DV, HAS_SKIP=skip is not None, GATE_FIRST=ctx.gate_first, TILES=TILES,
                BT=block, BV=columns, num_warps=4,
            )  # fmt: skip
        rows = dweight.view(-1, DV)
        if dD is None:
            return None, None, None, dx, dgate, sum_rows(rows, weight.dtype, rows[:, :0], weight.dtype)[0], dskip, None
        dweight, dD = sum_rows(rows, weight.dtype, dD, D.dtype)
        return None, None, None, dx, dgate, dweight.view_as(weight), dskip, dD.view_as(D)


def _block(value_dim: int, elements: int) -> tuple[int, int]:
    columns = power_of_two(value_dim)
    return max(elements // columns, 4), columns


def gated_norm(
    out: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gate_first: bool,
    skip: Tensor | None = None,
    D: Tensor | None = None,
    gradient: PackedGradient | None = None,
) -> Tensor:
    """`mixers.functional.gated_head_norm` of out + D * skip, in fp32 between its inputs and its result.

    Args:
        out, gate, skip: [B, T, H, Dv] in one dtype (bf16, fp16 or fp32). weight: [Dv], shared by the heads.
        D: fp32 [H], with `skip`. gradient: of the projection whose part `gate` is.

    Returns:
        [B, T, H, Dv]. A gradient that autograd would take of a gradient is refused.
    """
    return _GatedNorm.apply(eps, gate_first, gradient, out, gate, weight, skip, D)
