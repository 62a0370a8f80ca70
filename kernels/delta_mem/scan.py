"""The public entry point, `delta_mem_scan`: argument checks and the choice of a backend."""

from __future__ import annotations

from functools import cache as once

import torch
from torch import Tensor

from .chunk import chunk_scan
from .naive import naive_scan

BACKENDS = ("auto", "naive", "torch", "triton")
MAX_RANK = 64  # of the Triton kernels


@once
def _triton_missing() -> str:
    """Why the Triton kernels cannot be imported ('' if they can)."""
    try:
        from . import triton_scan  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def _choose(backend: str, v: Tensor) -> str:
    """Resolve `auto`. Raises ValueError if `triton` is requested and not available."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in ("auto", "triton") or (backend == "auto" and not v.is_cuda):
        return "torch" if backend == "auto" else backend
    if v.dtype == torch.float64:
        reason = "dtype torch.float64 (use bf16, fp16 or fp32)"
    elif v.shape[-1] > MAX_RANK:
        reason = f"rank {v.shape[-1]} (at most {MAX_RANK})"
    else:
        reason = _triton_missing()
    if reason and backend == "triton":
        raise ValueError(f"backend='triton' cannot be used here: {reason}; use backend='torch'")
    return "torch" if reason else "triton"


def _check_rows(shape: tuple[int, ...], names: str, **rows: Tensor | None) -> None:
    for name, x in rows.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {names} = {list(shape)} as v, got {list(x.shape)}")
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must hold floating-point numbers, got {x.dtype}")


def _check_state(state: Tensor | None, name: str, batch: int, states: int, rank: int) -> None:
    if state is not None and tuple(state.shape) != (batch, states, rank, rank):
        raise ValueError(f"{name} must be [B, N, r, r] = {[batch, states, rank, rank]}, got {list(state.shape)}")


def _check_flags(flags: Tensor | None, name: str, axes: str, shape: tuple[int, ...]) -> None:
    if flags is not None and (tuple(flags.shape) != shape or flags.dtype != torch.bool):
        raise ValueError(f"{name} must be bool {axes} = {list(shape)}, got {flags.dtype} {list(flags.shape)}")


def delta_mem_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    keep: Tensor | None = None,
    erase: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    write_mask: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Read, then write, an online r x r memory along a sequence (arXiv 2605.12357, eqs 6, 10-12).

        read_t = S_{t-1} q_t
        S_t    = Diag(keep_t) S_{t-1} + (beta_t * v_t - erase_t * (S_{t-1} k_t)) k_t^T

    Args:
        q, k: [B, T, N, r], N independent states of rank r; tanh and L2 norm are already applied (|k| <= 1 keeps the
            recurrence stable). v: [B, T, N, r].
        beta: [B, T, N, r] in [0, 1], write strength of each state row (value dimension).
        keep, erase: [B, T, N, r], None = 1 - beta and beta, the coupled form. Others: `keep=lam` (uncoupled),
            `keep=lam, erase=lam * beta` (decay outside), `keep=ones` (no decay).
        initial_state: [B, N, r, r], rows = value dims, columns = key dims; None = zeros. It is not changed.
        reset: bool [B, T], True where the state is emptied before the token reads.
        write_mask: bool [B, T], False where a token reads but leaves the state as it is. A padding token needs
            nothing else, but its read is not zeroed: the caller does that.
        backend: `naive` (the recurrence), `torch` (chunkwise), `triton` (GPU kernels; on a CPU only under Triton's
            interpreter), `auto` (`triton` on a GPU where it takes the inputs, else `torch`).
        chunk_size: tokens a chunk of `torch` and `triton`: speed, memory and rounding, not the result. None chooses.

    Returns:
        reads [B, T, N, r] and the final state [B, N, r, r], both fp32 (float64 where v is), whatever the inputs'
        dtype: it is also what everything is computed in. Gradients reach q, k, v, beta, keep, erase and
        initial_state, from both results.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if v.ndim != 4:
        raise ValueError(f"v must be [B, T, N, r], got {list(v.shape)}")
    B, T, N, r = v.shape
    if min(v.shape) < 1:
        raise ValueError(f"B, T, N and r must be at least 1, got v of shape {list(v.shape)}")
    _check_rows((B, T, N, r), "[B, T, N, r]", q=q, k=k, v=v, beta=beta, keep=keep, erase=erase)
    _check_state(initial_state, "initial_state", B, N, r)
    _check_flags(reset, "reset", "[B, T]", (B, T))
    _check_flags(write_mask, "write_mask", "[B, T]", (B, T))
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    backend = _choose(backend, v)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    state = v.new_zeros(B, N, r, r, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if backend == "triton":  # reads any dtype as it is
        from .triton_scan import triton_scan

        return triton_scan(q, k, v, beta, keep, erase, state, reset, write_mask, chunk_size)
    with torch.autocast(v.device.type, enabled=False):  # the memory is never computed in less than fp32
        q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
        keep, erase = (None if x is None else x.to(dtype) for x in (keep, erase))
        if backend == "naive":
            return naive_scan(q, k, v, beta, keep, erase, state, reset, write_mask)
        return chunk_scan(q, k, v, beta, keep, erase, state, reset, write_mask, chunk_size)
