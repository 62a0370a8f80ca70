"""What is timed: DLA, and beside it PyTorch's attention and fla's linear ones, on the same inputs."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dla import dla_attention
from .account import Work, dla_work, softmax_work
from .inputs import TAU, Inputs, Problem

Prepared = tuple[Callable[[], Tensor], list[Tensor]]  # the call, and the tensors that get a gradient


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        prepare: makes the call from the inputs; layouts that a model would have anyway are made outside the clock.
        backbones: where the method is an equal: its decay and writes are those of the backbone.
        work: the least operations and bytes, or None if they are not known.
    """

    name: str
    prepare: Callable[[Inputs, Problem], Prepared]
    backbones: tuple[str, ...]
    work: Callable[[Problem, float, int], Work] | None = None
    per_capacity: bool = False


def _dla(backend: str) -> Callable[[Inputs, Problem], Prepared]:
    def prepare(x: Inputs, p: Problem) -> Prepared:
        def call() -> Tensor:
            return dla_attention(*x.arguments(), tau=TAU, capacity=p.capacity, backend=backend)[0]

        return call, x.leaves()

    return prepare


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x.expand(-1, -1, heads, -1).transpose(1, 2).contiguous().detach().requires_grad_(x.requires_grad)


def _sdpa(x: Inputs, p: Problem) -> Prepared:
    q, k, v = (_heads_first(t, p.heads) for t in (x.q, x.k, x.v))

    def call() -> Tensor:  # q is already scaled
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)

    return call, [q, k, v]


def _fla(module: str, function: str) -> Callable:
    """An op of fla; raises ImportError with fla's message if it is missing. fla's import notices are not shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(importlib.import_module(module), function)


def _whole(x: Tensor, heads: int) -> Tensor:
    """q or k with a group a head, made before the clock starts (ops without groups need it)."""
    if x.shape[2] == heads:
        return x
    return x.expand(-1, -1, heads, -1).contiguous().detach().requires_grad_(x.requires_grad)


def _fla_gated_delta(x: Inputs, p: Problem) -> Prepared:
    op = _fla("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    beta = x.beta
    assert beta is not None
    return lambda: op(x.q, x.k, x.v, g=x.g, beta=beta, scale=1.0)[0], [x.q, x.k, x.v, x.g, beta]


def _fla_simple_gla(x: Inputs, p: Problem) -> Prepared:
    op = _fla("fla.ops.simple_gla", "chunk_simple_gla")
    q, k = (_whole(t, p.heads) for t in (x.q, x.k))
    return lambda: op(q, k, x.v, g=x.g, scale=1.0)[0], [q, k, x.v, x.g]


def _fla_log_linear(x: Inputs, p: Problem) -> Prepared:
    op = _fla("fla.ops.log_linear_attn", "chunk_log_linear_attn")
    levels = math.ceil(math.log2(max(p.tokens, 2))) + 1  # with fewer, fla drops the oldest chunks in silence
    scales = torch.ones(*x.g.shape, levels, dtype=x.v.dtype, device=x.v.device, requires_grad=x.v.requires_grad)
    return lambda: op(x.q, x.k, x.v, x.g, scales)[0], [x.q, x.k, x.v, x.g, scales]


def methods(backend: str) -> list[Method]:
    """All rows, DLA first; `backend` as in `dla_attention`."""
    both = ("mamba2", "gdn")
    return [
        Method("dla", _dla(backend), both, dla_work, per_capacity=True),
        Method("sdpa", _sdpa, both, lambda p, live, element: softmax_work(p, element)),
        Method("fla gated_delta_rule", _fla_gated_delta, ("gdn",)),
        Method("fla simple_gla", _fla_simple_gla, ("mamba2",)),
        Method("fla log_linear_attn", _fla_log_linear, ("mamba2",)),
    ]


def usable_backend(device: torch.device) -> tuple[str, str]:
    """The backend for `dla_attention` on this device, and what to say about it."""
    if device.type != "cuda":
        return "torch", "torch (chunkwise)"
    x = torch.zeros(1, 64, 1, 32, device=device, dtype=torch.bfloat16)
    g, slot_weights = torch.zeros(1, 64, 1, device=device), torch.ones(1, 64, 1, 4, device=device)
    try:
        dla_attention(x, x, x, g, slot_weights, tau=TAU, capacity=4, backend="triton")
    except (ValueError, ImportError) as error:
        return "torch", f"torch (chunkwise): the Triton kernels cannot be used: {first_line(error)}"
    return "triton", "triton"


def first_line(error: BaseException) -> str:
    """Type and first line of a message, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
