"""One token: read the state, then write it, in place, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import on_device, power_of_two
from .triton_forward import gates_of, load_rows, store_rows, vector


@triton.jit(do_not_specialize=["N"])
def step_kernel(
    q,  # [B, N, R]
    k,
    v,
    beta,
    keep,  # or unused
    erase,  # or unused
    write_mask,  # uint8 [B] or unused
    state,  # [B, N, R, R] fp32, in place
    read,  # [B, N, R] fp32 out
    N,
    R: tl.constexpr,
    RP: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ERASE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, RP)
    real = a < R
    at = lane * R + a
    s = load_rows(state, lane, a, R, RP)
    query = vector(q, at, real)
    tl.store(read + at, tl.sum(s * query[None, :], 1), mask=real)
    if WRITES:
        key, value = vector(k, at, real), vector(v, at, real)
        kept, erased, write = gates_of(
            beta, keep, erase, write_mask, at, lane // N, real, HAS_KEEP, HAS_ERASE, HAS_MASK
        )
        change = write * value - erased * tl.sum(s * key[None, :], 1)
        store_rows(state, lane, a, kept[:, None] * s + change[:, None] * key[None, :], R, RP)


def triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    keep: Tensor | None,
    erase: Tensor | None,
    state: Tensor,
    write: bool | Tensor,
) -> Tensor:
    """Arguments as `delta_mem_step`, checked; read [B, N, r] fp32."""
    B, N, r = v.shape
    mask = write.contiguous().view(torch.uint8) if isinstance(write, Tensor) else None
    optional = (keep, erase, mask)
    inputs = [x.contiguous() for x in (q, k, v, beta)]
    unused = inputs[3]
    with on_device(v):
        read = torch.empty(B, N, r, dtype=torch.float32, device=v.device)
        step_kernel[(B * N,)](
            *inputs, *(unused if x is None else x.contiguous() for x in optional), state, read, N,
            R=r, RP=power_of_two(r, 8), HAS_KEEP=keep is not None, HAS_ERASE=erase is not None,
            HAS_MASK=mask is not None, WRITES=write is not False, num_warps=1 if r <= 32 else 4,
        )  # fmt: skip
    return read
