"""`sum_rows`: the sums that the programs of a backward pass leave for small parameters, added up in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import ceil_div, on_device

ROWS, COLUMNS = 256, 8  # of a tile


@triton.jit
def add_rows(x, out, first, rows, columns, stride, BR: tl.constexpr, BC: tl.constexpr):
    o_r, o_c = tl.arange(0, BR), first + tl.arange(0, BC)
    b_sum = tl.zeros([BR, BC], tl.float32)
    for i_r in range(0, rows, BR):
        m = (i_r + o_r < rows)[:, None] & (o_c < columns)[None, :]
        b_sum += tl.load(x + (i_r + o_r).to(tl.int64)[:, None] * stride + o_c[None, :], mask=m, other=0.0)
    tl.store(out + o_c, tl.sum(b_sum, 0).to(out.dtype.element_ty), mask=o_c < columns)


@triton.jit(do_not_specialize=["x_rows", "y_rows"])
def sum_rows_kernel(
    x, y,  # fp32 [rows, columns], rows `stride` apart
    x_out, y_out,  # [columns] out
    x_rows, y_rows, x_columns, y_columns, x_stride, y_stride,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    programs = (x_columns + BC - 1) // BC
    i = tl.program_id(0)
    if i < programs:
        add_rows(x, x_out, i * BC, x_rows, x_columns, x_stride, BR, BC)
    else:
        add_rows(y, y_out, (i - programs) * BC, y_rows, y_columns, y_stride, BR, BC)


def sum_rows(x: Tensor, x_dtype: torch.dtype, y: Tensor, y_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums over the rows of x and y, fp32 [rows, columns], as [columns] in these dtypes; the same bits in every run."""
    outs = [torch.empty(z.shape[1], dtype=dtype, device=z.device) for z, dtype in ((x, x_dtype), (y, y_dtype))]
    grid = sum(ceil_div(z.shape[1], COLUMNS) for z in (x, y))
    with on_device(x):
        sum_rows_kernel[(grid,)](
            x, y, *outs, x.shape[0], y.shape[0], x.shape[1], y.shape[1], x.stride(0), y.stride(0), BR=ROWS, BC=COLUMNS,
            num_warps=4,
        )  # fmt: skip
    return outs[0], outs[1]
