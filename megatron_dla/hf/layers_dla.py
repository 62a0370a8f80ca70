"""The layers of a DLA language model in plain torch (copied into every exported directory)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import decode_step, dla_attention, partition
from .autocast import without_autocast
from .cache_dla import LayerMemory
from .configuration_dla import DLAConfig
from .functional import (
    clamp_tau,
    gated_group_norm,
    gated_head_norm,
    gdn_inputs,
    mamba2_inputs,
    short_convolution,
    slot_weights,
)
from .layout import FP32_PARAMETERS, dla_parameters, gdn_parameters, log_linear_parameters, mamba2_parameters
from .pattern import LETTERS
from .rules import EVERY_TOKEN, FENWICK, ONE_SLOT, Controls, SlotRule

CONVOLVED = ("value", "query", "key")  # sections of `in_proj`, next to each other, that a short convolution follows


@dataclass
class Step:
    """What all layers of one forward pass share.

    Attributes:
        padding: int64 [B], leading padded tokens of the row, or None; only in the call that reads them.
        real: bool [B, T], False at those tokens, or None.
        rotary: cosine and sine [B or 1, T, D], or None without softmax layers.
        mask: bool [B or 1, 1, T, S] for softmax layers, or None for the plain causal one.
        keep: whether the layers must fill their memories.
        document, ends: of packed rows, or None: int64 [B, T], document of each token, and int64 [n + 1], document
            borders over the flattened tokens.
    """

    padding: Tensor | None
    real: Tensor | None
    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    keep: bool
    document: Tensor | None = None
    ends: Tensor | None = None

    def to(self, device: Any, non_blocking: bool = False) -> Step:
        """On another device: accelerate moves the arguments of a layer to its own by this method."""

        def move(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(move, x))
            return x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x

        return Step(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


class DLARMSNorm(nn.Module):
    """RMSNorm over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class DLAMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(self, config: DLAConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DLAMixer(nn.Module):
    """Dynamic Linear Attention on the Mamba-2 or Gated DeltaNet backbone: [B, T, hidden] -> same.

    Its parameters and the sections of `in_proj` are those of `layout.dla_parameters`; `FP32_PARAMETERS` stay fp32 when
    the model is loaded in bf16.
    """

    table = staticmethod(dla_parameters)
    delta: bool | None = None  # Gated DeltaNet's recurrence, else Mamba-2's; None: what the config says

    in_proj: nn.Linear
    out_proj: nn.Linear
    conv_value: nn.Parameter
    conv_query: nn.Parameter
    conv_key: nn.Parameter
    conv_value_bias: nn.Parameter
    conv_query_bias: nn.Parameter
    conv_key_bias: nn.Parameter
    A_log: nn.Parameter
    dt_bias: nn.Parameter
    D: nn.Parameter
    slot_scale: nn.Parameter
    slot_bias: nn.Parameter
    sharpness: nn.Parameter
    tau: nn.Parameter
    norm: nn.Parameter

    def __init__(self, config: DLAConfig, letter: str = "D", layer: int = 0) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        if self.delta is None:
            self.delta = config.backbone == "gdn"
        table = self.table(config)
        self.sizes = dict(table["in_proj.weight"].sections)
        self.parts: dict[str, int] = {}  # the sections, those of the convolution as one
        for name, size in self.sizes.items():
            name = "convolved" if name in CONVOLVED else name
            self.parts[name] = self.parts.get(name, 0) + size
        for name, spec in table.items():
            if name.endswith(".weight"):
                setattr(self, name.removesuffix(".weight"), nn.Linear(spec.shape[1], spec.shape[0], bias=False))
            else:
                dtype = torch.float32 if name in FP32_PARAMETERS else None
                trained = name != "tau" or config.tau_mode == "learned"
                setattr(self, name, nn.Parameter(torch.empty(spec.shape, dtype=dtype), requires_grad=trained))

    def forward(self, x: Tensor, memory: LayerMemory, step: Step) -> Tensor:
        if step.real is not None:
            x = x * step.real[..., None]  # no projection has a bias: to the convolutions a zero token is like none
        part = self._project(x)
        query, key, value = self._convolve(part, memory, step)
        lam, rule = self._slots(part)
        beta, write = None, value
        if self.delta:
            query, key, g, beta = gdn_inputs(query, key, part["step"], part["strength"], self.A_log, self.dt_bias)
        else:
            write, g = mamba2_inputs(value, part["step"], self.A_log, self.dt_bias)
        out = self._recur((query, key, write, g, lam, beta), rule, memory, step)
        if not self.delta:
            out = out + self.D[:, None].to(value.dtype) * value
        gate = part["gate"].unflatten(-1, (self.config.num_heads, -1))
        eps, gate_first = self.config.norm_eps, not self.delta
        if self.config.gated_norm == "group":
            groups = self.config.num_groups
            out = gated_group_norm(out, gate, self.norm, eps, groups=groups, gate_first=gate_first)
        else:
            out = gated_head_norm(out, gate, self.norm, eps, gate_first=gate_first)
        return self.out_proj(out.flatten(2).to(x.dtype))

    @without_autocast
    def _project(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of `in_proj`. Not in bf16 under autocast: decisions and gradients would follow its rounding."""
        dtype = self.in_proj.weight.dtype
        x = x.to(dtype) if dtype.is_floating_point else x  # of quantised weights it says nothing
        return dict(zip(self.parts, self.in_proj(x).split(list(self.parts.values()), -1), strict=True))

    def _slots(self, part: dict[str, Tensor]) -> tuple[Tensor, SlotRule]:
        """The readout weight of each slot [B, T, H, K], and the rule by which slots open and merge."""
        c = self.config
        raw = part["slot"].unflatten(-1, (-1, c.capacity))
        tau = c.tau if c.tau_mode == "fixed" else clamp_tau(self.tau) if c.tau_mode == "learned" else self.tau.detach()
        controls = Controls(c.boundary, c.boundary_rate, c.boundary_every, c.control_seed, self.layer)
        sharpness = self.sharpness if c.slot_weights == "content" else None
        rule = SlotRule(tau, c.capacity, c.merge, controls, sharpness=sharpness)
        return slot_weights(raw, self.slot_scale, self.slot_bias), rule

    def _convolve(self, part: dict[str, Tensor], memory: LayerMemory, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key [B, T, G, Dk] and value [B, T, H, Dv] after their short convolutions."""
        c, raw, before = self.config, part["convolved"], memory.tail
        weight = torch.cat([getattr(self, f"conv_{name}") for name in CONVOLVED])
        bias = torch.cat([getattr(self, f"conv_{name}_bias") for name in CONVOLVED]) if c.conv_bias else None
        done = short_convolution(raw, weight, step.document, before, bias)
        if step.keep:
            memory.tail = self._tail(raw, before)
        inner, qk = c.num_heads * c.value_dim, c.num_groups * c.key_dim
        value, query, key = done.split([inner, qk, qk], -1)
        groups = (c.num_groups, c.key_dim)
        return query.unflatten(-1, groups), key.unflatten(-1, groups), value.unflatten(-1, (c.num_heads, c.value_dim))

    def _tail(self, x: Tensor, tail: Tensor | None) -> Tensor:
        """The last W - 1 inputs; a copy, since a view would keep the whole prompt's activations alive."""
        wanted = self.config.conv_kernel - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], wanted, x.shape[2])
        return torch.cat([tail[:, x.shape[1] :], x[:, max(x.shape[1] - wanted, 0) :]], 1)

    def _recur(self, tensors: tuple, rule: SlotRule, memory: LayerMemory, step: Step) -> Tensor:
        """The recurrence over (q, k, v, g, slot_weights, beta): [B, T, H, Dv]."""
        q, k, v, g, lam, beta = tensors
        tau = rule.tau
        options: dict[str, Any] = dict(
            capacity=rule.capacity, merge=rule.merge, controls=rule.controls, sharpness=rule.sharpness
        )
        if memory.slots is not None:
            if isinstance(tau, Tensor):
                tau = tau.detach()  # the threshold has a gradient only over whole sequences
            if v.shape[1] == 1 and not torch.is_grad_enabled():
                return decode_step(q, k, v, g, lam, memory.slots, beta, tau=tau, **options)[0]
        if not step.keep:
            return self._recur_once(tensors, rule, memory, step)
        out, memory.slots = dla_attention(
            q, k, v, g, lam, beta, tau=tau, padding=step.padding, cache=memory.slots, return_cache=True, **options
        )
        return out

    def _recur_once(self, tensors: tuple, rule: SlotRule, memory: LayerMemory, step: Step) -> Tensor:
        """Whole rows without a cache, with decisions that a recomputation of this layer takes from the memory."""
        q, k, v, g, lam, beta = tensors
        options: dict[str, Any] = dict(
            capacity=rule.capacity, merge=rule.merge, controls=rule.controls, cu_seqlens=step.ends
        )
        if memory.decided is None:
            tau = rule.tau
            if isinstance(tau, Tensor):  # also in the first pass of a reentrant checkpoint, which records no gradient
                tau = tau.detach().requires_grad_(self.tau.requires_grad and self.config.tau_mode == "learned")
            memory.decided = partition(k, v, g, beta, tau=tau, **options)
        options |= dict(partition=memory.decided, sharpness=rule.sharpness)
        return dla_attention(q, k, v, g, lam, beta, tau=rule.tau, **options)[0]


class LogLinearMixer(DLAMixer):
    """Log-Linear Attention: every token opens a slot, and slots merge by position; slot weights are those of levels."""

    table = staticmethod(log_linear_parameters)

    def _slots(self, part: dict[str, Tensor]) -> tuple[Tensor, SlotRule]:
        levels = self.config.levels
        weights = slot_weights(part["slot"].unflatten(-1, (-1, levels)), self.slot_scale, self.slot_bias)
        return weights, SlotRule(0.0, levels, FENWICK, EVERY_TOKEN)


class PlainMixer(DLAMixer):
    """A plain backbone, whatever `config.backbone` is: one state a head, no boundaries."""

    def _slots(self, part: dict[str, Tensor]) -> tuple[Tensor, SlotRule]:
        return torch.ones_like(part["step"], dtype=self.A_log.dtype)[..., None], ONE_SLOT


class GDNMixer(PlainMixer):
    """Gated DeltaNet."""

    table, delta = staticmethod(gdn_parameters), True


class Mamba2Mixer(PlainMixer):
    """Mamba-2."""

    table, delta = staticmethod(mamba2_parameters), False


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves not interleaved: x [B, heads, T, D]; cos, sin [B or 1, T, D]."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None].to(x.dtype) + torch.cat([-high, low], -1) * sin[:, None].to(x.dtype)


class DLASoftmaxAttention(nn.Module):
    """Causal softmax attention with grouped key/value heads: [B, T, hidden] -> same.

    A letter with `rotary` rotates queries and keys by their positions; `qk_norm` normalises each head of both first.
    A letter with `window` sees, and keeps between calls, the last `sliding_window` tokens only.
    """

    def __init__(self, config: DLAConfig, letter: str, layer: int = 0) -> None:
        super().__init__()
        self.head_dim, self.rotated = config.attention_channels, LETTERS[letter].rotary
        self.window = config.sliding_window if LETTERS[letter].window else None
        inner, kv = (n * self.head_dim for n in (config.attention_heads, config.attention_groups))
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            DLARMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, memory: LayerMemory, step: Step) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotated:
            assert step.rotary is not None
            q, k = rotate(q, *step.rotary), rotate(k, *step.rotary)
        out = self._attend(q, k, v, memory, step) if memory.attend is None else memory.attend(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, memory: LayerMemory, step: Step) -> Tensor:
        """[B, heads, T, D], over the memory and the new tokens, which it then keeps."""
        if memory.keys is not None and memory.values is not None:
            k, v = torch.cat([memory.keys, k], 2), torch.cat([memory.values, v], 2)
        if step.keep:
            memory.keys, memory.values = self._kept(k), self._kept(v)
        mask = self._mask(step.mask, q.shape[2], k.shape[2], q.device)
        grouped = k.shape[1] != q.shape[1]
        causal = mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

    def _kept(self, x: Tensor) -> Tensor:
        """What later calls can see of keys or values [B, G, S, D]; a copy, since a view would keep all alive."""
        beyond = 0 if self.window is None else x.shape[2] - (self.window - 1)
        return x[:, :, beyond:].clone() if beyond > 0 else x

    def _mask(self, mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """`Step.mask` [B or 1, 1, T, S] for the last `keys` tokens and inside the window."""
        if self.window is None or (keys <= self.window and mask is None):
            return mask
        behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        near = (behind >= 0) & (behind < self.window)
        return near if mask is None else near & mask[..., -keys:]


MIXERS = {
    "D": DLAMixer, "A": DLASoftmaxAttention, "N": DLASoftmaxAttention, "W": DLASoftmaxAttention, "G": GDNMixer,
    "M": Mamba2Mixer, "L": LogLinearMixer,
}  # fmt: skip


class DLALayer(GradientCheckpointingLayer):
    """Pre-norm mixer and SwiGLU MLP (unless `ffn_hidden_size` is 0), each with a residual connection."""

    def __init__(self, config: DLAConfig, letter: str, layer: int) -> None:
        super().__init__()
        self.input_layernorm = DLARMSNorm(config.hidden_size, config.norm_eps)
        self.mixer_name = LETTERS[letter].hf_module
        self.add_module(self.mixer_name, MIXERS[letter](config, letter, layer))
        self.mlp: DLAMLP | None = None
        if config.ffn_hidden_size:
            self.post_attention_layernorm = DLARMSNorm(config.hidden_size, config.norm_eps)
            self.mlp = DLAMLP(config)

    def forward(self, x: Tensor, memory: LayerMemory, step: Step) -> Tensor:
        x = x + getattr(self, self.mixer_name)(self.input_layernorm(x), memory, step)
        return x if self.mlp is None else x + self.mlp(self.post_attention_layernorm(x))


__all__ = ["MIXERS", "DLALayer", "DLAMixer", "DLARMSNorm", "DLASoftmaxAttention", "Step"]
