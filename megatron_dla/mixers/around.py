"""What a mixer computes around its recurrence: in torch, or on a GPU in fused kernels. Which one is decided here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_dla.kernels.dla.attention import kernels_missing
from megatron_dla.mixers import functional
from megatron_dla.mixers.recurrence import Inputs

if TYPE_CHECKING:
    from megatron_dla.config import ModelSection

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Parameters:
    """A mixer's parameters before its recurrence, as this rank has them.

    convolutions: weights [C, W] of value, query and key. biases: theirs [C], all or none. The others are fp32: A_log
    and dt_bias [H], slot_scale and slot_bias [H, K].
    """

    convolutions: list[Tensor]
    biases: list[Tensor | None]
    A_log: Tensor
    dt_bias: Tensor
    slot_scale: Tensor | None = None
    slot_bias: Tensor | None = None


def uses_kernels(x: Tensor, backend: str) -> bool:
    """Whether the fused kernels take x: as `dla_attention` chooses `triton`, but with any head dims.

    They round once where torch rounds after every operation, and have no second derivatives.
    """
    asked = backend == "triton" or (backend == "auto" and x.is_cuda)
    return asked and x.dtype in DTYPES and not kernels_missing()


def kernels(name: str) -> ModuleType:
    """A module of `kernels/fused`, for where `uses_kernels` says so."""
    return importlib.import_module(f"megatron_dla.kernels.fused.{name}")  # needs triton


class Sections(dict[str, Tensor]):
    """The parts of a projection by name. `gradient`: where the fused passes put theirs side by side; None in torch."""

    gradient: Any = None  # a fused.packed.PackedGradient

    def gradient_of(self, names: Iterable[str]) -> Any:
        """`gradient`, where all of these are parts of the projection."""
        return self.gradient if self.gradient is not None and self.gradient.sizes.keys() >= set(names) else None


def sections(x: Tensor, sizes: dict[str, int], backend: str) -> Sections:
    """The parts of a projection x [B, T, columns], each [B, T, size]."""
    if not uses_kernels(x, backend):
        return Sections(zip(sizes, x.split(list(sizes.values()), -1), strict=True))
    packed = kernels("packed")
    gradient = packed.PackedGradient(sizes)
    found = Sections(zip(sizes, packed.split(x, gradient), strict=True))
    found.gradient = gradient
    return found


def recurrence_inputs(
    part: dict[str, Tensor],
    p: Parameters,
    m: ModelSection,
    starts: Tensor | None,
    halo: int,
    backend: str,
    *,
    delta: bool,
) -> tuple[Inputs, Tensor | None]:
    """Convolutions, gates and slot weights; those of a plain backbone, whose projections have no `slot`, are 1.

    Args:
        part: the projections `value`, `query`, `key` [B, halo + T, C], `step`, `strength` (Gated DeltaNet) and `slot`
            [B, T, C] of this rank's heads and groups.
        starts: bool [B, halo + T], True where a document begins; None: a row is one document.
        halo: tokens before the first, which only the convolutions see.
        delta: Gated DeltaNet, else Mamba-2.

    Returns:
        the recurrence's inputs, and on the Mamba-2 backbone the values [B, T, H, Dv] of the skip, else None.
    """
    if "slot" not in part or not uses_kernels(part["value"], backend):
        return _in_torch(part, p, m, starts, halo, delta)
    assert p.slot_scale is not None
    fused = kernels("inputs")
    heads, groups = p.A_log.shape[0], part["query"].shape[-1] // m.key_dim
    shape = fused.Shape(
        heads, groups, m.value_dim, m.key_dim, p.slot_scale.shape[1], p.convolutions[0].shape[1], halo=halo, gdn=delta
    )
    gates = [p.A_log, p.dt_bias, p.slot_scale, p.slot_bias]
    gradient = part.gradient_of(part) if isinstance(part, Sections) else None
    *inputs, last = fused.recurrence_inputs(part, p.convolutions, p.biases, gates, shape, starts, gradient)
    q, k, v, g, weights = inputs
    return (Inputs(q, k, v, g, weights, last), None) if delta else (Inputs(q, k, v, g, weights, None), last)


def _in_torch(
    part: dict[str, Tensor], p: Parameters, m: ModelSection, starts: Tensor | None, halo: int, delta: bool
) -> tuple[Inputs, Tensor | None]:
    document = None if starts is None else starts.cumsum(1)
    convolved = zip(("value", "query", "key"), p.convolutions, p.biases, strict=True)
    xs = [functional.short_convolution(part[name], w, document, bias=b)[:, halo:] for name, w, b in convolved]
    value, query, key = (x.unflatten(-1, (-1, n)) for x, n in zip(xs, (m.value_dim, *2 * [m.key_dim]), strict=True))
    if p.slot_scale is None or p.slot_bias is None:
        weights = torch.ones(*value.shape[:3], 1, dtype=p.A_log.dtype, device=value.device)
    else:
        weights = functional.slot_weights(part["slot"].unflatten(-1, p.slot_scale.shape), p.slot_scale, p.slot_bias)
    if delta:
        query, key, g, beta = functional.gdn_inputs(query, key, part["step"], part["strength"], p.A_log, p.dt_bias)
        return Inputs(query, key, value, g, weights, beta), None
    write, g = functional.mamba2_inputs(value, part["step"], p.A_log, p.dt_bias)
    return Inputs(query, key, write, g, weights, None), value


def with_skip(out: Tensor, value: Tensor | None, D: Tensor | None) -> Tensor:
    """out + D * value, [B, T, H, Dv]; D [H]. Without a value: out."""
    return out if value is None or D is None else out + D[:, None].to(value.dtype) * value


def gated_head_norm(
    out: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    backend: str,
    *,
    gate_first: bool,
    value: Tensor | None = None,
    D: Tensor | None = None,
    gradient: Any = None,
) -> Tensor:
    """`functional.gated_head_norm` of `with_skip(out, value, D)`; `gradient`: of `Sections` with the gate."""
    if uses_kernels(out, backend):
        norm = kernels("norm").gated_norm
        return norm(out, gate, weight, eps, gate_first=gate_first, skip=value, D=D, gradient=gradient)
    return functional.gated_head_norm(with_skip(out, value, D), gate, weight, eps, gate_first=gate_first)
