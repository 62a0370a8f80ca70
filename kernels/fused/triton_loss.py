"""Kernels of the cross entropy over logits of any width: a program owns one token; fp32 between a load and a store."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def loss_forward_kernel(
    logits,  # [N, V]
    labels,  # int64 [N], numbers in the whole vocabulary
    largest,  # fp32 [N] out
    sums,  # fp32 [2, N] out: of exp(logits - largest), and the label's logit where it is among these, else 0
    N, V,
    first,  # number of the first logit in the whole vocabulary
    BV: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    m, total = -float("inf"), 0.0
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_x = tl.load(logits + i_n * V + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(b_x, 0))
        total = total * tl.exp(m - m_new) + tl.sum(tl.exp(b_x - m_new), 0)
        m = m_new
    label = tl.load(labels + i_n) - first
    there = (label >= 0) & (label < V)
    tl.store(largest + i_n, m)
    tl.store(sums + i_n, total)
    tl.store(sums + N + i_n, tl.load(logits + i_n * V + label, mask=there, other=0.0).to(tl.float32))


@triton.jit
def loss_backward_kernel(
    logits,  # [N, V], replaced by their gradient
    labels,  # int64 [N]
    largest,  # fp32 [N], in the whole vocabulary
    logsum,  # fp32 [N]: log of the sum over it of exp(logits - largest)
    dloss,  # fp32 [N]
    V, first,
    BV: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    label, b_d = tl.load(labels + i_n) - first, tl.load(dloss + i_n)
    b_max, b_logsum = tl.load(largest + i_n), tl.load(logsum + i_n)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        p_x = logits + i_n * V + o_v
        b_x = tl.load(p_x, mask=o_v < V, other=0.0).to(tl.float32)
        b_x = (tl.exp(b_x - b_max - b_logsum) - tl.where(o_v == label, 1.0, 0.0)) * b_d
        tl.store(p_x, b_x.to(logits.dtype.element_ty), mask=o_v < V)
