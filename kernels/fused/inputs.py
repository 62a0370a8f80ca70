"""`recurrence_inputs`: the fused passes from a mixer's projections to its recurrence, as one autograd function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.launch import ceil_div, on_device, power_of_two
from .packed import PackedGradient
from .sums import sum_rows
from .triton_inputs import convolution_backward_kernel, inputs_backward_kernel, inputs_forward_kernel

TILE = 4096  # elements of a forward tile
BACKWARD_TILE = 2048  # of the backward pass
SPAN = 256  # tokens a program of the backward pass
VALUE_COLUMNS = 128  # of a program, where a head's values need not be in one
SLOT_COLUMNS = 32
COLUMNS = 128  # of a program of the convolutions' backward pass


@dataclass(frozen=True)
class Shape:
    """Sizes of one mixer's local part: H heads of DV, G query/key groups of DK, K slots, W taps.

    halo: tokens before the first, whose values, queries and keys are inputs of the convolutions only.
    """

    heads: int
    groups: int
    value_dim: int
    key_dim: int
    capacity: int
    width: int
    halo: int = 0
    gdn: bool = False

    @property
    def columns(self) -> tuple[int, ...]:
        """Of value, query, key, step, strength (Gated DeltaNet) and slot."""
        keys, heads = self.groups * self.key_dim, self.heads
        return heads * self.value_dim, keys, keys, heads, heads * self.gdn, heads * self.capacity

    def parameters(self, biased: bool) -> list[int]:
        """Sizes of the sums of one program, in the order of `partial`."""
        channels = list(self.columns[:3])
        gates = [self.heads] * 2 + [self.heads * self.capacity] * 2
        return gates + [n * self.width for n in channels] + (channels if biased else [])

    @property
    def blocks(self) -> dict[str, int]:
        """Columns of a program: of values, of keys or queries, of slot weights."""
        bv = power_of_two(self.value_dim)
        if self.gdn:  # else a head's values are one program's, which sums the gradient of dt
            bv = min(bv, VALUE_COLUMNS)
        return {"BV": bv, "BK": power_of_two(self.key_dim), "BS": SLOT_COLUMNS}

    @property
    def units(self) -> int:
        values = self.heads * ceil_div(self.value_dim, self.blocks["BV"])
        return values + 2 * self.groups + ceil_div(self.heads * self.capacity, SLOT_COLUMNS)

    def constants(self) -> dict[str, int]:
        return {
            "H": self.heads, "G": self.groups, "DV": self.value_dim, "DK": self.key_dim, "K": self.capacity,
            "GDN": self.gdn,
        }  # fmt: skip


def _strides(xs: list[Tensor]) -> list[int]:
    return [n for x in xs for n in x.stride()[:2]]


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _RecurrenceInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shape: Shape,
        starts: Tensor | None,
        names: list[str],
        gradient: PackedGradient | None,
        *tensors: Tensor,
    ):
        sections = len(names)
        xs, parameters = [_dense_rows(x) for x in tensors[:sections]], [x.contiguous() for x in tensors[sections:]]
        ctx.shape, ctx.starts, ctx.names, ctx.gradient = shape, starts, names, gradient
        ctx.save_for_backward(*xs, *parameters)
        arguments = _arguments(shape, xs, parameters, starts)
        value = arguments[0]
        B, T, H = value.shape[0], value.shape[1], shape.heads

        def new(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(B, T, *sizes, dtype=dtype, device=value.device)

        low = value.dtype
        write = new(H, shape.value_dim, dtype=low)
        out = write if shape.gdn else torch.empty_like(write)
        query, key = (new(shape.groups, shape.key_dim, dtype=low) for _ in range(2))
        g, weights = new(H), new(H, shape.capacity)
        beta = new(H) if shape.gdn else g
        block = max(TILE // max(shape.blocks.values()), 4)
        grid = shape.units, ceil_div(T, block), B
        with on_device(value):
            inputs_forward_kernel[grid](
                *arguments, out, write, query, key, g, beta, weights, T, *_strides(arguments[:6]), _scale(shape),
                **shape.constants(), W=shape.width, HALO=shape.halo, HAS_STARTS=starts is not None,
                HAS_BIAS=len(parameters) > 7, **shape.blocks, BT=block, num_warps=4,
            )  # fmt: skip
        return (query, key, write, g, weights, beta) if shape.gdn else (query, key, write, g, weights, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        shape, starts, saved = ctx.shape, ctx.starts, ctx.saved_tensors
        xs, parameters = list(saved[: len(ctx.names)]), list(saved[len(ctx.names) :])
        arguments = _arguments(shape, xs, parameters, starts)
        value, biased = arguments[0], len(parameters) > 7
        B, T, halo = value.shape[0], value.shape[1], shape.halo
        wanted = [(shape.groups, shape.key_dim)] * 2 + [(shape.heads, shape.value_dim), (shape.heads,)]
        wanted += [(shape.heads, shape.capacity)]
        dense = [
            torch.zeros(B, T, *sizes, dtype=value.dtype, device=value.device) if x is None else x.contiguous()
            for x, sizes in zip(gradients, wanted, strict=False)
        ]
        d_query, d_key, d_write, d_g, d_weights = dense
        last = gradients[5]
        has_out = shape.gdn or last is not None
        if shape.gdn and last is None:
            last = torch.zeros_like(d_g)
        last = d_g if last is None else last.contiguous()
        if ctx.gradient is None:
            sizes = [x.shape[-1] for x in xs]
            packed = torch.empty(halo + T, B, sum(sizes), dtype=value.dtype, device=value.device).transpose(0, 1)
            dxs = list(packed.split(sizes, -1))
        else:
            dxs = [ctx.gradient.part(name, value) for name in ctx.names]
        dxs[3:] = [x[:, halo:] for x in dxs[3:]]
        inner = [x[:, halo:] for x in dxs[:3]]
        channels = sum(shape.columns[:3])
        dpre = torch.empty(B, T, channels, dtype=value.dtype, device=value.device)
        sizes, programs = shape.parameters(biased), ceil_div(T, SPAN)
        partial = torch.empty(B * programs, sum(sizes), dtype=torch.float32, device=value.device)
        # rows that do not begin at a multiple of 16 elements are read element by element, with an address for each
        aligned = all(n % 16 == 0 for n in _strides([*arguments[:3], dxs[0]]))
        elements = BACKWARD_TILE if aligned and value.dtype.itemsize == 2 else BACKWARD_TILE // 2
        tokens = {name.replace("B", "T"): min(max(elements // n, 4), SPAN) for name, n in shape.blocks.items()}
        common = dict(W=shape.width, HALO=halo, HAS_STARTS=starts is not None, num_warps=4)
        block, units = TILE // COLUMNS, sum(ceil_div(n, COLUMNS) for n in shape.columns[:3])
        with on_device(value):
            inputs_backward_kernel[(shape.units, programs, B)](
                *arguments, last, d_write, d_query, d_key, d_g, last, d_weights, dpre, dxs[3], dxs[-2], dxs[-1],
                partial, T, *_strides(arguments[:6]), *inner[0].stride()[:2], _scale(shape), HAS_OUT=has_out,
                HAS_BIAS=biased, TOTAL=sum(sizes), SPAN=SPAN,
                maxnreg=255,  # told so, the assembler does not spill to fit more programs on a multiprocessor
                **shape.constants(), **common, **shape.blocks, **tokens,
            )  # fmt: skip
            convolution_backward_kernel[(units, ceil_div(halo + T, block), B)](
                *arguments[6:9], arguments[-1], dpre, *inner, T, *inner[0].stride()[:2], CV=shape.columns[0],
                CK=shape.columns[1], BT=block, BC=COLUMNS, **common,
            )  # fmt: skip
        count = sum(sizes[:4])
        gates, convolutions = sum_rows(partial[:, :count], torch.float32, partial[:, count:], parameters[0].dtype)
        parts = [*gates.split(sizes[:4]), *convolutions.split(sizes[4:])]
        order = [*parts[4:7], *parts[:4], *parts[7:]]
        dparameters = [part.view_as(x).to(x.dtype) for part, x in zip(order, parameters, strict=True)]
        return None, None, None, None, *dxs, *dparameters


def _scale(shape: Shape) -> float:
    return shape.key_dim**-0.5 if shape.gdn else 1.0


def _arguments(shape: Shape, xs: list[Tensor], parameters: list[Tensor], starts: Tensor | None) -> list[Tensor]:
    """Inputs of both kernels in their order; what is not used is some other tensor."""
    value, query, key = (x[:, shape.halo :] for x in xs[:3])
    strength = xs[4] if shape.gdn else xs[3]
    biases = parameters[7:] or parameters[:3]
    flags = value if starts is None else starts.contiguous().view(torch.uint8)
    return [value, query, key, xs[3], strength, xs[-1], *parameters[:3], *biases, *parameters[3:7], flags]


def recurrence_inputs(
    sections: dict[str, Tensor],
    convolutions: list[Tensor],
    biases: list[Tensor | None],
    gates: list[Tensor],
    shape: Shape,
    starts: Tensor | None = None,
    gradient: PackedGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `mixers.functional` computes with `short_convolution`, `slot_weights` and `mamba2_inputs` or `gdn_inputs`.

    All is fp32 between the projections and the results; a gradient that autograd would take of a gradient is refused.

    Args:
        sections: `value` [B, halo + T, H Dv], `query` and `key` [B, halo + T, G Dk], `step` [B, T, H], with Gated
            DeltaNet `strength` [B, T, H], and `slot` [B, T, H K], of one dtype (bf16, fp16 or fp32); any strides.
        convolutions, biases: weights [C, W] of value, query and key, and their biases [C], all or none.
        gates: `A_log`, `dt_bias` [H], `slot_scale`, `slot_bias` [H, K], fp32.
        starts: bool [B, halo + T], True where a document begins; None: a row is one document.
        gradient: of the projection whose parts the sections are; without a halo.

    Returns:
        q, k [B, T, G, Dk], v [B, T, H, Dv] in the dtype of the sections; in fp32 g [B, T, H], slot weights
        [B, T, H, K]; beta fp32 [B, T, H] with Gated DeltaNet, else the values [B, T, H, Dv] that dt has not multiplied.
    """
    names = ["value", "query", "key", "step", *(["strength"] if shape.gdn else []), "slot"]
    given = [x for x in biases if x is not None]
    xs = [sections[name] for name in names]
    return _RecurrenceInputs.apply(shape, starts, names, gradient, *xs, *convolutions, *gates, *given)
