"""Sums over the heads that share a query and a key."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import ceil_div, power_of_two

ELEMENTS = 2048  # of a program's result


@triton.jit
def add_one(x, x_sum, o_t, i_g, T, G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    m = (o_t < T)[:, None] & (o_d < D)[None, :]
    o_x = o_t.to(tl.int64)[:, None] * G + i_g
    b_sum = tl.zeros([o_t.shape[0], BD], tl.float32)
    for i in range(N):
        b_sum += tl.load(x + (o_x * N + i) * D + o_d[None, :], mask=m, other=0.0)
    tl.store(x_sum + o_x * D + o_d[None, :], b_sum.to(x_sum.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def add_heads_kernel(
    x, y,  # fp32 [T, G, NX, D], [T, G, NY, D]
    x_sum, y_sum,  # [T, G, D] out
    T,
    G: tl.constexpr, D: tl.constexpr, NX: tl.constexpr, NY: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One of the two, as the last axis of the grid says, in the order of heads."""
    o_t, i_g = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1)
    if tl.program_id(2) == 0:
        add_one(x, x_sum, o_t, i_g, T, G, D, NX, BD)
    else:
        add_one(y, y_sum, o_t, i_g, T, G, D, NY, BD)


def add_heads(parts: list[tuple[Tensor, Tensor]]) -> None:
    """Each `out` [T, G, D] of one or two pairs (x, out) from x fp32 [T, heads, D], G dividing heads: one launch."""
    (x, x_sum), (y, y_sum) = parts[0], parts[-1]
    T, G, D = x_sum.shape
    columns = power_of_two(D)
    block = max(ELEMENTS // columns, 1)
    add_heads_kernel[(ceil_div(T, block), G, len(parts))](
        x, y, x_sum, y_sum, T, G=G, D=D, NX=x.shape[1] // G, NY=y.shape[1] // G, BT=block, BD=columns, num_warps=4
    )
