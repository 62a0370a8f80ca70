"""The one table of a DLA mixer's parameters: shape, named sections, tensor-parallel cut, dtype and initial values.

The Megatron module, the Hugging Face module, the name mapping, the counts and the memory estimate are built from it.
Self-contained (torch only): `dla convert to-hf` copies this file beside the modeling file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Init = Callable[[tuple[int, ...], torch.Generator | None], Tensor]

# parameters that stay fp32 in a bf16 model: they sit in exponentials and thresholds
FP32_PARAMETERS = ("A_log", "dt_bias", "D", "slot_scale", "slot_bias", "sharpness", "tau")


def named_generator(seed: int, name: str) -> torch.Generator:
    """The random numbers of one parameter: the same at every layout and in any order of the parameters."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def zeros(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.ones(shape)


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def normal(std: float) -> Init:
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def uniform(low: float, high: float) -> Init:
    return lambda shape, generator: torch.rand(shape, generator=generator) * (high - low) + low


def log_uniform(low: float, high: float) -> Init:
    """Logarithm of a uniform decay rate A (Mamba-2)."""
    draw = uniform(low, high)
    return lambda shape, generator: draw(shape, generator).log()


def inverse_softplus_dt(low: float, high: float) -> Init:
    """softplus^-1 of a log-uniform time step dt (Mamba-2)."""

    def draw(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        span = math.log(high) - math.log(low)
        dt = torch.exp(torch.rand(shape, generator=generator) * span + math.log(low)).clamp(min=1e-4)
        return dt + torch.log(-torch.expm1(-dt))

    return draw


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model.

    Attributes:
        shape: in the whole model, whatever the tensor-parallel size.
        inits: draws the fp32 initial values; one, or one for each section.
        kind, dim: how it is cut over the tensor-parallel ranks, see `megatron_dla.parallel.tags.Tag`.
        sections: (name, rows in the whole model) of a packed projection along axis 0, in order; empty = one section.
    """

    shape: tuple[int, ...]
    inits: tuple[Init, ...]
    kind: Literal["sharded", "replicated", "replicated_sum"] = "sharded"
    dim: int = 0
    sections: tuple[tuple[str, int], ...] = ()

    def local_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        """Shape on one tensor-parallel rank."""
        if self.kind != "sharded":
            return self.shape
        return tuple(n // tensor_parallel if i == self.dim else n for i, n in enumerate(self.shape))


class MixerConfig(Protocol):
    """What the table reads: the model section of a run, or the configuration of an exported model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_groups: int
    key_dim: int
    value_dim: int
    conv_kernel: int
    capacity: int
    levels: int
    tau: float
    init_std: float
    dt_min: float
    dt_max: float
    a_min: float
    a_max: float

    @property
    def backbone(self) -> str: ...
    @property
    def tau_mode(self) -> str: ...
    @property
    def slot_weights(self) -> str: ...
    @property
    def slot_weight_init(self) -> str: ...
    @property
    def conv_bias(self) -> bool: ...
    @property
    def gated_norm(self) -> str: ...


def packed(
    columns: int,
    sections: list[tuple[str, int, Init]],
    kind: Literal["sharded", "replicated_sum"] = "sharded",
) -> ParamSpec:
    """A matrix [rows of all sections, columns]; a section is (name, rows, initial values)."""
    sizes = tuple((section, rows) for section, rows, _ in sections)
    shape = (sum(rows for _, rows in sizes), columns)
    return ParamSpec(shape, tuple(init for *_, init in sections), kind, sections=sizes)


def output_std(m: MixerConfig) -> float:
    """Standard deviation of the initial matrices that write to the residual stream."""
    return m.init_std / math.sqrt(2 * m.num_layers)


def backbone_parameters(
    m: MixerConfig, tensor_parallel: int, *, delta: bool, more: Sequence[tuple[str, int, Init]] = ()
) -> dict[str, ParamSpec]:
    """Name -> parameter of a recurrence with H heads, G query/key groups and convolutions of W taps: Gated DeltaNet
    (`delta`) or Mamba-2. `more`: sections at the end of `in_proj`.

    With fewer groups than tensor-parallel ranks, query and key leave `in_proj` for a replicated `qk_proj`: several
    ranks read one group, each with heads of its own, so gradients are summed over the ranks.
    """
    H, G, W, hidden = m.num_heads, m.num_groups, m.conv_kernel, m.hidden_size
    inner, qk = H * m.value_dim, G * m.key_dim
    shared_groups = G % tensor_parallel != 0
    by_group: Literal["sharded", "replicated_sum"] = "replicated_sum" if shared_groups else "sharded"
    project, convolve = normal(m.init_std), uniform(-(W**-0.5), W**-0.5)

    query_key = [("query", qk, project), ("key", qk, project)]
    sections = [("gate", inner, project), ("value", inner, project)]
    sections += [] if shared_groups else query_key
    # dt and beta before their activations; checkpoints know them by these names
    sections += [("step", H, project)] + ([("strength", H, project)] if delta else [])
    sections += more

    table = {
        "in_proj.weight": packed(hidden, sections),
        "out_proj.weight": ParamSpec((hidden, inner), (normal(output_std(m)),), dim=1),
    }
    if shared_groups:
        table["qk_proj.weight"] = packed(hidden, query_key, by_group)
    table |= {
        "conv_value": ParamSpec((inner, W), (convolve,)),
        "conv_query": ParamSpec((qk, W), (convolve,), by_group),
        "conv_key": ParamSpec((qk, W), (convolve,), by_group),
    }
    if m.conv_bias:
        table["conv_value_bias"] = ParamSpec((inner,), (convolve,))
        table["conv_query_bias"] = table["conv_key_bias"] = ParamSpec((qk,), (convolve,), by_group)
    table |= {
        "A_log": ParamSpec((H,), (log_uniform(m.a_min, m.a_max),)),
        "dt_bias": ParamSpec((H,), (inverse_softplus_dt(m.dt_min, m.dt_max),)),
    }
    if not delta:
        table["D"] = ParamSpec((H,), (ones,))
    if m.gated_norm == "group":
        table["norm"] = ParamSpec((inner,), (ones,))
    else:  # shared by all heads, of which a rank sees its own: the gradient is partial at every tensor-parallel size
        table["norm"] = ParamSpec((m.value_dim,), (ones,), "replicated_sum")
    return table


def _slot_parameters(m: MixerConfig, tensor_parallel: int, K: int, *, tau: bool, content: bool) -> dict[str, ParamSpec]:
    """Of the backbone, and the weights of K slots a head."""
    H = m.num_heads
    as_backbone = m.slot_weight_init == "backbone"  # every slot weight softplus(slot_bias) starts at 1
    slot = ("slot", H * K, zeros if as_backbone else normal(m.init_std))
    table = backbone_parameters(m, tensor_parallel, delta=m.backbone == "gdn", more=[slot])
    norm = table.pop("norm")  # the last one: optimizer states of older checkpoints are in this order
    table["slot_scale"] = ParamSpec((H, K), (ones,))
    table["slot_bias"] = ParamSpec((H, K), (constant(math.log(math.e - 1)) if as_backbone else zeros,))
    if content:
        table["sharpness"] = ParamSpec((H,), (zeros,))
    if tau:
        table["tau"] = ParamSpec((H,), (constant(m.tau),))
    return table | {"norm": norm}


def dla_parameters(m: MixerConfig, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name -> parameter of one DLA mixer: its backbone's, the weights of K slots a head, and thresholds."""
    return _slot_parameters(
        m, tensor_parallel, m.capacity, tau=m.tau_mode != "fixed", content=m.slot_weights == "content"
    )


def log_linear_parameters(m: MixerConfig, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name -> parameter of one Log-Linear mixer: its backbone's, and the weights of its levels."""
    return _slot_parameters(m, tensor_parallel, m.levels, tau=False, content=False)


def gdn_parameters(m: MixerConfig, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name -> parameter of one Gated DeltaNet mixer, whatever `backbone` says of the DLA layers."""
    return backbone_parameters(m, tensor_parallel, delta=True)


def mamba2_parameters(m: MixerConfig, tensor_parallel: int = 1) -> dict[str, ParamSpec]:
    """Name -> parameter of one Mamba-2 mixer, whatever `backbone` says of the DLA layers."""
    return backbone_parameters(m, tensor_parallel, delta=False)
